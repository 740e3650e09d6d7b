"""`--streaming`: rows are read, checked and handed out one after the other; nothing is copied to disk or counted beforehand.

The data set that a script sees has a length, that of the run (--max_steps), and is read in order: the row after the last one
comes at no cost, an earlier one starts the files again, a later one reads on up to it. So a resumed run goes on with the rows
that it would have had, without making batches of the others. Every process and every worker reads all rows and passes over
those of the others.
"""

import hashlib
import json
import logging
import operator
import os
import random
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from args import DataArguments, VLConfig
from common.errors import InputError
from common.seeds import stable_seed
from data.convert import Reader
from data.files import RecordStream
from data.rows import Kind, Row, features_of
from data.verify import verify_row

logger = logging.getLogger(__name__)

BUFFER = 1000  # rows of which the next one is drawn
BUFFER_OF_BYTES = 100  # the same where rows hold their pictures


class RowCheck(Protocol):
    """What else makes a row a bad one (base.row_checks.ProcessorCheck)."""

    def of_row(self, row: Row, kind: Kind, sizes: Sequence[int] | None) -> str | None:
        """Why a row cannot be used, or None. `sizes`: width and height of each picture; None: no file was looked at."""


class Streaming(NamedTuple):
    """How many rows a run takes, and whether they are shuffled."""

    length: int
    shuffle: bool = True


def streaming_of(data_args: DataArguments, training_args: VLConfig) -> Streaming | None:
    """What a run with `--streaming` reads; None without the flag.

    Raises:
        InputError: a flag that needs to know all rows, or none of those that say how long the run is.
    """
    if not data_args.streaming:
        return None
    if training_args.max_steps <= 0:
        raise InputError("--streaming does not know the number of rows: say with --max_steps how long to train.")
    if training_args.train_sampling_strategy in ("group_by_length", "batch_rebalance"):
        raise InputError(
            f"--train_sampling_strategy {training_args.train_sampling_strategy} compares all rows, which --streaming does not "
            "know: leave one of them out."
        )
    for name, why in (
        ("precompute_ref_log_probs", "passes over all rows before training"),
        ("packing", "puts rows from anywhere in the data together"),
        ("dynamic_sampling", "draws further prompts from anywhere in the data"),
    ):
        if getattr(training_args, name, False):
            raise InputError(f"--{name} {why}, which --streaming cannot do: leave one of them out.")
    per_step = training_args.train_batch_size * training_args.gradient_accumulation_steps * training_args.world_size
    per_step *= getattr(training_args, "num_mini_batches", 1)
    rows = per_step // (getattr(training_args, "rollouts_per_prompt", None) or 1)
    return Streaming(training_args.max_steps * rows, training_args.train_sampling_strategy != "sequential")


class RowStream:
    """Rows of one data set, each with `problem`, `skipped` and `columns`. What `load_source` returns with `--streaming`."""

    def __init__(
        self,
        records: RecordStream,
        data_args: DataArguments,
        reader: Reader,
    ) -> None:
        self.records, self.data_args, self.reader = records, data_args, reader
        self.kind, self.label, self.image_root = reader.kind, reader.label, reader.image_root

    def __iter__(self) -> Iterator[Row]:
        for index, raw in enumerate(self.records):
            row, own = self.reader.row(raw, index)
            yield own | {name: value for name, value in row.items() if value is not None or name == "problem"}

    def serves(self, kind: Kind) -> bool:
        """Whether rows of `kind` can be made of these."""
        return kind in (self.kind, "prompt")

    def as_kind(self, row: Row, kind: Kind) -> Row:
        """The row as one of `kind`: any row without its answers is a prompt."""
        if kind == self.kind:
            return row
        if self.kind in ("preference", "unpaired"):
            answers = features_of(self.kind, False).keys() - features_of("prompt", False).keys()
            return {name: value for name, value in row.items() if name not in answers}
        messages: list = row["messages"]  # type: ignore[assignment]
        rest = {name: value for name, value in row.items() if name != "messages"}
        return rest | {"prompt": messages[:-1], "reference": messages[-1]["content"]}


