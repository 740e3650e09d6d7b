"""Direct preference optimisation of a vision-language model, and every loss of losses/.

1. With LoRA the base is the reference (or the adapter as it was loaded): no second model in memory.
2. A row's prompt and images are computed once for all its responses; with more than two of them every ordered pair counts (--pairs).
3. Dropout is off, so that the first step's log-ratio is exactly 0.
4. With --online the responses are the policy's own, sampled in every step and ranked by rewards (base/online_dpo.py).

One GPU, LoRA:
    python train_dpo.py --model_name_or_path llava-hf/llava-1.5-7b-hf --dataset_name plain_dpo --data_path pairs.json \\
        --image_root images --use_lora True --bf16 True --output_dir runs/dpo
Eight GPUs, all weights:
    deepspeed train_dpo.py --deepspeed ds_configs/zero3.json --model_name_or_path llava-hf/llava-1.5-7b-hf \\
        --dataset_name plain_dpo --data_path pairs.json --image_root images --bf16 True --output_dir runs/dpo
Online, answers of its own against a reward model:
    python train_dpo.py --model_name_or_path llava-hf/llava-1.5-7b-hf --dataset_name plain_dpo --data_path pairs.json \\
        --image_root images --use_lora True --online True --reward_adapter runs/rm --bf16 True --output_dir runs/online
"""

import common.compat  # noqa: F401  isort: skip  (must come before transformers)
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from transformers import set_seed

from args import DataArguments, DPOConfig, LoraArguments, ModelArguments, parse, run
from base.online_dpo import online
from base.rewards import rewards_of
from base.row_checks import ProcessorCheck
from base.run_folder import open_run, record_run
from base.trainer import VLDPOTrainer
from data import DataSplits, load_train_eval, streaming_of
from data.lengths import LengthLimits
from losses import columns_of, hyperparameters_of, needs_of
from models import core_mapper_for
from models.assemble import LoadPlan, load_policy, load_reference


def build(
    model_args: ModelArguments,
    data_args: DataArguments,
    lora_args: LoraArguments,
    training_args: DPOConfig,
    data: DataSplits | None = None,
) -> tuple[VLDPOTrainer, dict[str, Any]]:
    """The trainer, and what run.json says of model and data. `data` stands in for the rows that the flags name."""
    set_seed(training_args.seed)

    # ---- Model -----------------------------------------------------------------------------------------------------
    plan = LoadPlan.of(model_args, lora_args, training_args)  # precision, attention, shared prompts: printed
    adapter = core_mapper_for(plan.checkpoint)
    processor = adapter.processor(plan.checkpoint, **plan.rendering)
    # EDIT: what trains and what is frozen
    model = load_policy(plan, lora_args, training_args)
    ref_model = load_reference(model, plan, training_args) if training_args.reads_reference else None
    answers: dict[str, Any] = {}
    if training_args.online:
        role_model = adapter.value_model(model, with_value=False)  # the policy with the heads of reward adapters
        # EDIT: a reward of your own; or a function in a file, named by --reward_fn
        rewards = rewards_of(role_model, plan.base, training_args, plan.rendering["date"])
        answers = {"rewards": rewards, "role_model": role_model}

    # ---- Data ------------------------------------------------------------------------------------------------------
    limits, share_prefix = LengthLimits.from_args(data_args), plan.share_prefix
    pairs = {"pairs": data_args.pairs, "score_margin": data_args.score_margin}
    if training_args.online:
        collator = adapter.ppo_collator(processor, limits, share_prefix=share_prefix)
        answers |= pairs
    else:
        collator = adapter.dpo_collator(
            processor,
            limits,
            share_prefix=share_prefix,
            **pairs,
            needs=needs_of(training_args.loss_type),
            columns=columns_of(training_args.loss_type),
            corruption=training_args.corruption,
            diffusion_step=training_args.diffusion_step,
            seed=training_args.seed,
        )
    with training_args.main_process_first(desc="reading the data"):
        # EDIT: rows of your own, as a Dataset with the columns of docs/data.md
        data = data or load_train_eval(
            data_args,
            training_args.row_kind,
            training_args.seed,
            training_args.output_dir,
            ProcessorCheck(processor),
            streaming_of(data_args, training_args),
        )
        train_dataset, lengths = collator.drop_overlong(data.train, data_args.dataset_num_proc)
        eval_dataset, _ = collator.drop_overlong(data.eval, data_args.dataset_num_proc)

    # ---- Training --------------------------------------------------------------------------------------------------
    # EDIT: a subclass of VLDPOTrainer with a preference_loss of your own; or a function in losses, named by --loss_type
    trainer_class = online(adapter.dpo_trainer) if training_args.online else adapter.dpo_trainer
    trainer = trainer_class(
        model=model,
        ref_model=ref_model,
        args=training_args,
        processor=processor,
        data_collator=collator,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        **answers,
    )
    hyperparameters = hyperparameters_of(training_args.loss_type, vars(training_args))
    return trainer, {"plan": asdict(plan), "data": data.info, "lengths": lengths, "losses": hyperparameters}


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, build, train, save."""
    flags = parse(ModelArguments, DataArguments, LoraArguments, DPOConfig, argv=argv)
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
