"""Rewrite a checkpoint tensor by tensor: shared by the converters of families that were released as remote code.

Tensors are read one at a time and written in shards, so that memory use stays near one output shard, however large the
model is. Weights in `*.bin` files (torch's zip archive) are read without unpickling: the archive's index is
*interpreted* opcode by opcode with a whitelist of what a state dict needs, and nothing named in it is ever imported or
called.
"""

import functools
import json
import pickletools
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

Tensors = tuple[torch.Tensor, ...]

STORAGE_DTYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "BoolStorage": torch.bool,
}


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
            self._source |= _safetensors(file) if file.suffix == ".safetensors" else _torch_zip(file)

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


def _torch_zip(file: Path) -> dict[str, Callable[[], torch.Tensor]]:
    """Tensors of a `torch.save`d state dict, read from the archive's raw storages."""
    if not zipfile.is_zipfile(file):
        raise ValueError(
            f"{file} is not a zip archive (it was saved by torch < 1.6): save it again with a current torch."
        )
    archive = zipfile.ZipFile(file)
    root = next(name for name in archive.namelist() if name.endswith("/data.pkl")).removesuffix("data.pkl")
    if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") != b"little":
        raise ValueError(f"{file} was saved on a big-endian machine: save it again on a little-endian one.")
    state = _interpret_state_dict(archive.read(f"{root}data.pkl"), file)

    def read(storage: "_Storage", offset: int, shape: tuple, stride: tuple) -> torch.Tensor:
        with archive.open(f"{root}data/{storage.key}") as stream:
            flat = torch.frombuffer(bytearray(stream.read()), dtype=storage.dtype)
        return flat.as_strided(shape, stride, offset).clone()

    return {name: functools.partial(read, *view) for name, view in state.items()}


@dataclass(frozen=True)
class _Global:
    name: str


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: torch.dtype


_MARK = object()


def _interpret_state_dict(program: bytes, file: Path) -> dict[str, tuple]:  # noqa: C901  (a case per opcode)
    """Run the pickle program of a state dict on a stack of plain data: {name: (storage, offset, shape, stride)}.

    Only dictionaries, tuples, numbers, strings and the three callables that torch writes for a tensor are understood.
    """
    stack: list = []
    memo: dict[int, object] = {}

    def pop_mark() -> list:
        at = len(stack) - 1 - stack[::-1].index(_MARK)
        items = stack[at + 1 :]
        del stack[at:]
        return items

    def call(function: object, arguments: tuple) -> object:
        match function:
            case _Global("collections OrderedDict") if not arguments:
                return {}
            case _Global("torch._utils _rebuild_tensor_v2") if isinstance(arguments[0], _Storage):
                return tuple(arguments[:4])
            case _Global("torch._utils _rebuild_parameter"):
                return arguments[0]
        raise ValueError(f"{file} wants to call {function}, which a file of weights never needs: it is not read.")

    def storage(identifier: tuple) -> _Storage:
        _, kind, key, *_ = identifier  # ("storage", type, key, device, number of elements)
        dtype = STORAGE_DTYPES.get(kind.name.removeprefix("torch ")) if isinstance(kind, _Global) else None
        if dtype is None:
            raise ValueError(f"{file} holds a storage of type {kind}, which no released checkpoint uses.")
        return _Storage(key, dtype)

    for opcode, argument, _ in pickletools.genops(program):
        match opcode.name:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "MARK":
                stack.append(_MARK)
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_TUPLE":
                stack.append(())
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode.name == "NEWTRUE")
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINUNICODE" | "SHORT_BINUNICODE":
                stack.append(argument)
            case "GLOBAL":
                stack.append(_Global(argument))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(_Global(f"{module} {name}"))
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "TUPLE":
                stack.append(tuple(pop_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                n = int(opcode.name[-1])
                stack[-n:] = [tuple(stack[-n:])]
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                stack[-1][key] = value
            case "SETITEMS":
                items = pop_mark()
                stack[-1].update(zip(items[::2], items[1::2], strict=True))
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                stack.append(call(function, arguments))
            case "BINPERSID":
                stack.append(storage(stack.pop()))
            case "BUILD":
                stack.pop()  # the `_metadata` attribute of a module's state dict
            case name:
                raise ValueError(f"{file} holds the opcode {name}, which no file of weights needs: it is not read.")
    state = stack.pop()
    if not isinstance(state, dict) or not all(isinstance(view, tuple) and len(view) == 4 for view in state.values()):
        raise ValueError(f"{file} is not a flat dictionary of tensors: it is not read.")
    return state


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
