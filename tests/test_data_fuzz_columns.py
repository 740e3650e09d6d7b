"""Files of every kind with columns of every name: what a record holds is in the row, or listed as left out, or refused by name.

The oracle knows nothing of formats. Each text, number and boolean of a record must be found in the row that was made of it, and
each picture among the row's images; else the load must have stopped with a sentence that names the file and a column.
"""

import io
import json
import random
import re
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest
from PIL import Image

import data
from args import DataArguments
from common.errors import InputError

CASES = 100  # per seed

IMAGE_NAMES = """image images image_path image_paths img img_path imgs picture pictures photo file_name filename path file media Bild
    imagePath ImageFile image_url image_bytes visual visual_input pic figure screenshot frames input_image x Image IMAGES image_0""".split()
QUESTION_NAMES = "prompt question query instruction q text Prompt user_input problem".split()
ANSWER_PAIRS = [
    ("chosen", "rejected"), ("chosen", "rejected"), ("good", "bad"), ("chosen_response", "rejected_response"),
    ("response", "rejected_response"), ("output", "rejected"), ("answer_a", "answer_b"), ("win", "lose"),
    ("completion", "rejected_completion"), ("positive", "negative"), ("answer", "rejected_answer"),
]  # fmt: skip
OWN = {
    "id": [7, "a7"], "level": [3, 2.5], "topic": ["shapes"], "easy": [True, False], "tags": [["a", "b"], [1, 2]], "score": [4.5],
    "meta": [{"from_where": "web"}], "system": ["Be kind."], "system_prompt": ["Be kind."], "sys": ["Be kind."], "source": ["coco"],
    "label": [True, "cat", 3], "audio": ["a.wav"], "video": [["v.mp4"]], "mask": ["mask.png"], "kto_tag": [True], "history": [[["Hi", "Hello"]]],
    "input": ["More."], "tools": ["[{}]"], "caption": ["A disc, drawn."], "images_info": ["w 3"], "margin": [0.5], "scores": [[2, 1]],
    "negatives": [["A dog."]], "is_good": [False], "system_message": ["Be kind."], "speech": ["clip"], "thumbnail": ["t.png"],
    "reference": ["R."], "objects": [{"bbox": [1, 2]}], "depth_image": ["depth.png"], "bytes": ["none"], "image_id": [12], "url": ["http://x/y"],
}  # fmt: skip
KINDS = ["list", "pretty", "lines", "object", "by_id", "csv", "tsv", "parquet", "saved"]
ENDINGS = [".json", ".jsonl", ".txt", ".csv", ".tsv", ".parquet", "", ".data"]


@pytest.fixture(autouse=True)
def own_cache_and_no_hanging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    signal.alarm(300)
    yield
    signal.alarm(0)
    datasets.enable_progress_bars()


