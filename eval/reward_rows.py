"""Scores of pairs or K-rows of any data set that the training scripts read. Called by eval.reward.

    python -m eval.reward --model runs/rm --dataset_name plain_dpo --data_path pairs.json --image_root images --output scores.jsonl

One JSON line per row: where (file and row), source, responses, rewards, ranks. Prints the accuracy over all ordered pairs; a tie is wrong.
"""

import argparse
import json
from pathlib import Path

import torch
from tqdm import tqdm

from args import DataArguments
from base.reward import score_rows
from common.errors import InputError
from data import load_train_eval
from data.pairs import ordered_pairs
from eval.data import DataError
from models import core_mapper_for


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="output folder of train_rm.py")
    parser.add_argument("--dataset_name", required=True, help="as for train_rm.py")
    parser.add_argument("--data_path", help="file or folder of the data set")
    parser.add_argument("--image_root", help="folder that image names are relative to")
    parser.add_argument("--data_ratio", type=float, default=1.0, help="score this share of the rows")
    parser.add_argument("--on_bad_row", choices=["error", "drop"], default="error")
    parser.add_argument("--output", help="JSONL file; default: scores.jsonl in the folder of --model")
    parser.add_argument("--batch_size", type=int, default=8, help="rows per forward")
    parser.add_argument("--bf16", action="store_true")
    args = parser.parse_args(argv)
    try:
        score(args)
    except InputError as error:
        raise DataError(str(error)) from error


def score(args: argparse.Namespace) -> dict[str, float]:
    """Write the scores and return accuracy, pairs and rows.

    Raises:
        InputError: the reward model or the data cannot be used.
    """
    names = ("dataset_name", "data_path", "image_root", "data_ratio", "on_bad_row")
    data_args = DataArguments(**{name: getattr(args, name) for name in names})
    output = Path(args.output or Path(args.model) / "scores.jsonl")
    output.parent.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    adapter = core_mapper_for(args.model)
    model = adapter.reward_model.from_pretrained(args.model, dtype=torch.bfloat16 if args.bf16 else torch.float32)
    model.to(device)
    processor = adapter.processor(args.model)
    rows = load_train_eval(data_args, "preference", 0, output.parent).train
    right = pairs = 0
    part = output.with_name(output.name + ".part")
    with open(part, "w", encoding="utf-8") as file, tqdm(total=len(rows), unit="row", desc="scoring") as bar:
        for start in range(0, len(rows), args.batch_size):
            chunk = [rows[i] for i in range(start, min(start + args.batch_size, len(rows)))]
            for row, rewards in zip(chunk, score_rows(model, processor, chunk, len(chunk)), strict=True):
                line = {name: row.get(name) for name in ("where", "source", "responses")}
                file.write(json.dumps(line | {"rewards": rewards, "ranks": row["ranks"]}, ensure_ascii=False) + "\n")
                ordered = ordered_pairs(row["ranks"])
                pairs += len(ordered)
                right += sum(rewards[better] > rewards[worse] for better, worse in ordered)
            bar.update(len(chunk))
    part.replace(output)
    found = {"accuracy": right / max(pairs, 1), "pairs": pairs, "rows": len(rows)}
    print(f"accuracy {found['accuracy']:.4f} over {pairs} pairs of {len(rows)} rows; scores in {output}")
    return found
