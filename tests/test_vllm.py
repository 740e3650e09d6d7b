"""vLLM itself, on the CPU: `make test-server` sets it up in an environment of its own and runs this.

One server serves a tiny LLaVA for all tests: answers and losses of an evaluation are ours, updates train what it samples from, and its replies are
still those that the other tests play (tests/goldens/server).
"""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import peft
import pytest
from transformers import AutoModelForImageTextToText

import train_ppo
from common.errors import InputError
from common.openai_client import OpenAIClient, ServerError
from eval import generate
from tests import zoo
from tests.fake_server import seed_file
from tests.test_server_rollouts import RECORDED, REWARD, same_form
from tests.vllm_transcripts import of_server, transcript

ROOT = Path(__file__).parents[1]
PYTHON = ROOT / ".venv-server" / "bin" / "python"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (ROOT / ".venv-server" / "done").exists(), reason="needs vLLM: make test-server installs it"
    ),
]
ENVIRONMENT = {
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}
FLAGS = (
    "--host 127.0.0.1 --served-model-name tiny --dtype float32 --enforce-eager --max-model-len 256 --max-num-seqs 8 "
    "--enable-lora --max-lora-rank 16 --max-loras 2 --seed 0"
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny LLaVA with heads of 64, which vLLM's attention on a CPU takes."""
    return str(zoo.build("llava", tmp_path_factory.mktemp("served") / "llava", width=128, heads=2))


@pytest.fixture(scope="module")
def url(checkpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of vLLM, which is up."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("vllm") / "log.txt"
    command = [
        PYTHON,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        checkpoint,
        "--port",
        str(port),
        *FLAGS.split(),
    ]
    os.environ["no_proxy"] = "127.0.0.1"
    with open(log, "w") as out:
        server = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env=os.environ | ENVIRONMENT, cwd=log.parent
        )
        try:
            wait_for(port, server, log)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.terminate()
            server.wait(60)


def wait_for(port: int, server: subprocess.Popen, log: Path) -> None:
    """Until it listens. It compiles for its first request, too."""
    for _ in range(600):
        if server.poll() is not None:
            sys.exit(f"vLLM ended:\n{log.read_text()[-3000:]}")
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(1)
    raise TimeoutError(log.read_text()[-3000:])


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A POPE file: eight questions about four images."""
    folder = tmp_path_factory.mktemp("pope")
    for i in range(4):
        zoo.image(i).save(folder / f"{i}.png")
    rows = [
        {"question_id": n, "image": f"{n % 4}.png", "text": f"Is there a {word} in the image?", "label": "yes"}
        for n, word in enumerate(["dog", "cat", "red square", "table", "blue circle", "photo", "star", "no"])
    ]
    file = folder / "coco_pope_random.json"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_replies_are_still_the_recorded_ones(url: str, checkpoint: str, tmp_path: Path) -> None:
    now = transcript(of_server(url), checkpoint, tmp_path)
    for one, recorded in zip(now, json.loads(RECORDED.read_text()), strict=True):
        same_form(one, recorded)


def test_an_evaluation_is_ours_token_for_token(url: str, checkpoint: str, questions: Path, tmp_path: Path) -> None:
    line = f"--task pope --data_path {questions} --model_name_or_path {checkpoint} --max_new_tokens 16 --num_workers 0"
    generate.main(f"{line} --output {tmp_path / 'here.jsonl'}".split())
    generate.main(f"{line} --output {tmp_path / 'there.jsonl'} --url {url}".split())
    here, there = ((tmp_path / f"{name}.jsonl").read_text() for name in ("here", "there"))
    assert here == there and len({json.loads(row)["answer"] for row in here.splitlines()}) > 2


def test_the_losses_of_choices_are_ours(url: str, checkpoint: str, tmp_path: Path) -> None:
    """One request at a time: with --enable-lora vLLM 0.32 dies on a CPU of log-probs of several prompts in a step."""
    line = f"--task seed --likelihood --data_path {seed_file(tmp_path)} --image_root {tmp_path} --model_name_or_path {checkpoint} --num_workers 0"
    generate.main(f"{line} --output {tmp_path / 'here.jsonl'}".split())
    generate.main(f"{line} --output {tmp_path / 'there.jsonl'} --url {url} --batch_size 1".split())
    here, there = (json.loads((tmp_path / f"{name}.jsonl").read_text())["losses"] for name in ("here", "there"))
    assert there == pytest.approx(here, abs=1e-4)


GRPO = "grpo --rollouts_per_prompt 2 --temperature 1"


def test_an_adapter_that_it_does_not_load_ends_in_its_words(
    url: str, checkpoint: str, pairs_json: Path, image_dir: Path, tmp_path: Path
) -> None:
    """At once, although vLLM answers 500 as for what may pass."""
    line = f"--model_name_or_path {checkpoint} --dataset_name plain_dpo --data_path {pairs_json} --image_root {image_dir} --output_dir {tmp_path}"
    line += f" --use_lora True --lora_r 32 --response_length 8 --max_steps 1 --per_device_train_batch_size 4 --report_to none {REWARD}"
    began = time.monotonic()
    with pytest.raises(
        InputError, match=r"answered 500 .*LoRA rank 32 is greater than max_lora_rank 16.*--max-lora-rank"
    ):
        train_ppo.main(f"{line} --rollout_url {url} --advantage_estimator {GRPO}".split())
    assert time.monotonic() - began < 100


@pytest.mark.parametrize(
    ("name", "changes"),
    {
        "a DoRA": {"use_dora": True},
        "modules of its own": {"modules_to_save": ["lm_head"]},
        "biases": {"bias": "lora_only"},
        "a changed base": {"init_lora_weights": "pissa"},
    }.items(),
)
def test_what_is_refused_here_is_refused_there(
    url: str, checkpoint: str, tmp_path: Path, name: str, changes: dict
) -> None:
    """What base.server_rollouts.refuse_unserved says no to, against vLLM's own answer to the same config."""
    peft.get_peft_model(
        AutoModelForImageTextToText.from_pretrained(checkpoint),
        peft.LoraConfig(r=4, target_modules=r".*language_model.*q_proj"),
    ).save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    body = {"lora_name": name, "lora_path": str(tmp_path / "adapter")}
    with pytest.raises(ServerError, match="HTTP 500"):
        OpenAIClient(url, attempts=1).post("load_lora_adapter", body, lambda response: None)


@pytest.mark.parametrize("estimator", [GRPO, f"{GRPO} --use_rslora True", "gae --temperature 1"])
def test_updates_train_what_the_server_samples_from(
    url: str, checkpoint: str, pairs_json: Path, image_dir: Path, tmp_path: Path, estimator: str
) -> None:
    """The adapter goes there before each of two updates: probabilities agree in both, although the first one has changed them."""
    line = f"--model_name_or_path {checkpoint} --dataset_name plain_dpo --data_path {pairs_json} --image_root {image_dir} --output_dir {tmp_path}"
    line += " --use_lora True --lora_r 4 --per_device_train_batch_size 4 --response_length 8 --learning_rate .05 --max_steps 2 --logging_steps 1"
    train_ppo.main(f"{line} --report_to none {REWARD} --rollout_url {url} --advantage_estimator {estimator}".split())
    log = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    deviations = [entry["first/ratio_deviation"] for entry in log if "loss" in entry]
    assert len(deviations) == 2 and max(deviations) < 1e-3
    served = OpenAIClient(url).get("models", lambda response: [model["id"] for model in response.json()["data"]])
    (pushed,) = (path.name for path in (tmp_path / "rollout_adapter").iterdir())
    assert pushed.endswith("-1") and pushed in served and pushed[:-1] + "0" not in served
