#!/usr/bin/env bash
# Reward model on LLaVA-1.5 7B from RLHF-V's corrected answers, 8 GPUs of 80 GB.
# Settings: the reward model of LLaVA-RLHF (arXiv:2309.14525; llava-rlhf/LLaVA-RLHF,
# RLHF/scripts/13b-v1.5-336/train_reward_model.sh), on another data set.
# One 24 GB GPU instead, in 4 bits:
#   LAUNCH=python bash scripts/published/rlhfv_rm_llava.sh --q_lora True \
#       --per_device_train_batch_size 1 --gradient_accumulation_steps 32
set -euo pipefail

${LAUNCH:-torchrun --nproc_per_node 8} train_rm.py \
    --model_name_or_path llava-hf/llava-1.5-7b-hf \
    --dataset_name rlhfv \
    --eval_ratio 0.05 --eval_strategy steps --eval_steps 50 \
    --max_length 2048 \
    --use_lora True --lora_r 64 --lora_alpha 16 \
    --per_device_train_batch_size 4 --gradient_accumulation_steps 1 \
    --learning_rate 2e-5 --lr_scheduler_type constant_with_warmup --warmup_steps 0.03 --weight_decay 0 \
    --num_train_epochs 1 \
    --bf16 True --gradient_checkpointing True --logging_steps 10 \
    --save_steps 500 --save_total_limit 2 \
    --output_dir runs/published/rlhfv_rm_llava \
    "$@"
