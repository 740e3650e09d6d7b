"""Data sets: every format becomes checked rows of one kind. `load_train_eval` is what the scripts call.

To add a format, write a loader (data_args -> datasets.Dataset) and enter it into DATASET_MAP. A loader may return the
columns of any kind as they are (data/rows.py); marks, texts and images are checked here.
"""

import copy
import functools
import hashlib
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, Value, concatenate_datasets

from args import DataArguments
from common.errors import InputError
from common.files import write_json_lines
from data import (
    conversational,
    hadpo,
    llava_instruct,
    mmrlhf,
    plain_dpo,
    rlaifv,
    rlhfv,
    scenes,
    vlfeedback_paired,
    vlquery_json,
)
from data.columns import used_and_left_out
from data.rows import OPTIONAL, REQUIRED, Kind, features_of, shorten
from data.source import image_root_of
from data.splits import held_out, interleaved, kept
from data.stream import RowStream, StreamedRows, Streaming, streaming_of
from data.verify import Verdicts, verify

__all__ = ["DATASET_MAP", "DataSplits", "load_train_eval", "streaming_of"]

logger = logging.getLogger(__name__)

Loader = Callable[[DataArguments], Dataset]
# (usable rows, their kind, sizes of their images (see Verdicts), processes) -> why a row cannot be used, or None
RowCheck = Callable[[Dataset, Kind, pa.ChunkedArray, int | None], Sequence[str | None]]


# Any other --dataset_name is a hub id or a path in TRL's conversational format.
DATASET_MAP: dict[str, Loader] = {
    "shapes": scenes.load,
    "plain_dpo": plain_dpo.load,
    "vlquery_json": vlquery_json.load,
    "vlfeedback_paired": vlfeedback_paired.load,
    "rlhfv": rlhfv.load,
    "rlaifv": rlaifv.load,
    "mmrlhf": mmrlhf.load,
    "llava_instruct": llava_instruct.load,
    "hadpo": hadpo.load,
}


class DataSplits(NamedTuple):
    """train and eval (or None) are map-style data sets on disk; info (counts, fingerprint) goes into run.json."""

    train: Dataset
    eval: Dataset | None
    info: dict[str, object]


class _Part(NamedTuple):
    """One file of one data set after the checks."""

    name: str
    rows: Dataset  # usable rows only
    group: np.ndarray  # (N,) int64
    content: np.ndarray  # (N,) int64
    counts: dict[str, object]
    refused: list[dict[str, object]]


