"""The four kinds of row, what a format's `convert` reads them with, and the texts' checks.

| kind         | columns |
|---|---|
| conversation | images, messages |
| preference   | images, prompt (messages), responses (K >= 2), ranks (smaller is better), and optionally scores, severity, |
|              | margin, image_rejected |
| unpaired     | images, prompt (messages), responses (K = 1), label (True: the answer is good) |
| prompt       | images, prompt (messages), optionally reference |

A message is {"role": system | user | assistant, "content": text}, with one `<image>` mark in a user's text per image.
Rows of all kinds may have `videos`, each a list of file names (data/videos.py), with a `<video>` mark for each.
Every row also has `where`, the file and row that it came from, `source`, the name of its data set, and the file's other
columns as far as they are texts, numbers, booleans or lists of those. Until `load_train_eval` has dealt with them, rows
have `problem` (why the row cannot be used, or None), `skipped` (True: nothing is wrong with it, it just holds no
preference) and `columns` (which columns of the file were read, and which were not kept).
"""

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from datasets import Features, Value

from data.media import is_base64, medium_of

Kind = Literal["conversation", "preference", "unpaired", "prompt"]
Row = dict[str, object]


class Message(dict[str, Any]):
    """{"role", "content"} as `messages_of` has read it, and `images` and `videos` where its parts name some."""


IMAGE_MARK = "<image>"
VIDEO_MARK = "<video>"
# Longer than any context: a text like this is a broken file, and tokenising it would take minutes.
MAX_TEXT_CHARS = 1_000_000

# Tokens that stand for pictures in one family or another: in a text they are not words.
IMAGE_TOKENS = re.compile(
    r"<\|?/?(?:image|img|video|vision|media)_?(?:pad|start|end|placeholder|context|soft_token|patch)\|?>"
    r"|<\|(?:begin|end|start)_of_(?:image|img|video)\|>|<(?:start|end)_of_image>|<\|(?:image|img|video|audio)(?:_\d+)?\|>"
    r"|<img_(?:patch|line_break)>|<\|img_(?:patch|line_break)\|>|<imagehere>|<im_patch>|<fake_token_around_image>|<global-img>"
    r"|<row_\d+_col_\d+>|\[img(?:_break|_end)?\]|</?img>",
    re.IGNORECASE,
)
# Qwen's parts may say how large a picture is to be shown.
_PIXEL_KEYS = ("min_pixels", "max_pixels", "resized_height", "resized_width")
# And which frames of a film.
_FRAME_KEYS = ("fps", "nframes", "min_frames", "max_frames", "video_start", "video_end", "total_pixels")
_PATH_KEYS = ("path", "url")
# What names a picture or a sound within a question, or a film where a row has none; answers may be about such texts.
_NAMED_IN_TEXT = re.compile(
    r"<img>[^<]{0,500}|!\[[^\]]{0,200}\]\([^)\s]{1,500}\)|<(?:audio|speech|sound)>", re.IGNORECASE
)
_VIDEO_IN_TEXT = re.compile(r"</?video>", re.IGNORECASE)
# Other projects' marks. `<image_1>` may also refer to a picture whose place `<image>` marks.
_OTHER_MARK = re.compile(r"<(?:image|img|picture|photo)[ _-]?\d*>|[\[{](?:image|img)[ _-]?\d*[\]}]", re.IGNORECASE)
# What a label of one answer may be written as; cells of a table are texts.
LABELS: dict[object, bool] = {1: True, 0: False} | {
    text: good
    for good, texts in (
        (True, ("true", "1", "yes", "good", "desirable", "chosen")),
        (False, ("false", "0", "no", "bad", "undesirable", "rejected")),
    )
    for text in texts
}
# Scores of chosen and rejected, under the names that public sets give them.
PAIR_SCORES = [
    ("chosen_score", "rejected_score"),
    ("score_chosen", "score_rejected"),
    ("chosen_rating", "rejected_rating"),
    ("rating_chosen", "rating_rejected"),
]

ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}

