#!/usr/bin/env bash
# mDPO of LLaVA-1.5 7B on 10,000 rows of VLFeedback, 8 GPUs of 80 GB.
# Settings: mDPO's (arXiv:2406.11839; luka-group/mDPO, bunny/config.yaml): LoRA 64/128, 1e-5, 3 epochs, beta2 0.98.
# 32 pairs per step and device there; here 256 in all.
# One 24 GB GPU instead, in 4 bits:
#   LAUNCH=python bash scripts/published/mdpo_llava.sh --q_lora True \
#       --per_device_train_batch_size 1 --gradient_accumulation_steps 256
set -euo pipefail

${LAUNCH:-torchrun --nproc_per_node 8} train_dpo.py \
    --model_name_or_path llava-hf/llava-1.5-7b-hf \
    --dataset_name vlfeedback_paired --data_path data/vlfeedback --pairs best_worst --data_ratio 0.125 \
    --max_length 2048 \
    --use_lora True --lora_r 64 --lora_alpha 128 \
    --loss_type mdpo --beta 0.1 --mdpo_delta 0 --corruption crop \
    --per_device_train_batch_size 4 --gradient_accumulation_steps 8 \
    --learning_rate 1e-5 --lr_scheduler_type cosine --warmup_steps 0.1 --weight_decay 0.05 --adam_beta2 0.98 \
    --num_train_epochs 3 \
    --bf16 True --gradient_checkpointing True --logging_steps 10 \
    --save_steps 500 --save_total_limit 2 \
    --output_dir runs/published/mdpo_llava \
    "$@"
