"""Samples to look at during training, one HTML page per table: image and prompt once, then the answers with their numbers.

PPO shows its rollouts. SFT and DPO show what the data say, and what the model answers before training and now.
"""

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from base.images import ImageFile, load_image
from common.files import write_text
from common.pages import page
from data.rows import IMAGE_MARK

TableRow = tuple[Sequence[ImageFile], Sequence[str | float | None]]  # pictures, then a cell for every column

STYLE = (
    ".sample{display:grid;gap:.8rem;grid-template-columns:11rem 1fr;margin-bottom:.8rem}@media(max-width:34rem){.sample{grid-template-columns:1fr}}"
    "img{max-width:100%;max-height:14rem;border-radius:4px}.answer{border-top:1px solid var(--line);padding-top:.4rem;margin-top:.4rem}"
    ".answer b{font-weight:600}.answer .soft{float:right;margin-left:.8rem;font-variant-numeric:tabular-nums}.text{white-space:pre-wrap}"
    "@media(max-width:34rem){.answer .soft{float:none;display:block;margin:0}}"
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


def _small(image: ImageFile, size: int) -> Image.Image:
    picture = load_image(image)
    picture.thumbnail((size, size))
    return picture


def thumbnail(image: ImageFile, size: int = 160) -> str:
    """An image of a row as a data URL, so that the page is one file."""
    buffer = io.BytesIO()
    _small(image, size).save(buffer, "JPEG", quality=85)
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


def card(images: Sequence[ImageFile], prompt: Sequence[dict[str, Any]], answers: Sequence[tuple[str, str, str]]) -> str:
    """One prompt; answers are (label, text, numbers)."""
    pictures = "".join(f'<img src="{thumbnail(image, 480)}" alt="">' for image in images)
    told = "".join(
        f'<div class="answer"><span class="soft">{html.escape(numbers)}</span><b>{html.escape(label)}</b> '
        f'<div class="text">{html.escape(text)}</div></div>'
        for label, text, numbers in answers
    )
    words = f'<div class="text">{html.escape(prompt_text(prompt).replace(IMAGE_MARK, ""))}</div>'
    return f'<div class="card sample"><div>{pictures}</div><div>{words}{told}</div></div>'


def html_page(samples: Sequence[Sample], step: int) -> str:
    """The table as a page, pictures included; a prompt stands once above its answers."""
    prompts: dict[str, list[Sample]] = {}
    for s in samples:
        prompts.setdefault(repr((s.images, s.prompt)), []).append(s)
    cards = []
    for group in prompts.values():
        numbers = [f"reward {s.reward:.3f}" + (f", KL {s.kl:.3f} nats" if s.kl is not None else "") for s in group]
        answers = [("", s.response, text) for s, text in zip(group, numbers, strict=True)]
        cards.append(card(group[0].images, group[0].prompt, answers))
    title = f"Samples of update {step}"
    return page(title, f"<h1>{title}</h1>{''.join(cards)}", STYLE)


def markdown_table(columns: Sequence[str], rows: Sequence[TableRow]) -> str:
    """The table without pictures."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for _, cells in rows:
        texts = [_cell(c).replace("|", "\\|").replace("\n", " ") for c in cells]
        lines.append("| " + " | ".join(texts) + " |")
    return "\n".join(lines)


def _cell(value: str | float | None) -> str:
    return "" if value is None else value if isinstance(value, str) else f"{value:.3f}"


def report_table(
    columns: Sequence[str], rows: Sequence[TableRow], step: int, callbacks: Sequence[TrainerCallback]
) -> None:
    """A table with its pictures to wandb, trackio and TensorBoard, where callbacks report to them."""
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
            callback.tb_writer.add_text("samples", markdown_table(columns, rows), step)
            pictures = {repr(image): image for images, _ in rows for image in images}  # once, if several rows show it
            for i, image in enumerate(pictures.values()):
                shown = np.asarray(_small(image, 480))
                callback.tb_writer.add_image(f"samples/picture {i}", shown, step, dataformats="HWC")
        elif isinstance(callback, WandbCallback | TrackioCallback):
            # trackio has wandb's interface
            tracker = callback._wandb if isinstance(callback, WandbCallback) else callback._trackio
            if isinstance(callback, WandbCallback) and tracker.run is None:
                continue
            data = [[[tracker.Image(_small(image, 480)) for image in images], *cells] for images, cells in rows]
            table = tracker.Table(columns=["pictures", *columns], data=data)
            tracker.log({"samples": table, "train/global_step": step})


def write_samples(
    samples: Sequence[Sample], output_dir: Path, step: int, callbacks: Sequence[TrainerCallback] = ()
) -> Path:
    """Write `samples/step-000123.html`; trackers get the same table."""
    path = output_dir / "samples" / f"step-{step:06d}.html"
    write_text(path, html_page(samples, step))
    rows = [(s.images, (prompt_text(s.prompt), s.response, s.reward, s.kl)) for s in samples]
    report_table(("prompt", "response", "reward", "KL"), rows, step, callbacks)
    return path


# ---------------------------------------------------------------------------------------------------------------------
# SFT and DPO
# ---------------------------------------------------------------------------------------------------------------------


def asked_and_told(row: dict[str, Any]) -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
    """The prompt of a row of any kind, and what the data answer: (label, text) each."""
    if "messages" in row:
        last = max(i for i, message in enumerate(row["messages"]) if message["role"] == "assistant")
        answer = prompt_text([row["messages"][last]]).removeprefix("assistant: ")
        return list(row["messages"][:last]), [("in the data", answer)]
    if "ranks" not in row:
        return list(row["prompt"]), [("labelled good" if row["label"] else "labelled bad", row["responses"][0])]
    ranked = sorted(zip(row["ranks"], row["responses"], strict=True), key=lambda pair: pair[0])
    labels = ["chosen", "rejected"] if len(ranked) == 2 else [f"rank {rank:g}" for rank, _ in ranked]
    return list(row["prompt"]), [(label, text) for label, (_, text) in zip(labels, ranked, strict=True)]