_IMAGE_PATH = Value("string")
_IMAGE_BYTES = {"bytes": Value("binary"), "path": Value("string")}
_MESSAGES = [{"role": Value("string"), "content": Value("string")}]
# Optional columns of numbers in preference rows: one per row, or one per response. A loss may read any of them.
NUMBER_COLUMNS: dict[str, Literal["row", "response"]] = {
    "scores": "response",
    "severity": "response",
    "margin": "row",
}
_KIND_FEATURES: dict[str, dict] = {
    "conversation": {"messages": _MESSAGES},
    "preference": {
        "prompt": _MESSAGES,
        "responses": [Value("string")],
        "ranks": [Value("float64")],
        **{name: Value("float64") if of == "row" else [Value("float64")] for name, of in NUMBER_COLUMNS.items()},
    },
    "unpaired": {"prompt": _MESSAGES, "responses": [Value("string")], "label": Value("bool")},
    "prompt": {"prompt": _MESSAGES, "reference": Value("string")},
}
# What tells a kind from the others, and what may be missing.
REQUIRED: dict[Kind, tuple[str, ...]] = {
    "conversation": ("messages",),
    "preference": ("prompt", "responses", "ranks"),
    "unpaired": ("prompt", "responses", "label"),
    "prompt": ("prompt",),
}
OPTIONAL = (*NUMBER_COLUMNS, "image_rejected", "reference", "videos")


class BadRow(Exception):
    """This row cannot be used; the message says why and what would fix it, without naming the row."""


class SkippedRow(BadRow):
    """Nothing is wrong with this row, but it holds no preference (ties, or fewer than two rated responses)."""


def features_of(kind: Kind, image_bytes: bool) -> Features:
    """Columns of a kind. Images are file paths, or with `image_bytes` {"bytes", "path"} as parquet files hold them."""
    image = _IMAGE_BYTES if image_bytes else _IMAGE_PATH
    features = {"images": [image], "videos": [[_IMAGE_PATH]], **_KIND_FEATURES[kind]}
    if kind == "preference":
        features["image_rejected"] = image
    return Features({**features, "source": Value("string"), "where": Value("string")})


def repeated_key(pairs: Sequence[tuple[str, object]]) -> str | None:
    """What is wrong with the keys of a JSON object, or None. Of equal ones Python would take the last, without a word."""
    names = [name for name, _ in pairs]
    twice = next((name for name in names if names.count(name) > 1), None) if len(set(names)) < len(names) else None
    return None if twice is None else f"has the key {twice!r} twice in one object: which of the values counts?"


# ----------------------------------------------------------------------------------------------------------------------
# Reading the parts of a record


def require(record: Mapping[str, object], *columns: str) -> None:
    """Raises BadRow naming the first missing column and those that are there."""
    for column in columns:
        if record.get(column) is None:
            present: Iterable[tuple[str, object]] = dict.items(record)  # type: ignore[arg-type]  # not counted as read
            there = ", ".join(sorted(str(name) for name, value in present if value is not None)) or "nothing"
            name_it = "" if re.search(r"[.\[]", column) else f"name the column that holds it (--columns {column}=...), "
            raise BadRow(
                f"has no `{column}` (it has {shorten(there)}): add it, {name_it}or choose the --dataset_name of this format"
            )


def text_of(value: object, name: str, may_be_empty: bool = False) -> str:
    """`value` if it is a text that can be trained on. Raises BadRow otherwise."""
    if not isinstance(value, str):
        raise BadRow(f"its {name} is {type_name(value)}, not a text: write it as a string")
    if len(value) > MAX_TEXT_CHARS:
        raise BadRow(f"its {name} has {len(value):,} characters, more than any model reads: shorten it")
    if not value.strip() and not may_be_empty:
        raise BadRow(f"its {name} is empty: fill it in or take the row out")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        mark = f"\\u{ord(value[error.start]):04x}"
        raise BadRow(f"its {name} holds half a character ({mark}, a lone surrogate): write it as UTF-8") from None
    return value


def numbers_of(value: object, name: str, length: int) -> list[float]:
    """(length,) finite numbers."""
    if not isinstance(value, list) or len(value) != length:
        raise BadRow(f"its {name} must be a list of {length} numbers, one per response: it is {shorten(repr(value))}")
    return [number_of(v, f"{name}[{i}]") for i, v in enumerate(value)]


