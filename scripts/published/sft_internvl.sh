#!/usr/bin/env bash
# Supervised fine-tuning of InternVL3 8B, 8 GPUs of 80 GB.
# Settings: InternVL3's (arXiv:2504.10479; OpenGVLab/InternVL,
# internvl_chat/shell/internvl3.0/2nd_finetune/internvl3_8b_dynamic_res_2nd_finetune_full.sh).
# One 24 GB GPU instead, in 4 bits:
#   LAUNCH=python bash scripts/published/sft_internvl.sh --deepspeed "" --use_lora True --q_lora True \
#       --per_device_train_batch_size 1 --gradient_accumulation_steps 128 --learning_rate 2e-4
set -euo pipefail

${LAUNCH:-deepspeed} train_sft.py --deepspeed ds_configs/zero2.json \
    --model_name_or_path OpenGVLab/InternVL3-8B-hf \
    --dataset_name llava_instruct --data_path data/llava_v1_5_mix665k.json --image_root data \
    --max_length 16384 \
    --per_device_train_batch_size 4 --gradient_accumulation_steps 4 \
    --learning_rate 2e-5 --lr_scheduler_type cosine --warmup_steps 0.03 --weight_decay 0.05 \
    --num_train_epochs 1 \
    --bf16 True --gradient_checkpointing True --logging_steps 10 \
    --save_steps 500 --save_total_limit 2 \
    --output_dir runs/published/sft_internvl \
    "$@"
