"""What lies in a checkpoint's folder, and in that of a LoRA adapter."""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from common.errors import InputError

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
    return base


def processor_path(model_name_or_path: str) -> str:
    """Where a checkpoint's processor lies: an adapter folder without one, as other trainers write it, has its base's."""
    saved = any((Path(model_name_or_path) / name).is_file() for name in PROCESSOR_FILES)
    return model_name_or_path if saved else base_model_path(model_name_or_path)


def damaged_file(folder: str | Path) -> str | None:
    """The first file of a checkpoint that is cut short, empty or no file at all, with the reason. Reads JSON files and the headers of safetensors."""
    for path in sorted([*Path(folder).glob("*.safetensors"), *Path(folder).glob("*.json")]):
        try:
            if not path.is_file():
                return f"{path} is a folder and not a file"
            if path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
            else:
                with safe_open(path, "pt"):  # compares the header with the size of the file
                    pass
        except (SafetensorError, OSError, ValueError) as error:
            return f"{path} is damaged ({error})"
    return None
