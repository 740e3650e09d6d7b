"""Scores of responses by a reward model, or by DPO's implicit reward: of a reward benchmark's pairs, or of any data set's rows.

    python -m eval.reward --model_name_or_path runs/rm --dataset_name plain_dpo --data_path pairs.json --image_root images \\
        --output scores.jsonl

writes one JSON line per row: where (file and row), source, responses, rewards, ranks. Prints the accuracy over all ordered pairs; a
tie is wrong.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from args import DataArguments
from base.adapters import adapter_active
from base.loading import base_model_path
from base.reward import score_rows
from base.row_checks import ProcessorCheck
from common.errors import InputError
from common.files import replacing
from common.flags import FlagParser
from data import load_train_eval
from data.pairs import ordered_pairs
from eval.benchmark_files import Row, check_images, read_task, with_image_marks
from eval.flags import add_flag, add_switch
from eval.generate import Answerer, barrier, chunks, describe, processor_for, ranks
from eval.ledger import Ledger
from models import core_mapper_for

# ------------------------------------------------------------------------------------------ pairs of a benchmark

Score = Callable[[list[Row]], list[list[float]]]  # preference rows -> one number per response


def write_scores(args: argparse.Namespace, path: str) -> None:
    """Write {id, scores: [first, second]} for every row of the benchmark; resumable, sharded over ranks."""
    rows = read_task(args.task, args.data_path, args.image_root, args.limit)
    videos = [r["id"] for r in rows if r.get("video") and not r["images"]]
    if videos:
        if not args.skip_video:
            raise InputError(f"row '{videos[0]}' shows a video, which is not scored; --skip_video leaves such rows out")
        rows = [r for r in rows if r["id"] not in set(videos)]
    check_images(rows)
    with ranks() as (rank, world, device):
        score, settings = implicit_reward(args, device) if args.implicit else scalar_reward(args, device)
        settings["dtype"] = "bfloat16" if args.bf16 else "float32"
        settings |= {"skip_video": True} if args.skip_video else {}
        ledger = Ledger(path, describe(args, settings), [str(r["id"]) for r in rows], rank)
        barrier(world)
        done = ledger.open()
        barrier(world)
        batches = [b for n, b in enumerate(chunks(rows, args.batch_size)) if n % world == rank]
        batches = [b for b in batches if any(r["id"] not in done for r in b)]
        with tqdm(total=sum(map(len, batches)), unit="pair", desc=args.task, disable=rank != 0) as bar:
            for batch in batches:
                values = score([preference_row(row) for row in batch])
                new = [{"id": r["id"], "scores": v} for r, v in zip(batch, values, strict=True) if r["id"] not in done]
                ledger.write(new)
                bar.update(len(batch))
        ledger.close()
        barrier(world)
        if rank == 0:
            ledger.finish()


def preference_row(row: Row) -> Row:
    """The project's row of a pair, images first in the prompt."""
    content = with_image_marks(str(row["question"]), len(row["images"]))
    return {"images": row["images"], "prompt": [{"role": "user", "content": content}], "responses": row["responses"]}


def scalar_reward(args: argparse.Namespace, device: torch.device) -> tuple[Score, dict]:
    """The head's output at each response's last token."""
    if args.adapter:
        raise InputError(
            "a reward model is one folder: pass the output of train_rm.py as --model_name_or_path, without --adapter"
        )
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    model = (
        core_mapper_for(args.model_name_or_path)
        .reward_model.from_pretrained(args.model_name_or_path, dtype=dtype)
        .to(device)
    )
    processor = processor_for(args.model_name_or_path)
    return lambda rows: score_rows(model, processor, rows, batch_size=len(rows)), {"reward": "reward model"}


