"""Writes scripts/{sft,rm,dpo,ppo,grpo}_{family}.sh, one per row of models.tsv and template: `make scripts`. See README.md.

python -m scripts.generate
"""

import csv
from collections.abc import Sequence
from pathlib import Path
from string import Template

from common.flags import FlagParser

FOLDER = Path(__file__).parent
ALGORITHMS = ("sft", "rm", "dpo", "ppo", "grpo")
MARK = "# Written by `make scripts`"  # stands in every generated file, and in no other
SFT_ROWS_PER_STEP = 128
# A cell of the columns sft, rm, dpo, ppo and grpo -> launcher and DeepSpeed config. Which fits: docs/memory.md.
LAUNCHERS = {
    "full zero2": ("deepspeed", "ds_configs/zero2.json"),
    "full zero3": ("deepspeed", "ds_configs/zero3.json"),
    "lora zero3": ("deepspeed", "ds_configs/zero3.json"),
    "lora ddp": ("torchrun --nproc_per_node 8", ""),
}
CONVERT = """# Convert the released checkpoint once:
#   python -m models.{family}.convert \\
#       {convert} {model}"""


class ScriptTemplate(Template):
    """`%{name}` is filled in; `$` is bash's."""

    delimiter = "%"


def families() -> list[dict[str, str]]:
    """Rows of models.tsv, a dictionary each."""
    with open(FOLDER / "models.tsv", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def published(algorithm: str, family: str) -> list[str]:
    """Names of the hand-written scripts in published/ that run this algorithm on this family."""
    files = sorted((FOLDER / "published").glob(f"*_{family}.sh"))
    return [file.name for file in files if algorithm_of(file.read_text()) == algorithm]


def algorithm_of(text: str) -> str:
    """Of a launch script: train_ppo.py runs GRPO, too."""
    if "--advantage_estimator" in text:
        return "grpo"
    return next(a for a in ALGORITHMS if f" train_{a}.py" in text)


def script(algorithm: str, row: dict[str, str]) -> str:
    """The text of one launch script.

    Raises ValueError for a launcher that is not in LAUNCHERS, and for all weights outside SFT: no template writes them.
    """
    cell = row[algorithm]
    if cell not in LAUNCHERS or (cell.startswith("full") and algorithm != "sft"):
        allowed = [name for name in LAUNCHERS if algorithm == "sft" or name.startswith("lora")]
        raise ValueError(
            f'models.tsv, {row["family"]}, column {algorithm}: "{cell}" is not one of {", ".join(allowed)}'
        )
    launcher, config = LAUNCHERS[cell]
    lora = cell.startswith("lora")
    recipes = ", ".join(f"published/{name}" for name in published(algorithm, row["family"]))
    values = row | {
        "launcher": f"${{LAUNCH:-{launcher}}}",
        "deepspeed": f" --deepspeed {config}" if config else "",
        "no_deepspeed": '--deepspeed "" ' if config else "",
        "published": f"# Published settings: {recipes}" if recipes else "",
        "convert": CONVERT.format(**row) if row["convert"] else "",
        "lora": "    --use_lora True --lora_r 64 --lora_alpha 16 \\" if lora else "",
        "sft_rate": "2e-4" if lora else "2e-5",
        "sft_accumulation": str(SFT_ROWS_PER_STEP // 8 // int(row["sft_batch"])),
    }
    text = (FOLDER / "templates" / f"{algorithm}.sh").read_text()
    # a line that is one value goes where the value is empty
    lines = [line for line in text.splitlines() if not (line.startswith("%{") and values.get(line[2:-1]) == "")]
    return ScriptTemplate("\n".join(lines) + "\n").substitute(values)


def generated() -> dict[str, str]:
    """File name -> text, of every script that models.tsv asks for."""
    return {f"{algorithm}_{row['family']}.sh": script(algorithm, row) for row in families() for algorithm in ALGORITHMS}


def main(argv: Sequence[str] | None = None) -> None:
    """Write the scripts; remove those whose row is gone."""
    FlagParser(description=__doc__).parse_args(argv)
    texts = generated()
    for name, text in texts.items():
        (FOLDER / name).write_text(text)
    for file in FOLDER.glob("*.sh"):
        if file.name not in texts and MARK in file.read_text():
            file.unlink()
    print(f"{len(texts)} scripts written to {FOLDER}")


if __name__ == "__main__":
    main()
