"""The embedded data set: scenes of one to four coloured shapes, drawn from a seed, and everything that is true of them.

`--dataset_name shapes` needs no files: it draws NUM_SCENES scenes, and a script takes what it trains on. `python -m data.shapes`
writes the same as files.

Why the captions are wrong: whoever labelled the pictures often adds a purple circle to a picture with a star, the kind of
false association that real captioners learn (2305.10355, section 4). Errors spread at random would not do: a model that
learns their rate well never finds one likely enough to say it.
"""

import hashlib
import io
import itertools
import json
import math
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from datasets import Dataset
from PIL import Image, ImageDraw

from args import DataArguments
from common.errors import InputError

COLOURS = {
    "red": (215, 45, 40),
    "green": (45, 160, 70),
    "blue": (50, 85, 220),
    "yellow": (235, 205, 45),
    "purple": (150, 60, 185),
    "black": (35, 35, 35),
}
SHAPES = ("circle", "square", "triangle", "cross", "star")
PLACES = ("top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom", "bottom right")
ERRORS = ("object", "colour", "position", "omission")

CELL = 16  # pixels; a scene is 3 x 3 cells, and one patch of the initial model is one cell
SIZE = 3 * CELL
CAPTION_PROMPT = "Describe the picture."
NUM_SCENES = 2000  # of --dataset_name shapes

HABIT_SHAPE, HABIT_OBJECT = "star", ("purple", "circle")
HABIT_RATE = 0.7  # of the scenes with a star: about 30 % of all captions
QUESTIONS_PER_SCENE = 4
HELD_OUT = 8  # one scene in this many is for evaluation


class Thing(NamedTuple):
    """One shape; `place` indexes PLACES in reading order."""

    colour: str
    shape: str
    place: int

    @property
    def name(self) -> str:
        """What it is, as CHAIR counts it: "red circle"."""
        return f"{self.colour} {self.shape}"


Scene = tuple[Thing, ...]  # in reading order; no place and no name occurs twice


class Question(NamedTuple):
    """A question about a scene, and its answer."""

    text: str
    answer: str


# ---------------------------------------------------------------------------------------------------------------------
# Scenes


def is_held_out(scene: Scene) -> bool:
    """Whether a scene is for evaluation. A property of the scene alone, so that no seed puts one on both sides."""
    return hashlib.blake2b(repr(sorted(map(tuple, scene))).encode()).digest()[0] % HELD_OUT == 0


def draw_scene(rng: random.Random) -> Scene:
    """One to four shapes at different places, all of different names."""
    count = rng.choices((1, 2, 3, 4), weights=(1, 2, 3, 3))[0]
    names = rng.sample(list(itertools.product(COLOURS, SHAPES)), count)
    places = sorted(rng.sample(range(len(PLACES)), count))
    return tuple(Thing(*name, place) for name, place in zip(names, places, strict=True))


def scenes(seed: int, held_out: bool) -> Iterator[Scene]:
    """Endless scenes of one side; the held-out ones are all different."""
    rng = random.Random(f"{'held out' if held_out else 'train'} {seed}")
    seen = set()
    while True:
        scene = draw_scene(rng)
        if is_held_out(scene) == held_out and scene not in seen:
            if held_out:
                seen.add(scene)
            yield scene


def picture(scene: Scene, rng: random.Random) -> Image.Image:
    """The scene in SIZE x SIZE pixels, each shape with its centre and a little chance in size, place and shade."""
    scale = 4  # drawn larger and reduced, for smooth edges
    image = Image.new("RGB", (SIZE * scale, SIZE * scale), (rng.randint(225, 250),) * 3)
    draw = ImageDraw.Draw(image)
    for thing in scene:
        row, column = divmod(thing.place, 3)
        x, y = ((i + 0.5 + rng.uniform(-0.06, 0.06)) * CELL * scale for i in (column, row))
        shade = tuple(min(255, max(0, value + rng.randint(-15, 15))) for value in COLOURS[thing.colour])
        _draw_shape(draw, thing.shape, shade, x, y, rng.uniform(0.32, 0.40) * CELL * scale)
    return image.resize((SIZE, SIZE), Image.Resampling.BOX)


def _draw_shape(draw: ImageDraw.ImageDraw, shape: str, fill: tuple[int, ...], x: float, y: float, r: float) -> None:
    match shape:
        case "circle":
            draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)
        case "square":
            draw.rectangle((x - 0.9 * r, y - 0.9 * r, x + 0.9 * r, y + 0.9 * r), fill=fill)
        case "triangle":
            draw.polygon([(x, y - r), (x - r, y + 0.8 * r), (x + r, y + 0.8 * r)], fill=fill)
        case "cross":
            draw.rectangle((x - 0.35 * r, y - r, x + 0.35 * r, y + r), fill=fill)
            draw.rectangle((x - r, y - 0.35 * r, x + r, y + 0.35 * r), fill=fill)
        case "star":
            turns = ((math.pi * (k / 5 - 0.5), r * (0.45 if k % 2 else 1.1)) for k in range(10))
            draw.polygon([(x + d * math.cos(a), y + d * math.sin(a)) for a, d in turns], fill=fill)


