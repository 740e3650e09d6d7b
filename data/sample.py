"""Answers of a model to the prompts of a data set, scored: rows with K ranked responses, which DPO and reward models train on.

    python -m data.sample --dataset_name plain_dpo --data_path pairs.json --image_root images \\
        --model_name_or_path runs/sft --num_samples 8 --reward_model_name_or_path runs/rm --output runs/round1/rows.jsonl
    python train_dpo.py --dataset_name runs/round1/rows.jsonl --image_root images --pairs all \\
        --model_name_or_path runs/sft --use_lora True --output_dir runs/round1/dpo

Answers come from a checkpoint, an adapter, or a server that speaks OpenAI's API (--url). They are scored by the weighted sum of

    --reward_model_name_or_path   output folders of train_rm.py, weights or adapters
    --reward_fn                   functions as in train_ppo.py: file.py:name, or names of base/reward_functions.py
    --judge, --judge_model        a language model's rating from 1 to 10; it sees pictures (not with --judge_text_only) and `reference`
    --claims True                 RLAIF-V's divide and conquer: minus the claims that a model denies when it is asked about each of
                                  them: the answering model itself, or --claims_model (eval/answer_scores.py)

in this order (--reward_weights). A row has `responses` (distinct answers), `scores`, `times` (how often each was sampled), one
column per scorer, `model` and `seed`. --pairs of train_dpo.py and train_rm.py says which pairs enter. A prompt whose answers are all the
same, or have one score, has nothing to prefer and is left out.

Beside ROWS.jsonl lie ROWS.answers.jsonl, ROWS.NAME.jsonl for each scorer, each with its .meta.json, and ROWS.html, a page to look at. A
run that was killed goes on where it was and ends in the same files, on any number of processes under torchrun.
"""

import common.compat  # noqa: F401  isort: skip  (must come before transformers)
import argparse
import gc
import html
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from args import DataArguments, run
from base.layout import weights_fingerprint
from base.loading import base_model_path
from base.processor import VLProcessor
from base.rollout import Row
from base.row_checks import ProcessorCheck
from base.samples import STYLE, card
from common.errors import InputError
from common.files import write_text
from common.flags import FlagParser
from common.openai_client import Body, ChatReply, OpenAIClient, chat_body
from common.pages import page
from common.seeds import stable_seed
from data import load_train_eval
from data.check import write_rows
from data.rows import IMAGE_MARK, IMAGE_TOKENS
from data.source import image_root_of
from eval.answer_scores import Claims, Function, Rating, RewardModel, Scorer, load_split
from eval.files import read_records
from eval.flags import add_flag, add_model_flags, add_switch, add_thinking_flag
from eval.generate import (
    Answerer,
    EncodedBatches,
    barrier,
    chunks,
    generation_settings,
    image_key,
    plan,
    processor_for,
    ranks,
)
from eval.judge import add_judge_arguments
from eval.ledger import Ledger
from eval.results import versions

OF_DATA = ("dataset_name", "data_path", "image_root", "columns", "data_ratio", "on_bad_row", "allow_outside_image_root")
SHOWN = 50  # prompts on the page


class EncodedPrompts(EncodedBatches):
    """As EncodedBatches, of prompts that are messages."""

    def encode(self, row: Row) -> dict:
        """Token ids and image inputs of a row's prompt."""
        try:
            return self.encode_messages(row["prompt"], row["images"])
        except InputError as error:
            raise InputError(f"{row['where']}: {error}") from error


class Processes:
    """What a process needs to know of the others: its rank, their number, and its device."""

    def __init__(self, rank: int, world: int, device: torch.device) -> None:
        self.rank, self.world, self.device = rank, world, device

    @contextmanager
    def ledger(self, path: Path, meta: dict, rows: Sequence[Row], overwrite: bool) -> Iterator[tuple[Ledger, set[str]]]:
        """The file that takes a stage's rows, and the ids that are done; merged at the end, when every process has come to it."""
        ledger = Ledger(path, meta, [row["id"] for row in rows], self.rank, overwrite)
        barrier(self.world)
        done = ledger.open()
        barrier(self.world)
        yield ledger, done
        ledger.close()
        barrier(self.world)
        if self.rank == 0:
            ledger.finish()
        barrier(self.world)


# ---------------------------------------------------------------------------------------------------------------------
# Answers
# ---------------------------------------------------------------------------------------------------------------------


