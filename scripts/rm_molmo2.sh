#!/usr/bin/env bash
# Reward model on Molmo2 4B, 8 GPUs of 80 GB.
# Written by `make scripts` from models.tsv and templates/rm.sh: change those. One set of settings for every family.
# The model: https://arxiv.org/abs/2601.10611
# One 24 GB GPU instead, in 4 bits:
#   LAUNCH=python bash scripts/rm_molmo2.sh --q_lora True \
#       --per_device_train_batch_size 1 --gradient_accumulation_steps 32
set -euo pipefail

${LAUNCH:-torchrun --nproc_per_node 8} train_rm.py \
    --model_name_or_path allenai/Molmo2-4B \
    --dataset_name vlfeedback_paired --data_path data/vlfeedback --pairs all \
    --eval_ratio 0.01 --eval_strategy steps --eval_steps 50 \
    --max_length 8192 \
    --use_lora True --lora_r 64 --lora_alpha 16 \
    --per_device_train_batch_size 4 --gradient_accumulation_steps 1 \
    --learning_rate 2e-5 --lr_scheduler_type constant_with_warmup --warmup_steps 0.03 --weight_decay 0 \
    --num_train_epochs 1 \
    --bf16 True --gradient_checkpointing True --logging_steps 10 \
    --save_steps 500 --save_total_limit 2 \
    --output_dir runs/rm_molmo2 \
    "$@"
