"""State dicts in `*.bin` files, torch's zip archives, read without unpickling.

The archive's index is *interpreted* opcode by opcode with a whitelist of what a state dict needs, and nothing named in it
is ever imported or called.
"""

import functools
import pickletools
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

STORAGE_DTYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "BoolStorage": torch.bool,
}


def torch_zip(file: Path) -> dict[str, Callable[[], torch.Tensor]]:
    """Tensors of a `torch.save`d state dict by name, each read from the archive's raw storages when asked for.

    Raises:
        ValueError: the file is no such archive, or holds something other than tensors.
    """
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
