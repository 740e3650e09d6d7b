"""Look at a data set before a GPU hour is spent: what was understood of it, all checks, token lengths, and a page with rows.

    python -m data.check --dataset_name plain_dpo --data_path pairs.json --image_root images
    python -m data.check --dataset_name plain_dpo --data_path pairs.json --image_root images \\
        --model_name_or_path llava-hf/llava-1.5-7b-hf --max_length 1024 --decode_images True

Takes the data flags of the training scripts. With a model the page shows the prompt as the model reads it, special
tokens and all, the trained tokens of a conversation in colour, and token counts; and what its processor refuses is found.
`--fix rows.jsonl` writes the usable rows in the project's own format. Exit status: 0 if every row can be used, 1 if some
cannot or there are none, 2 for wrong flags or files.
"""

import base64
import html
import io
import itertools
import json
import re
import statistics
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset
from PIL import Image

from args import DataArguments, parse, run
from base.images import load_image
from base.processor import IGNORE_INDEX, VLProcessor
from base.row_checks import ProcessorCheck
from base.videos import Video, first_frame, media_of
from common.errors import InputError
from common.files import replacing
from data import about_columns, checked_rows, per_name, refused_rows, without_image
from data.images import FORMATS
from data.lengths import LengthLimits
from data.rows import IMAGE_MARK, NUMBER_COLUMNS, VIDEO_MARK, Kind, Row, features_of, is_inside, shorten
from data.source import image_root_of
from data.videos import is_film, read_header
from models import core_mapper_for

_SAMPLE = 1000  # rows that lengths and image sizes are measured on
_PICTURES = 200  # of which single colours are counted: they are decoded
_PICTURE = 360  # longest side on the page, in pixels


