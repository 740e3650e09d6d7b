"""Tables of samples that people look at during training: image, prompt, response and numbers, as one HTML page per table."""

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from base.images import load_image

_STYLE = (
    "body{font:14px/1.4 system-ui,sans-serif;margin:2em;max-width:70em}table{border-collapse:collapse}"
    "td,th{border-bottom:1px solid #ccc;padding:.5em;text-align:left;vertical-align:top}"
    "td.n{text-align:right;font-variant-numeric:tabular-nums}img{max-width:160px;max-height:160px}"
)


def thumbnail(image: Any, size: int = 160) -> str:
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


def write_samples(
    samples: Sequence[dict[str, Any]], output_dir: Path, step: int, callbacks: Sequence[Any] = ()
) -> Path:
    """Write `samples/step-000123.html`; give the same table to wandb and TensorBoard where their callbacks are at work.

    Args:
        samples: images, prompt (messages), response, reward, kl.
        callbacks: of the trainer.
    """
    rows = []
    for s in samples:
        images = "".join(f'<img src="{thumbnail(image)}" alt="">' for image in s["images"])
        prompt = html.escape(prompt_text(s["prompt"])).replace("\n", "<br>")
        rows.append(
            f"<tr><td>{images}</td><td>{prompt}</td><td>{html.escape(s['response'])}</td>"
            f'<td class="n">{s["reward"]:.3f}</td><td class="n">{s["kl"]:.3f}</td></tr>'
        )
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Samples of update {step}</title><style>{_STYLE}</style>'
        f"<h1>Samples of update {step}</h1><table><tr><th>image<th>prompt<th>response<th>reward<th>KL</tr>{''.join(rows)}</table></html>\n"
    )
    path = output_dir / "samples" / f"step-{step:06d}.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    for callback in callbacks:
        if type(callback).__name__ == "TensorBoardCallback" and callback.tb_writer is not None:
            lines = ["| prompt | response | reward | KL |", "|---|---|---|---|"]
            for s in samples:
                cells = [prompt_text(s["prompt"]), s["response"], f"{s['reward']:.3f}", f"{s['kl']:.3f}"]
                lines.append("| " + " | ".join(c.replace("|", "\\|").replace("\n", " ") for c in cells) + " |")
            callback.tb_writer.add_text("samples", "\n".join(lines), step)
        elif type(callback).__name__ == "WandbCallback" and getattr(callback, "_wandb", None) is not None:
            wandb = callback._wandb
            table = wandb.Table(columns=["image", "prompt", "response", "reward", "kl"])
            for s in samples:
                images = [wandb.Image(load_image(image)) for image in s["images"]]
                table.add_data(images, prompt_text(s["prompt"]), s["response"], s["reward"], s["kl"])
            wandb.log({"samples": table, "train/global_step": step})
    return path
