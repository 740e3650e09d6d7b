"""Mutated rows, files and images: only usable rows come out, and every refusal names its row."""

import copy
import json
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest
from PIL import Image

import data
from args import DataArguments
from base.images import load_image
from common.errors import InputError
from data.images import FORMATS

SECONDS = 20  # for one file; all files together take a fraction of one


@pytest.fixture(autouse=True)
def own_cache_and_no_hanging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    signal.alarm(SECONDS * 12)
    yield
    signal.alarm(0)


def make_images(folder: Path) -> None:
    folder.mkdir()
    for i in range(3):
        Image.new("RGB", (10, 10), (i * 90, 80, 9)).save(folder / f"{i}.png")


def rating(rng: random.Random) -> dict:
    return {"Helpfulness": {"Rating": str(rng.randint(1, 5)), "Rationale": "r"}, "Ethics": {"Rating": "5"}}


def good_row(name: str, i: int, rng: random.Random) -> dict:
    image = {"image": rng.choice([f"{i % 3}.png", [f"{i % 3}.png"]])}
    words = {"chosen": f"yes {i}", "rejected": f"no {i}"}
    turns = [{"from": "human", "value": f"<image>\nQ {i}?"}, {"from": "gpt", "value": f"A {i}"}]
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": f"Q {i}?"}]}
    completions = [{"response": f"a {k} {i}", "model": "m", "annotations": rating(rng)} for k in range(4)]
    return {
        "plain_dpo": lambda: {**image, "prompt": f"Q {i}?", **words, "margin": 1.5, "scores": [2, 1]},
        "vlquery_json": lambda: {**image, "conversations": turns * 2 if i % 2 and not i % 2 else turns},
        "llava_instruct": lambda: {
            "id": str(i),
            **image,
            "conversations": [*turns, turns[1] | {"from": "human"}, turns[1]],
        },
        "vlfeedback_paired": lambda: {**image, "prompt": f"Q {i}?", "completions": completions},
        "rlhfv": lambda: {**image, "text": json.dumps({"question": f"Q {i}?", **words})},
        "rlaifv": lambda: {**image, "question": f"Q {i}?", **words},
        "mmrlhf": lambda: {**image, "question": f"Q {i}?", "responses": ["a", "b", "c"], "ranks": [1, 2, 2]},
        "trl.jsonl": lambda: {"images": [f"{i % 3}.png"], "prompt": [user], **words},
    }[name]()


STRANGE = [
    None, True, False, 0, -1, 10**30, 10**400, 1.5, float("nan"), float("inf"), "", " ", "\n\t", "\0", "\ud800", "é" * 9, "\u202e\u2028",
    "<image>", "<image>" * 50, "x" * 1_500_000, "N/A", "nan", [], {}, [[]], [[[[["deep"]]]]], [None], [1, "a"], {"a": {"b": []}}, ["0.png", None],
    {"bytes": None, "path": None}, {"bytes": "text", "path": "0.png"}, "../0.png", "/etc/passwd", "http://x/y.png", "gone.png", ".", "a" * 5000,
    [{"role": "user"}], [{"role": "user", "content": [{"type": "video"}]}], [{"from": ["user"], "value": 3}], {"role": "user", "content": "x"},
]  # fmt: skip


