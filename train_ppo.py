"""Proximal policy optimisation of a vision-language model against reward models or functions.

The phases of an update are numbered in base/ppo_trainer.py, the details and departures in docs/ppo.md.

One GPU, LoRA, the reward model an adapter on the same base:
    python train_ppo.py --model_name_or_path llava-hf/llava-1.5-7b-hf --dataset_name plain_dpo --data_path pairs.json \\
        --image_root images --use_lora True --reward_adapter runs/rm --bf16 True --output_dir runs/ppo
Eight GPUs, all weights, a reward model of its own:
    deepspeed train_ppo.py --deepspeed ds_configs/zero3.json --model_name_or_path llava-hf/llava-1.5-7b-hf \\
        --dataset_name plain_dpo --data_path pairs.json --image_root images --reward_model_name_or_path runs/rm --bf16 True \\
        --output_dir runs/ppo
"""

import common.compat  # noqa: F401  isort: skip  (must come before transformers)
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from transformers import set_seed

from args import DataArguments, LoraArguments, ModelArguments, PPOConfig, parse, run
from base.ppo_trainer import VLPPOTrainer
from base.rewards import load_rewards
from base.row_checks import ProcessorCheck
from base.run_folder import open_run, record_run
from data import DataSplits, load_train_eval, streaming_of
from data.lengths import LengthLimits
from models import core_mapper_for
from models.assemble import LoadPlan, load_policy, load_reference


def build(
    model_args: ModelArguments,
    data_args: DataArguments,
    lora_args: LoraArguments,
    training_args: PPOConfig,
    data: DataSplits | None = None,
) -> tuple[VLPPOTrainer, dict[str, Any]]:
    """The trainer, and what run.json says of model and data. `data` stands in for the rows that the flags name."""
    set_seed(training_args.seed)

    # ---- Model -----------------------------------------------------------------------------------------------------
    plan = LoadPlan.of(model_args, lora_args, training_args)  # precision, attention, shared prompts: printed
    adapter = core_mapper_for(plan.checkpoint)
    processor = adapter.processor(plan.checkpoint, **plan.rendering)
    # EDIT: what trains and what is frozen
    model = load_policy(plan, lora_args, training_args)
    ref_model = load_reference(model, plan, training_args) if training_args.reads_reference else None
    # with a value head beside the policy, unless answers are compared with each other (--advantage_estimator)
    model = adapter.value_model(model, with_value=training_args.has_value_function)
    # EDIT: a reward of your own; or a function in a file, named by --reward_fn
    rewards = load_rewards(model, plan.base, plan.freeze_vision_tower, training_args, plan.rendering["date"])

    # ---- Data ------------------------------------------------------------------------------------------------------
    collator = adapter.ppo_collator(processor, LengthLimits.from_args(data_args), share_prefix=plan.share_prefix)
    with training_args.main_process_first(desc="reading the data"):
        # EDIT: rows of your own, as a Dataset with the columns of docs/data.md
        data = data or load_train_eval(
            data_args,
            "prompt",
            training_args.seed,
            training_args.output_dir,
            ProcessorCheck(processor),
            streaming_of(data_args, training_args),
        )
        train_dataset, lengths = collator.drop_overlong(data.train, data_args.dataset_num_proc)
        eval_dataset, _ = collator.drop_overlong(data.eval, data_args.dataset_num_proc)

    # ---- Training --------------------------------------------------------------------------------------------------
    # EDIT: a subclass of VLPPOTrainer with advantages or a policy_and_value_loss of your own
    trainer = adapter.ppo_trainer(
        model=model,
        ref_model=ref_model,
        rewards=rewards,
        args=training_args,
        processor=processor,
        data_collator=collator,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
    )
    return trainer, {"plan": asdict(plan), "data": data.info, "lengths": lengths}


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, build, train, save."""
    flags = parse(ModelArguments, DataArguments, LoraArguments, PPOConfig, argv=argv)
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
