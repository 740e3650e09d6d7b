"""A reward model: a vision-language model with a scalar head, trained to rank responses.

One GPU, LoRA:
    python train_rm.py --model_name_or_path llava-hf/llava-1.5-7b-hf --dataset_name plain_dpo --data_path pairs.json \\
        --image_root images --use_lora True --bf16 True --output_dir runs/rm
Eight GPUs, all weights:
    deepspeed train_rm.py --deepspeed ds_configs/zero3.json --model_name_or_path llava-hf/llava-1.5-7b-hf \\
        --dataset_name plain_dpo --data_path pairs.json --image_root images --bf16 True --output_dir runs/rm
"""

import base.compat  # noqa: F401  isort: skip  (must come before transformers)
from collections.abc import Sequence

from transformers import set_seed

from args import DataArguments, LoraArguments, ModelArguments, RMConfig, parse, run, write_run_json
from data import load_train_eval
from data.lengths import LengthLimits
from models import core_mapper_for, load_for_training


def main(argv: Sequence[str] | None = None) -> None:
    model_args, data_args, lora_args, training_args = parse(
        ModelArguments, DataArguments, LoraArguments, RMConfig, argv=argv
    )
    set_seed(training_args.seed)

    # ---- Model -----------------------------------------------------------------------------------------------------
    adapter = core_mapper_for(model_args.model_name_or_path)
    processor = adapter.processor(model_args.model_name_or_path)
    model = adapter.reward_model(load_for_training(model_args, lora_args, training_args))

    # ---- Data ------------------------------------------------------------------------------------------------------
    collator = adapter.reward_collator(
        processor,
        LengthLimits.from_args(data_args),
        share_prefix=training_args.share_prefix,
        pairs=data_args.pairs,
        score_margin=data_args.score_margin,
    )
    with training_args.main_process_first(desc="reading the data"):
        data = load_train_eval(data_args, "preference", training_args.seed, training_args.output_dir)
        train_dataset, lengths = collator.drop_overlong(data.train, data_args.dataset_num_proc)
        eval_dataset, _ = collator.drop_overlong(data.eval, data_args.dataset_num_proc)

    # ---- Training --------------------------------------------------------------------------------------------------
    trainer = adapter.reward_trainer(
        model=model,
        args=training_args,
        processor=processor,
        data_collator=collator,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
    )
    write_run_json(
        training_args.output_dir, model_args, data_args, lora_args, training_args, data=data.info, lengths=lengths
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    if data.eval is not None:
        trainer.evaluate()  # accuracy on the held-out pairs, and calibration.png

    # ---- Save ------------------------------------------------------------------------------------------------------
    trainer.save_model()
    trainer.save_state()


if __name__ == "__main__":
    run(main)
