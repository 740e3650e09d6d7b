#!/usr/bin/env bash
# Mixed preference optimisation (MPO) of InternVL3 8B, all weights, 8 GPUs of 80 GB.
# Settings: InternVL3's (arXiv:2411.10442; OpenGVLab/InternVL, internvl_chat/shell/internvl3.0/mpo/internvl3_8b_mpo.sh):
# 0.8 DPO + 0.2 BCO with running shift + 1 SFT, 256 pairs per step. The paper's InternVL2 8B
# (internvl2.0_mpo/preference_optimization) took --learning_rate 5e-6 --max_length 6144.
# data/mmpr.jsonl: rows of MMPR-v1.2 in the plain_dpo format.
# One 24 GB GPU instead, in 4 bits:
#   LAUNCH=python bash scripts/published/mpo_internvl.sh --deepspeed "" \
#       --use_lora True --q_lora True --freeze_vision_tower True \
#       --per_device_train_batch_size 1 --gradient_accumulation_steps 256 --learning_rate 5e-6
set -euo pipefail

${LAUNCH:-deepspeed} train_dpo.py --deepspeed ds_configs/zero3.json \
    --model_name_or_path OpenGVLab/InternVL3-8B-hf \
    --dataset_name plain_dpo --data_path data/mmpr.jsonl --image_root data/mmpr \
    --max_length 12288 \
    --freeze_vision_tower False \
    --loss_type mpo --mpo_wp 0.8 --mpo_wq 0.2 --mpo_wg 1 --beta 0.1 \
    --per_device_train_batch_size 1 --gradient_accumulation_steps 32 \
    --learning_rate 2e-7 --lr_scheduler_type cosine --warmup_steps 0.03 --weight_decay 0.05 \
    --num_train_epochs 1 \
    --bf16 True --gradient_checkpointing True --logging_steps 10 \
    --save_steps 500 --save_total_limit 2 \
    --output_dir runs/published/mpo_internvl \
    "$@"