def load_train_eval(
    data_args: DataArguments,
    kind: Kind,
    seed: int,
    output_dir: str | os.PathLike[str] | None = None,
    check: RowCheck | None = None,
    streaming: Streaming | None = None,
) -> DataSplits:
    """All rows of `--dataset_name`, checked, split by content and interleaved.

    Evaluation rows are `--eval_ratio` of the rows or those of `--eval_data_path`; a training row with the images and the
    first question of an evaluation row is never in `train`. `--data_ratio` then keeps a share of both. Call it on the
    main process first (`with training_args.main_process_first():`), the others read its cache.

    Args:
        kind: what the script trains on. Preference and conversation rows also serve as prompts.
        output_dir: where `bad_rows.jsonl` is written if any row is refused or skipped.
        check: what else makes a row a bad one (base.row_checks.ProcessorCheck: what the model's processor refuses).
        streaming: `streaming_of`, with `--streaming`: rows are not loaded, but read as they come.

    Raises:
        InputError: an unreadable file, bad rows with `--on_bad_row error`, flags that do not fit together, no rows left.
    """
    _check_shares(data_args)
    weights = _weights(data_args)
    if data_args.streaming:
        return _streamed(data_args, kind, seed, output_dir, check, streaming, weights)
    parts = [_load_part(args, kind, check) for args in per_name(data_args, "data_path")]
    eval_parts = [_load_part(args, kind, check) for args in per_name(data_args, "eval_data_path") if args.data_path]
    _report_refused([*parts, *eval_parts], data_args.on_bad_row, output_dir)

    group = np.concatenate([part.group for part in parts])
    if eval_parts:
        held = np.isin(group, np.concatenate([part.group for part in eval_parts]))
    elif data_args.eval_ratio:
        held = held_out(group, data_args.eval_ratio, seed)
    else:
        held = np.zeros(len(group), dtype=bool)
    trains, evals, starts = [], [], np.cumsum([0, *(len(part.rows) for part in parts)])
    for i, part in enumerate(parts):
        out = held[starts[i] : starts[i + 1]]
        keep = kept(len(part.rows), data_args.data_ratio, seed)
        trains.append(_select(part, ~out & keep))
        part.counts["train"] = len(trains[-1].rows)
        if eval_parts:
            part.counts["left_out_as_in_eval_data"] = int(out.sum())
        elif data_args.eval_ratio:
            evals.append(_select(part, out & keep))
            part.counts["eval"] = len(evals[-1].rows)
        if not len(trains[-1].rows):
            first = f"; the first: {part.refused[0]['where']}: {part.refused[0]['reason']}" if part.refused else ""
            why = "all usable ones are evaluation rows" if out.any() else f"none can be used{first}"
            raise InputError(
                f"--dataset_name {part.name} has no row left to train on, of {part.counts['rows']} ({why})."
            )
    evals = eval_parts or evals
    order = interleaved([len(part.rows) for part in trains], weights, seed)
    train = _joined(trains, order)
    held_rows = _joined(evals) if evals else None
    if held_rows is not None and not len(held_rows):
        raise InputError("No row is left to evaluate on: raise --eval_ratio or --data_ratio, or give --eval_data_path.")
    drawn = np.searchsorted(np.cumsum([len(part.rows) for part in trains]), order, side="right")
    for i, part in enumerate(parts):
        part.counts["drawn_per_epoch"] = int((drawn == i).sum())
    content = np.concatenate([part.content for part in trains])[order]
    info: dict[str, object] = {
        "train_rows": len(train),
        "eval_rows": len(held_rows) if held_rows is not None else 0,
        "train_fingerprint": hashlib.blake2b(content.tobytes(), digest_size=16).hexdigest(),
        "sets": [part.counts for part in parts],
    }
    if eval_parts:
        info["eval_sets"] = [part.counts for part in eval_parts]
    return DataSplits(train, held_rows, info)


def _check_shares(data_args: DataArguments) -> None:
    if data_args.eval_ratio and data_args.eval_data_path:
        raise InputError("--eval_ratio and --eval_data_path both say what to evaluate on: give one of them.")
    if data_args.data_ratio <= 0:
        raise InputError("--data_ratio 0 leaves no rows: give a share above 0.")


def _streamed(
    data_args: DataArguments,
    kind: Kind,
    seed: int,
    output_dir: str | os.PathLike[str] | None,
    check: "RowCheck | None",
    streaming: Streaming | None,
    weights: list[float] | None,
) -> DataSplits:
    """Training rows that are read as they come, and evaluation rows of files of their own, loaded as without `--streaming`."""
    if streaming is None:
        raise InputError("--streaming is for the training scripts: leave it out here.")
    streams = []
    for args in per_name(data_args, "data_path"):
        stream = DATASET_MAP.get(args.dataset_name, conversational.load)(args)
        if not isinstance(stream, RowStream):
            raise InputError(f"--dataset_name {args.dataset_name} is not read from a file: leave --streaming out.")
        if not stream.serves(kind):
            raise InputError(_other_kind(args.dataset_name, stream.kind, kind))
        streams.append(stream)
    if len(streams) > 1 and weights is None:
        raise InputError("--streaming does not know how many rows the data sets have: give --dataset_weights.")
    whole = [copy.copy(args) for args in per_name(data_args, "eval_data_path") if args.data_path]
    for args in whole:
        args.streaming = False
    evals = [_load_part(args, kind, check) for args in whole]
    _report_refused(evals, data_args.on_bad_row, None)
    held_rows = _joined(evals) if evals else None
    held_out = {int(group) for part in evals for group in part.group}
    train = StreamedRows(
        streams,
        kind,
        length=streaming.length,
        shuffle=streaming.shuffle,
        seed=seed,
        weights=weights,
        check=check,  # type: ignore[arg-type]
        held_out=held_out,
        output_dir=output_dir,
    )
    info: dict[str, object] = {
        "streaming": True,
        "train_rows": streaming.length,
        "eval_rows": len(held_rows) if held_rows is not None else 0,
        "train_fingerprint": train.fingerprint,
        "sets": [{"name": s.data_args.dataset_name, "file": s.data_args.data_path} for s in streams],
    }
    if evals:
        info["eval_sets"] = [part.counts for part in evals]
    return DataSplits(train, held_rows, info)  # type: ignore[arg-type]  # as a Dataset, but for what needs all rows


