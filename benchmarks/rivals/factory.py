"""LLaMA-Factory's side of benchmarks.rivals: its own `train`, run in its environment with our chat template, so that tokens are equal."""

import json
import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path

import torch

if torch.version.cuda is None:  # it imports torchaudio, for sound, whose wheel needs CUDA's libraries
    sys.modules["torchaudio"] = types.ModuleType("torchaudio")
    sys.modules["torchaudio"].__spec__ = ModuleSpec("torchaudio", None)

from llamafactory.data import template
from llamafactory.data.formatter import StringFormatter
from llamafactory.train.tuner import run_exp

from benchmarks.rivals.watch import Job, pairs_of, run_jobs

# Its plugin for a family, the token that stands for an image, and what the family's own template puts behind the image
PLUGINS = {
    "llava": ("llava", "<image>", "\n"),
    "llava_wide": ("llava", "<image>", "\n"),
    "qwen2_5_vl": ("qwen2_vl", "<|image_pad|>", ""),
}


def register_templates() -> None:
    """Our chat template for every family."""
    for family, (plugin, token, _) in PLUGINS.items():
        template.register_template(
            name=f"{family}_as_ours",
            format_user=StringFormatter(slots=["<|im_start|>user\n{{content}}<|im_end|><|im_start|>assistant\n"]),
            format_assistant=StringFormatter(slots=["{{content}}<|im_end|>"]),
            stop_words=["<|im_end|>"],
            mm_plugin=template.get_mm_plugin(name=plugin, image_token=token, video_token="<|video_pad|>"),
        )


def run(job: Job) -> None:
    """Train as the job says."""
    behind = PLUGINS[job.family][2]
    rows = [
        {
            "conversations": [{"from": "human", "value": f"<image>{behind}{row['prompt']}"}],
            "chosen": {"from": "gpt", "value": row["chosen"]},
            "rejected": {"from": "gpt", "value": row["rejected"]},
            "images": row["images"],
        }
        for row in pairs_of(job)
    ]
    folder = Path(job.folder)
    (folder / "rows.json").write_text(json.dumps(rows))
    columns = {"messages": "conversations", "chosen": "chosen", "rejected": "rejected", "images": "images"}
    about = {"file_name": "rows.json", "ranking": True, "formatting": "sharegpt", "columns": columns}
    (folder / "dataset_info.json").write_text(json.dumps({"rows": about}))
    run_exp(
        dict(
            stage=job.script,
            do_train=True,
            model_name_or_path=job.checkpoint,
            template=f"{job.family}_as_ours",
            dataset_dir=job.folder,
            dataset="rows",
            finetuning_type="lora",
            lora_rank=16,
            lora_alpha=32,
            lora_dropout=0.0,
            lora_target="q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj",
            flash_attn="fa2" if torch.cuda.is_available() else "sdpa",
            disable_gradient_checkpointing=True,
            disable_shuffling=True,
            cutoff_len=1 << 20,
            preprocessing_num_workers=1,
            dataloader_num_workers=0,
            overwrite_cache=True,
            per_device_train_batch_size=job.pairs,
            gradient_accumulation_steps=1,
            max_steps=job.max_steps,
            learning_rate=1e-4,
            lr_scheduler_type="constant",
            bf16=job.bf16,
            use_cpu=not torch.cuda.is_available(),
            report_to="none",
            save_strategy="no",
            output_dir=f"{job.folder}/run",
        )
    )


if __name__ == "__main__":
    register_templates()
    run_jobs(run)
