"""LoRA adapter + base -> one plain checkpoint."""

import json
import os
import shutil
from pathlib import Path

import torch

from base.heads import REWARD_HEAD, load_head, save_head
from base.layout import check_base_of_adapter, checkpoint_fingerprint, processor_path
from base.loading import base_model_path, load_adapter, load_model
from common.errors import InputError
from common.files import check_writable
from models import core_mapper_for


def bits_of(adapter: str) -> int | None:
    """The quantisation that an adapter was trained on, according to the run.json of its run: 4, 8 or None.

    run.json lies in the run's folder: beside the final adapter, or above a checkpoint's.
    """
    for folder in (Path(adapter), Path(adapter).parent):
        if (folder / "run.json").is_file():
            flags = json.loads((folder / "run.json").read_text())["arguments"]["ModelArguments"]
            return flags["bits"] if flags.get("q_lora") else None
    return None


def merge(base: str, adapter: str, bits: int | None = None, dtype: torch.dtype | str = "auto") -> torch.nn.Module:
    """The base model with the adapter's update added to its weights.

    Args:
        bits: 4 or 8 for an adapter that was trained on a quantised base. The base is quantised and dequantised again,
            so that the result is the model that was trained, quantisation error included. None adds the update to the
            weights as they are on disk.
        dtype: of the result; "auto" is the base's dtype, float32 with `bits`.

    Raises:
        InputError: `adapter` is not a LoRA adapter, was trained on other weights than `base` has, or on other layers.
    """
    if base_model_path(adapter) == adapter:
        raise InputError(f"{adapter} has no adapter_config.json: give the output folder of a run with --use_lora True.")
    _check_base(base, adapter)
    if bits is not None and dtype == "auto":
        dtype = torch.float32
    model = load_model(base, dtype=dtype, bits=bits)
    if bits is not None:
        model = model.dequantize()
    model = load_adapter(model, adapter)
    try:
        return model.merge_and_unload(safe_merge=True)
    except (RuntimeError, ValueError) as error:  # a trained bias where the layer has none, a sum that is not finite
        raise InputError(f"The adapter in {adapter} cannot be merged: {' '.join(str(error).split())[:300]}") from error


def merge_to(
    base: str, adapter: str, out: str | Path, bits: int | None = None, dtype: torch.dtype | str = "auto"
) -> None:
    """Write what `merge` returns as a plain checkpoint with processor, and with a reward model's head.

    The folder appears only when it is complete: it is written under another name first.

    Raises:
        InputError: as `merge`; or `out` holds files already.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists already: give a folder that is empty or does not exist.")
    check_writable(str(out.parent), "The folder of the merged model")
    model = merge(base, adapter, bits, dtype)
    aside = out.with_name(f".{out.name}.incomplete")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        model.save_pretrained(aside)
        core_mapper_for(base).processor(adapter if processor_path(adapter) == adapter else base).save_pretrained(aside)
        if (Path(adapter) / REWARD_HEAD).is_file():
            save_head(model, load_head(adapter, REWARD_HEAD, model).state_dict(), str(aside), REWARD_HEAD)
        if out.exists():
            out.rmdir()
        os.rename(aside, out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _check_base(base: str, adapter: str) -> None:
    """Refuse any base but the one that the adapter was trained on, if that one still exists, or is described."""
    check_base_of_adapter(adapter, base)
    trained_on = base_model_path(adapter)
    if os.path.isdir(trained_on) and checkpoint_fingerprint(trained_on) != checkpoint_fingerprint(base):
        raise InputError(
            f"The adapter in {adapter} was trained on {trained_on}, which has other weights than {base}: give that base."
        )
