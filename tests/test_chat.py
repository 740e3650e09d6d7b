"""Talking to checkpoints: in the terminal, and on a page."""

import json
import math
import sys
import types
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Self

import pytest
import torch
import transformers
from PIL import Image

from args import DataArguments
from common.errors import InputError
from data import load_train_eval
from eval import chat, chat_page
from eval.generate import Answerer

# -- the terminal --------------------------------------------------------------------------------------------------------------------


class Echo(chat.Chat):
    """Says how many turns it has seen, and of which picture."""

    def __init__(self, name: str) -> None:
        self.name, self.messages = name, []

    def answer(self, question: str, images: list[str]) -> str:
        self.messages += [question, ""]
        return f"{self.name} {len(self.messages) // 2} {images}"


def test_a_conversation_goes_on_until_an_empty_line(image_dir: Path):
    other = str(image_dir / "1.png")
    lines = ["one\n", "two\n", "/new\n", "three\n", f"/image {other}\n", "four\n", "\n", "five\n"]
    said = list(chat.talk({"a": Echo("a")}, ["0.png"], lines))
    assert said == ["a 1 ['0.png']", "a 2 ['0.png']", "a 1 ['0.png']", f"a 1 ['{other}']"]


def test_several_checkpoints_answer_one_below_the_other():
    said = list(chat.talk({"sft": Echo("x"), "dpo-2": Echo("y")}, [], ["one"]))
    assert said == ["sft    x 1 []", "dpo-2  y 1 []"]


def test_a_real_conversation_remembers(llava: str, image_dir: Path):
    """The second question is read behind the first and its answer: the prompt of the second turn holds both."""
    answerer = Answerer(llava, None, torch.device("cpu"), bf16=False)
    talker = chat.Chat(answerer, {"max_new_tokens": 4, "do_sample": False}, 0)
    seen = []
    answer = answerer.answer
    answerer.answer = lambda encoded, *rest: seen.append(encoded[0]["ids"]) or answer(encoded, *rest)  # type: ignore[method-assign]
    first = talker.answer("What is it?", [str(image_dir / "0.png")])
    talker.answer("And now?", [str(image_dir / "0.png")])
    decoded = answerer.processor.tokenizer.decode(seen[1])
    assert [m["role"] for m in talker.messages] == ["user", "assistant"] * 2 and talker.messages[1]["content"] == first
    assert decoded.index("What is it?") < decoded.index("And now?") and len(seen[1]) > len(seen[0])


def test_a_picture_that_is_not_there():
    with pytest.raises(InputError, match=r"the image nowhere\.png does not exist"):
        chat.main(["--model_name_or_path", "m", "--image", "nowhere.png"])


# -- the page of eval.chat ---------------------------------------------------------------------------------------------------


def test_tokens_have_the_log_probs_of_plain_transformers(llava: str, image_dir: Path):
    answerer = Answerer(llava, None, torch.device("cpu"), bf16=False)
    image = str(image_dir / "0.png")
    row = chat_page.row_of("What is it?", [image], "It is a dog.")
    found = chat_page.token_logps(answerer, row)
    assert "".join(text for text, _ in found) == "It is a dog." and answerer.processor.mode == "infer"

    processor = transformers.AutoProcessor.from_pretrained(llava)
    content = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    plain = transformers.AutoModelForImageTextToText.from_pretrained(llava, dtype=torch.float32).eval()
    whole = processor(text=prompt + " It is a dog.", images=Image.open(image), return_tensors="pt")
    with torch.inference_mode():
        logps = plain(**whole).logits[0].log_softmax(-1)
    ids = whole["input_ids"][0]
    expected = [logps[i - 1, ids[i]].item() for i in range(len(ids) - len(found), len(ids))]
    assert [p for _, p in found] == pytest.approx(expected, abs=1e-4)


def test_a_character_of_several_tokens_stands_at_the_last():
    texts = {1: b" a", 2: b"\xc3", 3: b"\xa9", 4: b"!"}
    decode = lambda ids: b"".join(texts[i] for i in ids).decode(errors="replace")  # noqa: E731
    assert chat_page.pieces(decode, [1, 2, 3, 4]) == [" a", "", "é", "!"]