def read_prompts(args: argparse.Namespace, processor: VLProcessor) -> list[Row]:
    """The prompts of the data set, each with an `id`.

    Raises:
        InputError: rows that cannot be read or show videos, or a function that asks for what they do not have: before anything is sampled.
    """
    data_args = DataArguments(**{name: getattr(args, name) for name in OF_DATA})
    data = load_train_eval(data_args, "prompt", args.seed, Path(args.output).parent, ProcessorCheck(processor)).train
    for spec in args.reward_fn:
        Function(spec, args.reward_timeout, processor.encode_response).reward.check_columns(data)
    if args.limit is not None:
        data = data.select(range(min(args.limit, len(data))))
    rows = [row | {"id": str(i), "where": row.get("where") or f"row {i}"} for i, row in enumerate(data)]
    film = next((row for row in rows if row.get("videos")), None)
    if film is not None:
        raise InputError(f"{film['where']} shows a video, which data.sample does not: leave such rows out.")
    return rows


def fingerprint(rows: Sequence[Row]) -> str:
    """Changes with any prompt or picture's name."""
    return f"{stable_seed([(row['prompt'], image_key(row)) for row in rows]):x}"


def described(args: argparse.Namespace, data: str, weights: str | None, generation: dict[str, Any]) -> dict:
    """What the .meta.json of a stage says; two runs write into one file only if it is the same (eval/ledger.py)."""
    return {
        "task": "sample",
        "data": args.dataset_name,
        "data_sha256": data,
        "image_dir": args.image_root,
        "limit": args.limit,
        "checkpoint": args.url or base_model_path(args.model_name_or_path),
        "adapter": args.adapter,
        "weights": weights,
        "prompt": {"enable_thinking": args.enable_thinking},
        "generation": generation,
        "versions": versions(),
    }


def weights_of(model: str, adapter: str | None) -> str | None:
    """The fingerprint of a checkpoint and the adapter on it, if `model` is none itself."""
    base = base_model_path(model)
    return weights_fingerprint(base, adapter or (model if base != model else None))


def sample_here(args: argparse.Namespace, rows: list[Row], path: Path, processes: Processes) -> None:
    """Answers of a checkpoint: batches are fixed by rows and --batch_size, and each has its own seed."""
    answerer = load_answerer(args, args.model_name_or_path, args.adapter, processes.device)
    settings, recorded = generation_settings(args, answerer)
    meta = described(args, fingerprint(rows), weights_of(args.model_name_or_path, args.adapter), recorded)
    with processes.ledger(path, meta, rows, args.overwrite) as (ledger, done):
        runs = plan(rows, args.batch_size)
        numbered = [(run_number, batch) for run_number, batches in enumerate(runs) for batch in batches]
        todo = [
            (args.seed + number, batch, run_number)
            for number, (run_number, batch) in enumerate(numbered)
            if run_number % processes.world == processes.rank and any(row["id"] not in done for row in batch)
        ]
        loader = DataLoader(
            EncodedPrompts([batch for _, batch, _ in todo], answerer.prompt_collator),
            batch_size=None,
            num_workers=args.num_workers,
            collate_fn=None,
        )
        current = -1
        with tqdm(
            total=sum(len(b) for _, b, _ in todo), unit="row", desc="answers", disable=processes.rank != 0
        ) as bar:
            for (seed, _, run_number), (batch, encoded) in zip(todo, loader, strict=True):
                if run_number != current:
                    answerer.forget_images()
                    current = run_number
                # The whole batch, as the first time: same padding, same answers
                texts = chunks(answerer.answer(encoded, settings, seed, args.num_samples), args.num_samples)
                new = [
                    {"id": row["id"], "answers": of_row, "seed": seed}
                    for row, of_row in zip(batch, texts, strict=True)
                    if row["id"] not in done
                ]
                ledger.write(new)
                bar.update(len(batch))


