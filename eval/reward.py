"""Reward models, and policies as reward models.

    python -m eval.reward --task vlrewardbench --data_path test.parquet --model_name_or_path runs/rm --output runs/rm/eval
    python -m eval.reward --task mmrb --data_path all_data.json --implicit True --model_name_or_path runs/dpo --beta 0.1 \\
        --output runs/dpo/eval
    python -m eval.reward --task mmrlhf --data_path mm_reward_bench.jsonl --scores scores.jsonl     # scores from elsewhere
    python -m eval.reward --task vlrewardbench --data_path test.parquet --replies votes.jsonl       # a generative judge
    python -m eval.reward --model_name_or_path runs/rm --dataset_name plain_dpo --data_path pairs.json --image_root images

The scalar of a response is a reward model's output, or with --implicit DPO's reward beta * (log pi - log pi_ref), whose
reference is the base under the adapter, or --ref. Scores of a benchmark go to scores_<task>.jsonl (resumable), then to
results.json. With --dataset_name the rows of any data set are scored (`--dataset_name x --help` shows its flags).
"""

import sys

from args import run
from eval import reward_benchmarks, score


def main(argv: list[str] | None = None) -> None:
    """Run the command line (`argv` in its place)."""
    given = sys.argv[1:] if argv is None else argv
    if any(flag.split("=")[0] == "--dataset_name" for flag in given):
        return score.main(given)
    return reward_benchmarks.main(given, __doc__)


if __name__ == "__main__":
    run(main)