def number_of(value: object, name: str) -> float:
    """`value` as a finite number. Raises BadRow otherwise."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRow(f"its {name} is {type_name(value)}, not a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise BadRow(f"its {name} is not a finite number")
    return number


def _finite(value: object) -> float | None:
    """A number, also one that is written as a text, or None."""
    try:
        number = None if isinstance(value, bool) or value is None else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return None
    return number if number is not None and math.isfinite(number) else None


def label_of(value: object) -> bool | None:
    """Whether a label says that an answer is good; None for what is no such label."""
    value = value.strip().lower() if isinstance(value, str) else value
    return LABELS.get(value) if isinstance(value, str | bool | int | float) else None


def messages_of(value: object, name: str = "messages") -> list[Message]:
    """Messages from [{"role", "content"}], [{"from", "value"}] or [{"human", "assistant"}], or from one such message.

    A content is a text, or a list of text, image and video parts; what parts name stands in the message's `images` and `videos`.
    """
    if isinstance(value, list) and value and all(isinstance(message, Message) for message in value):
        return value
    value = [value] if isinstance(value, Mapping) else value
    if not isinstance(value, list) or not value:
        raise BadRow(
            f"its `{name}` must be a list of messages with a role and a text each: it is {shorten(repr(value))}"
        )
    messages: list[Message] = []
    for i, message in enumerate(value):
        here = f"{name}[{i}]"
        if not isinstance(message, Mapping):
            raise BadRow(f"its {here} is {type_name(message)}: a message is an object with a role and a text")
        if message.get("human") is not None and message.get("assistant") is not None:
            for role in ("user", "assistant"):
                text = text_of(message["human" if role == "user" else role], f"{here}.{role}")
                messages.append(Message(role=role, content=text))
            continue
        role_key, text_key = ("from", "value") if message.get("from") is not None else ("role", "content")
        require({f"{here}.{key}": v for key, v in message.items()}, f"{here}.{role_key}", f"{here}.{text_key}")
        role = message[role_key]
        if not isinstance(role, str) or role not in ROLES:
            raise BadRow(f"its {here} has the role {shorten(repr(role))}: use system, user (human) or assistant (gpt)")
        _refuse_extras({k: v for k, v in message.items() if k not in (role_key, text_key)}, here)
        content = message[text_key]
        named: dict[str, list[object]] = {"images": [], "videos": []}
        if isinstance(content, list):
            content = "".join(_part_text(part, f"{here}.{text_key}[{j}]", named) for j, part in enumerate(content))
        text = text_of(content, f"{here}.{text_key}")
        messages.append(Message(role=ROLES[role], content=text, **{name: v for name, v in named.items() if v}))
    return messages


def _refuse_extras(extras: Mapping[str, object], name: str) -> None:
    """Raises BadRow for what a message holds beside its text and would lose."""
    for key, value in extras.items():
        if key in ("loss", "weight", "loss_weight", "train", "trainable") and value is not None and not value:
            raise BadRow(f"its {name} has {key} {value}: all answers are trained, or with --train_on last the last one")
        if value and key in ("tool_calls", "function_call", "reasoning_content", "thinking"):
            raise BadRow(f"its {name} has `{key}`, which is not supported: take the row out")
        medium = medium_of(key, value)
        if medium and medium[0] == "picture":
            raise BadRow(
                f"its {name} names a picture in `{key}`: put it into `images` of the row, or into an image part"
            )
        if medium:
            raise BadRow(f"its {name} has {medium[0]} in `{key}`, which is not supported: take the row out")


def _part_text(part: object, name: str, named: dict[str, list[object]]) -> str:
    """The text of one part; a picture or film that it names is added to the `images` or `videos` of `named`."""
    if not isinstance(part, Mapping):
        raise BadRow(f"its {name} is {type_name(part)}: a part is an object with a type")
    # Qwen-VL's parts have no type; parquet files give every part all keys.
    keys = ("text", "image", "image_url", "video")
    kind = part.get("type") or next((key for key in keys if part.get(key) is not None), None)
    _refuse_settings(part, name)
    match kind:
        case "text":
            return _text_part(part, name)
        case "image" | "image_url":
            named["images"] += _picture_of(part, name)
            return IMAGE_MARK
        case "video" | "video_url":
            named["videos"] += [part[key] for key in ("video", "video_url", *_PATH_KEYS) if part.get(key) is not None][
                :1
            ]
            return VIDEO_MARK
        case other:
            raise BadRow(
                f"its {name} has the type {shorten(repr(other))}: only text, image and video parts are supported"
            )


def _refuse_settings(part: Mapping[str, object], name: str) -> None:
    """Raises BadRow for a size or a sampling that is to hold for one picture or video alone."""
    if set_here := [key for key in _PIXEL_KEYS if part.get(key) is not None]:
        raise BadRow(f"its {name} sets {set_here[0]} for one picture, which is not supported: resize the file instead")
    if set_here := [key for key in _FRAME_KEYS if part.get(key) is not None]:
        raise BadRow(
            f"its {name} sets {set_here[0]} for one video, which is not supported: --video_frames and --video_fps set it for all"
        )


def _text_part(part: Mapping[str, object], name: str) -> str:
    if any(part.get(key) is not None for key in ("image", "image_url", *_PATH_KEYS)):
        raise BadRow(f"its {name} is a text part that names a picture: make that an image part")
    text = text_of(part.get("text"), name, may_be_empty=True)
    if mark := next((mark for mark in (IMAGE_MARK, VIDEO_MARK) if mark in text), None):
        kind = "an image" if mark == IMAGE_MARK else "a video"
        raise BadRow(f"its {name} is a text part that holds the mark {mark}: use {kind} part instead")
    return text


def _picture_of(part: Mapping[str, object], name: str) -> list[object]:
    """The picture that an image part names, if it names one."""
    picture = next((part[key] for key in ("image", "image_url", *_PATH_KEYS) if part.get(key) is not None), None)
    if part.get("text"):
        raise BadRow(f"its {name} is an image part that holds a text: make that a text part")
    if isinstance(picture, Mapping) and isinstance(picture.get("url"), str):
        picture = picture["url"]
    odd = [k for k, value in part.items() if k != "type" and isinstance(value, str | bytes | Mapping) and value]
    if picture is None and odd:
        raise BadRow(f"its {name} is an image part with `{odd[0]}`: name its file in `image`")
    return images_of(picture, name) if picture is not None else []


def images_of(value: object, name: str = "image") -> list[object]:
    """A list of image names (or {"bytes", "path"}) from one, a list, or None for a text-only row."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    values = [{"bytes": image, "path": None} if isinstance(image, bytes) else image for image in values]
    for image in values:
        if isinstance(image, Mapping):
            if not isinstance(image.get("bytes"), bytes | None) or not isinstance(image.get("path"), str | None):
                raise BadRow(f"its `{name}` is an object that holds no image: give the name of an image file")
            if image.get("bytes") is None and image.get("path") is None:
                keys = f" (it has {shorten(', '.join(map(str, image)))})" if image.keys() - {"bytes", "path"} else ""
                raise BadRow(f"its `{name}` has neither bytes nor a path{keys}: give the name of an image file")
        else:
            if isinstance(image, str) and not image:
                raise BadRow(f"its `{name}` is an empty name: leave the column out for a row without image")
            text_of(image, f"`{name}`")
    return [dict(image) if isinstance(image, Mapping) else image for image in values]


