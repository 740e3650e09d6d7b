#!/usr/bin/env bash
# PPO of Command A Vision 112B against its reward adapter (rm_cohere2_vision.sh), 8 GPUs of 80 GB.
# 512 rollouts an update, two passes over them in steps of 256.
# Written by `make scripts` from models.tsv and templates/ppo.sh: change those. One set of settings for every family.
# The model: https://huggingface.co/CohereLabs/command-a-vision-07-2025
# One 80 GB GPU instead, in 4 bits:
#   LAUNCH=python bash scripts/ppo_cohere2_vision.sh --deepspeed "" --q_lora True \
#       --per_device_train_batch_size 1 --gradient_accumulation_steps 256 --local_rollout_forward_batch_size 8
set -euo pipefail

${LAUNCH:-deepspeed} train_ppo.py --deepspeed ds_configs/zero3.json \
    --model_name_or_path CohereLabs/command-a-vision-07-2025 \
    --dataset_name vlfeedback_paired --data_path data/vlfeedback \
    --max_prompt_length 8192 \
    --reward_adapter runs/rm_cohere2_vision --init_value_from_reward True \
    --use_lora True --lora_r 64 --lora_alpha 16 \
    --per_device_train_batch_size 16 --gradient_accumulation_steps 2 --num_mini_batches 2 --num_ppo_epochs 2 \
    --response_length 896 --temperature 1.0 --kl_coef 0.1 --lam 0.95 --missing_eos_penalty 8.0 \
    --local_rollout_forward_batch_size 32 \
    --learning_rate 3e-5 --lr_scheduler_type cosine --warmup_steps 5 --weight_decay 0 \
    --num_train_epochs 4 \
    --bf16 True --gradient_checkpointing True --logging_steps 10 \
    --save_steps 10 --save_total_limit 2 \
    --output_dir runs/ppo_cohere2_vision \
    "$@"
