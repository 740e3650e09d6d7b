"""Proximal policy optimisation of a vision-language model against a reward model or a function. See base/ppo_trainer.py and docs/ppo.md.

One GPU, LoRA, the reward model an adapter on the same base:
    python train_ppo.py --model_name_or_path llava-hf/llava-1.5-7b-hf --dataset_name plain_dpo --data_path pairs.json \\
        --image_root images --use_lora True --reward_adapter runs/rm --bf16 True --output_dir runs/ppo
Eight GPUs, all weights, a reward model of its own:
    deepspeed train_ppo.py --deepspeed ds_configs/zero3.json --model_name_or_path llava-hf/llava-1.5-7b-hf \\
        --dataset_name plain_dpo --data_path pairs.json --image_root images --reward_model_name_or_path runs/rm --bf16 True \\
        --output_dir runs/ppo
"""

import base.compat  # noqa: F401  isort: skip  (must come before transformers)
from collections.abc import Sequence

from transformers import set_seed

from args import DataArguments, LoraArguments, ModelArguments, PPOConfig, parse, run, write_run_json
from base.ppo_rewards import load_rewards
from data import load_train_eval
from data.lengths import LengthLimits
from models import core_mapper_for, load_for_training, reference_for


def main(argv: Sequence[str] | None = None) -> None:
    model_args, data_args, lora_args, training_args = parse(
        ModelArguments, DataArguments, LoraArguments, PPOConfig, argv=argv
    )
    set_seed(training_args.seed)

    # ---- Model -----------------------------------------------------------------------------------------------------
    adapter = core_mapper_for(model_args.model_name_or_path)
    processor = adapter.processor(model_args.model_name_or_path)
    policy = load_for_training(model_args, lora_args, training_args)
    ref_model = reference_for(policy, model_args, lora_args, training_args)
    model = adapter.value_model(policy)
    rewards = load_rewards(model, model_args, lora_args, training_args)

    # ---- Data ------------------------------------------------------------------------------------------------------
    collator = adapter.ppo_collator(
        processor, LengthLimits.from_args(data_args), share_prefix=training_args.share_prefix
    )
    with training_args.main_process_first(desc="reading the data"):
        data = load_train_eval(data_args, "prompt", training_args.seed, training_args.output_dir)
        train_dataset, lengths = collator.drop_overlong(data.train, data_args.dataset_num_proc)

    # ---- Training --------------------------------------------------------------------------------------------------
    trainer = adapter.ppo_trainer(
        model=model,
        ref_model=ref_model,
        rewards=rewards,
        args=training_args,
        processor=processor,
        data_collator=collator,
        train_dataset=train_dataset,
        eval_dataset=data.eval,
    )
    write_run_json(
        training_args.output_dir, model_args, data_args, lora_args, training_args, data=data.info, lengths=lengths
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)

    # ---- Save ------------------------------------------------------------------------------------------------------
    trainer.save_model()
    trainer.save_state()


if __name__ == "__main__":
    run(main)
