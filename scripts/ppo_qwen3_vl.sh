#!/usr/bin/env bash
# PPO of Qwen3-VL 8B against its reward adapter (rm_qwen3_vl.sh), 8 GPUs of 80 GB.
# Settings: LLaVA-RLHF's (arXiv:2309.14525; llava-rlhf/LLaVA-RLHF,
# RLHF/scripts/13b-v1.5-336/train_rl_model.sh) on VLFeedback's prompts: 512 rollouts an update, 2 passes in steps of 256.
# One 24 GB GPU instead, in 4 bits:
#   bash scripts/ppo_qwen3_vl.sh --q_lora True --per_device_train_batch_size 1 \
#       --gradient_accumulation_steps 256 --local_rollout_forward_batch_size 8
set -euo pipefail

deepspeed train_ppo.py \
    --deepspeed ds_configs/zero2.json \
    --model_name_or_path Qwen/Qwen3-VL-8B-Instruct \
    --dataset_name vlfeedback_paired --data_path data/vlfeedback \
    --max_prompt_length 8192 \
    --reward_adapter runs/rm_qwen3_vl --init_value_from_reward True \
    --use_lora True --lora_r 64 --lora_alpha 16 \
    --per_device_train_batch_size 16 --gradient_accumulation_steps 2 --num_mini_batches 2 --num_ppo_epochs 2 \
    --response_length 896 --temperature 1.0 --kl_coef 0.1 --lam 0.95 --missing_eos_penalty 8.0 \
    --learning_rate 3e-5 --lr_scheduler_type cosine --warmup_steps 5 --weight_decay 0 \
    --num_train_epochs 4 \
    --bf16 True \
    --gradient_checkpointing True \
    --logging_steps 10 \
    --save_steps 10 --save_total_limit 2 \
    --output_dir runs/ppo_qwen3_vl \
    "$@"