def places(value: object, path: tuple = ()) -> Iterator[tuple]:
    """Paths of all values within a row."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*path, key)
        yield from places(inner, (*path, key))


def mutate(row: dict, rng: random.Random) -> object:
    row = copy.deepcopy(row)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        found = list(places(row))
        if not found:
            return row
        *way, last = rng.choice(found)
        holder = row
        for key in way:
            holder = holder[key]
        match rng.randrange(6):
            case 0 | 1 | 2:
                holder[last] = copy.deepcopy(rng.choice(STRANGE))
            case 3:
                del holder[last]
            case 4 if isinstance(holder, dict):
                holder[rng.choice(["imagee", "video", "Prompt", "", "\ud800", "images"])] = holder.pop(last)
            case _:
                holder[last] = [holder[last], holder[last]]
    return rng.choice(STRANGE) if rng.random() < 0.03 else row


def assert_usable(row: dict) -> None:
    """What every loss may assume, checked without the code under test."""
    messages = row.get("messages") or row["prompt"]
    roles = [m["role"] for m in messages]
    roles = roles[1:] if roles[0] == "system" else roles
    assert all(role == ("assistant" if i % 2 else "user") for i, role in enumerate(roles))
    assert (len(roles) % 2 == 0) == ("messages" in row)
    assert all(
        isinstance(m["content"], str) and m["content"].strip() and len(m["content"]) <= 2_000_000 for m in messages
    )
    assert sum(m["content"].count("<image>") for m in messages if m["role"] == "user") == len(row["images"])
    assert not any("<image>" in m["content"] for m in messages if m["role"] != "user")
    for image in row["images"]:
        source = image["path"] if isinstance(image, dict) and image["bytes"] is None else image
        if isinstance(source, str):
            assert "/images/" in str(Path(source).resolve())
        assert load_image(image).mode == "RGB"
    if "responses" in row:
        assert len(row["responses"]) == len(row["ranks"]) >= 2 and len(set(row["ranks"])) > 1
        assert all(isinstance(r, str) and r.strip() and "<image>" not in r for r in row["responses"])
        best, worst = row["ranks"].index(min(row["ranks"])), row["ranks"].index(max(row["ranks"]))
        assert row["responses"][best].strip() != row["responses"][worst].strip()
        assert all(abs(n) < float("inf") for n in [*row["ranks"], *(row.get("scores") or [])] if n is not None)


def load(folder: Path, name: str, file: str, out: Path, **flags) -> data.DataSplits:
    kind = "conversation" if name in ("vlquery_json", "llava_instruct") else "preference"
    path = (
        {"dataset_name": str(folder / file)}
        if name == "trl.jsonl"
        else {"dataset_name": name, "data_path": str(folder / file)}
    )
    return data.load_train_eval(DataArguments(image_root=str(folder / "images"), **path, **flags), kind, 0, out)


NAMES = ["plain_dpo", "vlquery_json", "llava_instruct", "vlfeedback_paired", "rlhfv", "rlaifv", "mmrlhf", "trl.jsonl"]


def test_300_mutated_rows(tmp_path: Path) -> None:
    make_images(tmp_path / "images")
    rng = random.Random(7)
    mutated, refused, kept = 0, 0, 0
    for name in NAMES:
        rows: list[object] = []
        for i in range(38):
            rows += [good_row(name, i, rng), mutate(good_row(name, i, rng), rng)]
        mutated += 38
        file = f"{name.removesuffix('.jsonl')}.jsonl"
        lines = [json.dumps(row, ensure_ascii=rng.random() < 0.5) for row in rows]
        (tmp_path / file).write_bytes(b"\n".join(line.encode("utf-8", "surrogatepass") for line in lines))
        out = tmp_path / f"out_{name}"
        found = load(tmp_path, name, file, out, on_bad_row="drop")
        listed = [json.loads(line) for line in (out / "bad_rows.jsonl").read_text().splitlines()]
        numbers = [int(entry["where"].split("row ")[1].split(" ")[0]) for entry in listed]
        assert len(found.train) + len(listed) == len(rows)
        assert all(file in entry["where"] and len(entry["reason"]) < 600 for entry in listed)
        wrong = [
            n
            for n in numbers
            if n % 2 == 0 and not (name == "vlfeedback_paired" and listed[numbers.index(n)]["skipped"])
        ]
        assert not wrong, [listed[numbers.index(n)] for n in wrong]  # the even rows are good
        for row in found.train:
            assert_usable(row)
        with pytest.raises(InputError, match=r"row [0-9]+"):
            load(tmp_path, name, file, out)
        refused, kept = refused + len(listed), kept + len(found.train)
    assert mutated >= 300 and refused > 150 and kept > 300
    print(f"{mutated} mutated rows: {refused} rows refused, {kept} rows kept and usable")


def damage(content: bytes, rng: random.Random) -> bytes:
    """Cut, overwrite, double, remove bytes or replace them by noise."""
    at, size = rng.randrange(len(content)), rng.choice([1, 2, 40, 400])
    noise = bytes(rng.randrange(256) for _ in range(size))
    match rng.randrange(6):
        case 0:
            return content[:at]
        case 1:
            return content[:at] + noise + content[at + size :]
        case 2:
            return content[:at] + content[at + size :]
        case 3:
            return content[: at + size] + content[at:]
        case 4:
            return content[:at] + b"\0" * size + content[at + size :]
        case _:
            return content[: at % 40] + noise + content[at % 40 + 1 :]


def test_damaged_data_files(tmp_path: Path) -> None:
    make_images(tmp_path / "images")
    rng = random.Random(11)
    outcomes = {"raised": 0, "loaded": 0}
    parquet = tmp_path / "whole.parquet"
    rows = [
        good_row("rlaifv", i, rng) | {"image": {"bytes": (tmp_path / "images/0.png").read_bytes(), "path": "x"}}
        for i in range(6)
    ]
    datasets.Dataset.from_list(rows).to_parquet(parquet)
    for trial in range(120):
        name = NAMES[trial % len(NAMES)]
        suffix = ("json", "jsonl", "parquet")[trial % 3]
        rows = [good_row(name, i, rng) for i in range(6)]
        content = (json.dumps(rows, indent=1) if suffix == "json" else "\n".join(map(json.dumps, rows))).encode()
        if suffix == "parquet":
            name, content = "rlaifv", parquet.read_bytes()
        elif name == "trl.jsonl":
            suffix = "jsonl"
            content = "\n".join(map(json.dumps, rows)).encode()
        file = f"{trial}.{suffix}"
        (tmp_path / file).write_bytes(damage(content, rng))
        try:
            found = load(tmp_path, name, file, tmp_path / "out", on_bad_row="drop")
        except InputError as error:
            assert file in str(error) or "row left" in str(error)
            outcomes["raised"] += 1
        else:
            for row in found.train:
                assert_usable(row)
            outcomes["loaded"] += 1
    assert min(outcomes.values()) > 20
    print(f"120 damaged files: {outcomes}")


def pictures() -> dict[str, bytes]:
    """One small noisy picture per format that Pillow can write, whether we accept the format or not."""
    import io

    Image.init()
    found = {}
    for format in sorted(Image.SAVE):
        for mode in ("RGB", "L", "1"):
            buffer = io.BytesIO()
            try:
                Image.effect_noise((40, 30), 90).convert(mode).save(buffer, format)
            except (OSError, ValueError, KeyError, TypeError, NotImplementedError):
                continue  # no such mode in this format
            found[format] = buffer.getvalue()
            break
    return found


def test_damaged_images_of_every_format(tmp_path: Path) -> None:
    rng = random.Random(13)
    formats = pictures()
    assert set(formats) > set(FORMATS) - {"AVIF", "JPEG2000"} and len(formats) > 15
    folder = tmp_path / "images"
    folder.mkdir()
    names, whole = [], set()
    for format, content in formats.items():
        for trial in range(9):
            name = f"{format}_{trial}.{format.lower()}"
            (folder / name).write_bytes(content if trial == 0 else damage(content, rng))
            names.append(name)
            if trial == 0:
                whole.add(name)
    rows = [{"image": name, "prompt": f"Q {i}?", "chosen": "yes", "rejected": "no"} for i, name in enumerate(names)]
    (tmp_path / "d.json").write_text(json.dumps(rows))
    found = load(tmp_path, "plain_dpo", "d.json", tmp_path / "out", on_bad_row="drop")
    kept = {Path(row["images"][0]).name for row in found.train}
    accepted = {name for name in whole if name.split("_")[0] in (*FORMATS, "MPO")}
    assert accepted <= kept and not (whole - accepted) & kept
    undecodable = 0
    for row in found.train:
        try:
            load_image(row["images"][0])
        except (
            InputError
        ) as error:  # damage in the middle, which the cheap check cannot see: one sentence, no traceback
            assert Path(row["images"][0]).name in str(error)
            undecodable += 1
    rows_map = data.load_rows(
        DataArguments(dataset_name="plain_dpo", data_path=str(tmp_path / "d.json"), image_root=str(folder))
    )[0]
    verdicts = data.verify(rows_map, "preference", str(folder), False, decode=True)
    for name, problem in zip(names, verdicts.problem, strict=True):
        if problem is None:
            load_image(str(folder / name))
        else:
            assert name in problem
    print(f"{len(names)} images in {len(formats)} formats: {len(kept)} kept, {undecodable} of them fail when decoded")
