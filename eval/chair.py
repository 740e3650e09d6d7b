"""Hallucinated objects in free text: CHAIR, Object HalBench, AMBER's generative part.

    python -m eval.chair --task chair  --data_path captions_val2014.json --coco annotations/ --synonyms synonyms.txt --answers A
    python -m eval.chair --task objhal --data_path obj_halbench_300_with_image.jsonl --coco annotations/ \
        --synonyms synonyms_refine.txt --answers A [--judge http://localhost:8000/v1 --judge_model M]
    python -m eval.chair --task amber  --data_path AMBER/query_all.json --answers A

Object HalBench without --judge is the official script's rule mode and is stored as `objhal_rule`: papers print the
judged mode (`objhal_judged`), whose numbers are not comparable. Fractions for CHAIR and Object HalBench, percent for AMBER.
"""

import argparse
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from common.errors import InputError, run
from eval import language
from eval.benchmark_files import Row
from eval.files import need, read_any, read_text
from eval.judge import Ask, Judge, add_judge_arguments, ask_all, judge_template
from eval.results import Scores, load, save, scorer_parser
from eval.yesno import amber_annotations, read_amber_truth

# ---------------------------------------------------------------------------------- objects in a list of words

# CHAIR's hard-coded pairs; Object HalBench takes all two-word entries of its table and the last two of these
_CHAIR_PAIRS = (
    "motor bike|motor cycle|air plane|traffic light|street light|traffic signal|stop light|fire hydrant|stop sign|"
    "parking meter|suit case|sports ball|baseball bat|baseball glove|tennis racket|wine glass|hot dog|cell phone|"
    "mobile phone|teddy bear|hair drier|potted plant|bow tie|laptop computer|home plate|train track"
).split("|")
_ANIMALS = "bird cat dog horse sheep cow elephant bear zebra giraffe animal cub".split()


class Mention(NamedTuple):
    """An object named in a text: the word after merging, its COCO node, and what stands in the text."""

    word: str
    node: str
    surface: str


WordsOf = Callable[[str], tuple[list[str], list[str]]]  # text -> its lower-case tokens, and the same made singular
MentionsOf = Callable[[str], list[Mention]]


class ObjectTable:
    """Synonyms -> COCO objects. `path` lists one object per line: "node, synonym, synonym".

    Args: `all_pairs` for Object HalBench, whose script takes every two-word entry as a double word and strips the entries;
        CHAIR's has a fixed list and leaves spaces around an entry, which then never matches.
    """

    def __init__(self, path: str | Path, all_pairs: bool) -> None:
        groups = [line.strip().split(", ") for line in read_text(path).split("\n") if line.strip()]
        groups = [[word.strip() for word in group] for group in groups] if all_pairs else groups
        if not groups:
            raise InputError(f"{path} holds no synonyms; use the synonyms file of the benchmark's repository")
        self.node = {word: group[0] for group in groups for word in group}
        pairs = [w for w in self.node if len(w.split()) == 2] + _CHAIR_PAIRS[-2:] if all_pairs else _CHAIR_PAIRS
        self.pairs = {pair: pair for pair in pairs}
        # "baby bird" is a bird and not a person, "wine glas" is what singularize makes of "wine glasses"
        self.pairs |= {f"{age} {animal}": animal for animal in _ANIMALS for age in ("baby", "adult")}
        self.pairs |= {"passenger jet": "jet", "passenger train": "train"}
        self.pairs |= {"bow tie": "tie", "toilet seat": "toilet", "wine glas": "wine glass"}

    def merge(self, words: list[str]) -> list[tuple[str, int, int]]:
        """Join double words from the left: (word, start, length)."""
        out, i = [], 0
        while i < len(words):
            joined = self.pairs.get(" ".join(words[i : i + 2]))
            length = 1 if joined is None else len(words[i : i + 2])
            out.append((words[i] if joined is None else joined, i, length))
            i += length
        return out

    def mentions(self, tokens: list[str], words: list[str]) -> list[Mention]:
        """The COCO objects among the singular `words`, in order and with repeats; `tokens` are the words as written."""
        merged = self.merge(words)
        if "toilet" in (w for w, _, _ in merged):
            merged = [m for m in merged if m[0] != "seat"]  # a toilet's seat does not count as a chair
        return [Mention(w, self.node[w], " ".join(tokens[i : i + n])) for w, i, n in merged if w in self.node]


