#!/usr/bin/env bash
# Dense DPO of LLaVA-1.5 7B on RLHF-V's corrected answers, 8 GPUs of 80 GB.
# Settings: RLHF-V (arXiv:2312.00849): beta 0.5, changed segments weigh 5, averaged, 7 epochs, 5e-7, 32 pairs per step.
# Its base model was Muffin. Its code weighs 3 without averaging: --ddpo_gamma 3 --ddpo_average False.
# One 24 GB GPU instead, in 4 bits:
#   LAUNCH=python bash scripts/published/rlhfv_ddpo_llava.sh --deepspeed "" --use_lora True --q_lora True \
#       --per_device_train_batch_size 1 --gradient_accumulation_steps 32 --learning_rate 1e-5
set -euo pipefail

${LAUNCH:-deepspeed} train_dpo.py --deepspeed ds_configs/zero2.json \
    --model_name_or_path llava-hf/llava-1.5-7b-hf \
    --dataset_name rlhfv \
    --max_length 2048 \
    --loss_type ddpo --beta 0.5 --ddpo_gamma 5 --ddpo_average True \
    --per_device_train_batch_size 4 --gradient_accumulation_steps 1 \
    --learning_rate 5e-7 --lr_scheduler_type cosine --warmup_steps 0.05 --weight_decay 0.01 \
    --num_train_epochs 7 \
    --bf16 True --gradient_checkpointing True --logging_steps 10 \
    --save_steps 500 --save_total_limit 2 \
    --output_dir runs/published/rlhfv_ddpo_llava \
    "$@"