def image_column(record: Mapping[str, object], *names: str) -> list[object]:
    """The images of whichever column the record has; a row with none is text only. Two such columns are refused."""
    there = [name for name in names or ("image", "images") if record.get(name) is not None]
    if len(there) > 1:
        raise BadRow(f"has both `{there[0]}` and `{there[1]}`: keep one of them")
    return images_of(record[there[0]], there[0]) if there else []


def question(prompt: object, name: str = "prompt") -> list[Message]:
    """A prompt: one user's text, or messages with earlier turns and a system prompt."""
    if isinstance(prompt, list):
        return messages_of(prompt, name)
    return [Message(role="user", content=text_of(prompt, f"`{name}`"))]


def preference(record: Mapping[str, object], prompt: object, responses: list[object], ranks: Sequence[float]) -> Row:
    """A preference row, with the optional columns that the record brings along."""
    row: Row = {"prompt": question(prompt), "responses": responses, "ranks": [float(r) for r in ranks]}
    for name, of in NUMBER_COLUMNS.items():
        if record.get(name) is not None:
            value, label = record[name], f"`{name}`"
            row[name] = number_of(value, label) if of == "row" else numbers_of(value, label, len(responses))
    for names in PAIR_SCORES if len(responses) == 2 and "scores" not in row else ():
        if all(_finite(dict.get(record, name)) is not None for name in names):  # type: ignore[call-overload]
            row["scores"] = [_finite(record[name]) for name in names]
            break
    if record.get("image_rejected") is not None:
        images = images_of(record["image_rejected"], "image_rejected")
        if len(images) != 1:
            raise BadRow(f"its `image_rejected` holds {len(images)} images: it is one image")
        row["image_rejected"] = images[0]
    return row


