# docker build -t vl-rlhf . && docker run --gpus all --ipc host -v $PWD/runs:/vl-rlhf/runs -v $HOME/.cache/huggingface:/root/.cache/huggingface \
#     -it vl-rlhf python train_dpo.py ...
# torch's wheels bring CUDA's libraries: the host needs a driver for them (docs/faq.md) and the NVIDIA container toolkit.
FROM python:3.11-slim

# g++ and git: DeepSpeed compiles CPU Adam for the _offload configs; run.json records the commit. No versions: Debian keeps
# the newest only.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ git && rm -rf /var/lib/apt/lists/*
WORKDIR /vl-rlhf
COPY requirements*.txt ./
RUN pip install --no-cache-dir torch==2.13.0 && pip install --no-cache-dir -r requirements.txt
COPY . .
CMD ["python", "train_dpo.py", "--help"]