def implicit_reward(args: argparse.Namespace, device: torch.device) -> tuple[Score, dict]:
    """beta * (log pi(y|x) - log pi_ref(y|x)), summed over the response's tokens (DPO, eq. 5 without its constant)."""
    policy = Answerer(args.model_name_or_path, args.adapter, device, args.bf16)
    wrapped = hasattr(policy.model, "peft_config")
    if not args.ref and not wrapped:
        raise InputError(
            "--implicit needs --ref, the checkpoint that training started from (without an adapter to switch off)"
        )
    reference = Answerer(args.ref, None, device, args.bf16) if args.ref else policy
    collator = policy.response_collator
    policy.processor.train()

    def score(rows: list[Row]) -> list[list[float]]:
        batch = collator.responses_only(rows)
        logps = policy.response_logps(batch)[0].sum(1)  # (R,)
        if args.ref:
            ref_logps = reference.response_logps(batch)[0].sum(1)
        else:
            with adapter_active(policy.model, None):
                ref_logps = policy.response_logps(batch)[0].sum(1)
        return (args.beta * (logps - ref_logps)).view(len(rows), -1).tolist()

    return score, {
        "reward": "implicit",
        "beta": args.beta,
        "ref": args.ref or base_model_path(args.adapter or args.model_name_or_path),
    }


# ----------------------------------------------------------------------------------------- rows of any data set


def main(argv: list[str] | None = None) -> None:
    """Run the command line (`argv` in its place)."""
    parser = FlagParser(description=__doc__)
    add_flag(parser, "--model_name_or_path", "--model", required=True, help="output folder of train_rm.py")
    parser.add_argument("--dataset_name", required=True, help="as for train_rm.py")
    parser.add_argument("--data_path", help="file or folder of the data set")
    add_flag(parser, "--image_root", "--image_dir", help="folder that image names are relative to")
    parser.add_argument("--data_ratio", type=float, default=1.0, help="score this share of the rows")
    parser.add_argument("--on_bad_row", choices=["error", "drop"], default="error")
    parser.add_argument("--output", help="JSONL file; default: scores.jsonl in the folder of --model_name_or_path")
    parser.add_argument("--batch_size", type=int, default=8, help="rows per forward")
    add_switch(parser, "--bf16", help="weights and activations in bfloat16 (default float32)")
    args = parser.parse_args(argv)
    score_data_set(args)


def score_data_set(args: argparse.Namespace) -> dict[str, float]:
    """Score the responses of every row of a data set that the training scripts read; return accuracy, pairs and rows.

    Raises:
        InputError: the reward model or the data cannot be used.
    """
    names = ("dataset_name", "data_path", "image_root", "data_ratio", "on_bad_row")
    data_args = DataArguments(**{name: getattr(args, name) for name in names})
    output = Path(args.output or Path(args.model_name_or_path) / "scores.jsonl")
    output.parent.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    adapter = core_mapper_for(args.model_name_or_path)
    model = adapter.reward_model.from_pretrained(
        args.model_name_or_path, dtype=torch.bfloat16 if args.bf16 else torch.float32
    )
    model.to(device)
    processor = adapter.processor(args.model_name_or_path)
    rows = load_train_eval(data_args, "preference", 0, output.parent, ProcessorCheck(processor)).train
    right = pairs = 0
    with (
        replacing(output) as part,
        open(part, "w", encoding="utf-8") as file,
        tqdm(total=len(rows), unit="row", desc="scoring") as bar,
    ):
        for start in range(0, len(rows), args.batch_size):
            chunk = [rows[i] for i in range(start, min(start + args.batch_size, len(rows)))]
            for row, rewards in zip(chunk, score_rows(model, processor, chunk, len(chunk)), strict=True):
                line = {name: row.get(name) for name in ("where", "source", "responses")}
                file.write(json.dumps(line | {"rewards": rewards, "ranks": row["ranks"]}, ensure_ascii=False) + "\n")
                ordered = ordered_pairs(row["ranks"])
                pairs += len(ordered)
                right += sum(rewards[better] > rewards[worse] for better, worse in ordered)
            bar.update(len(chunk))
    found = {"accuracy": right / max(pairs, 1), "pairs": pairs, "rows": len(rows)}
    print(f"accuracy {found['accuracy']:.4f} over {pairs} pairs of {len(rows)} rows; scores in {output}")
    return found
