"""Answer files: one reply per row of a benchmark, written by eval.generate or by another tool (docs/evaluation.md lists the layouts).

Three questions are answered by what the records hold, never by the file's name:
    which record belongs to which row  ids, whatever their column is called; else the order, if the questions agree
    which column is the model's reply  `prediction`, `response`, `text`, ... come before `answer`, which is often the truth
    what stays unclear                 is an error that names the columns
"""

import itertools
import re
from collections.abc import Iterator
from pathlib import Path

from common.errors import InputError
from eval.benchmark_files import HALLUSION_KEY, Row
from eval.files import REFERENCE_LENGTH, existing, need, read_any, read_text

# Columns that reading adds: the name of the file in a folder of files, the key in {id: record}.
FILE, KEY = "(file)", "(key)"
DATA_ENDINGS = (".txt", ".json", ".jsonl", ".tsv", ".csv", ".xlsx", ".parquet")

# Columns that name a row, likeliest first; a nested one ("pope_accuracy.question_id") counts after all of these.
ID_COLUMNS = (
    "id index question_id q_id qid questionid pid line sample_id uid problem_id question_index image_id image"
).split()
QUESTION_COLUMNS = "question prompt query input text instruction bare_question raw_question".split()
# The reply of the model, where a record may hold the truth, too.
REPLY_COLUMNS = (
    "prediction model_prediction response model_response model_answer model_output filtered_resps resps reply text caption "
    "output outputs predict hypothesis completion "
    "generated_text generation generated_answer predicted_answer pred_answer pred model_pred pred_ans answer_pred"
).split()
TRUTH_COLUMNS = (
    "gt gt_answer ground_truth groundtruth label target gold gold_answer reference truth correct_answer gt_ans gtruth solution answer_key key_answer"
).split()
# Words in the name of a column that no list foresees: `llava_output`, `my_answer`; `expected_answer` is a truth.
_REPLY_WORDS = frozenset(
    "pred preds prediction predictions predicted resp resps response responses reply replies generated generation completion "
    "output outputs answer answers".split()
)
_TRUTH_WORDS = frozenset(
    "gt gold golden true truth correct reference ref right expected target ground label official human std standard".split()
)
_NOT_A_REPLY = frozenset(
    "id ids name type time token tokens length len log logs hit score scores category path file hash parsed extraction extracted "
    "count num number index".split()
)
_ID_WORDS = frozenset("id ids idx index key uid uuid no number qid pid".split())
# Columns of a benchmark's question file: beside them an `answer` alone is the truth.
_QUESTION_FILE = frozenset(
    "a b all_choices index2ans options question_type answer_type l2_category gt_answer_details choice_a capability imagename".split()
)

_NEVER_A_REPLY = frozenset(
    [*ID_COLUMNS, *QUESTION_COLUMNS, *"answer category split model_id answer_id images image_path".split()]
)

Record = dict[str, object]


def read_answers(path: str | Path, rows: list[Row]) -> list[str]:
    """Return the model's reply to every row, in row order.

    Raises InputError when a reply is missing, is there twice, or when rows or columns cannot be told apart.
    """
    records = read_answer_records(path)
    matched = match(records, rows, path)
    column = reply_column(matched, rows, path)
    replies = [_reply(path, row, record.get(column)) for row, record in zip(rows, matched, strict=True)]
    if len(rows) > 1 and not any(reply.strip() for reply in replies):
        raise InputError(
            f"{path}: every '{column}' is empty; is it the template, before the model's replies were written to it?"
        )
    return _hallusion_codes(rows, replies)


# ---------------------------------------------------------------------------------------------------- records


def read_answer_records(path: str | Path) -> list[Record]:
    """The records of an answer file, or of the files of a folder (MME's text files, MMMU's output.json, one file per split)."""
    source = Path(path)
    if not source.is_dir():
        return _flat(_records(source))
    files = sorted(f for f in source.rglob("*") if f.suffix.lower() in DATA_ENDINGS and _holds_answers(f))
    outputs = [f for f in files if f.name == "output.json"]  # MMMU: one folder per subject, parsed files beside it
    texts = [f for f in files if f.suffix == ".txt" and _mme_lines(f) is not None]
    files = outputs or texts or [f for f in files if f.suffix != ".txt"]
    if not files:
        raise InputError(f"{path} is a folder without an answer file; pass the file")
    found = []
    for file in files:
        stem = file.parent.name if file.name == "output.json" else file.stem
        found += [{FILE: stem, **record} for record in _flat(_records(file))]
    return found


