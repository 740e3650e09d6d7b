#!/usr/bin/env bash
# Supervised fine-tuning of Gemma 4 31B, 8 GPUs of 80 GB.
# Settings: Google's guide to Gemma 3 with images
# (ai.google.dev/gemma/docs/core/huggingface_vision_finetune_qlora).
# One 80 GB GPU instead (it is too large for 24 GB), in 4 bits:
#   bash scripts/sft_gemma4.sh --deepspeed ds_configs/zero2.json --q_lora True \
#       --per_device_train_batch_size 1 --gradient_accumulation_steps 8
set -euo pipefail

deepspeed train_sft.py \
    --deepspeed ds_configs/zero3.json \
    --model_name_or_path google/gemma-4-31B-it \
    --dataset_name llava_instruct --data_path data/llava_v1_5_mix665k.json --image_root data \
    --max_length 4096 \
    --use_lora True \
    --lora_r 16 \
    --lora_alpha 16 \
    --max_grad_norm 0.3 \
    --per_device_train_batch_size 1 --gradient_accumulation_steps 1 \
    --learning_rate 2e-4 --lr_scheduler_type constant_with_warmup --warmup_steps 0.03 --weight_decay 0 \
    --num_train_epochs 1 \
    --bf16 True \
    --gradient_checkpointing True \
    --logging_steps 10 \
    --save_steps 500 \
    --save_total_limit 2 \
    --output_dir runs/sft_gemma4 \
    "$@"