def coco_truth(folder: str | Path, image_ids: set[int], table: ObjectTable, words_of: WordsOf) -> dict[int, set[str]]:
    """Objects per image: the instance annotations and the objects in the reference captions, of both COCO 2014 splits."""
    truth: dict[int, set[str]] = {i: set() for i in image_ids}
    for split in ("train", "val"):
        instances = read_any(Path(folder) / f"instances_{split}2014.json")
        names = {c["id"]: c["name"] for c in instances["categories"]}
        for a in instances["annotations"]:
            if a["image_id"] in truth:
                name = names[a["category_id"]]
                if name not in table.node:
                    raise InputError(f"the synonyms hold no '{name}', a COCO category; use the benchmark's own table")
                truth[a["image_id"]].add(table.node[name])
        del instances  # half a gigabyte each
        for a in read_any(Path(folder) / f"captions_{split}2014.json")["annotations"]:
            if a["image_id"] in truth:
                truth[a["image_id"]] |= {m.node for m in table.mentions(*words_of(a["caption"]))}
    return truth


# ------------------------------------------------------------------------------------------------------ CHAIR


def score_chair(
    rows: list[Row], answers: list[str], truth: dict[int, set[str]], mentions_of: MentionsOf
) -> tuple[Scores, list[dict]]:
    """CHAIRs = captions with a hallucinated object / captions; CHAIRi = hallucinated / all mentions, with repeats.

    LisaAnne/Hallucination utils/chair.py. Captions without any object stay in the denominator of CHAIRs.
    """
    details = [_compare(row, answer, mentions_of(answer), truth) for row, answer in zip(rows, answers, strict=True)]
    named, wrong = sum(len(d["objects"]) for d in details), sum(len(d["hallucinated"]) for d in details)
    sentences = sum(bool(d["hallucinated"]) for d in details) / len(details)
    return {"CHAIRs": sentences, "CHAIRi": wrong / named if named else 0.0}, details


def _compare(row: Row, answer: str, mentions: list[Mention], truth: dict[int, set[str]]) -> dict:
    gt = truth[int(str(row["image_id"]))]
    wrong = [m for m in mentions if m.node not in gt]
    return {
        "id": row["id"], "answer": answer, "correct": not wrong, "category": "",
        "objects": [[m.word, m.node] for m in mentions], "hallucinated": [[m.word, m.node] for m in wrong],
        "right": sorted({m.node for m in mentions} & gt), "truth": sorted(gt),
        "marks": sorted({m.surface for m in wrong}),
    }  # fmt: skip


# --------------------------------------------------------------------------------------------- Object HalBench


def score_objhal(
    rows: list[Row], answers: list[str], truth: dict[int, set[str]], mentions_of: MentionsOf
) -> tuple[Scores, list[dict]]:
    """RLHF-V/RLAIF-V eval_gpt_obj_halbench.py. Resp. = CHAIRs_refine, Ment. = CHAIRi in the papers.

    CHAIRs divides by all answers, CHAIRs_refine by those with at least one COCO object; obj_rec = distinct right objects /
    ground-truth objects; avg_word_len splits on single spaces.
    """
    texts = [objhal_text(a) for a in answers]
    details = [_compare(r, a, mentions_of(t), truth) for r, a, t in zip(rows, answers, texts, strict=True)]
    named, wrong = sum(len(d["objects"]) for d in details), sum(len(d["hallucinated"]) for d in details)
    with_objects = sum(bool(d["objects"]) for d in details)
    hallucinated = sum(bool(d["hallucinated"]) for d in details)
    right, gt = sum(len(d["right"]) for d in details), sum(len(d["truth"]) for d in details)
    refined, chair_i = hallucinated / with_objects if with_objects else 0.0, wrong / named if named else 0.0
    lengths = [len(t.split(" ")) for t in texts]
    return {
        "CHAIRs_refine": refined,
        "CHAIRi": chair_i,
        "CHAIRs": hallucinated / len(details),
        "obj_rec": right / gt if gt else 0.0,
        "correct_rate": 1 - refined,
        "object_correct_rate": 1 - chair_i,
        "avg_word_len": sum(lengths) / len(lengths),
        "sentence_num": len(details),
        "coco_sentence_num": with_objects,
        "coco_word_count": right,
        "gt_word_count": gt,
    }, details


def objhal_text(answer: str) -> str:
    """The answer without the role that some models write in front of it."""
    return answer.replace("Assistant:", "").strip()


def rule_mentions(table: ObjectTable, words_of: WordsOf) -> MentionsOf:
    """Every mention among the singular words of the answer, with repeats (CHAIR, Object HalBench's rule mode)."""
    return lambda answer: table.mentions(*words_of(answer))