def record_of(rng: random.Random, i: int, tame: bool) -> dict:
    """A row with a picture (or two), a question, answers and columns of the user's own, in a layout of some project.

    tame: under names that the project documents, so that most such rows are read.
    """
    names = [f"{rng.randrange(4)}.png" for _ in range(rng.choice([1, 1, 1, 2]))]
    mark = rng.choice(["", "<image>\n"]) and "<image>\n" * len(names)
    asked, good, bad = f"What is shown in {i}?", f"A disc, number {i}.", f"A dog, number {i}."
    row: dict = {}
    questions, pairs = (QUESTION_NAMES[:4], ANSWER_PAIRS[:2]) if tame else (QUESTION_NAMES, ANSWER_PAIRS)
    match rng.randrange(6):
        case 0 | 1:  # a pair of texts
            question, (chosen, rejected) = rng.choice(questions), rng.choice(pairs)
            row |= {question: mark + asked, chosen: good, rejected: bad}
        case 2:  # a pair of messages
            user = rng.choice([{"role": "user", "content": mark + asked}, {"from": "human", "value": mark + asked}])
            keys = ("from", "value") if "from" in user else ("role", "content")
            answers = [{keys[0]: "assistant", keys[1]: text} for text in (good, bad)]
            row |= {rng.choice(["conversations", "messages", "prompt"]): [user]}
            as_list = rng.random() < 0.5
            row |= {name: [a] if as_list else a for name, a in zip(("chosen", "rejected"), answers, strict=True)}
        case 3:  # ranked
            name = rng.choice(["responses", "completions"] if tame else ["responses", "completions", "answers"])
            if rng.random() < 0.5:
                row |= {
                    rng.choice(questions): mark + asked,
                    name: [good, bad],
                    rng.choice(["scores", "ranks"] if tame else ["scores", "ranks", "rating"]): [2, 1],
                }
            else:
                row |= {rng.choice(questions): mark + asked}
                row[name] = [{"response": good, "score": 1.5}, {"response": bad, "score": 0.5}]
        case 4:  # a conversation, perhaps with a rejected answer
            name = rng.choice(["messages", "conversations"] if tame else ["messages", "conversation", "dialog"])
            keys = rng.choice([("role", "content"), ("from", "value")])
            row[name] = [{keys[0]: "user", keys[1]: mark + asked}, {keys[0]: "assistant", keys[1]: good}]
            if rng.random() < 0.5:
                row[rng.choice(["rejected_response"] if tame else ["rejected", "rejected_messages", "negative"])] = bad
        case 5:  # pictures in parts, in messages or in texts
            where = rng.choice(["part", "url"] if tame else ["part", "text part", "message", "tag", "markdown"])
            part: dict = (
                {"type": "image", "image": names[0]}
                if where == "part"
                else {"type": "image_url", "image_url": {"url": names[0]}}
            )
            content: object = [part, {"type": "text", "text": asked}]
            if where == "text part":
                content = [{"type": "text", "text": asked, "image": names[0]}]
            elif where not in ("part", "url"):
                content = {"tag": f"<img>{names[0]}</img>{asked}", "markdown": f"![]({names[0]}) {asked}"}.get(
                    where, asked
                )
            if where == "part" and not tame:
                content = [{"type": "image", rng.choice(IMAGE_NAMES): names[0]}, {"type": "text", "text": asked}]
            user = {"role": "user", "content": content}
            user |= {rng.choice(IMAGE_NAMES): names[0]} if where == "message" else {}
            return {"messages": [user, {"role": "assistant", "content": good}]} | own(rng, tame)
    value = names if len(names) > 1 or rng.random() < 0.3 else names[0]
    if rng.random() < 0.08:
        value = [{"path": name, "bytes": None} for name in names]
    row[rng.choice(["image", "images"] if tame else IMAGE_NAMES)] = value
    return row | {k: v for k, v in own(rng, tame).items() if k not in row}


def own(rng: random.Random, tame: bool) -> dict:
    names = [*OWN][:11] if tame else [*OWN]
    return {name: rng.choice(OWN[name]) for name in rng.sample(names, rng.choice([0, 1, 2, 3]))}


def write(path: Path, rows: list[dict], kind: str) -> bool:
    """Write the rows as a file of this kind; False where the kind cannot hold them."""
    flat = (
        all(isinstance(v, str | int | float) for row in rows for v in row.values())
        and len({tuple(row) for row in rows}) == 1
    )
    match kind:
        case "list" | "pretty":
            path.write_text(json.dumps(rows, indent=1 if kind == "pretty" else None))
        case "lines":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        case "object":
            path.write_text(json.dumps({"version": 1, "data": rows}))
        case "by_id":
            path.write_text(json.dumps({f"row {i}": row for i, row in enumerate(rows)}, indent=1))
        case "csv" | "tsv":
            if not flat or any("\n" in str(v) or "," in str(v) for row in rows for v in row.values()):
                return False
            separator = "," if kind == "csv" else "\t"
            path.write_text(
                "\n".join(separator.join(map(str, line)) for line in [rows[0], *(row.values() for row in rows)])
            )
        case _:
            try:
                found = datasets.Dataset.from_list(rows)
            except (ValueError, TypeError, datasets.exceptions.DatasetGenerationError):
                return False
            if kind == "parquet":
                buffer = io.BytesIO()
                found.to_parquet(buffer)
                path.write_bytes(buffer.getvalue())
            else:
                datasets.DatasetDict({"train": found}).save_to_disk(str(path))
    return True


