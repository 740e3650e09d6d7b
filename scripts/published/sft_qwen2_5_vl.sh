#!/usr/bin/env bash
# Supervised fine-tuning of Qwen2.5-VL 7B, 8 GPUs of 80 GB.
# Settings: Qwen's fine-tuning command (QwenLM/Qwen2.5-VL, qwen-vl-finetune/scripts/sft_7b.sh).
# Nothing is published for Qwen2-VL, Qwen3-VL and Qwen3.5. Its qwen-vl-finetune/scripts/sft.sh for small models takes 1e-5.
# One 24 GB GPU instead, in 4 bits:
#   LAUNCH=python bash scripts/published/sft_qwen2_5_vl.sh --deepspeed "" --use_lora True --q_lora True \
#       --per_device_train_batch_size 1 --gradient_accumulation_steps 128 --learning_rate 2e-4
set -euo pipefail

${LAUNCH:-deepspeed} train_sft.py --deepspeed ds_configs/zero2.json \
    --model_name_or_path Qwen/Qwen2.5-VL-7B-Instruct \
    --dataset_name llava_instruct --data_path data/llava_v1_5_mix665k.json --image_root data \
    --max_length 8192 \
    --per_device_train_batch_size 4 --gradient_accumulation_steps 4 \
    --learning_rate 2e-7 --lr_scheduler_type cosine --warmup_steps 0.03 --weight_decay 0 \
    --num_train_epochs 1 \
    --bf16 True --gradient_checkpointing True --logging_steps 10 \
    --save_steps 500 --save_total_limit 2 \
    --output_dir runs/published/sft_qwen2_5_vl \
    "$@"
