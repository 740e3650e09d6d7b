#!/usr/bin/env bash
# Supervised fine-tuning of PaliGemma 2 3B, 8 GPUs of 80 GB.
# Settings: the transfer recipe of PaliGemma (arXiv:2407.07726, appendix J): 256 rows per step.
# One 24 GB GPU instead, in 4 bits:
#   LAUNCH=python bash scripts/published/sft_paligemma.sh --deepspeed "" --use_lora True --q_lora True \
#       --per_device_train_batch_size 1 --gradient_accumulation_steps 256 --learning_rate 2e-4
set -euo pipefail

${LAUNCH:-deepspeed} train_sft.py --deepspeed ds_configs/zero2.json \
    --model_name_or_path google/paligemma2-3b-pt-448 \
    --dataset_name llava_instruct --data_path data/single_turn.json --image_root data \
    --max_length 2048 \
    --per_device_train_batch_size 8 --gradient_accumulation_steps 4 \
    --learning_rate 1e-5 --lr_scheduler_type cosine --warmup_steps 0.05 --weight_decay 0 \
    --num_train_epochs 10 \
    --bf16 True --gradient_checkpointing True --logging_steps 10 \
    --save_steps 500 --save_total_limit 2 \
    --output_dir runs/published/sft_paligemma \
    "$@"
