"""Our side of benchmarks.rivals: the trainer that train_dpo.py, train_rm.py or train_sft.py builds, run by its own train()."""

import torch
from datasets import Dataset

import args as flags
from benchmarks.padding import SCRIPTS
from benchmarks.rivals.watch import Job, run_jobs
from data import DataSplits


def run(job: Job) -> None:
    """Train as the job says. An answer of a lower rank is better, as in every preference row."""
    module, config = SCRIPTS[job.script]
    data = job.data
    if job.script == "sft":
        answers = [[*row["prompt"], {"role": "assistant", "content": row["responses"][0]}] for row in data]
        data = [{"images": row["images"], "messages": talk} for row, talk in zip(data, answers, strict=True)]
    precision = "--bf16 True" if job.bf16 else "" if torch.cuda.is_available() else "--use_cpu True"
    samples = "" if job.script == "rm" else "--num_sample_generations 0"
    parsed = flags.parse(
        flags.ModelArguments,
        flags.DataArguments,
        flags.LoraArguments,
        config,
        argv=f"--model_name_or_path {job.checkpoint} --dataset_name x --output_dir {job.folder}/run --disable_tqdm True --seed 0 "
        f"--per_device_train_batch_size {job.batch} --max_steps {job.max_steps} --learning_rate 1e-4 --lr_scheduler_type constant "
        f"--use_lora True --lora_r 16 --lora_alpha 32 --lora_dropout 0 --save_strategy no "
        f"{' '.join([precision, samples, *job.options])}".split(),
    )
    trainer, _ = module.build(*parsed, data=DataSplits(Dataset.from_list(data), None, {}))
    trainer.train()


if __name__ == "__main__":
    run_jobs(run)
