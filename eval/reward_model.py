"""Scores of both responses of every pair, by a reward model or by DPO's implicit reward. Called by eval.reward."""

import argparse
from collections.abc import Callable

import torch
from tqdm import tqdm

from base.adapters import adapter_active
from base.loading import base_model_path
from base.reward import score_rows
from common.errors import InputError
from eval.data import DataError, Row, check_images, chunks, read_task
from eval.generate import Answerer, barrier, describe, processor_for, ranks, with_image_marks
from eval.ledger import Ledger
from models import core_mapper_for

Score = Callable[[list[Row]], list[list[float]]]  # preference rows -> one number per response


def write_scores(args: argparse.Namespace, path: str) -> None:
    """Write {id, scores: [first, second]} for every row of the benchmark; resumable, sharded over ranks."""
    rows = read_task(args.task, args.data, args.image_dir, args.limit)
    videos = [r["id"] for r in rows if r.get("video") and not r["images"]]
    if videos:
        if not args.skip_video:
            raise DataError(
                f"row '{videos[0]}' shows a video, which no family here reads; --skip_video leaves such rows out"
            )
        rows = [r for r in rows if r["id"] not in set(videos)]
    check_images(rows)
    try:
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
                    new = [
                        {"id": r["id"], "scores": v} for r, v in zip(batch, values, strict=True) if r["id"] not in done
                    ]
                    ledger.write(new)
                    bar.update(len(batch))
            ledger.close()
            barrier(world)
            if rank == 0:
                ledger.finish()
    except InputError as error:
        raise DataError(str(error)) from error


def preference_row(row: Row) -> Row:
    """The project's row of a pair, images first in the prompt."""
    content = with_image_marks(str(row["question"]), len(row["images"]))
    return {"images": row["images"], "prompt": [{"role": "user", "content": content}], "responses": row["responses"]}


def scalar_reward(args: argparse.Namespace, device: torch.device) -> tuple[Score, dict]:
    """The head's output at each response's last token."""
    if args.adapter:
        raise DataError("a reward model is one folder: pass the output of train_rm.py as --model, without --adapter")
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    model = core_mapper_for(args.model).reward_model.from_pretrained(args.model, dtype=dtype).to(device)
    processor = processor_for(args.model)
    return lambda rows: score_rows(model, processor, rows, batch_size=len(rows)), {"reward": "reward model"}


def implicit_reward(args: argparse.Namespace, device: torch.device) -> tuple[Score, dict]:
    """beta * (log pi(y|x) - log pi_ref(y|x)), summed over the response's tokens (DPO, eq. 5 without its constant)."""
    policy = Answerer(args.model, args.adapter, device, args.bf16)
    wrapped = hasattr(policy.model, "peft_config")
    if not args.ref and not wrapped:
        raise DataError(
            "--implicit needs --ref, the checkpoint that training started from (without an adapter to switch off)"
        )
    reference = Answerer(args.ref, None, device, args.bf16) if args.ref else policy
    collator = core_mapper_for(args.model).dpo_collator(policy.processor)
    policy.processor.train()

    def score(rows: list[Row]) -> list[list[float]]:
        batch = collator.encode_rows(rows)
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
        "ref": args.ref or base_model_path(args.adapter or args.model),
    }
