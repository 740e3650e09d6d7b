#!/usr/bin/env bash
# Supervised fine-tuning of Molmo2 4B, 8 GPUs of 80 GB.
# Written by `make scripts` from models.tsv and templates/sft.sh: change those. One set of settings for every family.
# The model: https://arxiv.org/abs/2601.10611
# One 24 GB GPU instead, in 4 bits:
#   LAUNCH=python bash scripts/sft_molmo2.sh --deepspeed "" --use_lora True --q_lora True \
#       --per_device_train_batch_size 1 --gradient_accumulation_steps 128 --learning_rate 2e-4
set -euo pipefail

${LAUNCH:-deepspeed} train_sft.py --deepspeed ds_configs/zero2.json \
    --model_name_or_path allenai/Molmo2-4B \
    --dataset_name llava_instruct --data_path data/llava_v1_5_mix665k.json --image_root data \
    --max_length 8192 \
    --per_device_train_batch_size 4 --gradient_accumulation_steps 4 \
    --learning_rate 2e-5 --lr_scheduler_type cosine --warmup_steps 0.03 --weight_decay 0 \
    --num_train_epochs 1 \
    --bf16 True --gradient_checkpointing True --logging_steps 10 \
    --save_steps 500 --save_total_limit 2 \
    --output_dir runs/sft_molmo2 \
    "$@"