def sample_there(
    args: argparse.Namespace, rows: list[Row], path: Path, processes: Processes, processor: VLProcessor
) -> None:
    """Answers of a server; each prompt has its own seed."""
    client = OpenAIClient(args.url, at_once=args.at_once)
    model = args.served_model or client.served_model()
    names = ("max_new_tokens", "temperature", "top_p", "num_samples", "seed")
    recorded = {name: getattr(args, name) for name in names} | {"served_model": model}
    with processes.ledger(path, described(args, fingerprint(rows), None, recorded), rows, args.overwrite) as (
        ledger,
        done,
    ):
        todo = [row for i, row in enumerate(rows) if i % processes.world == processes.rank and row["id"] not in done]
        prompts: dict[int, list[int]] = {}
        # Not what the checkpoint's generation_config.json says, which vLLM would take over
        plain = {} if args.checkpoint_settings else {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}

        def bodies() -> Iterator[Body]:
            for n, row in enumerate(todo):
                ((prompts[n],), _) = processor.encode_conversations([row["prompt"]], [row["images"]])
                yield chat_body(
                    model,
                    processor.api_messages(row["prompt"], row["images"]),
                    num_answers=args.num_samples,
                    max_tokens=args.max_new_tokens or 512,
                    temperature=args.temperature,
                    top_p=1.0 if args.top_p is None else args.top_p,
                    seed=args.seed + int(row["id"]),
                    tokens=False,
                    **plain,
                    **processor.api_fields(row["prompt"], prompts[n]),
                )

        with tqdm(total=len(todo), unit="row", desc="answers", disable=processes.rank != 0) as bar:

            def keep(n: int, reply: ChatReply) -> None:
                if reply.prompt_tokens not in (None, tokens := len(prompts.pop(n))):
                    client.warn_once(
                        "has read %d tokens of a prompt that has %d with %s. If it serves that checkpoint, then not with its chat template "
                        "and image processor (docs/serving.md).", reply.prompt_tokens, tokens, args.model_name_or_path,
                    )  # fmt: skip
                answers = [answer.text for answer in reply.answers]
                ledger.write([{"id": todo[n]["id"], "answers": answers, "seed": args.seed + int(todo[n]["id"])}])
                bar.update()

            client.chat_all(bodies(), keep, args.num_samples)


def load_answerer(args: argparse.Namespace, model: str, adapter: str | None, device: torch.device) -> Answerer:
    """A checkpoint that answers."""
    return Answerer(model, adapter, device, args.bf16, enable_thinking=args.enable_thinking)


def with_answers(rows: Sequence[Row], answers: Sequence[dict], model: str) -> list[Row]:
    """Rows whose answers differ, with the distinct ones as `responses`.

    Left out are empty answers, and those with an image token in them, which no row may have.
    """
    found = []
    for row, record in zip(rows, answers, strict=True):
        times = Counter(text for answer in record["answers"] if _usable(text := answer.strip()))
        if len(times) > 1:
            sampled = {"responses": [*times], "times": [*times.values()], "seed": record["seed"], "model": model}
            found.append(row | sampled)
    return found


def _usable(text: str) -> bool:
    return bool(text) and IMAGE_MARK not in text and not IMAGE_TOKENS.search(text)


# ---------------------------------------------------------------------------------------------------------------------
# Scores
# ---------------------------------------------------------------------------------------------------------------------


def scorers(args: argparse.Namespace, processor: VLProcessor, device: torch.device) -> Iterator[Scorer]:
    """The scorers of the command line, one model in memory at a time."""
    for folder in args.reward_model_name_or_path:
        yield RewardModel(folder, device, args.bf16, weights_of(folder, None))
    for spec in args.reward_fn:
        yield Function(spec, args.reward_timeout, processor.encode_response)
    if args.judge:
        yield Rating(args)
    if args.claims:
        model, adapter = args.claims_model or args.model_name_or_path, None if args.claims_model else args.adapter
        about = {"claims_model": model, "adapter": adapter, "weights": weights_of(model, adapter)}
        answerer = load_answerer(args, model, adapter, device)
        yield Claims(answerer, load_split(args.claims_fn), args.batch_size, about | {"claims_fn": args.claims_fn})


def score(args: argparse.Namespace, scorer: Scorer, rows: list[Row], path: Path, processes: Processes) -> None:
    """Write {id, scores} for every row."""
    answers = f"{stable_seed([(row['prompt'], image_key(row), row['responses']) for row in rows]):x}"
    with processes.ledger(path, described(args, answers, None, scorer.about), rows, args.overwrite) as (ledger, done):
        batches = [b for n, b in enumerate(chunks(rows, args.batch_size)) if n % processes.world == processes.rank]
        batches = [b for b in batches if any(row["id"] not in done for row in b)]
        with tqdm(total=sum(map(len, batches)), unit="row", desc=scorer.name, disable=processes.rank != 0) as bar:
            for batch in batches:
                scores = scorer.score(batch)
                ledger.write(
                    [
                        {"id": row["id"], "scores": of_row}
                        for row, of_row in zip(batch, scores, strict=True)
                        if row["id"] not in done
                    ]
                )
                bar.update(len(batch))