def _holds_answers(file: Path) -> bool:
    """Not what our scorers or other tools write beside the answers."""
    ours = (
        file.name.endswith(".meta.json") or file.name in ("results.json", "judge_cache.jsonl") or "scored" in file.parts
    )
    return not (ours or file.name in ("parsed_output.json", "result.json", "leaderboard.json"))


def _records(path: Path) -> list[Record]:
    lines = _mme_lines(path)
    if lines is not None:
        return lines
    data = read_any(path)
    if isinstance(data, dict):
        data = _records_of_object(data, path)
    if not isinstance(data, list) or not all(isinstance(r, dict) for r in data):
        raise InputError(f"{path} is not a list of answers: JSON lines or a JSON list of objects is expected")
    need(data, "", path)
    return data


def _mme_lines(path: Path) -> list[Record] | None:
    """MME's text file of one task: image, question, truth and reply, separated by tabs, without a header."""
    with open(existing(path), "rb") as file:
        start = file.read(4096)
    line = start.split(b"\n", 1)[0].split(b"\t")
    if len(line) < 4 or line[2].strip().lower() not in (b"yes", b"no"):
        return None
    found: list[Record] = []
    for number, text in enumerate(read_text(path).split("\n"), 1):
        if not text.strip():
            continue
        cells = text.split("\t", 3)
        if len(cells) < 4:
            raise InputError(f"{path}: line {number} has {len(cells)} of the four cells image, question, truth, reply")
        found.append({FILE: path.stem, "category": path.stem, "image": cells[0], "question": cells[1],
                      "gt_answer": cells[2].strip(), "prediction": cells[3].removesuffix("\r")})  # fmt: skip
    return found


def _records_of_object(data: dict, path: Path) -> list[Record]:
    """The records of one JSON object: {id: text}, {id: record}, {column: {...}}, {..., "results": [record, ...]}, or one record."""
    if isinstance(data.get("imgToEval"), dict):  # COCO's caption files
        data = data["imgToEval"]
    lists = [v for v in data.values() if isinstance(v, list) and v and all(isinstance(r, dict) for r in v)]
    if len(lists) == 1 and not all(isinstance(v, list) for v in data.values()):
        return lists[0]
    if len(lists) == 1 == len(data):
        return lists[0]
    names = {_plain(k) for k in data}
    columns = list(data.values())
    if names & {*REPLY_COLUMNS, *ID_COLUMNS, *QUESTION_COLUMNS, *TRUTH_COLUMNS, "answer"} and all(
        isinstance(c, dict | list) and len(c) == len(columns[0]) for c in columns
    ):
        keys = [list(c) if isinstance(c, dict) else list(range(len(c))) for c in columns]
        if all(k == keys[0] for k in keys):  # a table by columns, as pandas' to_dict and to_json write it
            return [{name: column[key] for name, column in data.items()} for key in keys[0]]
    within = [
        v for name, v in data.items() if _plain(name) in ("predictions", "answers", "responses", "results", "outputs")
    ]
    if len(data) > 1 and len(within) == 1 and isinstance(within[0], dict):  # beside what is said of the run
        return _records_of_object(within[0], path)
    if data and all(isinstance(v, dict) for v in data.values()):
        return [{KEY: k, **v} for k, v in data.items()]
    if names & {*REPLY_COLUMNS, *ID_COLUMNS[:4], "answer"}:
        return [data]
    return [{KEY: k, "prediction": v} for k, v in data.items()]


def _flat(records: list[Record]) -> list[Record]:
    """Records with what nested objects say about them as "outer.inner" (lmms-eval's samples, MM-RewardBench's Meta)."""
    out = []
    for record in records:
        inner = {
            f"{name}.{k}": v for name, value in record.items() if isinstance(value, dict) for k, v in value.items()
        }
        out.append({**record, **{k: v for k, v in inner.items() if not isinstance(v, dict)}} if inner else record)
    return out


def _plain(name: object) -> str:
    return str(name).strip().lower().replace("-", "_").replace(" ", "_")


def _names(records: list[Record]) -> dict[str, str]:
    """Column of any record: its plain name -> its name, in order of first appearance."""
    found: dict[str, str] = {}
    for record in records:
        for name in record:
            found.setdefault(_plain(name), name)
    return found


# -------------------------------------------------------------------------------------------------- which row?


