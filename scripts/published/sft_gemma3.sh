#!/usr/bin/env bash
# Supervised fine-tuning of Gemma 3 4B, 8 GPUs of 80 GB.
# Settings: Google's guide to Gemma 3 with images
# (ai.google.dev/gemma/docs/core/huggingface_vision_finetune_qlora).
# Nothing is published for Gemma 4. To try these there:
#   LAUNCH=deepspeed bash scripts/published/sft_gemma3.sh --deepspeed ds_configs/zero3.json \
#       --model_name_or_path google/gemma-4-31B-it --output_dir runs/published/sft_gemma4
# One 24 GB GPU instead, in 4 bits:
#   LAUNCH=python bash scripts/published/sft_gemma3.sh --q_lora True \
#       --per_device_train_batch_size 1 --gradient_accumulation_steps 8
set -euo pipefail

${LAUNCH:-torchrun --nproc_per_node 8} train_sft.py \
    --model_name_or_path google/gemma-3-4b-it \
    --dataset_name llava_instruct --data_path data/llava_v1_5_mix665k.json --image_root data \
    --max_length 4096 \
    --use_lora True --lora_r 16 --lora_alpha 16 \
    --max_grad_norm 0.3 \
    --per_device_train_batch_size 1 --gradient_accumulation_steps 1 \
    --learning_rate 2e-4 --lr_scheduler_type constant_with_warmup --warmup_steps 0.03 --weight_decay 0 \
    --num_train_epochs 1 \
    --bf16 True --gradient_checkpointing True --logging_steps 10 \
    --save_steps 500 --save_total_limit 2 \
    --output_dir runs/published/sft_gemma3 \
    "$@"
