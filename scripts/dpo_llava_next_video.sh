#!/usr/bin/env bash
# DPO of LLaVA-NeXT-Video 7B, 8 GPUs of 80 GB, 256 pairs per step.
# Written by `make scripts` from models.tsv and templates/dpo.sh: change those. One set of settings for every family.
# The model: https://llava-vl.github.io/blog/2024-04-30-llava-next-video/
# One 24 GB GPU instead, in 4 bits:
#   LAUNCH=python bash scripts/dpo_llava_next_video.sh --q_lora True \
#       --per_device_train_batch_size 1 --gradient_accumulation_steps 256
set -euo pipefail

${LAUNCH:-torchrun --nproc_per_node 8} train_dpo.py \
    --model_name_or_path llava-hf/LLaVA-NeXT-Video-7B-hf \
    --dataset_name vlfeedback_paired --data_path data/vlfeedback --pairs best_worst \
    --max_length 4096 \
    --use_lora True --lora_r 64 --lora_alpha 16 --lora_dropout 0.05 \
    --loss_type sigmoid --beta 0.1 \
    --per_device_train_batch_size 4 --gradient_accumulation_steps 8 \
    --learning_rate 1e-5 --lr_scheduler_type cosine --warmup_steps 0.1 --weight_decay 0.05 \
    --num_train_epochs 1 \
    --bf16 True --gradient_checkpointing True --logging_steps 10 \
    --save_steps 500 --save_total_limit 2 \
    --output_dir runs/dpo_llava_next_video \
    "$@"