def match(records: list[Record], rows: list[Row], path: str | Path) -> list[Record]:
    """The record of every row, in row order.

    By id, in whatever column; by the six key columns of HallusionBench; by task and picture (MME); by the order, if no
    column names the rows, and the questions agree where the records have them. Raises InputError if none of it fits.
    """
    names = _names(records)
    best: tuple[int, str, dict[str, list[Record]]] = (0, "", {})
    whole: dict[str, list[Record]] = {}  # columns that name every row, and the records in row order by each
    for column, keys, every in _key_columns(records, rows, names):
        found: dict[str, list[Record]] = {}
        for record, key in zip(records, keys, strict=True):
            if key is not None:
                found.setdefault(key, []).append(record)
        hits = sum(str(row["id"]) in found for row in rows)
        if hits == len(rows) and all(len(found[str(row["id"])]) == 1 for row in rows):
            if every:
                _refuse_missing(keys, column, path)
            whole.setdefault(column, [found[str(row["id"])][0] for row in rows])
        elif hits > best[0]:
            best = (hits, column, found)
    if whole:
        return _agreeing(whole, rows, names, path)
    by_picture = _match_pictures(records, rows, names)
    if by_picture:
        return by_picture
    in_order = _match_order(records, rows, names, path, named=bool(best[0]))
    if in_order:
        return in_order
    raise InputError(_why_not(path, records, rows, names, best))


def _agreeing(whole: dict[str, list[Record]], rows: list[Row], names: dict[str, str], path: str | Path) -> list[Record]:
    """The records by the one column that names the rows, or by several that agree; else by the one whose questions agree."""
    questions = [names[c] for c in QUESTION_COLUMNS if c in names and c not in REPLY_COLUMNS]
    agree: dict[str, float | None] = {}  # column -> share of the records whose question is the row's
    for column, matched in whole.items():
        checked = [
            any(_same_question(row, record.get(q)) for q in questions)
            for row, record in zip(rows, matched, strict=True)
            if any(len(_words(record.get(q) or "")) > 8 for q in questions)
        ]
        agree[column] = sum(checked) / len(checked) if checked and _questions_differ(rows) else None
    if all(share == 0 for share in agree.values()):
        raise InputError(
            f"{path}: the questions in it are not those of the data; is it the answer file of this benchmark?"
        )
    most = max((share for share in agree.values() if share), default=None)
    likely = [column for column, share in agree.items() if share == most] or list(agree)
    for column in likely[1:]:
        if any(a is not b for a, b in zip(whole[column], whole[likely[0]], strict=True)):
            raise InputError(
                f"{path}: '{likely[0]}' and '{column}' name different rows; remove the one that is not the question's id"
            )
    return whole[likely[0]]


def _key_columns(
    records: list[Record], rows: list[Row], names: dict[str, str]
) -> Iterator[tuple[str, list[str | None], bool]]:
    """Ways to name the row of a record: a column, the row id of every record by it (None without), whether none may lack it."""
    nested = [n for plain, n in names.items() if "." in plain and plain.rpartition(".")[2] in ID_COLUMNS[:-2]]
    columns = [KEY] if KEY in names.values() else []
    columns += [names[c] for c in ID_COLUMNS if c in names] + nested
    columns += [
        n for plain, n in names.items() if n not in columns and plain != "doc_id" and _words_of(plain) & _ID_WORDS
    ]
    values = {c: [_id_text(r.get(c)) for r in records] for c in columns}
    yield from ((c, keys, True) for c, keys in values.items())
    if all(c in names for c in HALLUSION_KEY):
        parts = [[_id_text(r.get(names[c])) for c in HALLUSION_KEY] for r in records]
        yield " + ".join(HALLUSION_KEY), [None if None in p else "_".join(map(str, p)) for p in parts], False
    splits = {str(row["split"]) for row in rows if "split" in row}
    if splits:  # POPE: "random/1" here, 1 there
        for column in columns:
            for split in _splits(records, splits, names):
                keys = zip(split, values[column], strict=True)
                yield column, [f"{s}/{v}" if s and v is not None else None for s, v in keys], False
            if len(splits) == 1:
                (only,) = splits
                yield column, [f"{only}/{v}" if v is not None else None for v in values[column]], True
    by_image = {row["image_id"]: str(row["id"]) for row in rows if isinstance(row.get("image_id"), int)}
    if len(by_image) == len(rows):  # CHAIR, Object HalBench: 139 or COCO_val2014_000000000139.jpg
        for column in (
            c for c in columns if c in (names.get("image_id"), names.get("image"), names.get("question_id"))
        ):
            numbers = [re.search(r"(\d{1,12})(\.\w+)?$", v) if v else None for v in values[column]]
            yield column, [by_image.get(int(n[1])) if n else None for n in numbers], False


