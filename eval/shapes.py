"""How often a model says what is not there, on the held-out scenes of data/scenes.py, where the truth is known exactly.

    python -m eval.shapes --model_name_or_path runs/demo/sft --data_path runs/demo/data/eval.json --output runs/demo/eval/sft
    python -m eval.shapes --model_name_or_path runs/demo/sft --adapter runs/demo/dpo --data_path runs/demo/data/eval.json \
        --output runs/demo/eval/dpo

writes scores.json and answers.jsonl to the folder. All answers are greedy.

    chair_i            objects mentioned that are not there / objects mentioned (CHAIR, 1809.02156, eq. 1; an object is a colour and a shape)
    chair_s            captions with such an object / captions (eq. 2)
    coverage           objects mentioned / objects there; a model that says nothing has no hallucination and no coverage
    exact_captions     captions with every object, its place and nothing else, in any order
    yesno_accuracy     yes/no questions answered correctly; yes_share: answered yes (one half is right)
    counting_accuracy  counting questions answered correctly
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import torch

from args import run
from base.loading import load_adapter, load_model
from common.errors import InputError
from common.files import write_json, write_json_lines
from common.flags import FlagParser
from data.scenes import COLOURS, PLACES, SHAPES, Thing, read_caption
from eval.flags import add_flag, add_model_flags
from eval.generate import processor_for

MAX_NEW_TOKENS = 64  # six objects; an answer to a question needs three
MENTION = re.compile(rf"\b({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})\b")

# ---------------------------------------------------------------------------------------------------------------------
# Scores: no model needed


def mentions(text: str) -> list[str]:
    """The objects that a text names, in order and with repeats: ["red circle", ...]."""
    return [f"{colour} {shape}" for colour, shape in MENTION.findall(text.lower())]


def score_captions(scenes: Sequence[Sequence[Thing]], captions: Sequence[str]) -> dict[str, float]:
    """chair_i, chair_s, coverage and exact_captions of one caption per scene. Without any mention chair_i is 0."""
    mentioned = false = affected = found = exact = 0
    for scene, text in zip(scenes, captions, strict=True):
        names, said = {thing.name for thing in scene}, mentions(text)
        wrong = sum(name not in names for name in said)
        mentioned, false, affected = mentioned + len(said), false + wrong, affected + (wrong > 0)
        found += len(names & set(said))
        exact += sorted(read_caption(text) or []) == sorted(scene)
    return {
        "chair_i": false / max(mentioned, 1),
        "chair_s": affected / len(captions),
        "coverage": found / sum(map(len, scenes)),
        "exact_captions": exact / len(captions),
    }


def score_answers(expected: Sequence[str], answers: Sequence[str]) -> dict[str, float]:
    """yesno_accuracy, yes_share and counting_accuracy; an answer is its first word, without case and full stop."""
    said = [(_first_word(right), _first_word(answer)) for right, answer in zip(expected, answers, strict=True)]
    yesno = [pair for pair in said if pair[0] in ("yes", "no")]
    counts = [pair for pair in said if pair[0] not in ("yes", "no")]
    return {
        "yesno_accuracy": sum(right == answer for right, answer in yesno) / max(len(yesno), 1),
        "yes_share": sum(answer == "yes" for _, answer in yesno) / max(len(yesno), 1),
        "counting_accuracy": sum(right == answer for right, answer in counts) / max(len(counts), 1),
    }


def _first_word(text: str) -> str:
    return (re.findall(r"\w+", text.lower()) or [""])[0]


def marked(text: str, scene: Sequence[Thing]) -> list[tuple[str, bool]]:
    """The caption in pieces, each with whether it is wrong: an object that is not there, or the place of one that is elsewhere."""
    places = {thing.name: PLACES[thing.place] for thing in scene}
    by_length = "|".join(sorted(PLACES, key=len, reverse=True))  # "top left" before "top"
    pieces: list[tuple[str, bool]] = []
    end = 0
    for match in re.finditer(rf"(?:\b({by_length})( a ))?{MENTION.pattern}", text, re.IGNORECASE):
        place, between, name = match[1], match[2], f"{match[3]} {match[4]}".lower()
        pieces.append((text[end : match.start()], False))
        if place and name in places:
            pieces += [(place, place.lower() != places[name]), (between + text[match.start(3) : match.end()], False)]
        else:
            pieces.append((match[0], name not in places))
        end = match.end()
    return [piece for piece in [*pieces, (text[end:], False)] if piece[0]]


# ---------------------------------------------------------------------------------------------------------------------
# Answers


def read_scenes(path: Path) -> list[dict]:
    """The rows of eval.json, each with `scene`, its objects as Things.

    Raises:
        InputError: the file is missing or was not written by data.shapes.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        for row in rows:
            row["scene"] = [Thing(o["colour"], o["shape"], PLACES.index(o["place"])) for o in row["objects"]]
            row["image"] = str(path.parent / row["image"])
    except FileNotFoundError:
        raise InputError(
            f"{path} does not exist: `python -m data.shapes --output_dir {path.parent}` writes it."
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} is not an eval.json of data.shapes ({error!r}): write it with `python -m data.shapes --output_dir DIR`."
        ) from error
    return rows