def _other_kind(name: str, have: Kind, kind: Kind, columns: str = "") -> str:
    uses = {
        "conversation": "train_sft.py",
        "preference": "train_dpo.py and train_rm.py",
        "unpaired": "train_dpo.py --loss_type kto",
        "prompt": "train_ppo.py",
    }
    labels = " (leave the labels out of conversations with --columns =label)" if have == "unpaired" else ""
    return (
        f"--dataset_name {name} holds {have} rows{columns}, which {uses[have]} can train on, not {kind} rows: choose another "
        f"data set or script{labels}, or name its columns with --columns (docs/data.md)."
    )


def load_rows(data_args: DataArguments, kind: Kind | None = None) -> tuple[Dataset, Kind]:
    """Converted rows of one data set, bad ones included (columns `problem`, `skipped`), and their kind.

    Raises:
        InputError: the data set is unreadable, or holds no rows of `kind`.
    """
    rows = DATASET_MAP.get(data_args.dataset_name, conversational.load)(data_args)
    if "problem" not in rows.column_names:  # a loader that leaves the checks to us
        rows = conversational.convert_dataset(rows, data_args, data_args.data_path or data_args.dataset_name, want=kind)
    have = next(k for k, columns in REQUIRED.items() if set(columns) <= set(rows.column_names))
    if kind is None or have == kind:
        return rows, have
    if kind == "prompt":
        return _as_prompts(rows, have), kind
    found = about_columns(rows)
    names = [*found["columns_read"], *found["columns_kept"]]  # type: ignore[misc]
    columns = f" (of the columns {shorten(', '.join(names))})" if names else ""
    raise InputError(_other_kind(data_args.dataset_name, have, kind, columns))


def _as_prompts(rows: Dataset, have: Kind) -> Dataset:
    features = features_of("prompt", _holds_bytes(rows))
    answers = features_of(have, False).keys() - features.keys()
    features |= {name: rows.features[name] for name in rows.column_names if name not in (*features, *answers)}
    if have == "conversation":
        return rows.map(_last_answer_off, remove_columns=["messages"], features=Features(features), desc="To prompts")
    return rows.remove_columns([name for name in rows.column_names if name in answers])


def _last_answer_off(row: dict) -> dict:
    messages = row["messages"] or [{"content": None}]
    return {"prompt": messages[:-1], "reference": messages[-1]["content"]}


def _load_part(args: DataArguments, kind: Kind, check: RowCheck | None) -> _Part:
    rows, verdicts, _ = checked_rows(args, kind, check)
    refused = refused_rows(rows, verdicts, args.dataset_name)
    good = np.array([problem is None for problem in verdicts.problem], dtype=bool)
    bad = sum(not entry["skipped"] for entry in refused)
    counts: dict[str, object] = {"name": args.dataset_name, "file": args.data_path, "rows": len(rows), "bad": bad}
    counts["skipped"] = len(refused) - bad
    counts |= about_columns(rows)
    usable = rows.remove_columns([name for name in ("problem", "skipped", "columns") if name in rows.column_names])
    part = _Part(args.dataset_name, usable, verdicts.group, verdicts.content, counts, refused)
    part = _select(part, good)
    counts["duplicates"] = len(part.content) - len(np.unique(part.content))
    counts["without_image"] = without_image(part.rows)
    if left_out := counts["columns_left_out"]:
        listed = ", ".join(f"{name} ({why})" for name, why in left_out.items())  # type: ignore[attr-defined]
        logger.warning("%s: columns that are not kept: %s.", args.data_path or args.dataset_name, listed)
    if counts["without_image"] == len(part.rows) > 0 and args.image_root:
        logger.warning(
            "%s: NOT ONE ROW HAS AN IMAGE, though --image_root %s is given. The model will see texts alone. Columns read: %s; "
            "kept as your own: %s.",
            args.data_path or args.dataset_name,
            args.image_root,
            ", ".join(counts["columns_read"]) or "-",  # type: ignore[arg-type]
            ", ".join(counts["columns_kept"]) or "-",  # type: ignore[arg-type]
        )
    return part