OBJECT_PROMPT = """List the physical objects that the following image description claims to be visible.

Rules: write each object as a short noun phrase without counts or colours; leave out places, feelings, actions and objects
that the description says are absent or only possible. Reply with a JSON list of strings and nothing else; [] if there are none.

Description: {answer}"""


def judged_mentions(
    table: ObjectTable, ask: Ask, tag: language.Tag, template: str = OBJECT_PROMPT, attempts: int = 5
) -> MentionsOf:
    """Judge mode: a language model lists the objects, spaCy lemmatises them, each string counts once per answer.

    Answers of at most three words name no object and are not asked. When a reply is not a JSON list, the judge is asked again.
    """

    def find(answer: str) -> list[Mention]:
        if len(answer.split()) <= 3:
            return []
        prompt = template.replace("{answer}", answer)
        replies = (_json_list(ask(prompt, sample=i)) for i in range(attempts))
        phrases = next((p for p in replies if p is not None), None)
        if phrases is None:
            raise InputError(
                f"the judge gave no JSON list of objects in {attempts} replies; use a stronger --judge_model"
            )
        surface: dict[str, str] = {}
        for phrase in phrases:
            for word in _phrase_words(phrase, table, tag):
                surface.setdefault(word, phrase)
        if "toilet" in surface:
            surface.pop("seat", None)  # as in the text: a toilet's seat does not count as a chair
        return [Mention(word, table.node[word], s) for word, s in surface.items() if word in table.node]

    return find


def _json_list(reply: str) -> list[str] | None:
    """The list in a reply: the whole reply, its last line behind other text, or a ```json block (later versions of the script)."""
    block = re.search(r"```json\n(.*?)\n```", reply, re.DOTALL)
    last = [reply.strip().split("\n")[-1]] if '["' in reply else []
    for text in [reply, *last, *([block[1]] if block else [])]:
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(value, list):
            return [str(item) for item in value]
    return None


def _phrase_words(phrase: str, table: ObjectTable, tag: language.Tag) -> list[str]:
    """The double words of "a <phrase>", or, without any, its runs of nouns."""
    tokens = tag(f"a {phrase}")
    doubles = [word for word, _, length in table.merge([lemma for lemma, _ in tokens]) if length == 2]
    if doubles:
        return doubles
    runs: list[list[str]] = [[]]
    for lemma, pos in tokens:
        if pos in ("NN", "NNS", "NNP", "NNPS"):
            runs[-1].append(lemma)
        else:
            runs.append([])
    return [" ".join(r) for r in runs if r]


# ------------------------------------------------------------------------------------------ AMBER, generative


def amber_nouns(answer: str, tag: language.Tag, lemma: Callable[[str], str]) -> list[tuple[str, str]]:
    """(lemma, word as written) of the nouns (NN*) of an answer; case is kept."""
    return [(lemma(token), token) for token, pos in tag(answer) if pos.startswith("NN")]


def score_amber_generative(
    rows: list[Row],
    answers: list[str],
    truth: list[dict],
    association: dict[str, list[str]],
    safe_words: Iterable[str],
    nouns_of: Callable[[str], list[tuple[str, str]]],
    similarity: language.Similarity,
    threshold: float = 0.8,
) -> tuple[Scores, list[dict]]:
    """CHAIR, Cover, Hal, Cog in percent with one decimal (junyangwang0410/AMBER inference.py).

    Only nouns of the association vocabulary count. A global safe word enters CHAIR's denominator and nothing else.
    Exact words of the truth list (or their associations) settle a noun; otherwise it may mark a likely hallucination (Cog)
    exactly and by similarity, and similarity to a true word still clears it. Denominators start at 0.001.
    """
    vocabulary = set(association) | {w for words in association.values() for w in words}
    always_safe = set(safe_words)
    total = defaultdict(lambda: 0.001, hallucinated=0, covered=0, cognition=0, clean=0)
    details = []
    for row, answer, note in zip(rows, answers, truth, strict=True):
        if note["type"] != "generative":
            continue
        nouns = [(lemma, token) for lemma, token in nouns_of(answer) if lemma in vocabulary]
        # (word, position in the list that it stands for): associations first, then the words themselves
        true = _targets(note["truth"], association)
        likely = _targets(note["hallu"], association)
        covered: set[int] = set()
        cognition: set[int] = set()
        wrong = []
        for noun, token in nouns:
            if noun in always_safe:
                continue
            exact = _first(true, lambda w, n=noun: w == n)
            if exact is not None:
                covered.add(exact)
                continue
            cognition |= {i for i in (_first(likely, lambda w, n=noun: w == n),) if i is not None}
            similar = _first(likely, lambda w, n=noun: similarity(n, w) > threshold)
            cognition |= {similar} if similar is not None else set()
            similar = _first(true, lambda w, n=noun: similarity(n, w) > threshold)
            if similar is None:
                wrong.append(token)
            else:
                covered.add(similar)
        total["hallucinated"] += len(wrong)
        total["nouns"] += len(nouns)
        total["covered"] += len(covered)
        total["truth"] += len(note["truth"])
        total["cognition"] += len(cognition)
        total["likely"] += len(note["hallu"])
        total["clean"] += not wrong
        total["answers"] += 1
        details.append({"id": row["id"], "answer": answer, "correct": not wrong, "category": "generative",
                        "marks": sorted(set(wrong)), "truth": note["truth"]})  # fmt: skip
    if not details:
        raise InputError("there is no generative question among the rows; pass AMBER's query_all.json")
    return {
        "CHAIR": round(100 * total["hallucinated"] / total["nouns"], 1),
        "Cover": round(100 * total["covered"] / total["truth"], 1),
        "Hal": round(100 - 100 * total["clean"] / total["answers"], 1),
        "Cog": round(100 * total["cognition"] / total["likely"], 1),
    }, details


