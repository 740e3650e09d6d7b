"""What lies in a checkpoint's folder, and in that of a LoRA adapter."""

import functools
import hashlib
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoProcessor, PreTrainedConfig, PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils import cached_file, logging

from common.errors import InputError

logger = logging.get_logger(__name__)
# Fields that processors of older checkpoints lack -> where config.json has them
PROCESSOR_FIELDS: dict[str, Callable[[PreTrainedConfig], Any]] = {
    "patch_size": lambda config: config.vision_config.patch_size,
    "vision_feature_select_strategy": lambda config: getattr(config, "vision_feature_select_strategy", "default"),
    "num_query_tokens": lambda config: config.num_query_tokens,
}
ADAPTER_CONFIG = "adapter_config.json"
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")


def base_model_path(model_name_or_path: str) -> str:
    """The checkpoint itself or, for a LoRA adapter folder, the base that its adapter_config.json names."""
    adapter = Path(model_name_or_path) / ADAPTER_CONFIG
    if not adapter.is_file():
        return model_name_or_path
    try:
        base = json.loads(adapter.read_text()).get("base_model_name_or_path")
    except ValueError as error:
        raise InputError(f"{adapter} is damaged ({error}): take another checkpoint, or copy the file again.") from error
    if not base:
        raise InputError(
            f"{adapter} names no base_model_name_or_path: add the checkpoint that the adapter was trained on."
        )
    base = _where_base_lies(base, adapter.parent.absolute())
    if (Path(base) / ADAPTER_CONFIG).is_file() and not (Path(base) / "config.json").is_file():
        raise InputError(
            f"{adapter} names {base} as its base, which is an adapter itself: merge that one with merge_lora.py, and name the "
            "merged checkpoint there."
        )
    return base


def without_cwd(model_name_or_path: str) -> str:
    """A folder's absolute path, so that what names it can be read from any working folder; a hub id as it is."""
    return os.path.abspath(model_name_or_path) if Path(model_name_or_path).is_dir() else model_name_or_path


@functools.cache
def _where_base_lies(base: str, adapter: Path) -> str:
    """Where the base is that an adapter names: there, or, if both have moved together, at the same place beside or above the adapter.

    Of a path that is gone the longest tail counts that a checkpoint has: for /old/runs/sft and the adapter /new/runs/dpo
    that is /new/runs/sft. Of what may be a hub id, "name/model", only the whole.
    """
    if Path(base).is_dir():
        return without_cwd(base)
    parts = [part for part in Path(base).parts if part not in ("/", "..")]
    shortest = 1 if os.path.isabs(base) or len(Path(base).parts) != 2 or base.startswith(".") else 2
    for length in range(len(parts), shortest - 1, -1):
        for folder in adapter.parents:
            place = folder.joinpath(*parts[-length:])
            if (place / "config.json").is_file():
                logger.warning("The base of the adapter %s is no longer at %s: taking %s.", adapter, base, place)
                return str(place)
    return base


def processor_path(model_name_or_path: str) -> str:
    """Where a checkpoint's processor lies: an adapter folder without one, as other trainers write it, has its base's."""
    saved = any((Path(model_name_or_path) / name).is_file() for name in PROCESSOR_FILES)
    return model_name_or_path if saved else base_model_path(model_name_or_path)


def native_processor(model_name_or_path: str, **kwargs: Any) -> ProcessorMixin:
    """The transformers processor that lies in a folder or on the hub; `kwargs` go to AutoProcessor.from_pretrained.

    Raises:
        InputError: there is none, it is damaged, or it is a tokenizer alone.
    """
    try:
        processor = AutoProcessor.from_pretrained(model_name_or_path, **kwargs)
    except Exception as error:  # of the many kinds that a damaged file makes tokenizers and image processors raise
        if damaged := damaged_file(model_name_or_path):
            raise InputError(f"{damaged}: copy or download the file again.") from error
        if not isinstance(error, OSError | ValueError):
            raise
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"{model_name_or_path} has no whole processor ({reason}): copy or download it again."
        ) from error
    if isinstance(processor, PreTrainedTokenizerBase):
        raise InputError(
            f"{model_name_or_path} holds a tokenizer but no image processor: save the whole processor there."
        )
    return processor


def damaged_file(folder: str | Path) -> str | None:
    """The first file of a checkpoint that is cut short, empty or no file at all, with the reason. Reads JSON files and the headers of safetensors.

    A template that is empty would be replaced by the family's own.
    """
    kinds = ("*.safetensors", "*.json", "*.jinja")
    for path in sorted(path for kind in kinds for path in Path(folder).glob(kind)):
        try:
            if not path.is_file():
                return f"{path} is a folder and not a file"
            if path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
            elif path.suffix == ".jinja":
                if not path.stat().st_size:
                    return f"{path} is empty"
            else:
                with safe_open(path, "pt"):  # compares the header with the size of the file
                    pass
        except (SafetensorError, OSError, ValueError) as error:
            return f"{path} is damaged ({error})"
    return None


def model_config(model_name_or_path: str) -> PreTrainedConfig | None:
    """The configuration of a checkpoint, or of an adapter's base; None where only a processor was saved."""
    path = base_model_path(model_name_or_path)
    if cached_file(path, "config.json", _raise_exceptions_for_missing_entries=False) is None:
        return None
    try:
        return AutoConfig.from_pretrained(path)
    except (ValueError, TypeError, KeyError) as error:  # an unknown model_type, values of other types
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{path}: its config.json is not read by the installed transformers ({reason}).") from error


