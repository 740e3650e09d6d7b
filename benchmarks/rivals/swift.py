"""ms-swift's side of benchmarks.rivals: its own `swift rlhf`, run in its environment with our chat template, so that tokens are equal."""

import json
from pathlib import Path

import swift.template
import torch
from swift.pipelines import rlhf_main

from benchmarks.rivals.watch import Job, pairs_of, run_jobs

TYPES = {"llava": "llava1_5_hf", "llava_wide": "llava1_5_hf", "qwen2_5_vl": "qwen2_5_vl"}


IMAGE_IDS = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}


def with_our_ids(template: type) -> type:
    """Qwen's template holds the ids of the published vocabulary: without ours it would leave a single token of a picture, without an error."""
    ids = {name: token for name, token in IMAGE_IDS.items() if hasattr(template, name)}
    ours = {
        n: property(lambda self, token=token: self.tokenizer.convert_tokens_to_ids(token)) for n, token in ids.items()
    }
    return type(template.__name__, (template,), ours)


def register_templates() -> None:
    """Our chat template for every family."""
    for kind in {*TYPES.values()}:
        swift.template.register_template(
            swift.template.TemplateMeta(
                f"{kind}_as_ours",
                prefix=[],
                prompt=["<|im_start|>user\n{{QUERY}}<|im_end|><|im_start|>assistant\n"],
                chat_sep=["<|im_end|>"],
                suffix=["<|im_end|>"],
                template_cls=with_our_ids(swift.template.TEMPLATE_MAPPING[kind].template_cls),
            )
        )


def run(job: Job) -> None:
    """Train as the job says: logits of the answers alone; on a GPU rows without padding, which needs FlashAttention."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": "<image>" + row["prompt"]},
                {"role": "assistant", "content": row["chosen"]},
            ],
            "rejected_response": row["rejected"],
            "images": row["images"],
        }
        for row in pairs_of(job)
    ]
    data = Path(job.folder, "rows.jsonl")
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    kind = TYPES[job.family]
    own = "--beta 0.1 --use_logits_to_keep true" if job.script == "dpo" else ""
    fast = "--attn_impl flash_attn --padding_free true" if torch.cuda.is_available() else "--attn_impl sdpa"
    rlhf_main(
        f"--rlhf_type {job.script} --model {job.checkpoint} --model_type {kind} --template {kind}_as_ours --dataset {data} "
        f"--torch_dtype {'bfloat16' if job.bf16 else 'float32'} {fast} {own} "
        f"--tuner_type lora --lora_rank 16 --lora_alpha 32 --lora_dropout 0 --freeze_vit true --freeze_aligner true "
        f"--per_device_train_batch_size {job.pairs} --gradient_accumulation_steps 1 --max_steps {job.max_steps} "
        f"--learning_rate 1e-4 --lr_scheduler_type constant --warmup_ratio 0 --weight_decay 0 --adam_beta2 0.999 "
        f"--gradient_checkpointing false --vit_gradient_checkpointing false --dataloader_num_workers 0 --dataset_shuffle false "
        f"--train_dataloader_shuffle false --load_from_cache_file false --split_dataset_ratio 0 --eval_strategy no --save_strategy no "
        f"--report_to none --output_dir {job.folder}/run".split()
    )


if __name__ == "__main__":
    register_templates()
    run_jobs(run)
