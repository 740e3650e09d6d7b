#!/usr/bin/env bash
# MPO of InternVL3 8B, 8 GPUs of 80 GB.
# Settings: mixed preference optimisation of InternVL3 (arXiv:2411.10442; OpenGVLab/InternVL,
# internvl_chat/shell/internvl3.0/mpo/internvl3_8b_mpo.sh), 256 pairs per step.
# One 24 GB GPU instead, in 4 bits:
#   bash scripts/dpo_internvl.sh --deepspeed ds_configs/zero2.json --use_lora True --q_lora True \
#       --per_device_train_batch_size 1 --gradient_accumulation_steps 256 --learning_rate 5e-6 \
#       --freeze_vision_tower True
set -euo pipefail

deepspeed train_dpo.py \
    --deepspeed ds_configs/zero3.json \
    --model_name_or_path OpenGVLab/InternVL3-8B-hf \
    --dataset_name plain_dpo --data_path data/mmpr.json --image_root data/mmpr \
    --max_length 12288 \
    --freeze_vision_tower False \
    --loss_type sigmoid bco_pair sft --loss_weights 0.8 0.2 1 --beta 0.1 \
    --per_device_train_batch_size 1 --gradient_accumulation_steps 32 \
    --learning_rate 2e-7 --lr_scheduler_type cosine --warmup_steps 0.03 --weight_decay 0.05 \
    --num_train_epochs 1 \
    --bf16 True \
    --gradient_checkpointing True \
    --logging_steps 10 \
    --save_steps 500 \
    --save_total_limit 2 \
    --output_dir runs/dpo_internvl \
    "$@"