def _targets(words: list[str], association: dict[str, list[str]]) -> list[tuple[str, int]]:
    related = [(a, i) for i, word in enumerate(words) for a in association.get(word, [])]
    return related + [(word, i) for i, word in enumerate(words)]


def _first(targets: list[tuple[str, int]], matches: Callable[[str], bool]) -> int | None:
    return next((i for word, i in targets if matches(word)), None)


# ------------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    """Run the command line (`argv` in its place)."""
    parser = scorer_parser(__doc__, ("chair", "objhal", "amber"))
    parser.add_argument("--coco", help="folder with instances_{train,val}2014.json and captions_{train,val}2014.json")
    parser.add_argument("--synonyms", help="CHAIR: synonyms.txt; Object HalBench: synonyms_refine.txt")
    parser.add_argument("--annotations", help="AMBER's annotations.json; relation.json and safe_words.txt beside it")
    add_judge_arguments(parser)
    args = parser.parse_args(argv)
    rows, answers, meta = load(args)
    if args.task == "amber":
        return _amber(args, rows, answers, meta)
    if not args.coco or not args.synonyms:
        raise InputError(f"--task {args.task} needs --coco (COCO 2014 annotations) and --synonyms")
    table = ObjectTable(args.synonyms, all_pairs=args.task == "objhal")
    tokenize = language.tokenizer()
    singular = language.singularizer() if args.task == "chair" else language.noun_lemmatizer()

    def words_of(text: str) -> tuple[list[str], list[str]]:
        tokens = tokenize(text.lower())
        return tokens, [singular(w) for w in tokens]

    truth = coco_truth(args.coco, {int(str(r["image_id"])) for r in rows}, table, words_of)
    if args.task == "chair":
        return save(args, "chair", *score_chair(rows, answers, truth, rule_mentions(table, words_of)), meta)
    if not args.judge:
        return save(args, "objhal_rule", *score_objhal(rows, answers, truth, rule_mentions(table, words_of)), meta)
    judge = Judge.from_args(args)
    template, described = judge_template(args, OBJECT_PROMPT, "answer")
    find = judged_mentions(table, judge.ask, language.phrase_tagger(), template)
    asked = [template.replace("{answer}", text) for text in map(objhal_text, answers) if len(text.split()) > 3]
    ask_all(judge.ask, asked, args.judge_workers)  # several at a time; the scorer then finds them in the cache
    save(args, "objhal_judged", *score_objhal(rows, answers, truth, find), meta, judge.describe() | described)


def _amber(args: argparse.Namespace, rows: list[Row], answers: list[str], meta: dict) -> None:
    annotations = amber_annotations(args.annotations, args.data_path)
    truth = read_amber_truth(annotations, rows)
    association = read_any(annotations.parent / "relation.json")
    need([t for t in truth if t["type"] == "generative"], "hallu", annotations)
    safe = read_text(annotations.parent / "safe_words.txt").split("\n")
    tag, lemma, similarity = language.noun_tagger(), language.noun_lemmatizer(), language.word_similarity()
    scores, details = score_amber_generative(
        rows, answers, truth, association, safe, lambda text: amber_nouns(text, tag, lemma), similarity
    )
    save(args, "amber_generative", scores, details, meta)


if __name__ == "__main__":
    run(main)
