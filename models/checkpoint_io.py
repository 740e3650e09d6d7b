"""Rewrite a checkpoint tensor by tensor: shared by the converters of families that were released as remote code.

Tensors are read one at a time and written in shards, so that memory use stays near one output shard, however large the
model is. Weights in `*.bin` files are read without unpickling (common/torch_zip.py).
"""

import functools
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from common.torch_zip import torch_zip

Tensors = tuple[torch.Tensor, ...]


def same(*tensors: torch.Tensor) -> Tensors:
    """Tensors that are only renamed."""
    return tensors


@dataclass
class Rule:
    """The tensors `old` of the original layout become the tensors `new` of the native one.

    Attributes:
        convert, revert: from the tensors of one side to those of the other; exact, so that a round trip gives the same
            bits.
    """

    old: tuple[str, ...]
    new: tuple[str, ...]
    convert: Callable[..., Tensors] = same
    revert: Callable[..., Tensors] = same


# ---------------------------------------------------------------------------------------------------------------------
# Reading


class TensorReader:
    """The tensors of a checkpoint folder by name, read from disk when asked for.

    Raises:
        FileNotFoundError: the folder holds no weights, or its index names a file that is missing.
        ValueError: a `.bin` file holds something other than tensors.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
        if not files:
            raise FileNotFoundError(f"{folder} holds no *.safetensors and no pytorch_model*.bin: download the weights.")
        for index in folder.glob(f"*{files[0].suffix}.index.json"):
            missing = set(json.loads(index.read_text())["weight_map"].values()) - {f.name for f in files}
            if missing:
                raise FileNotFoundError(f"{index} names {', '.join(sorted(missing))}, which {folder} does not hold.")
        self._source: dict[str, Callable[[], torch.Tensor]] = {}
        for file in files:
            self._source |= _safetensors(file) if file.suffix == ".safetensors" else torch_zip(file)

    def names(self) -> set[str]:
        """All tensors' names."""
        return set(self._source)

    def read(self, name: str) -> torch.Tensor:
        """One tensor, as it is stored; KeyError for a name that is not in `names()`."""
        return self._source[name]()


def _safetensors(file: Path) -> dict[str, Callable[[], torch.Tensor]]:
    def read(name: str) -> torch.Tensor:
        # Opened for every tensor: the file stays mapped, with its pages in memory, while a handle or tensor lives.
        with safe_open(file, framework="pt") as handle:
            return handle.get_tensor(name)

    with safe_open(file, framework="pt") as handle:
        return {name: functools.partial(read, name) for name in handle.keys()}  # noqa: SIM118  (a handle is not iterable)


# ---------------------------------------------------------------------------------------------------------------------
# Writing


class ShardWriter:
    """Writes tensors to `model*.safetensors`, a new file whenever `max_bytes` are buffered, and the index."""

    def __init__(self, folder: Path, max_bytes: int):
        self.folder = folder
        self.max_bytes = max_bytes
        self._held: dict[str, torch.Tensor] = {}
        self._held_bytes = 0
        self._shards: list[list[str]] = []
        self._total = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take a tensor; what is held goes to disk first if it would exceed `max_bytes`."""
        size = tensor.numel() * tensor.element_size()
        if self._held and self._held_bytes + size > self.max_bytes:
            self._flush()
        self._held[name] = tensor.contiguous()
        self._held_bytes += size
        self._total += size

    def _flush(self) -> None:
        save_file(self._held, self._file(len(self._shards)), metadata={"format": "pt"})
        self._shards.append(list(self._held))
        self._held, self._held_bytes = {}, 0

    def _file(self, shard: int, count: int | None = None) -> Path:
        if count == 1:
            return self.folder / "model.safetensors"
        return self.folder / f"model-{shard + 1:05d}-of-{count or 0:05d}.safetensors"

    def close(self) -> None:
        """Write what is held, give the shards their final names and write the index."""
        self._flush()
        count = len(self._shards)
        weight_map = {}
        for shard, names in enumerate(self._shards):
            file = self._file(shard).rename(self._file(shard, count))
            weight_map |= dict.fromkeys(names, file.name)
        if count > 1:
            index = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
            (self.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def rewrite(
    source: Path,
    target: Path,
    rules: Iterable[Rule],
    ignore: Callable[[str], bool] = lambda name: False,
    shapes: dict[str, torch.Size] | None = None,
    reverse: bool = False,
    max_shard_bytes: int = 4 << 30,
) -> None:
    """Stream every tensor of `source` through `rules` into `target`.

    Args:
        ignore: names that are dropped (buffers that the model computes).
        shapes: every native tensor's shape; checked on the native side in both directions.
        reverse: from the native names to the original ones.

    Raises:
        ValueError: a tensor is missing, unknown or has a shape that differs from the configuration's.
    """
    rules = [Rule(r.new, r.old, r.revert, r.convert) for r in rules] if reverse else list(rules)
    reader = TensorReader(source)
    expected = {name for rule in rules for name in rule.old}
    if missing := sorted(expected - reader.names()):
        raise ValueError(f"{source} lacks {_some(missing)}: the download is incomplete or this is another model.")
    if unknown := sorted(name for name in reader.names() - expected if not ignore(name)):
        raise ValueError(f"{source} holds {_some(unknown)}, which this converter does not know: this is another model.")
    if shapes is not None:
        native = expected if reverse else {name for rule in rules for name in rule.new}
        if native != set(shapes):
            raise ValueError(f"The converter and the model disagree about {_some(sorted(native ^ set(shapes)))}.")

    def check(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if shapes is not None and name in shapes and tensor.shape != shapes[name]:
            raise ValueError(
                f"{source}: {name} comes out as {tuple(tensor.shape)}, config.json says {tuple(shapes[name])}."
            )
        return tensor

    writer = ShardWriter(target, max_shard_bytes)
    for rule in rules:
        old = [check(name, reader.read(name)) if reverse else reader.read(name) for name in rule.old]
        for name, tensor in zip(rule.new, rule.convert(*old), strict=True):
            writer.add(name, tensor if reverse else check(name, tensor))
    writer.close()


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