# ----------------------------------------------------------------------------------------------------------------------
# Checks of a whole row


def check_row(kind: Kind, row: Row) -> Row:
    """The row with its image marks in place. Raises BadRow if it cannot be trained on. Looks at no file."""
    messages: list[Message] = row["messages" if kind == "conversation" else "prompt"]  # type: ignore[assignment]
    _check_turns(messages, ends_with="assistant" if kind == "conversation" else "user")
    videos = len(row.get("videos") or ())  # type: ignore[arg-type]
    for i, message in enumerate(messages):
        _refuse_tokens(message["content"], f"message {i}", message["role"] == "user", bool(videos))
    _place_all_marks(messages, len(row["images"]), videos)  # type: ignore[arg-type]
    if kind == "preference":
        _check_responses(row["responses"], row["ranks"])  # type: ignore[arg-type]
    if kind == "unpaired":
        _check_response(row["responses"][0], "answer")  # type: ignore[index]
    if kind == "prompt" and row.get("reference") is not None:
        text_of(row["reference"], "reference")
    return row


def _check_turns(messages: Sequence[Message], ends_with: str) -> None:
    turns = [m["role"] for m in messages]
    if turns[0] == "system":
        turns = turns[1:]
    expected = ["user", "assistant"] * (len(turns) // 2 + 1)
    for i, (role, wanted) in enumerate(zip(turns, expected, strict=False)):
        if role != wanted:
            place = i + len(messages) - len(turns)
            raise BadRow(
                f"has the role {role} in message {place} where {wanted} is due: after an optional system message, "
                "user and assistant alternate"
            )
    if not turns or turns[-1] != ends_with:
        last = turns[-1] if turns else "system"
        raise BadRow(f"ends with a message of {last}: it must end with one of {ends_with}")


def _refuse_tokens(text: str, name: str, asked: bool, videos: bool = False) -> None:
    """Raises BadRow for a text with another family's (or the model's own) image tokens, or that names a picture itself.

    Args:
        asked: it is a question. videos: the row has some, which marks may stand for.
    """
    named = _NAMED_IN_TEXT.search(text) or (None if videos else _VIDEO_IN_TEXT.search(text))
    if asked and named:
        raise BadRow(
            f"names {shorten(named.group(), 80)} in the text of {name}, which no model sees: put pictures into the image column and "
            f"{IMAGE_MARK} where they stand, films into `videos` and {VIDEO_MARK} where they stand; audio is not supported"
        )
    if token := IMAGE_TOKENS.search(text):
        raise BadRow(
            f"has {token.group()} in {name}, which a model takes for a picture: write {IMAGE_MARK} in a question where an "
            "image stands, and no such token elsewhere"
        )


def _place_all_marks(messages: list[Message], num_images: int, num_videos: int) -> None:
    def count(mark: str) -> int:
        return sum(message["content"].count(mark) for message in messages)

    if num_videos and not num_images and not count(VIDEO_MARK) and count(IMAGE_MARK) == num_videos:
        for message in messages:  # LLaVA-Video's sets write <image> where a video stands
            message["content"] = message["content"].replace(IMAGE_MARK, VIDEO_MARK)
    if num_videos:
        _place_marks(messages, num_videos, VIDEO_MARK, "video")
    _place_marks(messages, num_images, IMAGE_MARK, "image")


def _place_marks(messages: list[Message], number: int, mark: str, medium: str) -> None:
    for i, message in enumerate(messages):
        if message["role"] != "user" and mark in message["content"]:
            role = message["role"]
            article = "an" if medium == "image" else "a"
            raise BadRow(f"has {article} {mark} mark in message {i}, of {role}: {medium}s go into user messages")
    marks = sum(message["content"].count(mark) for message in messages)
    for message in messages if marks == 0 and mark == IMAGE_MARK else ():
        other = _OTHER_MARK.search(message["content"]) if message["role"] == "user" else None
        if other and (number or re.fullmatch(r"<.*\d>", other.group())):
            raise BadRow(f"has {other.group()} where an image stands: write {IMAGE_MARK}, in the order of its images")
    if marks == 0 and number:
        first = next(message for message in messages if message["role"] == "user")
        first["content"] = mark * number + first["content"]
    elif marks != number:
        raise BadRow(
            f"has {_count(marks, f'{mark} mark')} and {_count(number, medium)}: write one mark per {medium}, or "
            f"no mark at all to put the {medium}s first"
        )


def _check_responses(responses: Sequence[object], ranks: Sequence[float]) -> None:
    if len(responses) < 2:
        raise BadRow(f"has {_count(len(responses), 'response')}: a preference needs at least 2")
    if len(ranks) != len(responses):
        raise BadRow(f"has {len(responses)} responses and {len(ranks)} ranks: give one rank per response")
    names = ["chosen", "rejected"] if len(responses) == 2 and ranks[0] < ranks[1] else None
    rank_of: dict[str, tuple[int, float]] = {}
    for i, (response, rank) in enumerate(zip(responses, ranks, strict=True)):
        text = _check_response(response, names[i] if names else f"response {i}")
        same, same_rank = rank_of.setdefault(text.strip(), (i, rank))
        if same_rank != rank:
            raise BadRow(
                "has the same text as chosen and as rejected: there is nothing to prefer"
                if names
                else f"has the same text as responses {same} and {i}, which are ranked differently"
            )


def _check_response(response: object, name: str) -> str:
    """The text of one response, if a model can be trained to say it. Raises BadRow otherwise."""
    text = text_of(response, name)
    if IMAGE_MARK in text:
        raise BadRow(f"has an {IMAGE_MARK} mark in its {name}: a model answers in words")
    _refuse_tokens(text, f"its {name}", asked=False)
    return text


# ----------------------------------------------------------------------------------------------------------------------
# Names of images and videos, and words for messages


def normal_path(name: str, image_root: str, allow_outside: bool, what: str = "image") -> str:
    """Absolute path of an image's (or video's) name. Raises BadRow for URLs and names that leave `image_root`; looks at no file."""
    name = name.removeprefix("file://")
    if is_base64(name):
        raise BadRow(f"holds an image as base64 text ({shorten(name, 40)}): write it to a file and name that")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://|data:", name):
        raise BadRow(f"names the {what} {shorten(name)} by URL: download it first and give its file name")
    if "\0" in name:
        raise BadRow(f"has the name of a file ({what}) with a zero character in it")
    path = os.path.normpath(os.path.join(image_root, name))
    if not allow_outside and not is_inside(path, image_root):
        raise BadRow(
            f"names the {what} {shorten(name)}, which lies outside of --image_root {image_root}: move it there, or trust "
            "the file with --allow_outside_image_root True"
        )
    return path


def is_inside(path: str, folder: str) -> bool:
    """Whether a path lies in a folder, by their real names."""
    return path.startswith(folder if folder.endswith(os.sep) else folder + os.sep)


def shorten(text: str, length: int = 120) -> str:
    """Fit for an error message: one printable line that a hostile file cannot blow up."""
    if not text.isprintable():
        text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[: length + 1])
    return text if len(text) <= length else text[: length - 3] + "..."


def _count(number: int, name: str) -> str:
    return f"{number} {name}" + ("" if number == 1 else "s")


def type_name(value: object) -> str:
    """What a message calls the type of a value."""
    names = {
        dict: "an object",
        list: "a list",
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "a text",
    }
    return "missing" if value is None else names.get(type(value), f"a {type(value).__name__}")


def first_user_text(messages: Iterable[Message]) -> str:
    """The first question, by which rows are grouped."""
    return next((m["content"] for m in messages if m["role"] == "user"), "")
