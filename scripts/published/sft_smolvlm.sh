#!/usr/bin/env bash
# Supervised fine-tuning of SmolVLM2 2.2B, 8 GPUs of 80 GB.
# Settings: Hugging Face's LoRA notebook (merveenoyan/smol-vision, Smol_VLM_FT.ipynb).
# One 24 GB GPU instead, in 4 bits:
#   LAUNCH=python bash scripts/published/sft_smolvlm.sh --q_lora True \
#       --per_device_train_batch_size 1 --gradient_accumulation_steps 16
set -euo pipefail

${LAUNCH:-torchrun --nproc_per_node 8} train_sft.py \
    --model_name_or_path HuggingFaceTB/SmolVLM2-2.2B-Instruct \
    --dataset_name llava_instruct --data_path data/llava_v1_5_mix665k.json --image_root data \
    --max_length 4096 \
    --use_lora True --lora_r 8 --lora_alpha 8 --lora_dropout 0.1 \
    --per_device_train_batch_size 2 --gradient_accumulation_steps 1 \
    --learning_rate 1e-4 --lr_scheduler_type cosine --warmup_steps 50 --weight_decay 0.01 \
    --num_train_epochs 1 \
    --bf16 True --gradient_checkpointing True --logging_steps 10 \
    --save_steps 500 --save_total_limit 2 \
    --output_dir runs/published/sft_smolvlm \
    "$@"
