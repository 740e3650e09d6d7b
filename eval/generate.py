"""Answer a benchmark with a model: file of questions -> answers.jsonl (and answers.meta.json, which describes the run).

    python -m eval.generate --task pope --data_path coco_pope/ --image_root val2014/ \
        --model_name_or_path runs/dpo --output runs/dpo/eval/pope.jsonl
    torchrun --nproc_per_node 8 -m eval.generate --task mme --data_path MME.tsv \
        --model_name_or_path llava-hf/llava-1.5-7b-hf --bf16 True --output A

1. Rows with the same image stand in the same batch, and the vision tower runs once per image.
2. Batches are fixed by the data and --batch_size alone, and each has its own seed: a run that is killed and repeated, on any
   number of ranks, ends in the same file as one that is not.
3. --likelihood (task seed) writes the mean token loss of every choice instead of an answer.
4. --url asks an inference server instead of a model in this process (docs/serving.md): what it has answered is kept when it fails.
"""

import argparse
import datetime
import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import GenerationConfig
from transformers.utils import ModelOutput

from args import run
from base.collator import VLPPODataCollator
from base.features import join_image_inputs, pooled_features
from base.layout import processor_path, weights_fingerprint
from base.loading import base_model_path, load_adapter, load_model
from base.packing import scatter_to_responses
from base.processor import VLProcessor
from base.shared_prefill import answers_of_one_prefill, beams_of_one_prefill
from common.errors import InputError
from common.flags import FlagParser
from common.openai_client import Unavailable
from eval.benchmark_files import TASKS, Row, check_images, prompt, read_task, with_image_marks
from eval.flags import add_data_flags, add_model_flags, add_switch, add_thinking_flag
from eval.ledger import Ledger
from eval.results import meta_path, read_meta, sha256, versions
from eval.served import ServedModel, choice_settings, served_settings
from models import core_mapper_for

Batch = list[Row]

# ---------------------------------------------------------------------------------------------------- ranks


@contextmanager
def ranks() -> Iterator[tuple[int, int, "torch.device"]]:
    """(rank, world size, device) under torchrun or alone; barriers go over gloo, ranks may finish hours apart."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if world > 1:
        torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(days=7))
    try:
        yield rank, world, device
    finally:
        if world > 1:
            torch.distributed.destroy_process_group()


def barrier(world: int) -> None:
    """Wait for the other processes, if there are any."""
    if world > 1:
        torch.distributed.barrier()


# -------------------------------------------------------------------------------------------------- batches


def image_key(row: Row) -> tuple[str, ...]:
    """The same for rows with the same images and videos: paths, or digests of embedded bytes."""
    images = (i if isinstance(i, str) else hashlib.sha1(i["bytes"]).hexdigest() for i in row["images"])
    return (*images, *("\n".join(files) for files in row.get("videos") or ()))


def plan(rows: list[Row], batch_size: int) -> list[list[Batch]]:
    """Batches in runs; the batches of a run share an image and must go to one rank.

    A group of rows with the same image is kept in one batch unless it is larger than a batch. Rows without images never stand
    beside rows with images, and those with videos beside none: some families want equally many frames in all.
    """
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(image_key(row), []).append(row)
    runs: list[list[Batch]] = []
    for key, members in groups.items():
        if members[0].get("videos"):
            runs.append([[row] for row in members])
        elif key and len(members) <= batch_size:
            last = runs[-1][-1] if runs and len(runs[-1]) == 1 else None
            alike = last is not None and last[0]["images"] and not last[0].get("videos")
            if alike and len(last) + len(members) <= batch_size:
                last.extend(members)
            else:
                runs.append([list(members)])
        elif key:
            runs.append(list(chunks(members, batch_size)))
        else:
            runs += [[batch] for batch in chunks(members, batch_size)]
    return runs


def chunks(items: list, size: int) -> Iterator[list]:
    """Consecutive lists of `size` items (the last may be shorter)."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


