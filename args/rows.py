"""On which rows it is trained."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from common.errors import InputError


@dataclass
class DataArguments:
    """Which rows to train on. See docs/data.md for the formats."""

    title: ClassVar[str] = "Data"
    dataset_name: str = field(
        metadata={"help": "A name of data.DATASET_MAP, a hub id or a path; several joined by commas."}
    )
    data_path: str | None = field(default=None, metadata={"help": "File or folder of the data set; one per name."})
    image_root: str | None = field(
        default=None, metadata={"help": "Folder that image names in the rows are relative to."}
    )
    columns: str | None = field(
        default=None,
        metadata={
            "help": "Our names for the file's columns: prompt=question,image=file; =mask leaves mask out. Several sets: joined by ;."
        },
    )
    dataset_weights: str | None = field(default=None, metadata={"help": "Mixing weights of several sets: .7,.3"})
    data_ratio: float = field(default=1.0, metadata={"help": "Use this share of the rows, drawn with --seed."})
    eval_ratio: float = field(default=0.0, metadata={"help": "Hold out this share for evaluation; never trained on."})
    eval_data_path: str | None = field(default=None, metadata={"help": "Evaluate on this file instead of a share."})
    dataset_num_proc: int | None = field(
        default=None, metadata={"help": "Processes for reading and checking the rows."}
    )
    streaming: bool = field(
        default=False,
        metadata={
            "help": "Read and check rows as training takes them, for sets that do not fit on the disk twice; needs --max_steps."
        },
    )
    check_images: Literal["all", "sample", "none"] = field(
        default="all",
        metadata={
            "help": "Whose image files are looked at before training: of all rows, of a sample of 1000, or of none."
        },
    )
    on_bad_row: Literal["error", "drop"] = field(
        default="error",
        metadata={"help": "error stops at a bad row, drop leaves it out and writes it to bad_rows.jsonl."},
    )
    allow_outside_image_root: bool = field(
        default=False, metadata={"help": "Accept image paths that leave --image_root."}
    )
    pairs: Literal["best_worst", "all", "adjacent", "score_margin"] = field(
        default="all",
        metadata={
            "help": "Which ordered pairs of a row with more than two responses enter the loss: all, best_worst (one), adjacent ranks, or "
            "score_margin: all that --score_margin keeps."
        },
    )
    score_margin: float | None = field(
        default=None,
        metadata={"help": "Of these pairs keep those whose scores differ by this much; -1 keeps the largest gap only."},
    )
    max_length: int | None = field(
        default=None, metadata={"help": "Longest prompt + response, in tokens. Responses are cut."}
    )
    max_prompt_length: int | None = field(
        default=None, metadata={"help": "Longest prompt, image tokens included. Never cut."}
    )
    max_target_length: int | None = field(
        default=None, metadata={"help": "Longest response, in tokens. Cut at the end."}
    )
    overlong: Literal["drop", "error"] = field(
        default="drop",
        metadata={"help": "A row whose prompt alone is too long: drop leaves it out and counts it, error stops."},
    )
    train_on: Literal["all", "last"] = field(
        default="all", metadata={"help": "SFT: the loss covers all assistant turns, or the last one only."}
    )

    def __post_init__(self) -> None:
        for name in ("dataset_num_proc", "max_length", "max_prompt_length", "max_target_length"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise InputError(f"--{name} is 1 or more, not {value}.")
        for name in ("data_ratio", "eval_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"--{name} is a share between 0 and 1, not {getattr(self, name)}.")
        if self.streaming and (self.eval_ratio or self.data_ratio != 1):
            name = "eval_ratio" if self.eval_ratio else "data_ratio"
            instead = "give --eval_data_path" if self.eval_ratio else "leave it out"
            raise InputError(f"--{name} is a share of all rows, which --streaming does not know: {instead}.")
        if self.streaming and self.check_images == "sample":
            raise InputError(
                "--check_images sample is a share of all rows, which --streaming does not know: all or none."
            )