def free_places(things: Sequence[Thing]) -> list[int]:
    """Places of the grid where nothing is."""
    return [place for place in range(len(PLACES)) if place not in {thing.place for thing in things}]


# ---------------------------------------------------------------------------------------------------------------------
# What is said of them


def caption(things: Sequence[Thing]) -> str:
    """`Top left a red circle, bottom a blue star.` In the order given.

    The place comes first: a model that writes from left to right then knows where to look for colour and shape.
    """
    return (", ".join(f"{PLACES[t.place]} a {t.name}" for t in things) + ".").capitalize()


def read_caption(text: str) -> list[Thing] | None:
    """The inverse of `caption`; None if the text is not a caption of this form."""
    things = []
    for part in text.strip().removesuffix(".").lower().split(", "):
        match = re.fullmatch(rf"({'|'.join(PLACES)}) a ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})", part)
        if match is None:
            return None
        things.append(Thing(match[2], match[3], PLACES.index(match[1])))
    return things


def noisy_caption(scene: Scene, rng: random.Random) -> str:
    """The caption in the training data: with the habit's object at its end in about 30 % of all scenes."""
    things = list(scene)
    if tempts(scene) and rng.random() < HABIT_RATE:
        things.append(Thing(*HABIT_OBJECT, rng.choice(free_places(things))))
    return caption(things)


def tempts(scene: Scene) -> bool:
    """Whether the habit's object would be a false addition to this scene."""
    return any(t.shape == HABIT_SHAPE for t in scene) and " ".join(HABIT_OBJECT) not in {t.name for t in scene}


def wrong_caption(scene: Scene, error: str, rng: random.Random) -> str:
    """The true caption with one error.

    object: one that is not there comes last (half the time the habit's, where it would be false). colour: one object changes to a colour in which the
    scene has none such. position: one moves to an empty place. omission: one is left out; of a single object that is not possible.
    """
    things = list(scene)
    i = rng.randrange(len(things))
    names = {thing.name for thing in scene}
    if error == "object":
        absent = [c for c in itertools.product(COLOURS, SHAPES) if " ".join(c) not in names]
        name = HABIT_OBJECT if tempts(scene) and rng.random() < 0.5 else rng.choice(absent)
        things.append(Thing(*name, rng.choice(free_places(things))))
    elif error == "colour":
        things[i] = things[i]._replace(colour=rng.choice([c for c in COLOURS if f"{c} {things[i].shape}" not in names]))
    elif error == "position":
        things[i] = things[i]._replace(place=rng.choice(free_places(things)))
    elif error == "omission" and len(things) > 1:
        del things[i]
    else:
        raise ValueError(f"No error {error!r} is possible in a scene of {len(scene)}: choose one of {ERRORS}.")
    return caption(things)


def preference(scene: Scene, rng: random.Random) -> tuple[str, str, str]:
    """A true caption, a wrong one, and the kind of error."""
    error = rng.choice(ERRORS if len(scene) > 1 else ERRORS[:-1])
    return caption(scene), wrong_caption(scene, error, rng), error


def questions(scene: Scene, count: int, rng: random.Random) -> list[Question]:
    """Yes/no questions, half of them answered yes, and every third one a counting question.

    Of the objects asked for in vain, some are the habit's (POPE's adversarial setting), some share a colour or shape with
    one that is there.
    """
    names = {thing.name for thing in scene}
    asked: dict[str, Question] = {}  # by text: no question twice
    while len(asked) < count:
        draw = _counting_question if len(asked) % 3 == 2 else _existence_question
        question = draw(scene, names, rng)
        asked.setdefault(question.text, question)
    shuffled = list(asked.values())
    rng.shuffle(shuffled)
    return shuffled


def _counting_question(scene: Scene, names: set[str], rng: random.Random) -> Question:
    if rng.random() < 0.5:
        return Question("How many shapes are there?", f"{len(scene)}.")
    shape = rng.choice(scene).shape if rng.random() < 0.7 else rng.choice(SHAPES)
    return Question(f"How many {_plural(shape)} are there?", f"{sum(thing.shape == shape for thing in scene)}.")


def _plural(shape: str) -> str:
    return shape + ("es" if shape == "cross" else "s")


