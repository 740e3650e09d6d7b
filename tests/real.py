"""Files of published checkpoints, if they lie beside the project: they belong to others, and the project has only facts of them."""

import json
import shutil
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

from base.processor import VLProcessor
from models import core_mapper_for
from tests import zoo

FOLDER = Path(__file__).parents[2] / "shared" / "real_checkpoints"
if not FOLDER.is_dir():  # in a worktree
    FOLDER = next((p for p in (d / "shared/real_checkpoints" for d in Path(__file__).parents) if p.is_dir()), FOLDER)
needs_files = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"{FOLDER.name} are not beside the project")

# Folder of a published checkpoint -> the tiny checkpoint of its family
FAMILY_OF = {
    "llava-1.5-7b-hf": "llava",
    "llava-v1.6-mistral-7b-hf": "llava_next",
    "olmOCR-7B-Qwen2-VL": "qwen2_vl",
    "AIN-7B-Qwen2-VL": "qwen2_vl",
    "Qwen2.5-VL-7B-Instruct": "qwen2_5_vl",
    "Cosmos-Reason2-Qwen3-VL": "qwen3_vl",
    "Qwen3-VL-Embedding": "qwen3_vl",
    "pdfme-Qwen3-VL-adapter": "qwen3_vl",
    "medgemma-27b-it": "gemma3",
    "llava-1.5-adapter-t5": "llava",
    "paligemma-3b": "paligemma",
    "Llama-3.2-11B-Vision-Instruct": "mllama",
}
# Published templates that the package trl holds
TRL_TEMPLATES = {
    "gemma3": "gemma3",
    "gemma4": "gemma4",
    "gemma4_v2": "gemma4",
    "gemma4_v3": "gemma4",
    "gemma4_v4": "gemma4",
    "gemma4_v5": "gemma4",
    "idefics3": "idefics3",
    "lfm2_2_5_vl": "lfm2_vl",
    "llava_next": "llava_next",
    "qwen2_5_vl": "qwen2_5_vl",
    "qwen3_vl": "qwen3_vl",
    "qwen3_5_think": "qwen3_5",
    "qwen3_5_nothink": "qwen3_5",
    "smolvlm": "smolvlm",
}


def template_of(checkpoint: str) -> str | None:
    """The chat template of a published checkpoint; None if it is not among the files (PaliGemma has none)."""
    jinja, in_json = (FOLDER / checkpoint / f"chat_template.{kind}" for kind in ("jinja", "json"))
    if jinja.is_file():
        return jinja.read_text()
    return json.loads(in_json.read_text())["chat_template"] if in_json.is_file() else None


@cache
def templates() -> dict[str, tuple[str, str]]:
    """Name -> (family, template) of every published template at hand."""
    folder = Path(find_spec("trl").origin).parent / "chat_templates"
    found = {name: (family, (folder / f"{name}.jinja").read_text()) for name, family in TRL_TEMPLATES.items()}
    if FOLDER.is_dir():
        found |= {name: (family, template) for name, family in FAMILY_OF.items() if (template := template_of(name))}
    return found


def tiny_processor(folder: Path, family: str, template: str, **rendering: object) -> VLProcessor:
    """The processor of a family's tiny checkpoint with another chat template; files go to `folder`."""
    if not folder.is_dir():
        shutil.copytree(zoo.checkpoint(family), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "chat_template.jinja").write_text(template)
    return core_mapper_for(str(folder)).processor(str(folder), **rendering)
