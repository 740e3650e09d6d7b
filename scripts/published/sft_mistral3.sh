#!/usr/bin/env bash
# Supervised fine-tuning of Mistral Small 3.1 24B, 8 GPUs of 80 GB.
# Settings: Mistral's LoRA settings (mistralai/mistral-finetune, example/7B.yaml), written for text models.
# One 80 GB GPU instead (it is too large for 24 GB), in 4 bits:
#   LAUNCH=python bash scripts/published/sft_mistral3.sh --deepspeed "" --q_lora True \
#       --per_device_train_batch_size 1 --gradient_accumulation_steps 128
set -euo pipefail

${LAUNCH:-deepspeed} train_sft.py --deepspeed ds_configs/zero3.json \
    --model_name_or_path mistralai/Mistral-Small-3.1-24B-Instruct-2503 \
    --dataset_name llava_instruct --data_path data/llava_v1_5_mix665k.json --image_root data \
    --max_length 8192 \
    --use_lora True \
    --per_device_train_batch_size 1 --gradient_accumulation_steps 16 \
    --learning_rate 6e-5 --lr_scheduler_type cosine --warmup_steps 0.05 --weight_decay 0.1 \
    --num_train_epochs 1 \
    --bf16 True --gradient_checkpointing True --logging_steps 10 \
    --save_steps 500 --save_total_limit 2 \
    --output_dir runs/published/sft_mistral3 \
    "$@"
