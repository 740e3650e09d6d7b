#!/usr/bin/env bash
# DPO of LLaVA-1.5 7B on RLAIF-V, all weights, 8 GPUs of 80 GB. One round; the paper's numbers need four.
# Settings: RLAIF-V's (arXiv:2405.17220; RLHF-V/RLAIF-V, script/train/llava15_train.sh): 5e-7, beta 0.1, 2,672 steps.
# Four GPUs with one pair each there.
# One 24 GB GPU instead, in 4 bits:
#   LAUNCH=python bash scripts/published/rlaifv_dpo_llava.sh --deepspeed "" \
#       --use_lora True --q_lora True --freeze_vision_tower True \
#       --per_device_train_batch_size 1 --gradient_accumulation_steps 8 --learning_rate 1e-5
set -euo pipefail

${LAUNCH:-deepspeed} train_dpo.py --deepspeed ds_configs/zero2.json \
    --model_name_or_path llava-hf/llava-1.5-7b-hf \
    --dataset_name rlaifv \
    --max_length 2048 \
    --freeze_vision_tower False \
    --loss_type sigmoid --beta 0.1 --precompute_ref_log_probs True \
    --per_device_train_batch_size 1 --gradient_accumulation_steps 1 \
    --learning_rate 5e-7 --lr_scheduler_type cosine --warmup_steps 0.05 --weight_decay 0.01 \
    --max_steps 2672 \
    --bf16 True --gradient_checkpointing True --logging_steps 10 \
    --save_steps 500 --save_total_limit 2 \
    --output_dir runs/published/rlaifv_dpo_llava \
    "$@"