class EncodedBatches(torch.utils.data.Dataset):
    """Decoding, resizing and tokenising, one batch per item, in data-loader workers."""

    def __init__(self, batches: list[Batch], collator: VLPPODataCollator) -> None:
        self.batches, self.collator = batches, collator

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> tuple[Batch, list[dict]]:
        return self.batches[index], [self.encode(row) for row in self.batches[index]]

    def encode(self, row: Row) -> dict:
        """Token ids, image inputs of this row alone, and a digest of everything that its image features depend on."""
        messages = [{"role": "user", "content": with_image_marks(row["prompt"], len(row["images"]))}]
        try:
            return self.encode_messages(messages, row["images"], row.get("videos"))
        except InputError as error:
            raise InputError(f"row '{row['id']}': {error}") from error

    def encode_messages(self, messages: list[dict], images: list, videos: list[list[str]] | None = None) -> dict:
        """As `encode`, of a conversation that ends with a question."""
        row = {"images": images, "videos": videos, "prompt": messages}
        processor, batch = self.collator.processor, self.collator([row])
        (ids,), inputs = batch["prompts"], batch["img_input_dict"]
        # InstructBLIP's features depend on the question, too: what is equal in all inputs of the tower is shared, no more
        digest = hashlib.sha1()
        for name, value in sorted(inputs.items()):
            if name not in processor.per_token_keys and isinstance(value, torch.Tensor):
                digest.update(name.encode() + str(tuple(value.shape)).encode())
                digest.update(value.contiguous().view(torch.uint8).numpy())
        return {"ids": ids, "inputs": inputs, "digest": digest.hexdigest() if images or videos else None}


# ---------------------------------------------------------------------------------------------------- model


