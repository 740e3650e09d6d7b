"""What every scorer shares: command line, provenance, results.json, the rows of --results_db.

results.json of a run maps a score's name ("pope", "objhal_judged", ...) to
    scores      {"adversarial/f1": 0.84, ...}, flat
    rows, data, data_sha256, answers, answers_sha256, checkpoint, adapter, generation, judge, versions, time
A scorer adds or replaces its own entry only. `scored/<name>.jsonl` beside it holds what the report page shows per row:
id, answer, correct, category, marks (the hallucinated words).
"""

import argparse
import datetime
import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from common.errors import InputError
from common.files import write_json, write_json_lines
from common.flags import FlagParser
from common.versions import installed_versions
from eval.answer_files import read_answers
from eval.benchmark_files import Row, read_task
from eval.files import read_any
from eval.flags import add_data_flags

Scores = dict[str, float]

PACKAGES = ("torch", "transformers", "peft", "nltk", "spacy", "pillow", "pyarrow")


def sha256(path: str | Path) -> str:
    """Digest of a file, or of a folder's data files with their names (POPE's three splits, MMMU's subjects)."""
    source = Path(path)
    digest = hashlib.sha256()
    files = [source]
    if source.is_dir():
        inside = [f for f in sorted(source.rglob("*")) if f.is_file()]
        files = [f for f in inside if f.suffix in (".json", ".parquet")] or inside
    for file in files:
        if source.is_dir():
            digest.update(str(file.relative_to(source)).encode())
        with open(file, "rb") as f:
            for block in iter(lambda: f.read(1 << 20), b""):
                digest.update(block)
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Installed versions of everything that can move a number."""
    return installed_versions(PACKAGES)


def meta_path(answers: str | Path) -> Path:
    """Where eval.generate describes the run that wrote an answer file: answers.jsonl -> answers.meta.json."""
    return Path(answers).with_suffix(".meta.json")


def read_meta(answers: str | Path) -> dict[str, Any]:
    """What `meta_path` of an answer file holds.

    Raises:
        InputError: it is damaged.
    """
    path = meta_path(answers)
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        meta = error
    if not isinstance(meta, dict) or not isinstance(meta.get("prompt", {}), dict):
        raise InputError(f"{path} is damaged ({meta}); pass another --output, or --overwrite to start again")
    return meta


def scorer_parser(description: str | None, tasks: Iterable[str]) -> argparse.ArgumentParser:
    """The command line that all scorers have in common."""
    parser = FlagParser(description=description)
    names = list(tasks)
    parser.add_argument("--task", required=len(names) > 1, default=names[0], choices=names)
    add_data_flags(parser, "where the report page finds image files (default: as recorded)")
    parser.add_argument("--answers", required=True, help="answers.jsonl of eval.generate, or another tool's answers")
    parser.add_argument("--output", help="folder of results.json; default: the folder of --answers")
    parser.add_argument("--results_db", help="also append the scores here: any SQLAlchemy URL, e.g. sqlite:///x.db")
    return parser


def load(
    args: argparse.Namespace, read: Callable[[str, list[Row]], list] = read_answers
) -> tuple[list[Row], list, dict]:
    """Rows, answers in row order, and the recorded description of the run ({} if the answers come from elsewhere)."""
    meta_file = meta_path(args.answers)
    meta = read_any(meta_file) if meta_file.exists() else {}
    assert isinstance(meta, dict)
    if meta and meta.get("data_sha256") != sha256(args.data_path):
        raise InputError(
            f"{args.answers} was generated from another {Path(args.data_path).name}; pass --data_path {meta.get('data')}"
        )
    rows = read_task(args.task, args.data_path, args.image_root or meta.get("image_dir"), meta.get("limit"))
    return rows, read(args.answers, rows), meta


def save(
    args: argparse.Namespace,
    name: str,
    scores: Scores,
    details: list[dict],
    meta: dict,
    judge: dict | None = None,
    **extra: object,
) -> None:
    """Add an entry to results.json, write scored/<name>.jsonl, append to the database, print the numbers."""
    folder = Path(args.output or Path(args.answers).parent)
    entry = {
        "task": args.task,
        "scores": scores,
        "rows": len(details),
        "limit": meta.get("limit"),
        "data": str(args.data_path),
        "data_sha256": sha256(args.data_path),
        "image_dir": args.image_root or meta.get("image_dir"),
        "answers": str(args.answers),
        "answers_sha256": sha256(args.answers),
        "checkpoint": meta.get("checkpoint"),
        "adapter": meta.get("adapter"),
        "step": meta.get("step"),
        "generation": meta.get("generation"),
        "judge": judge,
        "versions": {"scored": versions(), "generated": meta.get("versions")},
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **extra,
    }
    results = folder / "results.json"
    merged = read_any(results) if results.exists() else {}
    if not isinstance(merged, dict):
        raise InputError(f"{results} is not a results file; move it away or pass another --output")
    write_json(results, {**merged, name: entry})
    write_json_lines(folder / "scored" / f"{name}.jsonl", details)
    if args.results_db:
        append_to_database(args.results_db, str(folder), name, entry)
    width = max(map(len, scores))
    print(f"{name} ({len(details)} rows) -> {results}")
    for metric, value in scores.items():
        print(f"  {metric:<{width}}  {value:.4f}")


def append_to_database(url: str, run_name: str, name: str, entry: dict) -> None:
    """Append one row per metric to the table `eval_scores` (created if absent). Errors never show the password."""
    import sqlalchemy as sa

    text = sa.Text().with_variant(sa.Text(length=2**24), "mysql")
    table = sa.Table(
        "eval_scores",
        sa.MetaData(),
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("time", sa.String(40), nullable=False),
        sa.Column("run", sa.String(500), nullable=False),
        sa.Column("benchmark", sa.String(80), nullable=False),
        sa.Column("metric", sa.String(200), nullable=False),
        sa.Column("value", sa.Float(53), nullable=False),
        sa.Column("n_rows", sa.Integer, nullable=False),
        sa.Column("checkpoint", sa.String(500)),
        sa.Column("adapter", sa.String(500)),
        sa.Column("step", sa.Integer),
        sa.Column("judge_model", sa.String(200)),
        sa.Column("data_sha256", sa.String(64), nullable=False),
        sa.Column("answers_sha256", sa.String(64), nullable=False),
        sa.Column("generation", text),  # JSON
        sa.Column("versions", text),  # JSON
    )
    common = {
        "time": entry["time"],
        "run": run_name,
        "benchmark": name,
        "n_rows": entry["rows"],
        **{k: entry[k] for k in ("checkpoint", "adapter", "step", "data_sha256", "answers_sha256")},
        "judge_model": (entry["judge"] or {}).get("model"),
        "generation": json.dumps(entry["generation"]),
        "versions": json.dumps(entry["versions"]),
    }
    try:
        shown = sa.make_url(url).render_as_string(hide_password=True)
    except sa.exc.ArgumentError:
        raise InputError("--results_db is not a SQLAlchemy URL; write e.g. sqlite:///scores.db") from None
    try:
        engine = sa.create_engine(url)
        with engine.begin() as connection:
            table.create(connection, checkfirst=True)
            connection.execute(
                table.insert(), [{**common, "metric": m, "value": v} for m, v in entry["scores"].items()]
            )
        engine.dispose()
    except ModuleNotFoundError as e:
        raise InputError(f"--results_db {shown} needs the driver '{e.name}'; pip install it") from None
    except sa.exc.SQLAlchemyError as e:
        raise InputError(
            f"--results_db {shown} cannot be written ({type(e).__name__}); results.json is complete"
        ) from None
