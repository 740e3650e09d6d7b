"""Supervised fine-tuning of a vision-language model on conversations with images.

One GPU, LoRA:
    python train_sft.py --model_name_or_path llava-hf/llava-1.5-7b-hf --dataset_name vlquery_json --data_path train.json \\
        --image_root images --use_lora True --bf16 True --output_dir runs/sft
Eight GPUs, all weights:
    deepspeed train_sft.py --deepspeed ds_configs/zero3.json --model_name_or_path llava-hf/llava-1.5-7b-hf \\
        --dataset_name vlquery_json --data_path train.json --image_root images --bf16 True --output_dir runs/sft
"""

import base.compat  # noqa: F401  isort: skip  (must come before transformers)
from collections.abc import Sequence

from transformers import set_seed

from args import DataArguments, LoraArguments, ModelArguments, SFTConfig, parse, run, write_run_json
from data import load_train_eval
from data.lengths import LengthLimits
from models import core_mapper_for, load_for_training


def main(argv: Sequence[str] | None = None) -> None:
    model_args, data_args, lora_args, training_args = parse(
        ModelArguments, DataArguments, LoraArguments, SFTConfig, argv=argv
    )
    set_seed(training_args.seed)

    # ---- Model -----------------------------------------------------------------------------------------------------
    adapter = core_mapper_for(model_args.model_name_or_path)
    processor = adapter.processor(model_args.model_name_or_path)
    model = load_for_training(model_args, lora_args, training_args)

    # ---- Data ------------------------------------------------------------------------------------------------------
    collator = adapter.sft_collator(processor, LengthLimits.from_args(data_args), train_on=data_args.train_on)
    with training_args.main_process_first(desc="reading the data"):
        data = load_train_eval(data_args, "conversation", training_args.seed, training_args.output_dir)
        train_dataset, lengths = collator.drop_overlong(data.train, data_args.dataset_num_proc)
        eval_dataset, _ = collator.drop_overlong(data.eval, data_args.dataset_num_proc)

    # ---- Training --------------------------------------------------------------------------------------------------
    trainer = adapter.sft_trainer(
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

    # ---- Save ------------------------------------------------------------------------------------------------------
    trainer.save_model()
    trainer.save_state()


if __name__ == "__main__":
    run(main)