def leaves(value: object) -> Iterator[object]:
    """Texts, numbers and booleans within a value, but for words of the layout."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key not in ("role", "from", "type"):
                yield from leaves(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from leaves(inner)
    elif value is not None:
        yield value


PICTURE = re.compile(r"[\w/]+\.png$")


def lost(record: dict, row: dict, about: dict, kind: str) -> list[object]:
    """What of the record is neither in the row nor listed as left out."""
    pictures = {Path(image["path"] if isinstance(image, dict) else image).name for image in row["images"]}
    there = list(leaves({name: value for name, value in row.items() if name not in ("where", "source")}))
    texts = "\0".join(map(str, there))
    missing: list[object] = []
    for name, value in record.items():
        for leaf in [] if name in about["columns_left_out"] else leaves(value):
            if isinstance(leaf, str) and PICTURE.search(leaf):
                if leaf not in pictures:
                    missing.append((name, leaf))
                continue
            words = str(leaf).replace("<image>", "").strip()
            found = words in texts or (isinstance(leaf, int | float) and leaf in there)
            unneeded = kind == "prompt" and (name in ("scores", "ranks") or re.match(r"A (disc|dog), number|\d", words))
            if not found and not unneeded:  # prompts need no answers
                missing.append((name, leaf))
    return missing


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 6))])
def test_nothing_is_lost_in_silence(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    (tmp_path / "images").mkdir()
    for i in range(4):
        Image.effect_noise((12 + i, 10), 60).save(tmp_path / "images" / f"{i}.png")
    outcomes: Counter[str] = Counter()
    case = 0
    while case < CASES:
        shape, tame = rng.randrange(10**9), rng.random() < 0.6
        rows = [record_of(random.Random(shape), i, tame) for i in range(rng.choice([1, 2]))]
        kind_of_file, path = rng.choice(KINDS), tmp_path / f"{case}{rng.choice(ENDINGS)}"
        if not write(path, rows, kind_of_file):
            continue
        case += 1
        name = rng.choice(["", "", "", "plain_dpo", "vlquery_json", "mmrlhf", "rlaifv", "vlfeedback_paired"])
        kind = rng.choice(["preference", "conversation", "prompt"])
        if tame:
            name = ""
            answered = {"chosen", "responses", "completions", "rejected_response"} & rows[0].keys()
            kind = rng.choice(["preference" if answered else "conversation", "prompt"])
        args = DataArguments(name or str(path), str(path) if name else None, str(tmp_path / "images"))
        what = f"seed {seed}, case {case}, {kind_of_file} as {path.name}, {name or '-'}, {kind}: {rows[0]}"
        try:
            found = data.load_train_eval(args, kind, 0)
        except InputError as error:
            message = str(error)
            assert str(path) in message or "--dataset_name" in message, (what, message)
            named = [c for row in rows for c in row if c in message]
            assert named or "<img>" in message or "![" in message or "messages[" in message or "holds" in message, (
                what,
                message,
            )
            assert "line 1, column 2" not in message and "Extra data" not in message, (what, message)
            outcomes["refused"] += 1
            continue
        about = found.info["sets"][0]
        assert len(found.train) == len(rows), what
        for record, row in zip(rows, found.train, strict=True):
            assert not lost(record, row, about, kind), (what, lost(record, row, about, kind), row)
        outcomes["read"] += 1
    print(f"seed {seed}: {dict(outcomes)}")
    assert outcomes["read"] > CASES * 0.3 and outcomes["refused"] > CASES * 0.15