def ranked(row: Row, parts: dict[str, list[float | None]], weights: Sequence[float]) -> Row | None:
    """The row with the weighted sum of its scores and their ranks, best first; None where nothing is left to prefer.

    Args:
        parts: of each scorer, a number per response. An answer for which all say None is left out; a single None counts 0.
    """
    totals = [
        math.nan
        if all(v is None for v in values)
        else sum(w * (v or 0.0) for w, v in zip(weights, values, strict=True))
        for values in zip(*parts.values(), strict=True)
    ]
    order = sorted((k for k, total in enumerate(totals) if not math.isnan(total)), key=lambda k: -totals[k])
    scores = [float(totals[k]) for k in order]
    levels = sorted(set(scores), reverse=True)
    if len(levels) < 2:
        return None
    numbers = {f"score_{name}": [values[k] for k in order] for name, values in parts.items()} if len(parts) > 1 else {}
    return row | numbers | {
        "responses": [row["responses"][k] for k in order],
        "times": [row["times"][k] for k in order],
        "scores": scores,
        "ranks": [float(levels.index(s)) for s in scores],
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# The file and its page
# ---------------------------------------------------------------------------------------------------------------------


def html_page(rows: Sequence[Row], about: str) -> str:
    """The first prompts with their answers, best first."""
    cards = []
    for row in rows[:SHOWN]:
        own = {name: values for name, values in row.items() if name.startswith("score_")}
        answers = []
        for k, text in enumerate(row["responses"]):
            parts = [f"{name.removeprefix('score_')} {_number(values[k])}" for name, values in own.items()]
            numbers = [f"score {_number(row['scores'][k])}", *parts, f"{row['times'][k]} x"]
            answers.append((f"rank {int(row['ranks'][k]) + 1}", text, ", ".join(numbers)))
        cards.append(card(row["images"], row["prompt"], answers))
    title = "Sampled answers"
    return page(title, f"<h1>{title}</h1><p class='soft'>{html.escape(about)}</p>{''.join(cards)}", STYLE)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def write(args: argparse.Namespace, rows: list[Row], sampled: int) -> None:
    """The rows and the page; prints what they are.

    Raises:
        InputError: no prompt has two answers of different score.
    """
    pairs = sum(a < b for row in rows for a in row["ranks"] for b in row["ranks"])
    about = f"{len(rows)} of {sampled} prompts have answers of different score: {pairs} pairs with --pairs all"
    if not rows:
        raise InputError(
            f"{args.output}: no prompt has two answers of different score: raise --num_samples or --temperature, or take another score."
        )
    data_args = DataArguments(**{name: getattr(args, name) for name in OF_DATA})
    image_root = image_root_of(data_args)
    write_rows([{k: v for k, v in row.items() if k != "id"} for row in rows], "preference", args.output, image_root)
    write_text(Path(args.output).with_suffix(".html"), html_page(rows, about))
    mean = sum(max(row["scores"]) - min(row["scores"]) for row in rows) / len(rows)
    print(f"{args.output}: {about}; best and worst differ by {mean:.3g} on average")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All flags."""
    data = parser.add_argument_group("data")
    data.add_argument(
        "--dataset_name", required=True, help="as for the training scripts; rows of any kind serve as prompts"
    )
    data.add_argument("--data_path", help="file or folder of the data set")
    data.add_argument("--image_root", help="folder that image names are relative to; training wants the same")
    data.add_argument("--columns", help="names of the data's columns, as for the training scripts")
    data.add_argument("--data_ratio", type=float, default=1.0, help="this share of the rows")
    data.add_argument("--limit", type=int, help="the first N prompts only")
    data.add_argument("--on_bad_row", choices=["error", "drop"], default="error")
    add_switch(data, "--allow_outside_image_root", help="accept image paths that leave --image_root")
    data.add_argument("--output", required=True, help="ROWS.jsonl; the other files lie beside it")
    add_switch(data, "--overwrite", help="start again instead of going on")
    answers = parser.add_argument_group("answers")
    add_model_flags(answers)
    answers.add_argument(
        "--url",
        help="a server that answers, e.g. http://localhost:8000/v1; --model_name_or_path gives the chat template",
    )
    answers.add_argument("--served_model", help="its name for the model; by default the first that it lists")
    answers.add_argument("--at_once", type=int, default=32, help="requests to --url at a time")
    answers.add_argument("--num_samples", type=int, default=8, help="answers to each prompt")
    answers.add_argument("--temperature", type=float, default=1.0, help="of sampling")
    answers.add_argument("--top_p", type=float, help="of sampling; default: as the family says, 1")
    answers.add_argument(
        "--max_new_tokens", type=int, help="longest answer; default: the family's (1024), 512 with --url"
    )
    answers.add_argument("--seed", type=int, default=0, help="of sampling; another one for every round")
    answers.add_argument("--batch_size", type=int, default=8, help="prompts per batch and process")
    answers.add_argument("--num_workers", type=int, default=2, help="processes that decode images and tokenise")
    add_switch(answers, "--checkpoint_settings", help="take over the checkpoint's generation_config.json")
    add_thinking_flag(answers)
    add_switch(answers, "--bf16", help="weights and activations in bfloat16 (default float32)")
    scores = parser.add_argument_group("scores")
    add_flag(
        scores,
        "--reward_model_name_or_path",
        "--reward_adapter",
        nargs="+",
        default=[],
        help="output folders of train_rm.py",
    )
    scores.add_argument(
        "--reward_fn", nargs="+", default=[], help="file.py:name, or a name of base/reward_functions.py"
    )
    scores.add_argument(
        "--reward_timeout", type=float, default=1800, help="seconds that a call may take; 0: without limit"
    )
    add_switch(scores, "--claims", help="minus the claims that a model denies")
    scores.add_argument("--claims_model", help="the model that is asked; default: --model_name_or_path with --adapter")
    scores.add_argument(
        "--claims_fn",
        help="file.py:name of a function: an answer -> its claims as yes/no questions, asked as they are; default: the model splits",
    )
    scores.add_argument(
        "--reward_weights", type=float, nargs="+", help="of reward models, functions, judge, claims; 1 by default"
    )
    add_judge_arguments(parser)
    add_switch(scores, "--judge_text_only", help="the judge sees no pictures, because it cannot")
    parser.set_defaults(num_beams=None)


def check_flags(args: argparse.Namespace) -> int:
    """The number of scorers. Raises InputError for flags that do not fit together."""
    if not args.output.endswith(".jsonl"):
        raise InputError(f"--output {args.output}: name the file of the rows, something.jsonl.")
    if args.num_samples < 2:
        raise InputError("--num_samples must be 2 at least: answers to one prompt are compared.")
    if args.claims_fn and not args.claims:
        raise InputError("--claims_fn needs --claims True.")
    count = len(args.reward_model_name_or_path) + len(args.reward_fn) + bool(args.judge) + args.claims
    if not count:
        raise InputError(
            "Nothing scores the answers: give --reward_model_name_or_path, --reward_fn, --judge or --claims True."
        )
    if args.reward_weights is not None and len(args.reward_weights) != count:
        raise InputError(
            f"--reward_weights has {len(args.reward_weights)} numbers for {count} score(s): give one each."
        )
    return count


def main(argv: list[str] | None = None) -> None:
    """Sample, score, write."""
    parser = FlagParser(description=__doc__)
    add_arguments(parser)
    args = parser.parse_args(argv)
    count = check_flags(args)
    load_split(args.claims_fn)  # a wrong name is said before anything is sampled
    weights = args.reward_weights or [1.0] * count
    output = Path(args.output)
    args.judge_cache = args.judge_cache or str(output.with_suffix(".judge_cache.jsonl"))
    processor = processor_for(args.model_name_or_path, args.adapter, enable_thinking=args.enable_thinking)
    prompts = read_prompts(args, processor)
    with ranks() as (rank, world, device):
        processes = Processes(rank, world, device)
        answers_file = output.with_suffix(".answers.jsonl")
        if args.url:
            sample_there(args, prompts, answers_file, processes, processor)
        else:
            sample_here(args, prompts, answers_file, processes)
        rows = with_answers(prompts, list(read_records(answers_file)), args.adapter or args.model_name_or_path)
        parts: dict[str, list[list[float | None]]] = {}
        for scorer in scorers(args, processor, device):
            name = f"{scorer.name}_{len(parts)}" if scorer.name in parts else scorer.name
            file = output.with_suffix(f".{name}.jsonl")
            score(args, scorer, rows, file, processes)
            parts[name] = [record["scores"] for record in read_records(file)]
            del scorer
            gc.collect()
        if rank == 0:
            of_row = [{name: values[i] for name, values in parts.items()} for i in range(len(rows))]
            found = [ranked(row, own, weights) for row, own in zip(rows, of_row, strict=True)]
            write(args, [row for row in found if row is not None], len(prompts))


if __name__ == "__main__":
    run(main)
