#!/usr/bin/env bash
# Supervised fine-tuning of InternLM-XComposer2-VL 7B, 8 GPUs of 80 GB.
# Convert the released checkpoint once:
#   python -m models.internlm_xcomposer2.convert \
#       internlm/internlm-xcomposer2-vl-7b checkpoints/internlm-xcomposer2-vl-7b
# Settings: the released command (InternLM/InternLM-XComposer, InternLM-XComposer-2.0/finetune/finetune.sh).
# One 24 GB GPU instead, in 4 bits:
#   LAUNCH=python bash scripts/published/sft_internlm_xcomposer2.sh --deepspeed "" --use_lora True --q_lora True \
#       --per_device_train_batch_size 1 --gradient_accumulation_steps 64 --learning_rate 2e-4
set -euo pipefail

${LAUNCH:-deepspeed} train_sft.py --deepspeed ds_configs/zero2.json \
    --model_name_or_path checkpoints/internlm-xcomposer2-vl-7b \
    --dataset_name llava_instruct --data_path data/llava_v1_5_mix665k.json --image_root data \
    --max_length 4096 \
    --adam_beta2 0.95 \
    --per_device_train_batch_size 1 --gradient_accumulation_steps 8 \
    --learning_rate 1e-5 --lr_scheduler_type cosine --warmup_steps 0.01 --weight_decay 0.1 \
    --num_train_epochs 1 \
    --bf16 True --gradient_checkpointing True --logging_steps 10 \
    --save_steps 500 --save_total_limit 2 \
    --output_dir runs/published/sft_internlm_xcomposer2 \
    "$@"