def test_preferences_become_pairs_that_scripts_read(image_dir: Path, tmp_path: Path):
    pairs, image = tmp_path / "new" / "mine.jsonl", str(image_dir / "0.png")
    said = {"sft": "A cat.", "dpo": "A dog.", "ppo": " A dog. "}
    others = {name: text for name, text in said.items() if name != "dpo"}
    assert chat_page.save_pairs(pairs, "What?", image, said["dpo"], others, "dpo") == 1  # ppo says the same
    assert chat_page.save_pairs(pairs, "And?", None, "Both.", said, "you") == 2  # two say the same
    read = DataArguments(dataset_name=str(pairs), image_root=str(pairs.parent))
    rows = load_train_eval(read, "preference", 0).train
    assert [row["responses"] for row in rows] == [["A dog.", "A cat."], ["Both.", "A cat."], ["Both.", "A dog."]]
    assert Path(rows[0]["images"][0]).read_bytes() == Path(image).read_bytes() and rows[1]["images"] == []
    assert rows[0]["rejected_by"] == "sft" and rows[2]["rejected_by"] == "dpo, ppo"


class FakeGradio(types.ModuleType):
    """Keeps what is wired to what; every component stands for itself."""

    class Error(Exception):
        pass

    def __init__(self) -> None:
        super().__init__("gradio")
        self.made: list[SimpleNamespace] = []
        self.asked: list = []

    def on(self, events: list, run: Callable, inputs: list, outputs: list) -> None:
        self.asked.append((run, inputs, outputs))

    def __getattr__(self, kind: str) -> Callable:
        def make(*args: object, **options: object) -> SimpleNamespace:
            made = Component(kind=kind, args=args, options=options, clicks=[])
            self.made.append(made)
            return made

        return make


class Component(SimpleNamespace):
    submit = None

    def click(self, *wired: object) -> None:
        self.clicks.append(wired)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def test_the_page_asks_all_and_saves_what_is_better(monkeypatch: pytest.MonkeyPatch, image_dir: Path, tmp_path: Path):
    gradio = FakeGradio()
    monkeypatch.setitem(sys.modules, "gradio", gradio)
    replies = {
        "a": chat_page.Reply("red", [("red", -0.5)], 1.25),
        "b": chat_page.Reply("blue", [("bl", -1.0), ("ue", 0.0)], None),
    }
    asked = []
    pairs = tmp_path / "p.jsonl"
    chat_page.build(lambda *question: asked.append(question) or replies, ["a", "b"], pairs)
    ((ask, inputs, outputs),) = gradio.asked
    image = str(image_dir / "0.png")
    shown = ask(image, " Which? ")
    assert asked == [("Which?", [image])] and len(inputs) == 2 and len(shown) == len(outputs)
    assert shown[0] == {"a": "red", "b": "blue"} and shown[5] == ""
    assert (
        shown[1] == [("red", pytest.approx(math.exp(-0.5) - 1))]
        and shown[2] == "reward 1.250, log-prob -0.5 nats, 1 tokens"
    )
    assert shown[4] == "log-prob -1.0 nats, 2 tokens"
    buttons = {made.args[0]: made.clicks for made in gradio.made if made.kind == "Button" and made.clicks}
    assert list(buttons) == ["a is better", "b is better", "Mine is better"]
    ((prefer, *_),) = buttons["b is better"]
    assert prefer(image, "Which?", shown[0], "") == f"1 pair appended to {pairs}."
    ((mine, *_),) = buttons["Mine is better"]
    assert mine(image, "Which?", shown[0], "green").startswith("2 pairs")
    chosen = [(row["chosen"], row["rejected"]) for row in map(json.loads, pairs.read_text().splitlines())]
    assert chosen == [("blue", "red"), ("green", "red"), ("green", "blue")]
    for wrong in (lambda: ask(image, " "), lambda: prefer(image, "Q", {}, ""), lambda: mine(image, "Q", shown[0], " ")):
        with pytest.raises(FakeGradio.Error):
            wrong()


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--reward_model r", "add --web True"),
        ("--web True --question Q", "leave --image and --question out"),
    ],
)
def test_flags_of_the_page_that_would_do_nothing(flags: str, sentence: str):
    with pytest.raises(InputError, match=sentence):
        chat.main(["--model_name_or_path", "m", *flags.split()])


def test_the_page_without_gradio_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(InputError, match=r"--web needs gradio: pip install -r requirements-web\.txt"):
        chat_page.build(lambda *_: {}, ["a"], tmp_path)
