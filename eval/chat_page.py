"""The page of `eval.chat --web`: a picture, a question, the answers of all checkpoints side by side, preferences as rows to train on.

Every token has the colour of its probability, every answer its reward if a reward model is named. The button under the
better answer appends a pair with each other answer to the pairs file, which every script reads.
"""

import functools
import hashlib
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from common.errors import InputError
from data.rows import IMAGE_MARK
from eval.generate import Answerer

Row = dict[str, Any]
Reward = Callable[[list[Row]], list[list[float]]]  # preference rows -> one number per response


@dataclass(frozen=True)
class Reply:
    """What a checkpoint says.

    Attributes:
        tokens: each with its log-prob under the checkpoint, in nats, the end token left out.
        reward: None without a reward model.
    """

    text: str
    tokens: list[tuple[str, float]]
    reward: float | None


class Page(Protocol):
    """gradio.Blocks, as far as it is used."""

    def launch(self, *, server_name: str, server_port: int, share: bool) -> object:
        """Serve until Ctrl-C."""


def row_of(question: str, images: Sequence[str], answer: str) -> Row:
    """A row with one response, images first."""
    content = IMAGE_MARK * len(images) + question
    return {"images": list(images), "prompt": [{"role": "user", "content": content}], "responses": [answer]}


@torch.inference_mode()
def token_logps(answerer: Answerer, row: Row) -> list[tuple[str, float]]:
    """The tokens of a row's response and their log-probs, in nats."""
    answerer.processor.train()
    batch = answerer.response_collator.responses_only([row])
    answerer.processor.infer()
    logps, mask = answerer.response_logps(batch)
    ids = batch["completion_ids"].to(mask.device)[mask].tolist()
    ends = set(answerer.processor.tokenizer.all_special_ids)
    kept = [(i, p) for i, p in zip(ids, logps[mask].tolist(), strict=True) if i not in ends]
    texts = pieces(answerer.processor.tokenizer.decode, [i for i, _ in kept])
    return [(text, p) for text, (_, p) in zip(texts, kept, strict=True)]


def pieces(decode: Callable[[list[int]], str], ids: list[int]) -> list[str]:
    """What each token adds to the text: alone, SentencePiece's lose the space before them.

    A character of several tokens stands at the last of them.
    """
    found, shown = [], ""
    for end in range(1, len(ids) + 1):
        text = decode(ids[:end])
        whole = shown if text.endswith("\N{REPLACEMENT CHARACTER}") else text
        found.append(whole[len(shown) :])
        shown = whole
    return found


def reply(answerer: Answerer, row: Row, reward: Reward | None) -> Reply:
    """All that the page shows of a row's response."""
    return Reply(row["responses"][0], token_logps(answerer, row), reward([row])[0][0] if reward else None)


def save_pairs(path: Path, question: str, image: str | None, better: str, others: Mapping[str, str], who: str) -> int:
    """Append a pair of the better answer with each different one, as rows of plain_dpo; returns their number.

    The picture is copied beside the file, under the name of its content: `--image_root` is the file's folder.

    Args:
        others: name -> answer.
        who: gave the better answer.
    """
    row: Row = {"prompt": question}
    path.parent.mkdir(parents=True, exist_ok=True)
    if image:
        digest = hashlib.sha1(Path(image).read_bytes()).hexdigest()[:16]
        copy = path.parent / f"{path.stem}_images" / f"{digest}{Path(image).suffix}"
        copy.parent.mkdir(exist_ok=True)
        if not copy.exists():
            shutil.copyfile(image, copy)
        row["image"] = str(copy.relative_to(path.parent))
    rejected: dict[str, list[str]] = {}  # text -> who gave it
    for name, text in others.items():
        if text.strip() != better.strip():
            rejected.setdefault(text.strip(), []).append(name)
    pairs = [
        row | {"chosen": better.strip(), "rejected": text, "chosen_by": who, "rejected_by": ", ".join(names)}
        for text, names in rejected.items()
    ]
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs)
    return len(pairs)


def shade(logp: float) -> float:
    """For gradio's colours, from -1 (full) to 0 (none): the probability that other tokens had."""
    return math.exp(logp) - 1.0


def build(answer: Callable[[str, list[str]], dict[str, Reply]], names: Sequence[str], pairs: Path) -> Page:
    """The page.

    Args:
        answer: (question, images) -> the reply of each checkpoint.
        names: of the checkpoints.

    Raises:
        InputError: gradio is not installed.
    """
    try:
        import gradio  # an extra, and slow to import
    except ImportError:
        raise InputError("--web needs gradio: pip install -r requirements-web.txt") from None

    def ask(image: str | None, question: str) -> list[Any]:
        if not question.strip():
            raise gradio.Error("Write a question first.")
        replies = answer(question.strip(), [image] if image else [])
        shown: list[Any] = [{name: r.text for name, r in replies.items()}]
        for r in replies.values():
            number = "" if r.reward is None else f"reward {r.reward:.3f}, "
            nats = sum(p for _, p in r.tokens)
            shown += [
                [(text, shade(p)) for text, p in r.tokens],
                f"{number}log-prob {nats:.1f} nats, {len(r.tokens)} tokens",
            ]
        return [*shown, ""]

    def prefer(who: str, image: str | None, question: str, said: dict[str, str], own: str) -> str:
        if not said:
            raise gradio.Error("Ask first.")
        better = own.strip() if who == "you" else said[who]
        if not better:
            raise gradio.Error("Write your answer first.")
        others = {name: text for name, text in said.items() if name != who}
        saved = save_pairs(pairs, question.strip(), image, better, others, who)
        return (
            f"{saved} pair{'' if saved == 1 else 's'} appended to {pairs}."
            if saved
            else "No pair: the answers are the same."
        )

    with gradio.Blocks(title="VL-RLHF: " + ", ".join(names), analytics_enabled=False) as page:
        said = gradio.State({})
        with gradio.Row():
            image = gradio.Image(type="filepath", label="Picture", height=320)
            with gradio.Column():
                question = gradio.Textbox(label="Question", lines=3)
                button = gradio.Button("Ask", variant="primary")
                gradio.Markdown("The stronger the colour of a token, the less likely it was.")
        outputs: list[Any] = [said]
        buttons = []
        with gradio.Row():
            for name in names:
                with gradio.Column(min_width=280):
                    outputs.append(gradio.HighlightedText(label=name, combine_adjacent=False, show_legend=False))
                    outputs.append(gradio.Markdown())
                    if len(names) > 1:  # one answer makes no pair
                        buttons.append((name, gradio.Button(f"{name} is better")))
        own = gradio.Textbox(label="A better answer of your own", lines=2)
        buttons.append(("you", gradio.Button("Mine is better")))
        note = gradio.Markdown()
        gradio.on([button.click, question.submit], ask, [image, question], [*outputs, note])
        for name, each in buttons:
            each.click(functools.partial(prefer, name), [image, question, said, own], note)
    return page