@dataclass
class CheckArguments:
    """What to check and where to write."""

    output_dir: str = field(default="data_check", metadata={"help": "Folder of index.html and bad_rows.jsonl."})
    kind: Literal["conversation", "preference", "unpaired", "prompt"] | None = field(
        default=None, metadata={"help": "Rows that the training needs; by default what the data set holds."}
    )
    show_rows: int = field(default=24, metadata={"help": "Rows drawn on the page, per data set."})
    decode_images: bool = field(
        default=False, metadata={"help": "Decode every image in full: slow, finds damage in the middle of a file too."}
    )
    max_pixels: int | None = field(default=None, metadata={"help": "As in training: larger pictures are shrunk."})
    min_pixels: int | None = field(default=None, metadata={"help": "As in training: smaller pictures are enlarged."})
    video_frames: int | None = field(default=None, metadata={"help": "As in training: so many frames of a video."})
    video_fps: float | None = field(default=None, metadata={"help": "As in training: so many frames of each second."})
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Show what this model's processor makes of the rows, and count tokens."}
    )
    fix: str | None = field(
        default=None,
        metadata={
            "help": "Write the usable rows of the one data set to this file, as JSON lines in the project's format."
        },
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Read, check, report; the exit status is 1 if a row cannot be used."""
    data_args, check_args = parse(DataArguments, CheckArguments, argv=argv)
    processor = None
    if check_args.model_name_or_path:
        adapter = core_mapper_for(check_args.model_name_or_path)
        processor = adapter.processor(
            check_args.model_name_or_path,
            min_pixels=check_args.min_pixels,
            max_pixels=check_args.max_pixels,
            video_frames=check_args.video_frames,
            video_fps=check_args.video_fps,
        )

    out = Path(check_args.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    table: list[tuple[str, str]] = []
    sections, refused, bad, empty = [], [], 0, False
    sets = list(per_name(data_args, "data_path"))
    if check_args.fix and len(sets) > 1:
        raise InputError(f"--fix writes one data set: give one name to --dataset_name, not {len(sets)}.")
    for args in sets:
        check = ProcessorCheck(processor) if processor is not None else None
        rows, verdicts, kind = checked_rows(args, check_args.kind, check, check_args.decode_images)
        good = [i for i, problem in enumerate(verdicts.problem) if problem is None]
        found = refused_rows(rows, verdicts, args.dataset_name)
        bad += sum(not entry["skipped"] for entry in found)
        refused += found
        usable = rows.select(good)
        empty = empty or not good
        about = _about(args, kind, rows, usable)
        facts = _facts(args.dataset_name, kind, rows, usable, found, len(set(verdicts.content[good].tolist())))
        facts[2:2] = about[5:]  # after "usable"
        facts[1:1] = about[:5]
        if processor is not None and good:
            collators = {
                "conversation": adapter.sft_collator,
                "preference": adapter.dpo_collator,
                "unpaired": adapter.dpo_collator,
                "prompt": adapter.ppo_collator,
            }
            collator = collators[kind](processor, LengthLimits.from_args(data_args))
            counts = collator.drop_overlong(usable, args.dataset_num_proc)[1]
            facts += _token_facts(usable, kind, processor, data_args.train_on)
            facts += [(f"  length limits: {name.replace('_', ' ')}", f"{n:,}") for name, n in counts.items()]
        table += facts
        shown = usable.select(range(min(check_args.show_rows, len(usable))))
        sections.append(_section(args.dataset_name, kind, shown, facts, found, processor, data_args.train_on))
        if check_args.fix:
            write_rows(usable, kind, check_args.fix, image_root_of(args))

    _print_table(table)
    (out / "bad_rows.jsonl").write_text(
        "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in refused), encoding="utf-8"
    )
    (out / "index.html").write_text(_PAGE.replace("<!-- sections -->", "\n".join(sections)), encoding="utf-8")
    print(f"\nPage: {out / 'index.html'}   refused rows: {out / 'bad_rows.jsonl'}")
    if check_args.fix:
        print(
            f"Usable rows: {check_args.fix}   (load them with --dataset_name {check_args.fix} and the same --image_root)"
        )
    return 1 if bad or empty else 0


def write_rows(rows: Dataset | Sequence[dict[str, Any]], kind: Kind, path: str, image_root: str) -> None:
    """JSON lines that load to the same rows, as `--dataset_name PATH --image_root IMAGE_ROOT`.

    Pictures that are bytes are written to a folder beside the file, PATH without its ending; their names then are
    relative to the file's folder, which is the image root if the flag is left out.
    """
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    pictures = file.with_suffix("")
    project = {*features_of(kind, False), "problem", "skipped", "columns"}
    with replacing(file) as beside, open(beside, "w", encoding="utf-8") as out:
        for i, row in enumerate(rows):
            names = [_named(image, image_root, pictures / f"{i}_{n}") for n, image in enumerate(row["images"])]
            written: dict = {"images": names} if names else {}
            if row.get("videos"):
                written["videos"] = [[_named(file, image_root, pictures) for file in files] for files in row["videos"]]
            if kind == "conversation":
                written["messages"] = row["messages"]
            else:
                written["prompt"] = row["prompt"]
            if kind == "preference" and row["ranks"] == [0, 1]:
                written["chosen"], written["rejected"] = row["responses"]
            elif kind == "preference":
                written |= {"responses": row["responses"], "ranks": row["ranks"]}
            elif kind == "unpaired":
                written |= {"completion": row["responses"][0], "label": row["label"]}
            if row.get("image_rejected") is not None:
                written["image_rejected"] = _named(row["image_rejected"], image_root, pictures / f"{i}_rejected")
            written |= {n: row[n] for n in ("scores", "severity", "margin", "reference") if row.get(n) is not None}
            written |= {name: value for name, value in row.items() if name not in project and value is not None}
            out.write(json.dumps(written, ensure_ascii=False) + "\n")


def _named(image: object, image_root: str, to: Path) -> str:
    """The name of a picture, relative to the image root if it lies there; bytes are written to a file first."""
    data, path = (image["bytes"], image["path"]) if isinstance(image, dict) else (None, str(image))
    if data is None:
        return str(Path(path).relative_to(image_root)) if is_inside(path, image_root) else path
    with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
        to = to.with_name(f"{to.name}.{opened.format.lower()}")  # type: ignore[union-attr]
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_bytes(data)
    return f"{to.parent.name}/{to.name}"


# ----------------------------------------------------------------------------------------------------------------------
# The table


def _about(args: DataArguments, kind: Kind, rows: Dataset, usable: Dataset) -> list[tuple[str, str]]:
    """What was understood of the file: columns, and whether there are images."""
    found = about_columns(rows)
    types = {name: str(getattr(f, "dtype", "list")) for name, f in rows.features.items()}
    none = without_image(usable)
    facts = [
        ("  file", str(args.data_path or args.dataset_name)),
        ("  columns read", ", ".join(found["columns_read"]) or "-"),  # type: ignore[arg-type]
        (
            "  columns kept as your own",
            ", ".join(f"{name} ({types[name]})" for name in found["columns_kept"]) or "-",  # type: ignore[attr-defined]
        ),
        ("  columns not kept", "; ".join(f"{n}: {w}" for n, w in found["columns_left_out"].items()) or "-"),  # type: ignore[attr-defined]
        ("  images from", image_root_of(args)),
        ("  usable rows without an image", f"{none:,}"),
    ]
    if none == len(usable) > 0 and args.image_root:
        facts.append(("  NOT ONE ROW HAS AN IMAGE", "though --image_root is given: the model will see texts alone"))
    if not len(usable):
        facts.append(("  NOT ONE ROW CAN BE USED", "see the reasons below"))
    return facts


def _token_facts(rows: Dataset, kind: Kind, processor: VLProcessor, train_on: str) -> list[tuple[str, str]]:
    """Token lengths of a sample, image tokens included, without decoding an image."""
    whole, prompts, answers = [], [], []
    with processor.lengths_only():
        for row in _sample(rows):
            images = media_of(row)
            if kind == "conversation":
                ids, labels, _ = processor.encode_talks([row["messages"]], [images], train_on)
                whole.append(len(ids[0]))
                answers.append(sum(label != IGNORE_INDEX for label in labels[0]))
                continue
            prompts.append(len(processor.encode_conversations([row["prompt"]], [images])[0][0]))
            own = [*map(len, processor.encode_responses(row["prompt"], row.get("responses") or [], images))]
            answers += own
            whole.append(prompts[-1] + max(own, default=0))
    facts = [("  tokens of a prompt, images included", _spread(prompts))] if prompts else []
    if answers:
        facts.append(("  trained tokens" if kind == "conversation" else "  tokens of a response", _spread(answers)))
    facts.append(("  tokens of a row (with its longest response)", _spread(whole)))
    for limit in (1024, 2048, 4096, 8192):
        if (longer := sum(n > limit for n in whole)) or limit == 1024:
            facts.append((f"    rows longer than {limit:,} tokens", f"{longer / max(len(whole), 1):.1%}"))
    return facts


def _sample(rows: Dataset) -> Dataset:
    """Up to 1000 rows, evenly spread."""
    return rows.select(range(0, len(rows), max(len(rows) // _SAMPLE, 1))[:_SAMPLE])


def _facts(
    name: str, kind: Kind, rows: Dataset, usable: Dataset, found: Sequence[dict], different: int
) -> list[tuple[str, str]]:
    """What is worth knowing of a data set, as (name, value)."""
    facts = [
        (f"{name} ({kind} rows)", f"{len(rows):,}"),
        ("  usable", f"{len(usable):,}"),
        ("  exact duplicates among them", f"{len(usable) - different:,}"),
    ]
    for skipped, label in ((False, "cannot be used"), (True, "hold no preference")):
        reasons = Counter(_kind_of_reason(entry["reason"]) for entry in found if entry["skipped"] == skipped)
        facts.append((f"  {label}", f"{sum(reasons.values()):,}"))
        facts += [(f"    {reason}", f"{count:,}") for reason, count in reasons.most_common(12)]
    sample = _sample(usable)
    if len(sample) < len(usable):
        facts.append(("  the following is of a sample of rows", f"{len(sample):,}"))
    images = Counter(len(images) for images in sample["images"])
    facts.append(("  images per row", ", ".join(f"{n}: {count:,}" for n, count in sorted(images.items())) or "-"))
    facts += _video_facts(sample)
    sizes = [_size_of(image) for images in sample["images"] for image in images]
    facts.append(("  image width in pixels", _spread(width for width, _ in sizes)))
    facts.append(("  image height in pixels", _spread(height for _, height in sizes)))
    if sizes:
        plain = sum(_is_plain(image) for image in _different(sample)[:_PICTURES])
        facts.append((f"  pictures of a single colour, of {min(len(_different(sample)), _PICTURES):,}", f"{plain:,}"))
    if kind == "conversation":
        facts.append(("  turns of the assistant", _spread(len(_answers(row)) for row in sample)))
        facts.append(("  characters of an answer", _spread(len(a) for row in sample for a in _answers(row))))
    else:
        facts.append(
            ("  characters of the last question", _spread(len(_words(row["prompt"][-1]["content"])) for row in sample))
        )
    if kind == "preference":
        facts.append(("  responses per row", _spread(len(responses) for responses in sample["responses"])))
        facts.append(("  characters of a response", _spread(len(r) for rs in sample["responses"] for r in rs)))
        best = [(row["ranks"].index(min(row["ranks"])), row["ranks"].index(max(row["ranks"]))) for row in sample]
        longer = sum(
            len(row["responses"][b]) > len(row["responses"][w]) for row, (b, w) in zip(sample, best, strict=True)
        )
        if len(sample):
            # A preference for the longer answer is the best-known way in which a reward model goes wrong.
            facts.append(("  rows whose best response is longer than the worst", f"{longer / len(sample):.0%}"))
    if kind == "unpaired":
        facts.append(("  characters of an answer", _spread(len(responses[0]) for responses in sample["responses"])))
        if len(sample):
            facts.append(("  rows whose answer is a good one", f"{sum(sample['label']) / len(sample):.0%}"))
    return facts


def _video_facts(sample: Dataset) -> list[tuple[str, str]]:
    """Number and length of the videos, if there are any."""
    if "videos" not in sample.column_names:
        return []
    of_rows = [videos or [] for videos in sample["videos"]]
    counts = Counter(map(len, of_rows))
    if not counts.keys() - {0}:
        return []
    frames, seconds = [], []
    for files in itertools.chain(*of_rows):
        if not is_film(files):
            frames.append(len(files))
            continue
        try:
            header = read_header(files[0])
        except (ValueError, OSError):  # with --check_images none nobody has looked at it
            continue
        frames.append(header.frames)
        seconds.append(round(header.frames / header.fps))
    return [
        ("  videos per row", ", ".join(f"{n}: {count:,}" for n, count in sorted(counts.items()))),
        ("  frames of a video", _spread(frames)),
        ("  seconds of a video", _spread(seconds)),
    ]


def _words(question: str) -> str:
    return question.replace(IMAGE_MARK, "").replace(VIDEO_MARK, "").strip()


def _different(rows: Dataset) -> list:
    """The pictures of the rows, each once."""
    found: dict[object, object] = {}
    for images in rows["images"]:
        for image in images:
            found.setdefault(image if isinstance(image, str) else image["bytes"] or image["path"], image)
    return list(found.values())


def _is_plain(image: object) -> bool:
    """Whether all pixels are alike: an empty picture, or ink that was lost."""
    try:
        return all(low == high for low, high in load_image(image).getextrema())  # type: ignore[arg-type, misc]
    except InputError:
        return False


def _kind_of_reason(reason: str) -> str:
    """A reason without the names and numbers of its row, so that equal mistakes are counted together."""
    reason = re.sub(r"(the image|by URL:?|--image_root|a link to) \S*[^\s,:)]", r"\1 ...", reason)
    reason = re.sub(r"'[^']*'|\"[^\"]*\"", "...", reason)
    return re.sub(r"\d[\d,.]*", "N", reason).split(": ")[0][:100]


def _answers(row: Row) -> list[str]:
    return [m["content"] for m in row["messages"] if m["role"] == "assistant"]  # type: ignore[attr-defined]


def _size_of(image: object) -> tuple[int, int]:
    if isinstance(image, dict):
        image = io.BytesIO(image["bytes"]) if image["bytes"] is not None else image["path"]
    with Image.open(image) as opened:  # type: ignore[arg-type]
        return opened.size


def _spread(values: Iterable[int]) -> str:
    numbers = sorted(values)
    if not numbers:
        return "-"
    high = numbers[min(int(0.99 * len(numbers)), len(numbers) - 1)]
    return f"{numbers[0]:,} to {numbers[-1]:,}, median {statistics.median(numbers):,.0f}, 99 % up to {high:,}"


def _print_table(table: Sequence[tuple[str, str]]) -> None:
    width = min(max(len(name) for name, _ in table), 104)
    for name, value in table:
        if not name.startswith(" "):
            print()
        print(f"{name:<{width}}  {value}")


# ----------------------------------------------------------------------------------------------------------------------
# The page


def _section(
    name: str,
    kind: Kind,
    rows: Dataset,
    facts: Sequence[tuple[str, str]],
    found: Sequence[dict],
    processor: VLProcessor | None,
    train_on: str,
) -> str:
    lines = "".join(
        f'<tr class="d{(len(n) - len(n.lstrip())) // 2}{_loud(n, v)}"><td>{html.escape(n.strip())}</td><td>{html.escape(v)}</td></tr>'
        for n, v in facts
    )
    bad = "".join(
        f"<li><b>{html.escape(entry['where'])}</b> {html.escape(entry['reason'])}</li>" for entry in found[:100]
    )
    more = f"<p>The first 100 of {len(found):,}; bad_rows.jsonl has all.</p>" if len(found) > 100 else ""
    listed = f"<h3>Refused rows</h3><ul class=bad>{bad}</ul>{more}" if found else ""
    cards = "".join(_card(row, kind, processor, train_on) for row in rows)
    return (
        f"<section><h2>{html.escape(name)}</h2><table>{lines}</table>{listed}"
        f"<h3>First {len(rows)} usable rows</h3>{_LEGEND if processor is not None else ''}{cards}</section>"
    )


def _loud(name: str, value: str) -> str:
    """The class of a line that asks for a look: reasons why rows are refused, rows that are too long, NOT ONE ROW ..."""
    return (
        " loud"
        if name.strip().startswith("NOT ONE") or (name.startswith("    ") and value not in ("0", "0.0%"))
        else ""
    )


def _card(row: Row, kind: Kind, processor: VLProcessor | None, train_on: str) -> str:
    images: list = row["images"]  # type: ignore[assignment]
    videos: list = row.get("videos") or []  # type: ignore[assignment]
    pictures = "".join(_picture(image, f"image {i} of {len(images)}") for i, image in enumerate(images, 1))
    for i, files in enumerate(videos, 1):
        pictures += _picture(Video(tuple(files)), f"first frame of video {i} of {len(videos)}")
    pictures = pictures or "<p class=none>no image</p>"
    if kind == "conversation":
        text = _conversation(row, processor, train_on)
    else:
        text = _prompt(row, processor)
        if kind == "preference":
            text += _responses(row, processor)
        elif kind == "unpaired":
            side, note = ("best", "good") if row["label"] else ("worst", "bad")
            text += _response(row["responses"][0], side, [f"labelled {note}"], processor)  # type: ignore[index]
        elif row.get("reference"):
            text += f"<h4>reference</h4><pre>{html.escape(str(row['reference']))}</pre>"
    project = {*features_of(kind, False), "problem", "skipped", "columns"}
    own = [f"{name}: {shorten(str(v))}" for name, v in row.items() if name not in project and v is not None]
    if own:
        text += f"<p class=count>your columns: {html.escape('; '.join(own))}</p>"
    return f"<article><div class=pictures>{pictures}</div><div><h4>{html.escape(str(row['where']))}</h4>{text}</div></article>"


def _picture(image: object, name: str) -> str:
    try:
        picture = first_frame(image) if isinstance(image, Video) else load_image(image)  # type: ignore[arg-type]
    except InputError as error:
        return f"<p class=none>{html.escape(str(error))}</p>"
    width, height = picture.size
    picture.thumbnail((_PICTURE, _PICTURE))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG" if max(width, height) <= 64 else "JPEG")
    encoded = base64.b64encode(buffer.getvalue()).decode()
    return f'<figure><img alt="{name}" src="data:image/*;base64,{encoded}"><figcaption>{width} × {height}{_caption(image)}</figcaption></figure>'


def _caption(image: object) -> str:
    return f", first frame of {html.escape(Path(str(image)).name)}" if isinstance(image, Video) else ""


def _prompt(row: Row, processor: VLProcessor | None) -> str:
    messages: list = row["prompt"]  # type: ignore[assignment]
    if processor is None:
        return _plain(messages)
    ids = processor.encode_conversations([messages], [media_of(row)])[0][0]
    return f"<pre>{_tokens(processor, ids)}</pre><p class=count>{len(ids):,} tokens{_of_images(processor, ids)}</p>"


def _conversation(row: Row, processor: VLProcessor | None, train_on: str) -> str:
    messages: list = row["messages"]  # type: ignore[assignment]
    if processor is None:
        return _plain(messages)
    (ids,), (labels,), _ = processor.encode_talks([messages], [media_of(row)], train_on)
    trained = [label != IGNORE_INDEX for label in labels]
    return (
        f"<pre>{_tokens(processor, ids, trained)}</pre>"
        f"<p class=count>{len(ids):,} tokens{_of_images(processor, ids)}, {sum(trained):,} trained</p>"
    )


def _responses(row: Row, processor: VLProcessor | None) -> str:
    ranks: list = row["ranks"]  # type: ignore[assignment]
    out = []
    for i in sorted(range(len(ranks)), key=ranks.__getitem__):
        side = "best" if ranks[i] == min(ranks) else "worst" if ranks[i] == max(ranks) else "middle"
        notes = [f"{side}, rank {ranks[i]:g}"]
        for name, of in NUMBER_COLUMNS.items():
            if of == "response" and row.get(name) and row[name][i] is not None:  # type: ignore[index]
                notes.append(f"{name.removesuffix('s')} {row[name][i]:g}")  # type: ignore[index]
        out.append(_response(row["responses"][i], side, notes, processor))  # type: ignore[index]
    return "".join(out)


def _response(response: str, side: str, notes: list[str], processor: VLProcessor | None) -> str:
    text = html.escape(response)
    if processor is not None:
        ids = processor.encode_response(response)
        text, notes = _tokens(processor, ids), [*notes, f"{len(ids):,} tokens"]
    return f"<pre class={side}>{text}</pre><p class=count>{', '.join(notes)}</p>"


def _plain(messages: Sequence[dict[str, str]]) -> str:
    def marked(text: str) -> str:
        text = html.escape(text)
        for mark in map(html.escape, (IMAGE_MARK, VIDEO_MARK)):
            text = text.replace(mark, f"<span class=special>{mark}</span>")
        return text

    return "".join(f"<pre><span class=role>{m['role']}</span> {marked(m['content'])}</pre>" for m in messages)


def _tokens(processor: VLProcessor, ids: Sequence[int], trained: Sequence[bool] | None = None) -> str:
    """Text with special tokens boxed and runs of one token counted."""
    tokenizer = processor.tokenizer
    special = set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values())
    trained = trained or [False] * len(ids)
    out = []
    for (is_special, is_trained, _), run_ids in itertools.groupby(
        zip(ids, trained, strict=True), key=lambda t: (t[0] in special, t[1], t[0] if t[0] in special else None)
    ):
        tokens = [token for token, _ in run_ids]
        if is_special:
            times = f" × {len(tokens):,}" if len(tokens) > 1 else ""
            text = f"<span class=special>{html.escape(tokenizer.convert_ids_to_tokens(tokens)[0])}{times}</span>"
        else:
            text = html.escape(str(tokenizer.decode(tokens, skip_special_tokens=False)))
        out.append(f"<span class=trained>{text}</span>" if is_trained else text)
    return "".join(out)


def _of_images(processor: VLProcessor, ids: Sequence[int]) -> str:
    told = ""
    for medium, token in (("images", processor.image_token), ("videos", processor.template.video_token)):
        placeholder = processor.tokenizer.convert_tokens_to_ids(token) if token else None
        count = sum(id == placeholder for id in ids)
        told += f", {count:,} of them for {medium}" if count else ""
    return told


_LEGEND = """<p class=legend><span class=special>token</span> special token, × how often in a row &nbsp;
<span class=trained>text</span> enters the loss of a conversation &nbsp; green, yellow, red edge: best, middle, worst response</p>"""

# Texts of the data set are escaped; the policy keeps a page from fetching or running anything all the same.
_PAGE = """<!doctype html><html lang=en><meta charset=utf-8><title>Data check</title>
<meta name=viewport content="width=device-width">
<meta http-equiv=Content-Security-Policy content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<style>
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #1d2430 }
h1, h2 { line-height: 1.1 } h2 { margin-top: 2em; border-bottom: 2px solid #1d2430; padding-bottom: .2em }
h4 { margin: 0 0 .4em; font-size: .85em; color: #5b6573; overflow-wrap: anywhere }
table { border-collapse: collapse } td { padding: .15em .9em .15em 0; vertical-align: top; overflow-wrap: anywhere }
tr.d0 td { font-weight: 600 } tr.d1 td:first-child { padding-left: 1.2em }
tr.d2 td:first-child { padding-left: 2.8em } tr.loud td { color: #a02c2c } td:last-child { font-variant-numeric: tabular-nums }
article { display: grid; grid-template-columns: minmax(120px, 3fr) 7fr; gap: 1.2em; padding: 1.2em 0;
  border-top: 1px solid #d8dde4 }
article > * { min-width: 0 }
figure { margin: 0 0 .6em } img { max-width: 100%; min-width: 96px; image-rendering: auto; border: 1px solid #d8dde4 }
figcaption, .count, .none, .legend { font-size: .82em; color: #5b6573; margin: .1em 0 .7em }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font: 13.5px/1.5 ui-monospace, monospace; background: #f4f6f8;
  padding: .6em .8em; margin: .3em 0; border-left: 4px solid #c4ccd6 }
pre.best { border-color: #2c8a4b } pre.worst { border-color: #b8403a } pre.middle { border-color: #c79a2b }
.special { background: #dfe7fb; color: #2346a0; border-radius: 3px; padding: 0 .3em; font-size: .92em }
.role { font-weight: 600; color: #2346a0 } .bad li { margin: .25em 0; overflow-wrap: anywhere }
.trained { background: #d7f0dd } .trained .special { background: #b5e2c1; color: #14602f }
@media (prefers-color-scheme: dark) {
  body { background: #14181d; color: #dde3ea } h2 { border-color: #dde3ea } pre { background: #1e242b; border-color: #49535e }
  article, figure img { border-color: #39424c } h4, figcaption, .count, .none, .legend { color: #9aa6b3 }
  .special { background: #24345e; color: #b9caff } .trained { background: #1d3f29 }
  .trained .special { background: #265c38; color: #b8f0c8 } .role { color: #9db5ff } tr.loud td { color: #f09a94 }
}
@media (max-width: 640px) {
  body { margin: 1em auto } article { display: block } .pictures { display: flex; flex-wrap: wrap; gap: 0 .8em }
  figure { max-width: 47% } td:first-child { width: 45% } tr.d2 td:first-child { padding-left: 1.8em } .bad { padding-left: 1.1em }
}
</style><h1>Data check</h1><!-- sections --></html>
"""


if __name__ == "__main__":
    status: list[int] = []
    run(lambda: status.append(main()))
    sys.exit(status[0])
