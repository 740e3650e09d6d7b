"""Direct preference optimisation of a vision-language model, and every loss of losses.py.

One GPU, LoRA:
    python train_dpo.py --model_name_or_path llava-hf/llava-1.5-7b-hf --dataset_name plain_dpo --data_path pairs.json \\
        --image_root images --use_lora True --bf16 True --output_dir runs/dpo
Eight GPUs, all weights:
    deepspeed train_dpo.py --deepspeed ds_configs/zero3.json --model_name_or_path llava-hf/llava-1.5-7b-hf \\
        --dataset_name plain_dpo --data_path pairs.json --image_root images --bf16 True --output_dir runs/dpo
"""

import base.compat  # noqa: F401  isort: skip  (must come before transformers)
from collections.abc import Sequence

from transformers import set_seed

from args import DataArguments, DPOConfig, LoraArguments, ModelArguments, parse, run, write_run_json
from data import load_train_eval
from data.lengths import LengthLimits
from losses import needs_of
from models import core_mapper_for, load_for_training, reference_for


def main(argv: Sequence[str] | None = None) -> None:
    model_args, data_args, lora_args, training_args = parse(
        ModelArguments, DataArguments, LoraArguments, DPOConfig, argv=argv
    )
    set_seed(training_args.seed)

    # ---- Model -----------------------------------------------------------------------------------------------------
    adapter = core_mapper_for(model_args.model_name_or_path)
    processor = adapter.processor(model_args.model_name_or_path)
    model = load_for_training(model_args, lora_args, training_args)
    ref_model = reference_for(model, model_args, lora_args, training_args)

    # ---- Data ------------------------------------------------------------------------------------------------------
    collator = adapter.dpo_collator(
        processor,
        LengthLimits.from_args(data_args),
        share_prefix=training_args.share_prefix,
        pairs=data_args.pairs,
        score_margin=data_args.score_margin,
        needs=needs_of(training_args.loss_type),
        corruption=training_args.corruption,
        diffusion_step=training_args.diffusion_step,
        seed=training_args.seed,
    )
    with training_args.main_process_first(desc="reading the data"):
        data = load_train_eval(data_args, "preference", training_args.seed, training_args.output_dir)
        train_dataset, lengths = collator.drop_overlong(data.train, data_args.dataset_num_proc)
        eval_dataset, _ = collator.drop_overlong(data.eval, data_args.dataset_num_proc)

    # ---- Training --------------------------------------------------------------------------------------------------
    trainer = adapter.dpo_trainer(
        model=model,
        ref_model=ref_model,
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
