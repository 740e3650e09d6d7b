"""Supervised fine-tuning of a vision-language model on conversations with images.

1. The loss covers the assistant's turns (--train_on: all of them, or the last one).
2. It is the mean over all trained tokens of the global batch, whatever the devices and accumulation steps they are spread over.
3. The vision tower is frozen unless told otherwise (--freeze_vision_tower False).

One GPU, LoRA:
    python train_sft.py --model_name_or_path llava-hf/llava-1.5-7b-hf --dataset_name vlquery_json --data_path train.json \\
        --image_root images --use_lora True --bf16 True --output_dir runs/sft
Eight GPUs, all weights:
    deepspeed train_sft.py --deepspeed ds_configs/zero3.json --model_name_or_path llava-hf/llava-1.5-7b-hf \\
        --dataset_name vlquery_json --data_path train.json --image_root images --bf16 True --output_dir runs/sft
"""

import common.compat  # noqa: F401  isort: skip  (must come before transformers)
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from transformers import set_seed

from args import DataArguments, LoraArguments, ModelArguments, SFTConfig, parse, run
from base.row_checks import ProcessorCheck
from base.run_folder import open_run, record_run
from base.trainer import VLSFTTrainer
from data import DataSplits, load_train_eval, streaming_of
from data.lengths import LengthLimits
from models import core_mapper_for
from models.assemble import LoadPlan, load_policy


def build(
    model_args: ModelArguments,
    data_args: DataArguments,
    lora_args: LoraArguments,
    training_args: SFTConfig,
    data: DataSplits | None = None,
) -> tuple[VLSFTTrainer, dict[str, Any]]:
    """The trainer, and what run.json says of model and data. `data` stands in for the rows that the flags name."""
    set_seed(training_args.seed)

    # ---- Model -----------------------------------------------------------------------------------------------------
    plan = LoadPlan.of(model_args, lora_args, training_args)  # precision, attention, shared prompts: printed
    adapter = core_mapper_for(plan.checkpoint)
    processor = adapter.processor(plan.checkpoint, **plan.rendering)
    # EDIT: what trains and what is frozen
    model = load_policy(plan, lora_args, training_args)

    # ---- Data ------------------------------------------------------------------------------------------------------
    collator = adapter.sft_collator(processor, LengthLimits.from_args(data_args), train_on=data_args.train_on)
    with training_args.main_process_first(desc="reading the data"):
        # EDIT: rows of your own, as a Dataset with the columns of docs/data.md
        data = data or load_train_eval(
            data_args,
            "conversation",
            training_args.seed,
            training_args.output_dir,
            ProcessorCheck(processor),
            streaming_of(data_args, training_args),
        )
        train_dataset, lengths = collator.drop_overlong(data.train, data_args.dataset_num_proc)
        eval_dataset, _ = collator.drop_overlong(data.eval, data_args.dataset_num_proc)

    # ---- Training --------------------------------------------------------------------------------------------------
    # EDIT: a subclass of VLSFTTrainer with a compute_loss of your own
    trainer = adapter.sft_trainer(
        model=model,
        args=training_args,
        processor=processor,
        data_collator=collator,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
    )
    return trainer, {"plan": asdict(plan), "data": data.info, "lengths": lengths}


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, build, train, save."""
    flags = parse(ModelArguments, DataArguments, LoraArguments, SFTConfig, argv=argv)
    resume_from = open_run(*flags)
    trainer, about = build(*flags)
    record_run(*flags, resumed_from=resume_from, **about)
    if not trainer.args.do_train:
        trainer.evaluate_alone(resume_from)
        return
    trainer.train(resume_from_checkpoint=resume_from)

    # ---- Save ------------------------------------------------------------------------------------------------------
    trainer.save_model()
    trainer.save_state()


if __name__ == "__main__":
    run(main)
