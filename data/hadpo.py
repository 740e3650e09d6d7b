"""`hadpo`: HA-DPO's files (arXiv 2311.16839): pope_data.json and desc_data.json, for images of Visual Genome.

Images are named by `image_id`: VG_100K/ID.jpg, VG_100K_2/ID.jpg or ID.jpg under --image_root. A file of descriptions has no
question: it gets one of the four that HA-DPO draws from, by the image's number, and all its good and bad answers in one row
(HA-DPO draws one of each; --pairs best_worst takes the first of each). A question that the model had answered right
(`correct`) holds no preference and is skipped, as there.
"""

import functools
import os

from datasets import Dataset

from args import DataArguments
from data.rows import BadRow, Kind, Row, SkippedRow, preference, require
from data.source import image_root_of, load_source

FOLDERS = ("VG_100K", "VG_100K_2", "")
DESCRIBE = (
    "Describe this image in detail.",
    "Take a look at this image and describe what you notice.",
    "Please provide a detailed description of the picture.",
    "Could you describe the contents of this image for me?",
)


def convert(record: dict, kind: Kind, image_root: str, changed: tuple[float, ...] = ()) -> Row:
    """One record of HA-DPO."""
    # desc_data.json of LLaVA is {image_id: answers}, whose names data.files gives the rows as `id`.
    number = record["image_id"] if record.get("image_id") is not None else record.get("id")
    if number is None:
        require(record, "image_id")
    if not str(number).isdigit():
        raise BadRow(f"has the image_id {str(number)[:80]!r}: it must be the number of an image of Visual Genome")
    names = [os.path.join(folder, f"{int(str(number))}.jpg") for folder in FOLDERS]
    name = next((n for n in names if os.path.exists(os.path.join(image_root, n))), names[0])
    rejected = record["rejected"] if record.get("rejected") is not None else record.get("reject")
    if rejected is None:
        require(record, "rejected")
    require(record, "chosen")
    chosen = record["chosen"]
    if record.get("correct"):
        raise SkippedRow("holds no pair: the model had answered right (`correct`)")
    prompt = record.get("question") or DESCRIBE[int(str(number)) % len(DESCRIBE)]
    good, bad = (answers if isinstance(answers, list) else [answers] for answers in (chosen, rejected))
    row = preference(record, prompt, [*good, *bad], ranks=[0] * len(good) + [1] * len(bad))
    return row | {"images": [name]}


def load(data_args: DataArguments) -> Dataset:
    """Rows of HA-DPO."""
    image_root = image_root_of(data_args)
    # When the folders changed is part of what cached rows are keyed by: they say in which one an image lies.
    folders = [os.path.join(image_root, folder) for folder in FOLDERS]
    changed = tuple(os.path.getmtime(folder) for folder in folders if os.path.isdir(folder))
    return load_source(data_args, functools.partial(convert, image_root=image_root, changed=changed), "preference")