def about_columns(rows: Dataset) -> dict[str, object]:
    """Which of a file's columns were read, kept as columns of the user's own, and left out (with the reason)."""
    used, left_out = used_and_left_out(rows)
    kind: Kind = next(k for k, columns in REQUIRED.items() if set(columns) <= set(rows.column_names))
    project = {*features_of(kind, False), "problem", "skipped", "columns"}
    kept = [name for name in rows.column_names if name not in project]
    return {"columns_read": used, "columns_kept": kept, "columns_left_out": left_out}


def without_image(rows: Dataset) -> int:
    """Rows without any image or video."""
    if not len(rows):
        return 0
    columns = [name for name in ("images", "videos") if name in rows.column_names]
    table = rows.select_columns(columns).with_format("arrow")[:]
    lengths = [pc.fill_null(pc.list_value_length(table[name]), 0) for name in columns]
    return pc.sum(pc.equal(functools.reduce(pc.add, lengths), 0)).as_py() or 0


def checked_rows(
    args: DataArguments, kind: Kind | None, check: RowCheck | None = None, decode: bool = False
) -> tuple[Dataset, Verdicts, Kind]:
    """All rows of one data set, the verdict on each (rows, images, pairs, then `check`), and their kind.

    Raises:
        InputError: as `load_rows`.
    """
    if args.streaming:
        raise InputError("--streaming is for the training scripts: leave it out here.")
    rows, kind = load_rows(args, kind)
    preference = kind == "preference"
    verdicts = verify(
        rows,
        kind,
        image_root_of(args),
        args.allow_outside_image_root,
        pairs=args.pairs if preference else None,
        score_margin=args.score_margin if preference else None,
        num_proc=args.dataset_num_proc,
        decode=decode,
        check_images=args.check_images,
    )
    good = [i for i, problem in enumerate(verdicts.problem) if problem is None]
    if check is not None and good:
        reasons = check(rows.select(good), kind, verdicts.sizes.take(good), args.dataset_num_proc)
        problem = list(verdicts.problem)
        for i, reason in zip(good, reasons, strict=True):
            problem[i] = reason
        verdicts = verdicts._replace(problem=problem)
    return rows, verdicts, kind


def refused_rows(rows: Dataset, verdicts: Verdicts, name: str) -> list[dict[str, object]]:
    """What bad_rows.jsonl lists: {"source", "where", "skipped", "reason"} of every row with a problem."""
    indices = [i for i, problem in enumerate(verdicts.problem) if problem is not None]
    wheres = rows.select_columns(["where"]).select(indices)["where"]
    return [
        {"source": name, "where": where, "skipped": bool(verdicts.skipped[i]), "reason": verdicts.problem[i]}
        for i, where in zip(indices, wheres, strict=True)
    ]


def _report_refused(parts: list[_Part], on_bad_row: str, output_dir: str | os.PathLike[str] | None) -> None:
    refused = [entry for part in parts for entry in part.refused]
    if not refused:
        return
    path = None
    if output_dir is not None and os.environ.get("RANK", "0") == "0":
        path = Path(output_dir) / "bad_rows.jsonl"
        write_json_lines(path, refused)
    bad = [entry for entry in refused if not entry["skipped"]]
    rows = sum(int(part.counts["rows"]) for part in parts)  # type: ignore[call-overload]
    if bad and on_bad_row == "error":
        first = f"{bad[0]['where']}: {bad[0]['reason']}"
        if len(bad) == 1:
            raise InputError(f"{first}. Rows count from 0. --on_bad_row drop would leave the row out.")
        listed = f"all are listed in {path}" if path else "python -m data.check lists all"
        raise InputError(
            f"{len(bad)} of {rows} rows cannot be used (rows count from 0; {listed}). The first: {first}. Fix them, or "
            "leave them out with --on_bad_row drop."
        )
    for skipped, what in ((False, "dropped as they cannot be used"), (True, "left out as they hold no preference")):
        entries = [entry for entry in refused if entry["skipped"] == skipped]
        if entries:
            first = f"{entries[0]['where']}: {entries[0]['reason']}"
            logger.warning("%d of %d rows are %s; the first: %s", len(entries), rows, what, first)


def _select(part: _Part, mask: np.ndarray) -> _Part:
    if mask.all():
        return part
    return part._replace(
        rows=part.rows.select(np.flatnonzero(mask)), group=part.group[mask], content=part.content[mask]
    )


