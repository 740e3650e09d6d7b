"""Answer files: one answer per row of a benchmark, written by eval.generate or by another tool."""

from pathlib import Path

from common.errors import InputError
from eval.benchmark_files import Row
from eval.files import need, read_json, read_jsonl

_ID_KEYS = "id index question_id pid ID image_id".split()
_TEXT_KEYS = "answer prediction response text caption model_answer output".split()


def read_answers(path: str | Path, rows: list[Row]) -> list[str]:
    """Return the model's answer to every row, in row order.

    Takes answers.jsonl of eval.generate, and what other tools write: JSON lines or a JSON list with id | index |
    question_id | pid | image_id and answer | prediction | response | text | caption, {id: text}, or lines without ids
    in the order of the rows (POPE's official answer file). Raises InputError when an answer is missing or twice there.
    """
    data = read_json(path) if Path(path).suffix == ".json" else read_jsonl(path)
    if isinstance(data, dict):
        found = {str(k): v for k, v in data.items()}
    else:
        if not isinstance(data, list) or not all(isinstance(r, dict) for r in data):
            raise InputError(f"{path} is not a list of answers: JSON lines or a JSON list of objects is expected")
        need(data, "", path)
        text_key = next((k for k in _TEXT_KEYS if k in data[0]), None)
        id_key = next((k for k in _ID_KEYS if k in data[0]), None)
        if text_key is None:
            raise InputError(f"{path}: row 0 has no answer; one of {', '.join(_TEXT_KEYS)} is expected")
        need(data, text_key, path)
        if id_key is None:
            if len(data) != len(rows):
                raise InputError(f"{path} has {len(data)} answers without ids for {len(rows)} questions; add 'id'")
            return [_text(path, n, r[text_key]) for n, r in enumerate(data)]
        need(data, id_key, path)
        found = {}
        for n, r in enumerate(data):
            if str(r[id_key]) in found:
                raise InputError(f"{path}: row {n} answers '{r[id_key]}' a second time; delete one of the two lines")
            found[str(r[id_key])] = r[text_key]
    missing = [str(row["id"]) for row in rows if str(row["id"]) not in found]
    if missing:
        raise InputError(
            f"{path} has no answer to '{missing[0]}' ({len(missing)} of {len(rows)} are missing); "
            "run eval.generate again with the same arguments, it goes on where it stopped"
        )
    return [_text(path, str(row["id"]), found[str(row["id"])]) for row in rows]


def _text(path: str | Path, where: object, value: object) -> str:
    if not isinstance(value, str):
        raise InputError(f"{path}: the answer of row {where} is {type(value).__name__}, a string is expected")
    return value