def _splits(records: list[Record], splits: set[str], names: dict[str, str]) -> Iterator[list[str | None]]:
    """The split of every record by each column that tells it: its value, or the name of the file it came from."""
    for name in names.values():
        values = [r.get(name) for r in records]
        if name == FILE:
            told = [next((s for s in splits if s in str(v)), None) for v in values]
        elif all(isinstance(v, str) and len(v) < 40 for v in values):
            told = [v.lower() if v.lower() in splits else None for v in values]
        else:
            continue
        if any(told):
            yield told


def _id_text(value: object) -> str | None:
    """An id as a text: 3, 3.0 and "3" are the same."""
    if isinstance(value, bool) or value is None or isinstance(value, dict | list):
        return None
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def _refuse_missing(keys: list[str | None], column: str, path: str | Path) -> None:
    missing = next((n for n, key in enumerate(keys) if key is None), None)
    if missing is not None:
        raise InputError(f"{path}: row {missing} has no '{column}', which names the question in the other rows")


def _match_pictures(records: list[Record], rows: list[Row], names: dict[str, str]) -> list[Record] | None:
    """MME: the picture and the question name a row, within its task if the records tell it."""
    pictures = [
        n for plain, n in names.items() if plain.rpartition(".")[2] in ("image", "image_path", "question_id", "img")
    ]
    questions = [names[c] for c in QUESTION_COLUMNS if c in names]
    if not rows or "image_id" not in rows[0] or "category" not in rows[0]:
        return None
    categories = [n for plain, n in names.items() if plain.rpartition(".")[2] == "category"] or [None]
    for picture, question, category in itertools.product(pictures, questions, categories):
        shown: dict[tuple, list[Record]] = {}
        for record in records:
            key = (record.get(category) if category else None, Path(str(record.get(picture))).name)
            shown.setdefault(key, []).append(record)
        keys = [(row["category"] if category else None, Path(str(row["image_id"])).name) for row in rows]
        fits = [
            [record for record in shown.get(key, []) if _same_question(row, record.get(question))]
            for row, key in zip(rows, keys, strict=True)
        ]
        if all(len(found) == 1 for found in fits) and len({id(found[0]) for found in fits}) == len(rows):
            return [found[0] for found in fits]
    return None


def _match_order(
    records: list[Record], rows: list[Row], names: dict[str, str], path: str | Path, named: bool
) -> list[Record] | None:
    """Records in the order of the rows: one each, with the rows' questions, or with nothing that names a row at all.

    Several splits may stand in another order in the answer file if the questions show which.
    """
    if named or len(records) != len(rows):
        return None
    place = names.get("doc_id")
    if place and sorted(str(r.get(place)) for r in records) == sorted(map(str, range(len(rows)))):
        records = sorted(records, key=lambda r: int(str(r[place])))  # lmms-eval: the row's number in the data set
    columns = [
        names[c] for c in QUESTION_COLUMNS if c in names and all(isinstance(r.get(names[c]), str) for r in records)
    ]
    splits = list(dict.fromkeys(str(row.get("split")) for row in rows))
    ids = [n for plain, n in names.items() if plain in ID_COLUMNS]
    orders = []
    for order in itertools.permutations(splits) if 1 < len(splits) <= 4 else [splits]:
        numbers = [n for split in order for n in range(len(rows)) if str(rows[n].get("split")) == split]
        for column in columns:
            if all(_same_question(rows[n], r[column]) for n, r in zip(numbers, records, strict=True)):
                orders.append(numbers)
                break
    if len(orders) == 1 and (_questions_differ(rows) or not (ids or place)):
        by_row = dict(zip(orders[0], records, strict=True))
        return [by_row[n] for n in range(len(rows))]
    asked = any(c in names for c in ("question", "input"))
    if orders or ids or place or asked or KEY in names.values() or len(splits) > 1:
        return None
    return records


def _words(text: object) -> str:
    """A text with single spaces, image marks aside."""
    return " ".join(re.sub(r"<image( \d)?>", " ", str(text)).split())


def _questions_differ(rows: list[Row]) -> bool:
    """Whether a question says anything about which row it is: "Describe this image." of every row does not."""
    return len({_words(row.get("question")) for row in rows}) > 1