def _joined(parts: list[_Part], order: np.ndarray | None = None) -> Dataset:
    """The parts in one data set with equal columns: optional ones that no part fills are left out."""
    image_bytes = any(_holds_bytes(part.rows) for part in parts)
    filled = Counter(name for part in parts for name in OPTIONAL if _has_values(part.rows, name))
    sets = []
    for part in parts:
        rows = part.rows.remove_columns([n for n in OPTIONAL if n in part.rows.column_names and not filled[n]])
        sets.append(_with_image_bytes(rows) if image_bytes else rows)
    joined = concatenate_datasets(_with_equal_types(sets)) if len(sets) > 1 else sets[0]
    if order is None or np.array_equal(order, np.arange(len(joined))):
        return joined
    return joined.select(order)


def _with_equal_types(sets: list[Dataset]) -> list[Dataset]:
    """The sets, of which a column of the user's own that has another type in another set is left out."""
    types: dict[str, set[str]] = {}
    for rows in sets:
        for name, feature in rows.features.items():
            types.setdefault(name, set()).add(str(feature))
    differing = [name for name, found in types.items() if len(found) > 1]
    if differing:
        logger.warning("Columns of different types in different data sets are left out: %s.", ", ".join(differing))
    return [rows.remove_columns([name for name in differing if name in rows.column_names]) for rows in sets]


def _has_values(rows: Dataset, name: str) -> bool:
    if name not in rows.column_names:
        return False
    column = rows.data.column(name)
    return column.null_count < len(column)


def _holds_bytes(rows: Dataset) -> bool:
    return not isinstance(rows.features["images"].feature, Value)


def _with_image_bytes(rows: Dataset) -> Dataset:
    """File names as {"bytes": None, "path"}, where another set of the run brings its images as bytes."""
    if _holds_bytes(rows):
        return rows
    kind: Kind = next(k for k, columns in REQUIRED.items() if set(columns) <= set(rows.column_names))
    features = Features(rows.features | {n: f for n, f in features_of(kind, True).items() if n in rows.column_names})
    return rows.map(_wrap_paths, features=features, desc="Joining data sets")


def _wrap_paths(row: dict) -> dict:
    out: dict[str, object] = {"images": [{"bytes": None, "path": path} for path in row["images"]]}
    if row.get("image_rejected") is not None:
        out["image_rejected"] = {"bytes": None, "path": row["image_rejected"]}
    return out


def per_name(data_args: DataArguments, path_field: str) -> Iterator[DataArguments]:
    """The arguments of each data set: names, paths and image roots are comma lists of one length."""
    names = [name.strip() for name in data_args.dataset_name.split(",")]
    paths = _aligned(getattr(data_args, path_field), len(names), f"--{path_field}")
    roots = _aligned(data_args.image_root, len(names), "--image_root", repeat=True)
    columns = (data_args.columns or "").split(";")
    if len(columns) not in (1, len(names)):
        raise InputError(
            f"--columns {data_args.columns} has {len(columns)} maps for {len(names)} names of --dataset_name: give one per "
            "name, separated by semicolons."
        )
    columns = columns * len(names) if len(columns) == 1 else columns
    for name, path, root, own in zip(names, paths, roots, columns, strict=True):
        if not name:
            raise InputError(f"--dataset_name {data_args.dataset_name} holds an empty name: take the comma out.")
        args = copy.copy(data_args)
        args.dataset_name, args.data_path, args.image_root, args.columns = name, path, root, own or None
        yield args


def _aligned(value: str | None, length: int, flag: str, repeat: bool = False) -> list[str | None]:
    if value is None:
        return [None] * length
    values: list[str | None] = [part.strip() or None for part in value.split(",")] if length > 1 else [value]
    if repeat and len(values) == 1:
        return values * length
    if len(values) != length:
        raise InputError(
            f"{flag} {value} has {len(values)} entries for {length} names of --dataset_name: give one per name, "
            "empty where a set needs none (a.json,,b.json)."
        )
    return values


def _weights(data_args: DataArguments) -> list[float] | None:
    if data_args.dataset_weights is None:
        return None
    names = data_args.dataset_name.split(",")
    try:
        weights = [float(weight) for weight in data_args.dataset_weights.split(",")]
    except ValueError:
        weights = []
    if len(weights) != len(names) or not all(0 < weight < float("inf") for weight in weights):
        raise InputError(
            f"--dataset_weights {data_args.dataset_weights} must be one number above 0 per name of --dataset_name "
            f"({len(names)}), such as .7,.3."
        )
    return weights