def stop_tokens(model_name_or_path: str) -> list[int]:
    """The tokens at which a checkpoint, or an adapter's base, stops generating: `eos_token_id` of generation_config.json."""
    file = cached_file(
        base_model_path(model_name_or_path), "generation_config.json", _raise_exceptions_for_missing_entries=False
    )
    try:
        stops = dict(json.loads(Path(file).read_text())).get("eos_token_id") if file else None
    except (ValueError, TypeError) as error:
        raise InputError(f"{file} is damaged ({error}): copy or download the file again.") from error
    return stops if isinstance(stops, list) else [stops] * (stops is not None)


def complete_processor(processor: ProcessorMixin, config: PreTrainedConfig) -> None:
    """Fill in what a processor of an older checkpoint lacks; transformers would fail, or count an image token too few."""
    for name, read in PROCESSOR_FIELDS.items():
        if hasattr(processor, name) and getattr(processor, name) is None:
            setattr(processor, name, read(config))
    class_token = getattr(getattr(config, "vision_config", None), "model_type", None) == "clip_vision_model"
    if class_token and getattr(processor, "num_additional_image_tokens", None) == 0:
        processor.num_additional_image_tokens = 1


def check_weights(path: str) -> None:
    """Refuse a plain checkpoint whose weights cannot be trained, or are not read.

    Raises:
        InputError: they are quantised by other means than bitsandbytes, or pickled.
    """
    config = json.loads(Path(cached_file(path, "config.json")).read_text())
    parts = (config, config.get("text_config") or {})
    settings = next((part[k] for part in parts for k in ("quantization_config", "quantization") if part.get(k)), {})
    method = settings.get("quant_method") or ("MLX" if settings else None)
    if method and method != "bitsandbytes":
        raise InputError(
            f"{path} holds weights that were quantised with {method}, which cannot be trained or merged: give the checkpoint "
            "that it was made from (its model card names the base model), with --q_lora True for 4 bits."
        )
    folder = Path(path)
    if any(folder.glob("pytorch_model*.bin")) and not any(folder.glob("*.safetensors")):
        raise InputError(
            f"{path} holds its weights as pytorch_model.bin, and only safetensors are read: convert it once, in Python, by "
            f"AutoModelForImageTextToText.from_pretrained({path!r}, dtype='auto').save_pretrained(OUT), and copy the other files."
        )


def checkpoint_file(folder: str, name: str) -> Path | None:
    """A file of a checkpoint folder or hub repository, or None."""
    if os.path.isdir(folder):
        path = Path(folder) / name
        return path if path.is_file() else None
    found = cached_file(folder, name, _raise_exceptions_for_missing_entries=False)
    return Path(found) if found else None


def weights_fingerprint(base: str, adapter: str | None) -> str | None:
    """Identity of a base's weights and of those of an adapter on it."""
    found = checkpoint_fingerprint(base)
    if found and adapter is not None:
        found += checkpoint_fingerprint(adapter, "adapter_model.safetensors") or ""
    return found


def checkpoint_fingerprint(model_name_or_path: str, weights: str = "model.safetensors") -> str | None:
    """Identity of a checkpoint's weights: names, shapes and some bytes of every tensor. None without safetensors files.

    Two checkpoints of one family differ, and so does one that was trained on in place; loading in another dtype or
    quantised does not matter.

    Raises:
        InputError: a file is damaged.
    """
    path = checkpoint_file(model_name_or_path, "model.safetensors.index.json")
    digest = hashlib.sha256()
    try:
        names = sorted(set(json.loads(path.read_text())["weight_map"].values())) if path else [weights]
        for name in names:
            path = checkpoint_file(model_name_or_path, name)
            if path is None:
                return None
            _add_weights(digest, path)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, MemoryError, struct.error) as error:
        raise InputError(f"{path} is damaged ({error}): copy or download the file again.") from error
    return digest.hexdigest()[:32]


def _add_weights(digest: "hashlib._Hash", path: Path) -> None:
    with open(path, "rb") as file:
        size = struct.unpack("<Q", file.read(8))[0]
        header = json.loads(file.read(size))
        for tensor, info in sorted(header.items()):
            if tensor == "__metadata__":
                continue
            begin, end = info["data_offsets"]
            file.seek(8 + size + (begin + end) // 2 // 16 * 16)
            digest.update(json.dumps([tensor, info["dtype"], info["shape"]]).encode() + file.read(min(64, end - begin)))


def check_base_of_adapter(adapter: str, base: str) -> None:
    """Compare the base that an adapter is loaded on with the one it was trained on, which the run.json beside it knows.

    Raises:
        InputError: the base has other weights now.
    """
    if adapter == base:
        return
    try:
        run = json.loads((Path(adapter) / "run.json").read_text(encoding="utf-8"))
        merged, trained_on = run["arguments"]["ModelArguments"]["merge_first"], run["base_fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        return  # of another program, or of the hub
    # Where an adapter was merged first, the base is what came of it; where one was continued, its own fingerprint follows the base's.
    if merged or not trained_on or (found := checkpoint_fingerprint(base)) is None or trained_on.startswith(found):
        return
    raise InputError(
        f"The adapter in {adapter} was trained on other weights than {base} holds now: put those back, train it anew, or, if both are the "
        "same model, delete the run.json beside the adapter."
    )
