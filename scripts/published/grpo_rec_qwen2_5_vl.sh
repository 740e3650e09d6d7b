#!/usr/bin/env bash
# GRPO of Qwen2.5-VL 3B on referring expressions (RefCOCO, boxes), 8 GPUs of 80 GB.
# Settings: VLM-R1 (arXiv:2504.07615; om-ai-lab/VLM-R1, run_scripts of referring expressions): 8 answers to a prompt,
# 16 prompts a step, two epochs, IoU + format, KL to the reference .04 in the loss, learning rate 1e-6.
# Departures: LoRA at 10 times the rate in place of all weights; up to 512 tokens, not 2048; the format is
# <think>...</think><answer>...</answer> without a rule for what the answer looks like.
# Rows: images, prompt, solution "[x1, y1, x2, y2]" in pixels of the picture as the model sees it; the prompt asks for
# "First output the thinking process in <think> </think> tags and then output the final answer in <answer> </answer>
# tags. Output the final answer in JSON format."
# One 24 GB GPU instead, in 4 bits:
#   LAUNCH=python bash scripts/published/grpo_rec_qwen2_5_vl.sh --q_lora True \
#       --per_device_train_batch_size 8 --gradient_accumulation_steps 16
set -euo pipefail

${LAUNCH:-torchrun --nproc_per_node 8} train_ppo.py \
    --model_name_or_path Qwen/Qwen2.5-VL-3B-Instruct \
    --dataset_name data/refcoco.jsonl --image_root data/coco \
    --max_prompt_length 2048 \
    --advantage_estimator grpo --num_generations 8 --loss_type grpo \
    --kl_in_loss 0.04 --use_bias_correction_kl False \
    --reward_fn box_iou think_format \
    --use_lora True --lora_r 64 --lora_alpha 128 \
    --per_device_train_batch_size 8 --gradient_accumulation_steps 2 \
    --response_length 512 --temperature 1.0 \
    --learning_rate 1e-5 --lr_scheduler_type linear --warmup_steps 0 --weight_decay 0 \
    --num_train_epochs 2 \
    --bf16 True --gradient_checkpointing True --logging_steps 1 \
    --save_steps 100 --save_total_limit 2 \
    --output_dir runs/published/grpo_rec_qwen2_5_vl \
    "$@"
