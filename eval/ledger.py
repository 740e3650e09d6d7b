"""An append-only JSON-lines file that several ranks write, that survives a kill, and that ends up whole and in order.

Every rank appends to its own part (`answers.jsonl.part-0`, ...), one write per batch. A rerun reads all parts, whatever the
number of ranks was, ignores a line that a kill has torn, and goes on with what is missing. `finish` merges the parts.
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path

from common.errors import InputError
from common.files import write_json, write_json_lines, write_text
from eval.files import read_records
from eval.results import meta_path, read_meta

# what must be equal for two runs to write into one file
SAME = ("task", "data_sha256", "image_dir", "limit", "checkpoint", "adapter", "weights", "prompt", "generation")


class Ledger:
    """The rows that are done, and the file that takes the next ones.

    Args: `path` of the merged file; `meta` describes the run and is stored beside it; `ids` all rows of this run, in order.
    Raises InputError when the existing file was written with other settings.
    """

    def __init__(self, path: str | Path, meta: dict, ids: list[str], rank: int = 0, overwrite: bool = False) -> None:
        self.path, self.meta, self.ids, self.rank = Path(path), meta, ids, rank
        self._file = None
        if overwrite and rank == 0:
            for old in (self.path, meta_path(self.path), *self._parts()):
                old.unlink(missing_ok=True)

    def open(self) -> set[str]:
        """Return the ids that are done. To be called by every rank, between two barriers: reading comes before writing."""
        described = meta_path(self.path)
        if described.exists():
            old = read_meta(self.path)
            for key in SAME:
                if key == "weights" and key not in old:  # of an earlier version
                    continue
                if old.get(key) != self.meta.get(key):
                    raise InputError(
                        f"{self.path} was written with {key} {old.get(key)}, now it is {self.meta.get(key)}; "
                        "pass another --output, or --overwrite to start again"
                    )
        elif self.path.exists():
            raise InputError(f"{self.path} exists without {described.name}; pass another --output, or --overwrite")
        return {row["id"] for row in self._rows()} & set(self.ids)

    def write(self, rows: list[dict]) -> None:
        """Append the rows of one batch."""
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.rank == 0:
                write_json(meta_path(self.path), self.meta)
            part = self._part(self.rank)
            if part.exists():  # cut a torn last line, or the next row would be glued to it
                text = part.read_text(encoding="utf-8")
                write_text(part, text[: text.rfind("\n") + 1])
            self._file = open(part, "a", encoding="utf-8")  # noqa: SIM115  until close()
        self._file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        self._file.flush()

    def close(self) -> None:
        """Close the part of this rank."""
        if self._file is not None:
            self._file.close()

    def finish(self) -> None:
        """Rank 0, after all ranks have closed: merge the parts in row order. Raises InputError if a row is missing."""
        found = {row["id"]: row for row in self._rows()}
        missing = [i for i in self.ids if i not in found]
        if missing:
            raise InputError(f"{self.path}: {len(missing)} rows are missing, the first is '{missing[0]}'; run it again")
        write_json(meta_path(self.path), self.meta)
        write_json_lines(self.path, (found[i] for i in self.ids))
        for part in self._parts():
            part.unlink()

    def _part(self, rank: int) -> Path:
        return self.path.with_name(f"{self.path.name}.part-{rank}")

    def _parts(self) -> list[Path]:
        return sorted(self.path.parent.glob(f"{self.path.name}.part-*"))

    def _rows(self) -> Iterable[dict]:
        if self.path.exists():
            yield from read_records(self.path)
        for part in self._parts():
            whole, _, _torn = part.read_text(encoding="utf-8").rpartition("\n")
            for number, line in enumerate(whole.split("\n"), 1):
                try:
                    row = json.loads(line or "null")
                except ValueError:
                    row = None
                if isinstance(row, dict) and "id" in row:
                    yield row
                elif line:
                    print(f"{part}, line {number} is damaged and is answered again.", file=sys.stderr)