class Answerer:
    """A model with its processor, ready to answer batches.

    Args: `model` is a checkpoint or LoRA adapter folder; `adapter` a LoRA adapter folder on top of it; `rendering` goes to the
    processor.
    """

    def __init__(self, model: str, adapter: str | None, device: torch.device, bf16: bool, **rendering: Any) -> None:
        dtype = torch.bfloat16 if bf16 else torch.float32
        self.model = load_model(model, dtype=dtype)
        if adapter:
            if base_model_path(model) != model:
                raise InputError(
                    f"--model_name_or_path {model} is an adapter already; pass its base there, or no --adapter"
                )
            self.model = load_adapter(self.model, adapter)
        self.model = self.model.to(device).eval()
        self.device, self.dtype = device, dtype
        self.processor = processor_for(model, adapter, **rendering)
        self.processor.infer()
        self.checkpoint_settings = take_settings(self.core)
        family = core_mapper_for(model)
        self.prompt_collator = family.ppo_collator(self.processor)
        self.response_collator = family.dpo_collator(self.processor)
        self.tower_runs = 0  # images that the vision tower has seen
        self._features: dict[str, dict] = {}

    @property
    def core(self) -> torch.nn.Module:
        """The family's model inside peft's wrapper."""
        return self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model

    def to_device(self, inputs: dict) -> dict:
        """Tensors on the device of the model."""
        moved = {k: v.to(self.device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
        return {
            k: v.to(self.dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v
            for k, v in moved.items()
        }

    def forget_images(self) -> None:
        """Drop the features kept for rows with the same image."""
        self._features.clear()

    def features(self, encoded: list[dict]) -> dict:
        """What stands for the images of a batch in generate: the tower runs once per distinct image."""
        shared = []
        for item in encoded:
            if item["digest"] is None:
                continue
            if item["digest"] not in self._features:
                inputs = self.to_device(self.processor.pad_img_inputs(item["inputs"]))
                out = self.core.encode_images(inputs)
                self._features[item["digest"]] = {
                    k: v for k, v in out.items() if k not in self.processor.per_token_keys
                }
                self.tower_runs += 1
            shared.append(self._features[item["digest"]])
        joined = join_image_inputs([pooled_features(inputs) for inputs in shared])
        per_token = {
            k: [i["inputs"][k] for i in encoded] for k in self.processor.per_token_keys if k in encoded[0]["inputs"]
        }
        per_token = {k: [row for rows in v for row in rows] for k, v in per_token.items()}
        return joined | self.to_device(self.processor.pad_img_inputs(per_token))

    @torch.inference_mode()
    def answer(self, encoded: list[dict], settings: dict, seed: int, num_samples: int = 1) -> list[str]:
        """Greedy, beam or sampled answers to a batch of `EncodedBatches`.

        Args:
            num_samples: answers to each row, row after row.

        Every prompt is prefilled once for all its answers or beams; for sampled beams once for each.
        """
        ids = [item["ids"] for item in encoded]
        padding = self.processor.tokenizer.pad_token_id
        prompts = self.processor.pad(ids, padding).to(self.device)  # (B, L), padded on the left
        if num_samples > 1:
            settings = settings | {"custom_generate": answers_of_one_prefill, "num_answers": num_samples}
        elif (beams := settings.get("num_beams") or 1) > 1 and not settings.get("do_sample"):
            settings = settings | {"custom_generate": beams_of_one_prefill, "beams": beams, "num_beams": 1}
        if settings.get("stop_strings"):
            settings = settings | {"tokenizer": self.processor.tokenizer}
        torch.manual_seed(seed)
        out = self.model.generate(
            input_ids=prompts,
            attention_mask=self.processor.pad([[1] * len(i) for i in ids], 0).to(self.device),
            **self.features(encoded),
            **settings,
            pad_token_id=padding,
        )
        prompts = prompts.repeat_interleave(num_samples, 0)
        length = prompts.shape[1]
        if out.shape[1] >= length and torch.equal(out[:, :length], prompts):
            out = out[:, length:]  # else only new tokens are there (InstructBLIP generates from embeddings)
        return [self.processor.decode_response(ids) for ids in out.tolist()]

    def response_logps(self, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs of the response tokens of a packed batch (VLDPODataCollatorWithPadding) and their mask, (R, T) each."""
        mask = batch["completion_mask"].to(self.device)
        out = self._completions(batch, completion_ids=batch["completion_ids"].to(self.device)[mask])
        return scatter_to_responses(out.logps, mask), mask

    @torch.inference_mode()
    def greedy_tokens(self, batch: dict) -> torch.Tensor:
        """The likeliest token at the place of every response token, (N,) on the CPU."""
        hidden = self._completions(batch).hidden
        return self.core.get_output_embeddings()(hidden).argmax(-1).cpu()

    @torch.inference_mode()
    def _completions(self, batch: dict, **kwargs: torch.Tensor) -> ModelOutput:
        core = self.core
        index = batch["completion_index"][batch["completion_mask"]].to(self.device)
        images = core.encode_images(self.to_device(batch["img_input_dict"]))
        inputs = self.to_device({k: batch[k] for k in ("input_ids", "segment_ids")})
        packed = core.packed_inputs(
            inputs["input_ids"], inputs["segment_ids"], images, batch["packed"], batch["layout"]
        )
        return self.model(**packed, completion_index=index, **kwargs)


def take_settings(core: torch.nn.Module) -> dict:
    """Leave a checkpoint's generation settings nothing but its special tokens; return the others (repetition_penalty, ...)."""
    tokens = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
    taken = core.generation_config.to_diff_dict()
    for module in core.modules():
        config = getattr(module, "generation_config", None)
        if isinstance(config, GenerationConfig):
            module.generation_config = GenerationConfig(**{name: getattr(config, name) for name in tokens})
    about = (*tokens, "transformers_version", "_from_model_config")
    return {name: value for name, value in taken.items() if name not in about and value is not None}


def processor_for(model: str, adapter: str | None = None, **rendering: Any) -> VLProcessor:
    """The processor saved beside the adapter or the model, else that of the base under it.

    Args:
        rendering: see VLProcessor.
    """
    saved = adapter if adapter and processor_path(adapter) == adapter else model
    return core_mapper_for(model).processor(saved, **rendering)


# What evaluation decides, whatever a family says: one answer to a prompt, as token ids, its own batches
DECIDED = {"num_return_sequences": 1, "return_dict_in_generate": False, "generation_config": None}


def family_settings(model: torch.nn.Module) -> dict[str, Any]:
    """What a family's `prepare_default_generation_kwargs` says, without what evaluation decides.

    Raises:
        InputError: it asks for something else than evaluation decides.
    """
    settings = dict(model.prepare_default_generation_kwargs())
    settings.pop("pad_token_id", None)  # of the tokenizer, with which the batches are padded
    for name, decided in DECIDED.items():
        if (said := settings.pop(name, decided)) not in (decided, None):
            raise InputError(
                f"prepare_default_generation_kwargs of {type(model).__name__} says {name}={said}, which evaluation decides: leave "
                "it out (--num_samples writes several answers; settings stand in the dictionary itself)."
            )
    return settings


def generation_settings(args: argparse.Namespace, answerer: Answerer) -> tuple[dict, dict]:
    """Keyword arguments of generate, and what is recorded of them.

    Flags come first, then the checkpoint's generation_config.json if --checkpoint_settings asks for it, then what the
    family's `prepare_default_generation_kwargs` says, then greedy search.
    """
    settings = family_settings(answerer.core)
    if args.checkpoint_settings:
        settings |= answerer.checkpoint_settings
    names = ("max_new_tokens", "num_beams", "temperature", "top_p")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if "temperature" in given:
        given["do_sample"] = args.temperature > 0
    settings |= given
    samples = bool(settings.get("do_sample"))
    if samples:
        settings = {"temperature": 1.0, "top_p": 1.0, "top_k": 0} | settings
    elif "top_p" in given:
        raise InputError("--top_p belongs to sampling: add --temperature, above 0.")
    else:  # what belongs to sampling has no part in greedy search
        settings |= {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    said = {k: v for k, v in settings.items() if v is not None}
    recorded = json.loads(json.dumps(said, default=lambda value: type(value).__name__))  # objects by their class
    if samples:
        recorded["seed"] = args.seed
    if args.num_samples < 1 or (args.num_samples > 1 and (not samples or settings.get("num_beams", 1) > 1)):
        raise InputError(
            f"--num_samples {args.num_samples} needs --temperature above 0 and no beams: the answers would be equal."
        )
    if args.num_samples > 1:
        recorded["num_samples"] = args.num_samples
    return settings, recorded | {"dtype": str(answerer.dtype).removeprefix("torch.")}


def checkpoint_step(*paths: str | None) -> int | None:
    """The step in the name of a checkpoint-123 folder."""
    found = (re.fullmatch(r"checkpoint-(\d+)", Path(p).name) for p in paths if p)
    return next((int(m[1]) for m in found if m), None)


def rendering_of(args: argparse.Namespace) -> dict[str, Any]:
    """What --enable_thinking says, and the day on which a run began that this one goes on with: some templates print it."""
    described = meta_path(args.output)
    began = None
    if described.is_file() and not args.overwrite:
        began = read_meta(args.output).get("prompt", {}).get("date")
    date = datetime.date.fromisoformat(began) if began else None
    return {"enable_thinking": args.enable_thinking, "date": date}


def describe(args: argparse.Namespace, recorded: dict, facts: dict | None = None) -> dict:
    """answers.meta.json, which scorers copy into results.json. `facts` are those of the chat template."""
    base = base_model_path(args.model_name_or_path) if args.model_name_or_path else None
    adapter = args.adapter or (args.model_name_or_path if base != args.model_name_or_path else None)
    return {
        "task": args.task,
        "data": str(args.data_path),
        "data_sha256": sha256(args.data_path),
        "image_dir": args.image_root,
        "limit": args.limit,
        "checkpoint": base,
        "adapter": adapter,
        "weights": weights_fingerprint(base, adapter)
        if base
        else None,  # the same folder may hold another model by now
        "step": checkpoint_step(args.adapter, args.model_name_or_path),
        "prompt": {"suffix": getattr(args, "suffix", None)} | (facts or {}),
        "generation": recorded,
        "batch_size": args.batch_size,
        "world_size": int(os.environ.get("WORLD_SIZE", 1)),
        "versions": versions(),
    }


# ----------------------------------------------------------------------------------------------------- runs


def answer_rows(args: argparse.Namespace, rows: list[Row], answerer: Answerer, rank: int, world: int) -> dict:
    """Write an answer for every row that has none yet; return {"rows": on this rank, "images": tower runs}."""
    check_images(rows)
    settings, recorded = generation_settings(args, answerer)
    described = describe(args, recorded, answerer.processor.template.facts)
    ledger = Ledger(args.output, described, [str(r["id"]) for r in rows], rank, args.overwrite)
    barrier(world)
    done = ledger.open()
    barrier(world)
    for row in rows:
        row["prompt"] = prompt(args.task, row, args.suffix)
    todo: list[tuple[int, Batch, int]] = []  # (seed, batch, run)
    number = 0
    for run_number, batches in enumerate(plan(rows, args.batch_size)):
        for batch in batches:
            number += 1
            if run_number % world == rank and any(row["id"] not in done for row in batch):
                todo.append((args.seed + number, batch, run_number))
    loader = DataLoader(
        EncodedBatches([batch for _, batch, _ in todo], answerer.prompt_collator),
        batch_size=None,
        num_workers=args.num_workers,
        collate_fn=None,
    )
    count, current = 0, -1
    total = sum(row["id"] not in done for _, batch, _ in todo for row in batch)
    with tqdm(total=total, unit="row", desc=args.task, disable=rank != 0) as bar:
        for (seed, _, run_number), (batch, encoded) in zip(todo, loader, strict=True):
            if run_number != current:
                answerer.forget_images()
                current = run_number
            # The whole batch, as the first time: same padding, same answers
            K = args.num_samples
            texts = list(chunks(answerer.answer(encoded, settings, seed, K), K))
            new = [_record(row, of_row) for row, of_row in zip(batch, texts, strict=True) if row["id"] not in done]
            ledger.write(new)
            count += len(new)
            bar.update(len(new))
    ledger.close()
    barrier(world)
    if rank == 0:
        ledger.finish()
    return {"rows": count, "images": answerer.tower_runs}


def _record(row: Row, answers: list[str]) -> dict:
    """A line of answers.jsonl."""
    return {"id": row["id"], "prompt": row["prompt"], "answer": answers[0], **_samples(answers), **_shown(row)}


def _samples(answers: list[str]) -> dict:
    """All of several answers; scorers read the first one."""
    return {"answers": answers} if len(answers) > 1 else {}


def _shown(row: Row) -> dict:
    """Small fields that make answers.jsonl readable by itself."""
    paths = [i for i in row["images"] if isinstance(i, str)]
    extra = {k: row[k] for k in ("label", "category", "split", "choices", "videos") if k in row}
    return ({"images": paths} if paths else {}) | extra


def choice_losses(args: argparse.Namespace, rows: list[Row], answerer: Answerer, rank: int, world: int) -> dict:
    """Write {id, losses}: mean loss over each choice's tokens, end token included, all choices of a question in one row."""
    check_images(rows)
    answerer.processor.train()
    collator = answerer.response_collator
    recorded = {"likelihood": True, "choice": "{text}", "dtype": str(answerer.dtype).removeprefix("torch.")}
    described = describe(args, recorded, answerer.processor.template.facts)
    ledger = Ledger(args.output, described, [str(r["id"]) for r in rows], rank, args.overwrite)
    barrier(world)
    done = ledger.open()
    barrier(world)
    count = 0
    batches = [b for n, b in enumerate(chunks(rows, args.batch_size)) if n % world == rank]
    batches = [b for b in batches if any(r["id"] not in done for r in b)]
    with tqdm(total=sum(map(len, batches)), unit="row", desc=f"{args.task} likelihood", disable=rank != 0) as bar:
        for batch in batches:
            packed = collator.responses_only(
                [
                    {"images": r["images"], "prompt": [{"role": "user", "content": r["bare_question"]}],
                     "responses": list(r["choices"].values())}
                    for r in batch
                ]
            )  # fmt: skip
            logps, mask = answerer.response_logps(packed)
            losses = (-logps.sum(1) / mask.sum(1)).view(len(batch), -1).tolist()  # (B, 4)
            new = [{"id": r["id"], "losses": x} for r, x in zip(batch, losses, strict=True) if r["id"] not in done]
            ledger.write(new)
            count += len(new)
            bar.update(len(batch))
    ledger.close()
    barrier(world)
    if rank == 0:
        ledger.finish()
    return {"rows": count}


def ask_server(args: argparse.Namespace, rows: list[Row]) -> dict:
    """Write what an inference server answers, or with --likelihood the losses of the choices, for every row that has none yet."""
    check_images(rows)
    processor = None
    if args.model_name_or_path:
        processor = processor_for(args.model_name_or_path, args.adapter, **rendering_of(args))
    served = ServedModel(args.url, args.served_model, processor, args.batch_size)
    recorded = choice_settings(served) if args.likelihood else served_settings(args, served)
    described = describe(args, recorded, processor.template.facts if processor else None)
    described |= {"url": served.client.shown_url, "checkpoint": described["checkpoint"] or served.model}
    ledger = Ledger(args.output, described, [str(r["id"]) for r in rows], 0, args.overwrite)
    done = ledger.open()
    left = [(n, row) for n, row in enumerate(rows) if row["id"] not in done]
    with tqdm(total=len(left), unit="row", desc=args.task) as bar:

        def write(record: dict) -> None:
            ledger.write([record])
            bar.update()

        try:
            if args.likelihood:
                served.choice_losses(
                    [row for _, row in left], lambda row, found: write({"id": row["id"], "losses": found})
                )
            else:
                for _, row in left:
                    row["prompt"] = prompt(args.task, row, args.suffix)
                served.answers(left, recorded, lambda row, texts: write(_record(row, texts)))
        except Unavailable as error:
            raise InputError(f"{error}; the rows so far are kept, run the command again to go on.") from error
        finally:
            ledger.close()
    ledger.finish()
    return {"rows": len(left)}


def add_generation_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags that eval.generate and eval.sweep share."""
    parser.add_argument("--limit", type=int, help="the first N rows only; marked in every table")
    parser.add_argument("--suffix", help="instruction after the question, in place of the task's own")
    parser.add_argument(
        "--batch_size", type=int, default=8, help="rows per batch and rank; with --url requests at a time"
    )
    parser.add_argument("--max_new_tokens", type=int, help="default: the family's (1024)")
    parser.add_argument("--num_beams", type=int, help="default 1; RLAIF-V reports Object HalBench with 3")
    parser.add_argument("--temperature", type=float, help="0 is greedy; default: as the family says, greedy")
    parser.add_argument("--top_p", type=float, help="of sampling; default: as the family says, 1")
    add_switch(
        parser,
        "--checkpoint_settings",
        help="take over the checkpoint's generation_config.json (repetition_penalty, ...)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of sampling")
    parser.add_argument(
        "--num_samples", type=int, default=1, help="answers per row, with --temperature; the column `answers` has all"
    )
    add_thinking_flag(parser)
    add_switch(parser, "--bf16", help="weights and activations in bfloat16 (default float32)")
    parser.add_argument("--num_workers", type=int, default=2, help="processes that decode images and tokenise")
    add_switch(parser, "--overwrite", help="start again instead of going on")


def main(argv: list[str] | None = None) -> None:
    """Run the command line (`argv` in its place)."""
    parser = FlagParser(description=__doc__)
    parser.add_argument("--task", required=True, choices=list(TASKS))
    add_model_flags(parser, required=False)
    parser.add_argument(
        "--url",
        help="ask an inference server, http://host:8000/v1 (docs/serving.md); --model_name_or_path is then what it serves, whose prompts its own are "
        "compared with, and may be left out",
    )
    parser.add_argument("--served_model", help="with --url: the model's name there; default: the first one listed")
    add_data_flags(parser)
    parser.add_argument("--output", required=True, help="answers.jsonl")
    add_switch(parser, "--likelihood", help="seed: losses of the choices instead of answers")
    add_generation_arguments(parser)
    args = parser.parse_args(argv)
    if args.likelihood and args.task != "seed":
        raise InputError("--likelihood is a variant of --task seed only; leave it out")
    if not args.url and not args.model_name_or_path:
        raise InputError("give --model_name_or_path, a checkpoint, hub id or adapter folder, or the --url of a server")
    if args.served_model and not args.url:
        raise InputError("--served_model names a model of --url: give that, too, or leave it out")
    rows = read_task(args.task, args.data_path, args.image_root, args.limit)
    if args.url:
        print(
            f"{args.output}: {len(rows)} rows; asked for {ask_server(args, rows)['rows']} at {args.url.split('@')[-1]}"
        )
        return
    with ranks() as (rank, world, device):
        answerer = Answerer(args.model_name_or_path, args.adapter, device, args.bf16, **rendering_of(args))
        write = choice_losses if args.likelihood else answer_rows
        facts = write(args, rows, answerer, rank, world)
        if rank == 0:
            print(f"{args.output}: {len(rows)} rows; on rank 0 " + ", ".join(f"{v} {k}" for k, v in facts.items()))


if __name__ == "__main__":
    run(main)
