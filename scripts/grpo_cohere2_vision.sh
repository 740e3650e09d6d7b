#!/usr/bin/env bash
# GRPO of Command A Vision 112B against an answer key, 8 GPUs of 80 GB: no reward model, no value function.
# Rows of data/questions.jsonl: images, prompt, solution (docs/data.md); the prompt asks for
# <think>...</think><answer>...</answer>. 32 prompts with 8 answers each are one update and one step.
# Written by `make scripts` from models.tsv and templates/grpo.sh: change those. One set of settings for every family.
# The model: https://huggingface.co/CohereLabs/command-a-vision-07-2025
# One 80 GB GPU instead, in 4 bits:
#   LAUNCH=python bash scripts/grpo_cohere2_vision.sh --deepspeed "" --q_lora True \
#       --per_device_train_batch_size 8 --gradient_accumulation_steps 32 --local_rollout_forward_batch_size 8
set -euo pipefail

${LAUNCH:-deepspeed} train_ppo.py --deepspeed ds_configs/zero3.json \
    --model_name_or_path CohereLabs/command-a-vision-07-2025 \
    --dataset_name data/questions.jsonl --image_root data \
    --max_prompt_length 8192 \
    --advantage_estimator grpo --num_generations 8 \
    --reward_fn exact_answer think_format --reward_weights 1 0.5 \
    --use_lora True --lora_r 64 --lora_alpha 16 \
    --per_device_train_batch_size 16 --gradient_accumulation_steps 2 \
    --response_length 512 --mask_truncated_completions True \
    --local_rollout_forward_batch_size 32 \
    --learning_rate 1e-5 --lr_scheduler_type constant_with_warmup --warmup_steps 5 --weight_decay 0 \
    --num_train_epochs 1 \
    --bf16 True --gradient_checkpointing True --logging_steps 1 \
    --save_steps 50 --save_total_limit 2 \
    --output_dir runs/grpo_cohere2_vision \
    "$@"