def answer(
    model: str, adapter: str | None, prompts: Sequence[tuple[str, str]], max_new_tokens: Sequence[int], batch_size: int
) -> list[str]:
    """Greedy answers to (image, text) prompts; `max_new_tokens` has one number per prompt, and batches hold equal ones."""
    processor, policy = processor_for(model, adapter), load_model(model)
    if adapter:
        policy = load_adapter(policy, adapter)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    policy.to(device).eval()
    processor.infer()
    answers = [""] * len(prompts)
    for length in sorted(set(max_new_tokens)):
        indices = [i for i, n in enumerate(max_new_tokens) if n == length]
        for start in range(0, len(indices), batch_size):
            batch = indices[start : start + batch_size]
            convs = [[{"role": "user", "content": prompts[i][1]}] for i in batch]
            inputs = processor(convs=convs, images=[[prompts[i][0]] for i in batch])
            inputs = {name: value.to(device) for name, value in inputs.items()}
            with torch.inference_mode():
                tokens = policy.generate(**inputs, max_new_tokens=length, do_sample=False)
            for i, ids in zip(batch, tokens[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
                answers[i] = processor.decode_response(ids)
    return answers


def evaluate(model: str, adapter: str | None, data: Path, output: Path, batch_size: int) -> dict[str, float]:
    """Answer everything in `data`, write scores.json and answers.jsonl to `output`, return the scores."""
    rows = read_scenes(data)
    asked = [question for row in rows for question in row["questions"]]
    prompts = [(row["image"], row["prompt"]) for row in rows]
    prompts += [(row["image"], question["text"]) for row in rows for question in row["questions"]]
    limits = [MAX_NEW_TOKENS] * len(rows) + [4] * len(asked)
    answers = answer(model, adapter, prompts, limits, batch_size)
    captions, replies = answers[: len(rows)], answers[len(rows) :]
    scores = score_captions([row["scene"] for row in rows], captions)
    scores |= score_answers([question["answer"] for question in asked], replies)
    write_json(
        output / "scores.json", {"model": model, "adapter": adapter, "data": str(data), "rows": len(rows)} | scores
    )
    truth = [row["caption"] for row in rows] + [question["answer"] for question in asked]
    lines = zip(prompts, answers, truth, strict=True)
    keys = ("image", "prompt", "answer", "truth")
    write_json_lines(output / "answers.jsonl", (dict(zip(keys, (*p, a, t), strict=True)) for p, a, t in lines))
    return scores


def main() -> None:
    """Answer the held-out questions and score the answers."""
    parser = FlagParser(description=__doc__)
    add_model_flags(parser)
    add_flag(parser, "--data_path", "--data", required=True, type=Path, help="eval.json of data.shapes")
    parser.add_argument("--output", required=True, type=Path, help="folder of scores.json and answers.jsonl")
    parser.add_argument("--batch_size", type=int, default=100)
    args = parser.parse_args()
    scores = evaluate(args.model_name_or_path, args.adapter, args.data_path, args.output, args.batch_size)
    print(f"{args.adapter or args.model_name_or_path} -> {args.output}")
    for name, value in scores.items():
        print(f"  {name:<17} {value:.3f}")


if __name__ == "__main__":
    run(main)
