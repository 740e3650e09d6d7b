#!/usr/bin/env bash
# Supervised fine-tuning of %{name}, 8 GPUs of 80 GB.
# Written by `make scripts` from models.tsv and templates/sft.sh: change those. One set of settings for every family.
# The model: %{source}
%{published}
%{convert}
# One %{one_gpu_gb} GB GPU instead, in 4 bits:
#   LAUNCH=python bash scripts/sft_%{family}.sh %{no_deepspeed}--use_lora True --q_lora True \
#       --per_device_train_batch_size 1 --gradient_accumulation_steps 128 --learning_rate 2e-4
set -euo pipefail

%{launcher} train_sft.py%{deepspeed} \
    --model_name_or_path %{model} \
    --dataset_name llava_instruct --data_path %{sft_data} --image_root %{sft_images} \
    --max_length %{max_length} \
%{lora}
    --per_device_train_batch_size %{sft_batch} --gradient_accumulation_steps %{sft_accumulation} \
    --learning_rate %{sft_rate} --lr_scheduler_type cosine --warmup_steps 0.03 --weight_decay 0 \
    --num_train_epochs 1 \
    --bf16 True --gradient_checkpointing True --logging_steps 10 \
    --save_steps 500 --save_total_limit 2 \
    --output_dir runs/sft_%{family} \
    "$@"
