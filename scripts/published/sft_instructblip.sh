#!/usr/bin/env bash
# Supervised fine-tuning of InstructBLIP 7B (Vicuna), 8 GPUs of 80 GB.
# Settings: InstructBLIP's (arXiv:2305.06500, section 2.6), which trains the Q-Former only; here LoRA goes into the
# language model.
# One 24 GB GPU instead, in 4 bits:
#   LAUNCH=python bash scripts/published/sft_instructblip.sh --q_lora True \
#       --per_device_train_batch_size 1 --gradient_accumulation_steps 128
set -euo pipefail

${LAUNCH:-torchrun --nproc_per_node 8} train_sft.py \
    --model_name_or_path Salesforce/instructblip-vicuna-7b \
    --dataset_name llava_instruct --data_path data/llava_instruct_150k.json --image_root data/coco/train2017 \
    --max_length 1024 \
    --use_lora True \
    --per_device_train_batch_size 8 --gradient_accumulation_steps 2 \
    --learning_rate 1e-5 --lr_scheduler_type cosine --warmup_steps 1000 --weight_decay 0.05 \
    --num_train_epochs 1 \
    --bf16 True --gradient_checkpointing True --logging_steps 10 \
    --save_steps 500 --save_total_limit 2 \
    --output_dir runs/published/sft_instructblip \
    "$@"