class StreamedRows:
    """`length` usable rows of one or several streams, in order: what trainers take for their training rows."""

    def __init__(
        self,
        streams: Sequence[RowStream],
        kind: Kind,
        *,
        length: int,
        seed: int,
        weights: Sequence[float] | None = None,
        shuffle: bool = True,
        check: RowCheck | None = None,
        held_out: Collection[int] = (),
        output_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        """
        Args:
            weights: of which each stream gets its share of the rows.
            shuffle: draw each row from the next BUFFER ones.
            held_out: groups (`data.verify.Verdicts`) of evaluation rows, which are passed over.
            output_dir: where bad_rows.jsonl is written.

        Raises:
            InputError: the first row cannot be read, or none can be used.
        """
        self.streams, self.kind, self.length, self.seed = list(streams), kind, length, seed
        self.weights = list(weights) if weights is not None else [1.0] * len(self.streams)
        self.shuffle, self.check, self.held_out, self.output_dir = shuffle, check, frozenset(held_out), output_dir
        self.tests: list[Callable[[Row], str | None]] = []
        self._rows: Iterator[Row]
        self._last: Row  # the one that was read last
        self._process: int | None  # that reads
        self._read: int  # rows so far
        self._refused: int
        self._left_out: set[str]
        self._start_over()
        self.column_names = list(self[0])

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Row:
        index = operator.index(index)
        if not 0 <= index < self.length:
            raise IndexError(index)
        # A worker has the parent's place, but may not read on in its files.
        if os.getpid() != self._process or index < self._read - 1:
            self._start_over()
        while self._read <= index:
            self._last, self._read = next(self._rows), self._read + 1
        return dict(self._last)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_rows", "_last")} | {
            "_process": None
        }

    def only(self, test: Callable[[Row], str | None]) -> "StreamedRows":
        """The same without the rows for which `test` gives a reason; starts over."""
        self.tests.append(test)
        self._start_over()
        return self

    def unique(self, column: str) -> list[str]:
        """As a Dataset's, of the one column that is known without reading all rows: `source`, the names of the data sets."""
        if column != "source":
            raise InputError(f"--streaming does not know all values of {column}.")
        return [stream.data_args.dataset_name for stream in self.streams]

    @property
    def fingerprint(self) -> str:
        """Of the files' names, sizes, beginnings and ends: other rows in their middle cannot be told without reading all."""
        known = [[stream.label, stream.records.state, stream.kind] for stream in self.streams]
        return hashlib.blake2b(json.dumps([known, self.weights]).encode(), digest_size=16).hexdigest()

    # -- reading ---------------------------------------------------------------------------------------------------------

    def _start_over(self) -> None:
        self._process, self._read, self._refused = os.getpid(), 0, 0
        self._left_out, self._last = set(), {}
        self._rows = self._drawn() if self.shuffle else self._mixed()

    def _drawn(self) -> Iterator[Row]:
        """Rows at random out of a buffer, which each one that is taken fills up again."""
        rng, rows = random.Random(stable_seed(self.seed, "stream")), self._mixed()
        first = next(rows)
        images: list = first["images"]  # type: ignore[assignment]
        size = BUFFER_OF_BYTES if images and isinstance(images[0], dict) else BUFFER
        buffer = [first, *(next(rows) for _ in range(min(size, self.length) - 1))]
        for row in rows:
            place = rng.randrange(len(buffer))
            yield buffer[place]
            buffer[place] = row

    def _mixed(self) -> Iterator[Row]:
        """Rows of all streams, each next one of the stream that lacks most of its share."""
        rows = [self._usable(stream) for stream in self.streams]
        taken = [0] * len(rows)
        while True:
            lacking = [
                weight * (sum(taken) + 1) / sum(self.weights) - n for weight, n in zip(self.weights, taken, strict=True)
            ]
            i = max(range(len(rows)), key=lacking.__getitem__)
            taken[i] += 1
            yield next(rows[i])

    def _usable(self, stream: RowStream) -> Iterator[Row]:
        """The rows of a stream that can be used, again and again."""
        first_pass = True
        while True:
            found = False
            for row in stream:
                reason, skipped = self._problem(stream, row)
                if reason is None:
                    found = True
                    row = stream.as_kind(row, self.kind)
                    yield {name: value for name, value in row.items() if name not in ("problem", "skipped", "columns")}
                elif first_pass:
                    self._refuse(stream, row, reason, skipped)
            if not found:
                raise InputError(f"{stream.label}: no row can be used{self._listed()}.")
            first_pass = False

    def _problem(self, stream: RowStream, row: Row) -> tuple[str | None, bool]:
        """Why a row is passed over, and whether that is no mistake."""
        args = stream.data_args
        if row["problem"] is None:
            self._tell_left_out(stream, str(row["columns"]))
            preference = self.kind == "preference"
            verdict = verify_row(
                row,
                stream.kind,
                stream.image_root,
                args.allow_outside_image_root,
                pairs=args.pairs if preference else None,
                score_margin=args.score_margin if preference else None,
                look=args.check_images == "all",
            )
            if verdict.problem is not None:
                return verdict.problem, verdict.skipped
            if verdict.group in self.held_out:
                return "is an evaluation row as well", True
            row = stream.as_kind(row, self.kind)
            reason = self.check.of_row(row, self.kind, verdict.sizes) if self.check is not None else None
            return reason or next((found for test in self.tests if (found := test(row))), None), False
        return str(row["problem"]), bool(row["skipped"])

    # -- what is said ----------------------------------------------------------------------------------------------------

    def _refuse(self, stream: RowStream, row: Row, reason: str, skipped: bool) -> None:
        if not skipped and stream.data_args.on_bad_row == "error":
            raise InputError(f"{row['where']}: {reason}. Rows count from 0. --on_bad_row drop would leave the row out.")
        worker = torch.utils.data.get_worker_info()
        if os.environ.get("RANK", "0") != "0" or (worker is not None and worker.id):
            return
        self._refused += 1
        if self.output_dir is not None:
            path = Path(self.output_dir) / "bad_rows.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            entry = {
                "source": stream.data_args.dataset_name,
                "where": row["where"],
                "skipped": skipped,
                "reason": reason,
            }
            with open(path, "w" if self._refused == 1 else "a", encoding="utf-8") as file:
                file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        if str(self._refused).strip("0") == "1":  # the first, the tenth, the hundredth, ...
            logger.warning(
                "%d rows are left out so far%s; the last: %s: %s", self._refused, self._listed(), row["where"], reason
            )

    def _listed(self) -> str:
        return (
            f" (listed in {Path(self.output_dir) / 'bad_rows.jsonl'})"
            if self.output_dir is not None and self._refused
            else ""
        )

    def _tell_left_out(self, stream: RowStream, columns: str) -> None:
        left_out = json.loads(columns).get("left_out", {}) if "left_out" in columns else {}
        new = {name: why for name, why in left_out.items() if name not in self._left_out}
        self._left_out |= new.keys()
        if new and torch.utils.data.get_worker_info() is None:
            listed = ", ".join(f"{name} ({why})" for name, why in new.items())
            logger.warning("%s: columns that are not kept: %s.", stream.label, listed)


def without_column(name: str, reader: str) -> Callable[[Row], str | None]:
    """A test for `StreamedRows.only`: rows that lack a column."""

    def test(row: Row) -> str | None:
        return f"has no {name}, which {reader} reads: add it to the row" if row.get(name) is None else None

    return test
