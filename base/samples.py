"""Tables of samples to look at during training: image, prompt, response and numbers, one HTML page per table."""

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, WandbCallback

from base.images import ImageFile, load_image
from common.files import write_text

_STYLE = (
    "body{font:14px/1.4 system-ui,sans-serif;margin:2em;max-width:70em}table{border-collapse:collapse}"
    "td,th{border-bottom:1px solid #ccc;padding:.5em;text-align:left;vertical-align:top}"
    "td.n{text-align:right;font-variant-numeric:tabular-nums}img{max-width:160px;max-height:160px}"
)


@dataclass(frozen=True)
class Sample:
    """One row of a table.

    Attributes:
        images: of the dataset's row.
        prompt: messages.
        reward: the answer's score.
        kl: of the answer to the reference, in nats; None if it was not computed.
    """

    images: Sequence[ImageFile]
    prompt: Sequence[dict[str, Any]]
    response: str
    reward: float
    kl: float | None


def thumbnail(image: ImageFile, size: int = 160) -> str:
    """An image of a row as a data URL, so that the page is one file."""
    picture = load_image(image)
    picture.thumbnail((size, size))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def prompt_text(messages: Sequence[dict[str, Any]]) -> str:
    """The words of a prompt, one line per message."""
    lines = []
    for message in messages:
        content = message["content"]
        if not isinstance(content, str):
            content = "".join(part.get("text") or "" for part in content)
        lines.append(f"{message['role']}: {content}")
    return "\n".join(lines)


def _kl(sample: Sample) -> str:
    return "" if sample.kl is None else f"{sample.kl:.3f}"


def html_page(samples: Sequence[Sample], step: int) -> str:
    """The table as a page, pictures included."""
    rows = []
    for s in samples:
        images = "".join(f'<img src="{thumbnail(image)}" alt="">' for image in s.images)
        prompt = html.escape(prompt_text(s.prompt)).replace("\n", "<br>")
        rows.append(
            f"<tr><td>{images}</td><td>{prompt}</td><td>{html.escape(s.response)}</td>"
            f'<td class="n">{s.reward:.3f}</td><td class="n">{_kl(s)}</td></tr>'
        )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Samples of update {step}</title>'
        f"<style>{_STYLE}</style><h1>Samples of update {step}</h1>"
        f"<table><tr><th>image<th>prompt<th>response<th>reward<th>KL</tr>{''.join(rows)}</table></html>\n"
    )


def markdown_table(samples: Sequence[Sample]) -> str:
    """The table without pictures."""
    lines = ["| prompt | response | reward | KL |", "|---|---|---|---|"]
    for s in samples:
        cells = [prompt_text(s.prompt), s.response, f"{s.reward:.3f}", _kl(s)]
        lines.append("| " + " | ".join(c.replace("|", "\\|").replace("\n", " ") for c in cells) + " |")
    return "\n".join(lines)


def _log_to_wandb(samples: Sequence[Sample], step: int) -> None:
    import wandb  # optional; there if its callback is

    if wandb.run is None:
        return
    table = wandb.Table(columns=["image", "prompt", "response", "reward", "kl"])
    for s in samples:
        images = [wandb.Image(load_image(image)) for image in s.images]
        table.add_data(images, prompt_text(s.prompt), s.response, s.reward, s.kl)
    wandb.log({"samples": table, "train/global_step": step})


def write_samples(
    samples: Sequence[Sample], output_dir: Path, step: int, callbacks: Sequence[TrainerCallback] = ()
) -> Path:
    """Write `samples/step-000123.html`; the same table goes to wandb and TensorBoard where callbacks report to them."""
    path = output_dir / "samples" / f"step-{step:06d}.html"
    write_text(path, html_page(samples, step))
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
            callback.tb_writer.add_text("samples", markdown_table(samples), step)
        elif isinstance(callback, WandbCallback):
            _log_to_wandb(samples, step)
    return path
