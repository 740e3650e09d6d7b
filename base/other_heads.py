"""Heads of reward models that other programs have trained, in the files in which they write them.

| program | file | names |
|---|---|---|
| TRL, ms-swift: `*ForSequenceClassification` | the model's weights, or the adapter's | `score.weight` |
| LLaMA-Factory, TRL's model with a value head | `value_head.safetensors` or `.bin`, or the model's weights | `v_head.summary.weight`, `.bias` |
| VL-RLHF | `rm_head.bin` | `weight`, `bias` |

All of them read the hidden state that lm_head would read, at the answer's last token, as we do.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from base.layout import ADAPTER_CONFIG, checkpoint_file
from common.errors import InputError
from common.torch_zip import torch_zip

# Names of such heads within a checkpoint: `score.weight`, `base_model.model.score.weight`, `v_head.summary.bias`, `rm_head.weight`, ...
HEAD_WEIGHT = re.compile(r"(?:^|\.)(score|classifier|v_head\.summary|v_head|rm_head)\.(?:\d+\.)?(weight|bias)$")


@dataclass(frozen=True)
class OtherHead:
    """A head of another program: `weight` (1, D) and maybe `bias` (1,)."""

    file: Path
    tensors: dict[str, Tensor]


def is_head_weight(name: str) -> bool:
    """Whether a weight of a checkpoint, or of an adapter, belongs to such a head."""
    return HEAD_WEIGHT.search(name) is not None


def other_head(folder: str) -> OtherHead | None:
    """The head in a checkpoint folder or hub repository, or None.

    Raises:
        InputError: the head has several outputs or layers, or the file is damaged.
    """
    for file, readers in _files(folder):
        found = {name: read for name, read in readers.items() if is_head_weight(name) or file.name == "rm_head.bin"}
        if not found:
            continue
        if len(found) > 2 or any(re.search(r"\.\d+\.(weight|bias)$", name) for name in found):
            raise InputError(
                f"{file} holds a head of several layers ({', '.join(sorted(found))}), which is not supported."
            )
        tensors = {name.rpartition(".")[2]: read() for name, read in found.items()}
        if "weight" not in tensors or len(tensors["weight"]) != 1:
            outputs = len(tensors.get("weight", ()))
            raise InputError(f"{file} holds a head with {outputs} outputs: a reward model has one.")
        return OtherHead(file, tensors)
    return None


def _files(folder: str) -> Iterator[tuple[Path, dict[str, Callable[[], Tensor]]]]:
    """The files in which a head may lie, and how to read their tensors."""
    beside = [checkpoint_file(folder, name) for name in ("value_head.safetensors", "value_head.bin", "rm_head.bin")]
    if checkpoint_file(folder, ADAPTER_CONFIG) is not None:
        weights = [checkpoint_file(folder, "adapter_model.safetensors")]
    elif (index := checkpoint_file(folder, "model.safetensors.index.json")) is not None:
        shards: dict[str, str] = json.loads(index.read_text())["weight_map"]
        weights = [checkpoint_file(folder, file) for file in {f for name, f in shards.items() if is_head_weight(name)}]
    else:
        weights = [checkpoint_file(folder, "model.safetensors")]
    for file in [*beside, *weights]:
        if file is not None:
            yield file, _torch_zip(file) if file.suffix == ".bin" else _safetensors(file)


def _safetensors(file: Path) -> dict[str, Callable[[], Tensor]]:
    def read(name: str) -> Callable[[], Tensor]:
        def tensor() -> Tensor:
            with safe_open(file, "pt") as opened:
                return opened.get_tensor(name)

        return tensor

    with safe_open(file, "pt") as opened:
        return {name: read(name) for name in opened.keys()}  # noqa: SIM118  not a dict


def _torch_zip(file: Path) -> dict[str, Callable[[], Tensor]]:
    try:
        return torch_zip(file)
    except ValueError as error:
        raise InputError(str(error)) from error
