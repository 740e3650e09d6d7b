#!/usr/bin/env bash
# The whole path on embedded pictures, on a CPU: data -> SFT from scratch on noisy captions -> reward model -> DPO -> PPO
# -> GRPO -> evaluation.
# Every command is printed before it runs. `make demo`; OUT, SEED and LOSS (of docs/losses.md) can be set: make demo LOSS=mdpo
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-runs/demo} SEED=${SEED:-0} LOSS=${LOSS:-sigmoid}
DATA=$OUT/data

stage() { # stage NAME COMMAND...: print the command, run it, keep its output in NAME.log and its seconds in seconds.tsv
    local name=$1 started=$SECONDS
    shift
    printf '\n\033[1m[%s]\033[0m %s\n' "$name" "$*"
    "$@" >>"$OUT/$name.log" 2>&1 || { tail -n 20 "$OUT/$name.log"; exit 1; }
    printf '%s\t%s\n' "$name" $((SECONDS - started)) >>"$OUT/seconds.tsv"
    echo "    $((SECONDS - started)) s, log in $OUT/$name.log"
}

# Only what an earlier demo left: OUT may be any folder.
rm -rf "$OUT"/{data,init,sft,rm,dpo,ppo,grpo,eval} "$OUT"/{data,sft,rm,dpo,ppo,grpo,evaluation}.log "$OUT"/{seconds.tsv,report.json,report.html}
mkdir -p "$OUT"
lora="--use_lora True --lora_r 32 --lora_alpha 64 --lora_dropout 0"
common="--seed $SEED --lr_scheduler_type cosine --logging_steps 10 --save_strategy no --disable_tqdm True"
pairs="--dataset_name plain_dpo --data_path $DATA/pairs.json --image_root $DATA"

stage data python -m data.shapes --output_dir "$DATA" --num_train 3500 --num_eval 300 --seed "$SEED" --init_model "$OUT/init"

stage sft python train_sft.py --model_name_or_path "$OUT/init" --output_dir "$OUT/sft" \
    --dataset_name vlquery_json --data_path "$DATA/sft.json" --image_root "$DATA" --freeze_vision_tower False \
    --per_device_train_batch_size 16 --num_train_epochs 3 --learning_rate 1e-3 --warmup_steps 0.05 $common

stage rm python train_rm.py --model_name_or_path "$OUT/sft" --output_dir "$OUT/rm" $pairs \
    --eval_data_path "$DATA/eval_pairs.json" $lora \
    --per_device_train_batch_size 16 --max_steps 600 --learning_rate 8e-4 --warmup_steps 0.1 $common

stage dpo python train_dpo.py --model_name_or_path "$OUT/sft" --output_dir "$OUT/dpo" $pairs $lora --loss_type "$LOSS" --beta 1.0 \
    --per_device_train_batch_size 16 --max_steps 60 --learning_rate 3e-4 $common

stage ppo python train_ppo.py --model_name_or_path "$OUT/sft" --output_dir "$OUT/ppo" $lora \
    --dataset_name plain_dpo --data_path "$DATA/pairs.json" --image_root "$DATA" \
    --reward_adapter "$OUT/rm" --init_value_from_reward True --rollouts_per_prompt 4 --response_length 64 --temperature 1.0 \
    --per_device_train_batch_size 32 --gradient_accumulation_steps 2 --num_ppo_epochs 2 --kl_coef 0.05 --missing_eos_penalty 1.0 \
    --max_steps 30 --learning_rate 5e-4 $common --logging_steps 1

# No reward model, no value function, no reference: a rule compares the objects of a caption with those of the picture.
stage grpo python train_ppo.py --model_name_or_path "$OUT/sft" --output_dir "$OUT/grpo" $lora \
    --dataset_name "$DATA/prompts.json" --image_root "$DATA" \
    --advantage_estimator grpo --reward_fn scripts/demo_rewards.py:caption_f1 --num_generations 8 --response_length 64 \
    --per_device_train_batch_size 32 --gradient_accumulation_steps 2 \
    --max_steps 30 --learning_rate 5e-4 $common --logging_steps 1

for two in "sft dpo" "ppo grpo"; do # side by side: most of an evaluation is one thread
    running=()
    for name in $two; do
        adapter=$([ $name = sft ] || echo "--adapter $OUT/$name")
        OMP_NUM_THREADS=1 stage evaluation python -m eval.shapes --model_name_or_path "$OUT/sft" $adapter --data_path "$DATA/eval.json" \
            --output "$OUT/eval/$name" &
        running+=($!)
    done
    for evaluation in "${running[@]}"; do wait "$evaluation"; done
done

printf '\n\033[1m[report]\033[0m python -m eval.shapes_report %s\n' "$OUT"
python -m eval.shapes_report "$OUT"
