"""A reward model: a vision-language model with a scalar head, trained to rank responses.

1. The head reads the last token of a response, never padding.
2. Every pair of a row's K responses counts, and the row counts once (2203.02155 eq. 1). Its prompt and images are computed once.
3. Dropout is off, so that both sides of a pair see the same network.

One GPU, LoRA:
    python train_rm.py --model_name_or_path llava-hf/llava-1.5-7b-hf --dataset_name plain_dpo --data_path pairs.json \\
        --image_root images --use_lora True --bf16 True --output_dir runs/rm
Eight GPUs, all weights:
    deepspeed train_rm.py --deepspeed ds_configs/zero3.json --model_name_or_path llava-hf/llava-1.5-7b-hf \\
        --dataset_name plain_dpo --data_path pairs.json --image_root images --bf16 True --output_dir runs/rm
"""

import common.compat  # noqa: F401  isort: skip  (must come before transformers)
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from transformers import set_seed

from args import DataArguments, LoraArguments, ModelArguments, RMConfig, parse, run
from base.row_checks import ProcessorCheck
from base.run_folder import open_run, record_run
from base.trainer import VLRMTrainer
from data import DataSplits, load_train_eval, streaming_of
from data.lengths import LengthLimits
from models import core_mapper_for
from models.assemble import LoadPlan, load_policy


def build(
    model_args: ModelArguments,
    data_args: DataArguments,
    lora_args: LoraArguments,
    training_args: RMConfig,
    data: DataSplits | None = None,
) -> tuple[VLRMTrainer, dict[str, Any]]:
    """The trainer, and what run.json says of model and data. `data` stands in for the rows that the flags name."""
    set_seed(training_args.seed)

    # ---- Model -----------------------------------------------------------------------------------------------------
    plan = LoadPlan.of(model_args, lora_args, training_args)  # precision, attention, shared prompts: printed
    adapter = core_mapper_for(plan.checkpoint)
    processor = adapter.processor(plan.checkpoint, **plan.rendering)
    # EDIT: what trains and what is frozen
    model = load_policy(plan, lora_args, training_args)
    model = adapter.reward_model(model)  # a scalar head beside the weights

    # ---- Data ------------------------------------------------------------------------------------------------------
    collator = adapter.reward_collator(
        processor,
        LengthLimits.from_args(data_args),
        share_prefix=plan.share_prefix,
        pairs=data_args.pairs,
        score_margin=data_args.score_margin,
    )
    with training_args.main_process_first(desc="reading the data"):
        # EDIT: rows of your own, as a Dataset with the columns of docs/data.md
        data = data or load_train_eval(
            data_args,
            "preference",
            training_args.seed,
            training_args.output_dir,
            ProcessorCheck(processor),
            streaming_of(data_args, training_args),
        )
        train_dataset, lengths = collator.drop_overlong(data.train, data_args.dataset_num_proc)
        eval_dataset, _ = collator.drop_overlong(data.eval, data_args.dataset_num_proc)

    # ---- Training --------------------------------------------------------------------------------------------------
    # EDIT: a subclass of VLRMTrainer with a ranking_loss of your own
    trainer = adapter.reward_trainer(
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
    flags = parse(ModelArguments, DataArguments, LoraArguments, RMConfig, argv=argv)
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
