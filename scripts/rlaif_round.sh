#!/usr/bin/env bash
# One round of RLAIF-V's loop (arXiv:2405.17220): K answers of the policy to every prompt, scores, DPO on all pairs of
# different score, evaluation. The loop, four rounds on one GPU:
#   START=llava-hf/llava-1.5-7b-hf
#   for round in 1 2 3 4; do
#       START=$START OUT=runs/rlaif/$round SEED=$round bash scripts/rlaif_round.sh --bf16 True
#       START=runs/rlaif/$round/dpo
#   done
# The first round starts an adapter on the checkpoint; a later one continues the adapter of the round before, which is its
# reference as well. A round that was killed goes on when it is called again. Flags after the file name go to train_dpo.py.
# START     checkpoint or adapter that answers and is trained        OUT       folder of the round
# PROMPTS   flags of the data (rows of any kind)                     IMAGES    folder of its pictures
# SAMPLE    flags of data.sample                                     SCORE     its scores, by default the policy's own
# EVALUATE  a command; $ADAPTER and $OUT are set in it               SEED      of answers and training
set -euo pipefail
: "${START:?give START, a checkpoint or an adapter}" "${OUT:?give OUT, the folder of the round}"
SEED=${SEED:-0} IMAGES=${IMAGES:-data}
PROMPTS=${PROMPTS:---dataset_name plain_dpo --data_path data/pairs.json}
SAMPLE=${SAMPLE:---num_samples 8 --max_new_tokens 512}
SCORE=${SCORE:---claims True}
PYTHON=${PYTHON:-python}

$PYTHON -m data.sample $PROMPTS --image_root "$IMAGES" --model_name_or_path "$START" --seed "$SEED" $SAMPLE $SCORE \
    --output "$OUT/rows.jsonl"

if [ ! -f "$OUT/dpo/adapter_config.json" ]; then
    ${LAUNCH:-$PYTHON} train_dpo.py --model_name_or_path "$START" --use_lora True --seed "$SEED" \
        --dataset_name "$OUT/rows.jsonl" --image_root "$IMAGES" --pairs all --loss_type sigmoid --beta 0.1 \
        --learning_rate 1e-5 --lr_scheduler_type cosine --warmup_steps 0.05 --num_train_epochs 1 \
        --per_device_train_batch_size 1 --gradient_accumulation_steps 16 --save_steps 100 --save_total_limit 1 \
        --resume_from_checkpoint True --output_dir "$OUT/dpo" "$@"
fi

if [ -n "${EVALUATE:-}" ]; then
    ADAPTER=$OUT/dpo OUT=$OUT bash -c "$EVALUATE"
fi
