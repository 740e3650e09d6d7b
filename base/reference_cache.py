"""Reference log-probs on disk, computed once: `--precompute_ref_log_probs`.

    <folder>/<key>/about.json            what the key stands for
    <folder>/<key>/<random>.safetensors  row key -> (tokens,) float32, one file per rank and a few hundred rows

The key covers what changes every number: weights, configuration, processor and chat template, length limits, precision,
versions. A row's key covers its rendered prompt, its responses and the bytes of its images. A run that was killed continues
where it stopped, a later run reads what it finds, and whatever changed since has another key and is computed anew. Who
computes what: base/reference_pass.py.
"""

import hashlib
import json
import logging
import tempfile
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.utils.hub import constants

from base.images import ImageSource, image_file
from base.processor import VLProcessor
from base.videos import count_media, media_of
from common.errors import InputError
from common.files import replacing, write_text

logger = logging.getLogger(__name__)

COLUMN = "reference_logps"  # of the data set: the log-probs of all response tokens of a row, response after response


def default_folder() -> Path:
    """Beside the hub's cache, so that every run of a user finds it."""
    return Path(constants.HF_HOME) / "vl_rlhf" / "reference_logps"


def weights_digest(model: nn.Module, is_policy: bool) -> str:
    """SHA-256 of the names, shapes, types and bytes of all parameters and buffers of a reference.

    Args:
        is_policy: `model` is the policy, which is its own reference once its adapter "default" is off: that adapter is left out.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted([*model.named_parameters(), *model.named_buffers()]):
        if is_policy and isinstance(model, PeftModel) and ".default." in f"{name}.":
            continue
        tensor = getattr(tensor, "ds_tensor", tensor).detach()  # ZeRO-3: this rank's part
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def processor_digest(processor: VLProcessor) -> str:
    """SHA-256 of everything that the processor saves, and of its chat template."""
    digest = hashlib.sha256(processor.chat_template.encode())
    with tempfile.TemporaryDirectory() as folder:
        processor.save_pretrained(folder)
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def row_key(row: dict[str, Any], columns: Sequence[str], processor: VLProcessor) -> str:
    """SHA-256 of a row's prompt as the chat template prints it, with its date for example, of its responses and image bytes.

    Args:
        columns: further ones that the reference is asked about.
    """
    images, videos = count_media(media_of(row))
    prompt = processor.render(row["prompt"], add_generation_prompt=True, images=images, videos=videos)
    text = [prompt, row["responses"], {name: row.get(name) for name in columns if name != "image_rejected"}]
    digest = hashlib.sha256(json.dumps(text, sort_keys=True).encode())
    films = (file for files in row.get("videos") or () for file in files)
    for image in [*row["images"], *films, *([row["image_rejected"]] if "image_rejected" in columns else [])]:
        digest.update(_image_bytes(image))
    return digest.hexdigest()


def _image_bytes(image: ImageSource) -> bytes:
    file = image_file(image)
    if isinstance(file, Image.Image):
        content = f"{file.mode} {file.size}".encode() + file.tobytes()
    elif isinstance(file, str):
        try:
            content = Path(file).read_bytes()
        except OSError as error:
            raise InputError(f"Cannot read the image {file} ({error}): replace the file or drop the row.") from error
    else:
        content = file.getvalue()
    return hashlib.sha256(content).digest()


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for key, tensor in sorted(tensors.items()):
        digest.update(key.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


class ReferenceCache:
    """The cached log-probs of one reference. Every process writes separate files, whole or not at all."""

    def __init__(self, folder: str | Path, about: dict[str, Any], rows_per_file: int = 256) -> None:
        """
        Args:
            about: everything that changes the numbers of every row, as JSON.
        """
        text = json.dumps(about, indent=2, sort_keys=True, default=str)
        self.folder = Path(folder) / hashlib.sha256(text.encode()).hexdigest()[:32]
        self.rows_per_file = rows_per_file
        self._held: dict[str, Tensor] = {}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text(self.folder / "about.json", text + "\n")
        except OSError as error:
            raise InputError(
                f"Cannot write reference log-probs to {self.folder} ({error}): give --ref_log_probs_dir another folder."
            ) from error

    def keys(self) -> set[str]:
        """The rows that are on disk."""
        found: set[str] = set()
        for path in self._whole_files():
            with safe_open(path, framework="pt") as file:
                found.update(file.keys())
        return found

    def _whole_files(self) -> list[Path]:
        """The files that are as they were written. Others are set aside, and their rows computed again."""
        whole = []
        for path in sorted(self.folder.glob("*.safetensors")):
            try:
                with safe_open(path, framework="pt") as file:
                    written = (file.metadata() or {}).get("blake2b")
                    now = _digest({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118  not a dict
                reason = "its checksum is another" if now != written else None
            except FileNotFoundError:
                continue  # another process has set it aside
            except (OSError, SafetensorError) as error:
                reason = str(error)
            if reason is None:
                whole.append(path)
                continue
            logger.warning("%s is damaged (%s): its rows are computed again.", path, reason)
            try:
                path.rename(path.with_suffix(".damaged"))
            except FileNotFoundError:
                continue
        return whole

    def add(self, key: str, logps: Tensor) -> None:
        """Keep the log-probs of a row, (tokens,); written with those of other rows."""
        self._held[key] = logps.float().cpu().contiguous()
        if len(self._held) >= self.rows_per_file:
            self.flush()

    def flush(self) -> None:
        """Write what is held."""
        if self._held:
            path = self.folder / f"{uuid.uuid4().hex}.safetensors"
            with replacing(path) as beside:
                save_file(self._held, beside, {"blake2b": _digest(self._held)})
            self._held = {}

    def read(self, keys: Iterable[str]) -> dict[str, list[float]]:
        """The log-probs of rows.

        Raises:
            InputError: some are not there, because the processes do not see one and the same folder.
        """
        wanted, found = set(keys), {}
        for path in self.folder.glob("*.safetensors"):
            with safe_open(path, framework="pt") as file:
                found |= {key: file.get_tensor(key).tolist() for key in wanted.intersection(file.keys())}
        if missing := len(wanted) - len(found):
            raise InputError(
                f"{self.folder} lacks the reference log-probs of {missing} rows that another process has computed: give "
                "--ref_log_probs_dir a folder that all nodes share."
            )
        return found
