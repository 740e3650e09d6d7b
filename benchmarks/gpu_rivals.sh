#!/usr/bin/env bash
# The table of benchmarks.rivals at 7B on a GPU with 80 GB, and what gpu_checks.sh shows beside it: largest batch, kernels, what the host waits for.
#
#     benchmarks/gpu_rivals.sh --out DIR [--swift ENV/bin/python] [--factory ENV/bin/python] [--case "dpo, ragged*"] [--steps 10]
#
# One case after the other; each writes DIR/N/rivals_7b.md, .json and log.txt, so that what is cut off leaves the cases before it.
# Without a GPU the same on tiny sizes, to see that the script reaches its end.
set -uo pipefail
cd "$(dirname "$0")/.."
out="" steps=10 case="*" environments=()
while [ $# -gt 0 ]; do
    case $1 in
        --out) out=$2 ;;
        --case) case=$2 ;;
        --steps) steps=$2 ;;
        --swift | --factory) environments+=("$1" "$2") ;;
        *) sed -n '2,8p' "$0"; exit 2 ;;
    esac
    shift 2
done
[ -n "$out" ] || { sed -n '2,8p' "$0"; exit 2; }
size=$(python -c 'import torch; print("7b" if torch.cuda.is_available() else "tiny")')
n=0
python -m benchmarks.rivals --list "$case" | while IFS= read -r name; do
    n=$((n + 1))
    started=$SECONDS
    mkdir -p "$out/$n"
    timeout -k 5 "${CASE_SECONDS:-900}" python -m benchmarks.rivals --size "$size" --steps "$steps" --case "$name" \
        ${environments[@]+"${environments[@]}"} --out "$out/$n" >"$out/$n/log.txt" 2>&1 </dev/null
    echo "$name: exit $?, $((SECONDS - started)) s, $out/$n"
done
[ "$size" = tiny ] || benchmarks/gpu_checks.sh --out "$out/checks" --only "5 6"