def _same_question(row: Row, text: object) -> bool:
    """Whether a record asks the question of a row: the same text, or one within the other (instructions around it)."""
    shown = _words(text)
    asked = (_words(row[k]) for k in ("bare_question", "question", "prompt") if row.get(k))
    return bool(shown) and any(a == shown or (a and a in shown) or (len(shown) > 8 and shown in a) for a in asked)


def _why_not(
    path: str | Path, records: list[Record], rows: list[Row], names: dict[str, str], best: tuple[int, str, dict]
) -> str:
    """One sentence: why records and rows do not fit together."""
    hits, column, found = best
    splits = {str(row["split"]) for row in rows if "split" in row}
    ids = [names[c] for c in ID_COLUMNS if c in names] or ([KEY] if KEY in names.values() else [])
    if len(splits) > 1 and not hits:
        return (
            f"{path}: its records do not tell the {len(splits)} splits of the data apart; score one split at a time, or add "
            f"a column 'split' with {', '.join(sorted(splits))}"
        )
    if hits:
        twice = next((str(row["id"]) for row in rows if len(found.get(str(row["id"]), [])) > 1), None)
        if twice and splits:
            return (
                f"{path} answers '{twice}' more than once, and its records do not tell the splits apart; pass the answers of one "
                f"split, or add a column 'split' with {', '.join(sorted(splits))}"
            )
        if twice:
            number = next(n for n, record in enumerate(records) if record is found[twice][1])
            return f"{path}: row {number} answers '{twice}' a second time (by '{column}'); delete one of the two"
        lacking = next((n for n, r in enumerate(records) if column in names.values() and r.get(column) is None), None)
        if lacking is not None:
            return f"{path}: row {lacking} has no '{column}', which names the question in the other rows"
        missing = [str(row["id"]) for row in rows if str(row["id"]) not in found]
        if missing:
            return (
                f"{path} has no answer to '{missing[0]}' ({len(missing)} of {len(rows)} are missing); "
                "run eval.generate again with the same arguments, it goes on where it stopped"
            )
    if not ids:
        if len(records) != len(rows):
            return f"{path} has {len(records)} answers without ids for {len(rows)} questions; add 'id'"
        return f"{path} has no ids, and its questions are not those of the data in the same order; add 'id'"
    shown = next((_id_text(r.get(ids[0])) for r in records if r.get(ids[0]) is not None), None)
    name = "its keys" if ids[0] == KEY else f"its '{ids[0]}'"
    return (
        f"{path}: {name} (e.g. '{shown}') name no row of the data (e.g. '{rows[0]['id']}'): all of {len(rows)} are missing; "
        "is it the answer file of this benchmark?"
    )


# ------------------------------------------------------------------------------------------ which column?


def reply_column(records: list[Record], rows: list[Row], path: str | Path) -> str:
    """The column with the model's reply. Raises InputError with both names where two columns may be it."""
    names = _names(records)
    texts = {plain: name for plain, name in names.items() if name not in (FILE, KEY) and "." not in plain}
    known = [texts[c] for c in REPLY_COLUMNS if c in texts and not _is_question(texts[c], records, rows)]
    other = [
        n for plain, n in texts.items()
        if plain not in (*REPLY_COLUMNS, *TRUTH_COLUMNS, *ID_COLUMNS, *QUESTION_COLUMNS, "answer")
        and _words_of(plain) & _REPLY_WORDS and not _words_of(plain) & (_NOT_A_REPLY | _TRUTH_WORDS) and _holds_texts(n, records)
    ]  # fmt: skip
    candidates = known or other
    if texts.get("filtered_resps") in candidates and texts.get("resps") in candidates:
        candidates = [c for c in candidates if c != texts["resps"]]  # the reply as the task's filter left it
    differ = [c for c in candidates[1:] if any(r.get(c) != r.get(candidates[0]) for r in records)]
    if differ:
        raise InputError(
            f"{path}: '{candidates[0]}' and '{differ[0]}' may both be the model's reply; remove or rename one of them"
        )
    if known:
        return known[0]
    unclear = [n for n in _further_texts(texts, records, rows) if n not in other]
    if other:  # a guess by its name: right only if nothing else can be meant
        if "answer" in texts and any(map(_is_truth, texts)):
            unclear = [texts["answer"], *unclear]  # not the truth, which stands in a column of its own
        if unclear:
            raise InputError(
                f"{path}: '{other[0]}' and '{unclear[0]}' may both be the model's reply; name the reply 'prediction'"
            )
        return other[0]
    if "answer" not in texts:
        raise InputError(f"{path}: row 0 has no answer; one of {', '.join(REPLY_COLUMNS[:9])}, answer is expected")
    _refuse_truth(texts, records, rows, unclear, path)
    return texts["answer"]


