#!/usr/bin/env bash
# What only a GPU can show, in order of worth: figures as DIR/N.json, output as DIR/N.log. Under nine minutes on one GPU with 80 GB.
#
#     benchmarks/gpu_checks.sh --out DIR [--only "1 2"] [--skip "5 8"]
#
# Without a GPU the same checks run on tiny sizes, to see that the script reaches its end.
set -uo pipefail
cd "$(dirname "$0")/.."
out="" only="1 2 3 4 5 6 7 8" skip=""
while [ $# -gt 0 ]; do
    case $1 in
        --out) out=$2 ;;
        --only) only=$2 ;;
        --skip) skip=$2 ;;
        *) sed -n '2,6p' "$0"; exit 2 ;;
    esac
    shift 2
done
[ -n "$out" ] || { sed -n '2,6p' "$0"; exit 2; }
mkdir -p "$out"
seconds=(0 60 80 50 70 120 50 30 70) # the most that each may take
export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
for n in $only; do
    case " $skip " in *" $n "*) continue ;; esac
    launcher="python -m"
    case $n in 1 | 4) launcher="torchrun --nproc_per_node 1 --standalone -m" ;; esac # a process group, as with several GPUs
    started=$SECONDS
    rm -f "$out/$n.json"
    timeout -k 5 "${CHECK_SECONDS:-${seconds[$n]}}" $launcher benchmarks.gpu_checks "$n" --out "$out" >"$out/$n.log" 2>&1
    echo "check $n: exit $?, $((SECONDS - started)) s, $out/$n.json"
done
