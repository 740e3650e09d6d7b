#!/usr/bin/env bash
# DPO of Idefics2 8B, 8 GPUs of 80 GB.
# Settings: TRL's example for this model (huggingface/trl, examples/scripts/dpo_vlm.py) on RLAIF-V, with TRL's defaults.
# One 24 GB GPU instead, in 4 bits:
#   LAUNCH=python bash scripts/published/dpo_idefics2.sh --q_lora True \
#       --per_device_train_batch_size 1 --gradient_accumulation_steps 512
set -euo pipefail

${LAUNCH:-torchrun --nproc_per_node 8} train_dpo.py \
    --model_name_or_path HuggingFaceM4/idefics2-8b \
    --dataset_name rlaifv --data_path data/rlaif-v \
    --max_length 2048 \
    --use_lora True --lora_r 16 --lora_alpha 32 --lora_dropout 0.05 \
    --loss_type sigmoid --beta 0.1 \
    --per_device_train_batch_size 2 --gradient_accumulation_steps 32 \
    --learning_rate 1e-6 --lr_scheduler_type cosine --warmup_steps 0 --weight_decay 0 \
    --num_train_epochs 1 \
    --bf16 True --gradient_checkpointing True --logging_steps 10 \
    --save_steps 500 --save_total_limit 2 \
    --output_dir runs/published/dpo_idefics2 \
    "$@"