def _further_texts(texts: dict[str, str], records: list[Record], rows: list[Row]) -> list[str]:
    """Columns of texts that differ from row to row, are not the question file's own, and whose name does not say what they are."""
    named = {*REPLY_COLUMNS, *TRUTH_COLUMNS, *_NEVER_A_REPLY}
    found = [
        n for plain, n in texts.items()
        if plain not in named and not _words_of(plain) & (_NOT_A_REPLY | _TRUTH_WORDS | _ID_WORDS) and _holds_texts(n, records)
    ]  # fmt: skip
    of_rows = [{str(value) for value in row.values()} for row in rows]
    return [
        n
        for n in found
        if len({str(r.get(n)) for r in records}) > 1
        and not all(str(r.get(n)) in values for r, values in zip(records, of_rows, strict=True))
    ]


def _refuse_truth(
    texts: dict[str, str], records: list[Record], rows: list[Row], unclear: list[str], path: str | Path
) -> None:
    """Raise InputError if `answer` is the truth of a question file, or may be: it agrees everywhere, or the data tell no truth,
    and another column has texts (`unclear`)."""
    answer = texts["answer"]
    truth = [row.get("label", row.get("answer")) for row in rows]
    agrees = all(
        t is not None and _words(t).lower() == _words(r.get(answer)).lower()
        for t, r in zip(truth, records, strict=True)
    )
    if agrees and unclear:
        raise InputError(
            f"{path}: '{answer}' is the truth in every row, so '{unclear[0]}' may be the model's reply; name the reply 'prediction'"
        )
    if unclear and all(t is None for t in truth) and not any(map(_is_truth, texts)):
        raise InputError(
            f"{path}: '{answer}' and '{unclear[0]}' may both be the model's reply; name the reply 'prediction'"
        )
    if any(map(_is_truth, texts)) or "prompt" in texts:
        return
    shown = records[0].get(texts["image"]) if "image" in texts else None
    if (
        _QUESTION_FILE & set(texts)
        or isinstance(shown, dict)
        or (isinstance(shown, str) and len(shown) > REFERENCE_LENGTH)
    ):
        raise InputError(
            f"{path}: its '{answer}' stands beside the question's columns, so it is the truth, and no column holds the model's "
            "reply; name that 'prediction'"
        )


def _is_question(column: str, records: list[Record], rows: list[Row]) -> bool:
    """Whether a column repeats the questions of the rows (POPE's question file calls them `text`)."""
    return all(
        _same_question(row, r.get(column)) and len(_words(r.get(column))) > 8
        for row, r in zip(rows, records, strict=True)
    )


def _words_of(plain: str) -> frozenset[str]:
    return frozenset(re.split(r"[_\W]+", plain))


def _is_truth(plain: str) -> bool:
    return plain in TRUTH_COLUMNS or bool(_words_of(plain) & _TRUTH_WORDS)


def _holds_texts(column: str, records: list[Record]) -> bool:
    return any(isinstance(_unwrapped(r.get(column)), str) for r in records)


def _unwrapped(value: object) -> object:
    """The one item of a list of one: [["Yes"]] -> "Yes"."""
    while isinstance(value, list) and len(value) == 1:
        value = value[0]
    return value


def _reply(path: str | Path, row: Row, value: object) -> str:
    text = _unwrapped(value)
    if isinstance(text, list) and text and all(isinstance(t, str) for t in text):
        raise InputError(f"{path}: row '{row['id']}' has {len(text)} replies; one is expected")
    if not isinstance(text, str):
        raise InputError(f"{path}: the answer of row {row['id']} is {type(text).__name__}, a string is expected")
    return text


def _hallusion_codes(rows: list[Row], replies: list[str]) -> list[str]:
    """HallusionBench's own script takes 0, 1, 2 for No, Yes, uncertain, too."""
    if rows and "figure_id" in rows[0] and {r.strip() for r in replies} <= {"0", "1", "2"}:
        return [{"0": "No", "1": "Yes", "2": "Uncertain"}[r.strip()] for r in replies]
    return replies
