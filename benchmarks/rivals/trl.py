"""TRL's side of benchmarks.rivals: DPOTrainer with a row per pair, or SFTTrainer, in our environment."""

import torch
import transformers
import trl
from datasets import Dataset
from peft import LoraConfig
from PIL import Image

from benchmarks.rivals.watch import Job, pairs_of, run_jobs

TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


def run(job: Job) -> None:
    """Train as the job says, on attention kernels that are there."""
    flash = transformers.utils.is_flash_attn_2_available()
    model = transformers.AutoModelForImageTextToText.from_pretrained(
        job.checkpoint,
        dtype=torch.bfloat16 if job.bf16 else torch.float32,
        attn_implementation="flash_attention_2" if flash else "sdpa",
    )
    settings = dict(
        output_dir=f"{job.folder}/run",
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        max_steps=job.max_steps,
        max_length=None,
        gradient_checkpointing=False,
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        bf16=job.bf16,
        disable_tqdm=True,
        save_strategy="no",
    )
    if job.script == "sft":
        trainer_class, config = trl.SFTTrainer, trl.SFTConfig(per_device_train_batch_size=job.batch, **settings)
        rows = [row | {"prompt": row["prompt"][0]["content"], "completion": row["responses"][0]} for row in job.data]
        answers = ("completion",)
    else:
        trainer_class, config = trl.DPOTrainer, trl.DPOConfig(per_device_train_batch_size=job.pairs, **settings)
        rows, answers = pairs_of(job), ("chosen", "rejected")
    data = [
        {"images": [Image.open(path) for path in row["images"]], "prompt": [{"role": "user", "content": row["prompt"]}]}
        | {name: [{"role": "assistant", "content": row[name]}] for name in answers}
        for row in rows
    ]
    trainer = trainer_class(
        model=model,
        processing_class=transformers.AutoProcessor.from_pretrained(job.checkpoint),
        train_dataset=Dataset.from_list(data),
        args=config,
        peft_config=LoraConfig(r=16, lora_alpha=32, lora_dropout=0, task_type="CAUSAL_LM", target_modules=TARGETS),
    )
    trainer.train()


if __name__ == "__main__":
    run_jobs(run)
