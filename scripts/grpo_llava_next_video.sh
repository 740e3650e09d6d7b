#!/usr/bin/env bash
# GRPO of LLaVA-NeXT-Video 7B against an answer key, 8 GPUs of 80 GB: no reward model, no value function.
# Rows of data/questions.jsonl: images, prompt, solution (docs/data.md); the prompt asks for
# <think>...</think><answer>...</answer>. 32 prompts with 8 answers each are one update and one step.
# Written by `make scripts` from models.tsv and templates/grpo.sh: change those. One set of settings for every family.
# The model: https://llava-vl.github.io/blog/2024-04-30-llava-next-video/
# One 24 GB GPU instead, in 4 bits:
#   LAUNCH=python bash scripts/grpo_llava_next_video.sh --q_lora True \
#       --per_device_train_batch_size 8 --gradient_accumulation_steps 32 --local_rollout_forward_batch_size 8
set -euo pipefail

${LAUNCH:-torchrun --nproc_per_node 8} train_ppo.py \
    --model_name_or_path llava-hf/LLaVA-NeXT-Video-7B-hf \
    --dataset_name data/questions.jsonl --image_root data \
    --max_prompt_length 4096 \
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
    --output_dir runs/grpo_llava_next_video \
    "$@"