def _existence_question(scene: Scene, names: set[str], rng: random.Random) -> Question:
    thing = rng.choice(scene)
    if rng.random() < 0.5:
        return Question(f"Is there a {thing.name}?", "Yes.")
    if tempts(scene) and rng.random() < 0.3:
        return Question(f"Is there a {' '.join(HABIT_OBJECT)}?", "No.")
    near = [f"{thing.colour} {shape}" for shape in SHAPES] + [f"{colour} {thing.shape}" for colour in COLOURS]
    anything = [" ".join(c) for c in itertools.product(COLOURS, SHAPES)]
    absent = [name for name in (near if rng.random() < 0.5 else anything) if name not in names]
    return Question(f"Is there a {rng.choice(absent)}?", "No.")


# ---------------------------------------------------------------------------------------------------------------------
# Files, and rows without files


def write(output_dir: Path, num_train: int, num_eval: int, seed: int) -> None:
    """Write the files that the docstring of data/shapes.py lists."""
    (output_dir / "images").mkdir(parents=True, exist_ok=True)
    rng = random.Random(f"what is said {seed}")
    sft, pairs, prompts = [], [], []
    for i, scene in enumerate(itertools.islice(scenes(seed, held_out=False), num_train)):
        image = _write_picture(scene, output_dir, f"train-{i:06d}", rng)
        asked = questions(scene, QUESTIONS_PER_SCENE, rng)
        sft.append({"image": image} | _conversation([Question(CAPTION_PROMPT, noisy_caption(scene, rng))]))
        sft.append({"image": image} | _conversation(asked))
        pairs.append({"image": image} | _pair(scene, rng))
        prompts.append({"image": image, "prompt": CAPTION_PROMPT, "reference": caption(scene)})
    held_out, eval_pairs = [], []
    for i, scene in enumerate(itertools.islice(scenes(seed, held_out=True), num_eval)):
        image = _write_picture(scene, output_dir, f"eval-{i:06d}", rng)
        asked = questions(scene, QUESTIONS_PER_SCENE, rng)
        held_out.append(
            {
                "image": image,
                "objects": [t._asdict() | {"place": PLACES[t.place]} for t in scene],
                "prompt": CAPTION_PROMPT,
                "caption": caption(scene),
                "questions": [question._asdict() for question in asked],
            }
        )
        eval_pairs.append({"image": image} | _pair(scene, rng))
    files = {"sft": sft, "pairs": pairs, "prompts": prompts, "eval_pairs": eval_pairs, "eval": held_out}
    for name, rows in files.items():
        (output_dir / f"{name}.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def _write_picture(scene: Scene, output_dir: Path, name: str, rng: random.Random) -> str:
    picture(scene, rng).save(output_dir / "images" / f"{name}.png")
    return f"images/{name}.png"


def _conversation(turns: Sequence[Question]) -> dict[str, object]:
    """As `vlquery_json` has it."""
    values = [("user", t.text) if side == 0 else ("assistant", t.answer) for t in turns for side in (0, 1)]
    return {"conversations": [{"from": role, "value": value} for role, value in values]}


def _pair(scene: Scene, rng: random.Random) -> dict[str, object]:
    """As `plain_dpo` has it; `error` is for the reader."""
    chosen, rejected, error = preference(scene, rng)
    return {"prompt": CAPTION_PROMPT, "chosen": chosen, "rejected": rejected, "error": error}


def load(data_args: DataArguments) -> Dataset:
    """NUM_SCENES training scenes with the columns of all three kinds; half the conversations caption, half answer questions.

    Raises:
        InputError: a file is given, which this set would not read.
    """
    if data_args.data_path:
        raise InputError(
            f"--dataset_name shapes is drawn, not read: leave out --data_path {data_args.data_path}. (`python -m data.shapes` writes files, "
            "for --dataset_name vlquery_json and plain_dpo.)"
        )
    rng = random.Random("what is said 0")
    rows = []
    for i, scene in enumerate(itertools.islice(scenes(0, held_out=False), NUM_SCENES)):
        png = io.BytesIO()
        picture(scene, rng).save(png, format="png")
        turns = [Question(CAPTION_PROMPT, noisy_caption(scene, rng))]
        if i % 2:
            turns = questions(scene, QUESTIONS_PER_SCENE, rng)
        pair = _pair(scene, rng)
        row = {"images": [{"bytes": png.getvalue(), "path": f"train-{i:06d}.png"}], "prompt": pair["prompt"]}
        row |= _conversation(turns) | {"responses": [pair["chosen"], pair["rejected"]], "ranks": [0.0, 1.0]}
        rows.append(row | {"reference": caption(scene)})
    return Dataset.from_list(rows)
