#!/usr/bin/env bash
# Supervised fine-tuning of LLaVA-1.5 7B, 8 GPUs of 80 GB.
# Settings: LLaVA-1.5's fine-tuning (arXiv:2310.03744; haotian-liu/LLaVA, scripts/v1_5/finetune.sh).
# ViP-LLaVA's (arXiv:2312.00784) are the same: --model_name_or_path llava-hf/vip-llava-7b-hf.
# One 24 GB GPU instead, in 4 bits:
#   LAUNCH=python bash scripts/published/sft_llava.sh --deepspeed "" --use_lora True --q_lora True \
#       --per_device_train_batch_size 1 --gradient_accumulation_steps 128 --learning_rate 2e-4
set -euo pipefail

${LAUNCH:-deepspeed} train_sft.py --deepspeed ds_configs/zero2.json \
    --model_name_or_path llava-hf/llava-1.5-7b-hf \
    --dataset_name llava_instruct --data_path data/llava_v1_5_mix665k.json --image_root data \
    --max_length 2048 \
    --per_device_train_batch_size 8 --gradient_accumulation_steps 2 \
    --learning_rate 2e-5 --lr_scheduler_type cosine --warmup_steps 0.03 --weight_decay 0 \
    --num_train_epochs 1 \
    --bf16 True --gradient_checkpointing True --logging_steps 10 \
    --save_steps 500 --save_total_limit 2 \
    --output_dir runs/published/sft_llava \
    "$@"
