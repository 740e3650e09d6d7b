#!/usr/bin/env bash
# GRPO of Qwen2.5-VL 3B on counting (CLEVR), 8 GPUs of 80 GB.
# Settings: R1-V (Deep-Agent/R1-V, src/scripts/run_grpo_clevr.sh at 8fe656f, src/r1-v/src/open_r1/grpo.py at 3c16cd3):
# 8 answers to a prompt, 2 prompts per GPU and step, two epochs, accuracy + format, and TRL's defaults of its time,
# 256 tokens, learning rate 1e-6 falling linearly, temperature 1 and KL to the reference .04 in the loss.
# Departures: LoRA at 10 times the rate in place of all weights; pictures as the processor sizes them (there at most
# 401408 pixels); the numbers of an answer and the key are compared, not their texts.
# Rows: MMInstruction/Clevr_CoGenT_TrainA_70K_Complex as images, prompt, solution; to the question is added
# "Output the thinking process in <think> </think> and final answer (number) in <answer> </answer> tags."
# One 24 GB GPU instead, in 4 bits:
#   LAUNCH=python bash scripts/published/grpo_clevr_qwen2_5_vl.sh --q_lora True \
#       --per_device_train_batch_size 8 --gradient_accumulation_steps 16
set -euo pipefail

${LAUNCH:-torchrun --nproc_per_node 8} train_ppo.py \
    --model_name_or_path Qwen/Qwen2.5-VL-3B-Instruct \
    --dataset_name data/clevr_cogent.jsonl --image_root data \
    --max_prompt_length 1024 \
    --advantage_estimator grpo --num_generations 8 --loss_type grpo \
    --kl_in_loss 0.04 --use_bias_correction_kl False \
    --reward_fn number think_format \
    --use_lora True --lora_r 64 --lora_alpha 128 \
    --per_device_train_batch_size 8 --gradient_accumulation_steps 2 \
    --response_length 256 --temperature 1.0 \
    --learning_rate 1e-5 --lr_scheduler_type linear --warmup_steps 0 --weight_decay 0 \
    --num_train_epochs 2 \
    --bf16 True --gradient_checkpointing True --logging_steps 1 \
    --save_steps 100 --save_total_limit 2 \
    --output_dir runs/published/grpo_clevr_qwen2_5_vl \
    "$@"
