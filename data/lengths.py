"""Length limits: responses may be shortened at their end; prompts are never cut, so an image token is never lost.

The functions see token counts and ids only, so that they hold for every family: what a prompt is (text and image
tokens) is up to the processor. A limit that is None does not limit.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal, Self

from args import DataArguments
from common.errors import InputError


@dataclass(frozen=True)
class LengthLimits:
    """`--max_length` (prompt + one response), `--max_prompt_length`, `--max_target_length` in tokens; `--overlong`."""

    max_length: int | None = None
    max_prompt_length: int | None = None
    max_target_length: int | None = None
    overlong: Literal["drop", "error"] = "drop"

    def __post_init__(self) -> None:
        for name in ("max_length", "max_prompt_length", "max_target_length"):
            limit = getattr(self, name)
            if limit is not None and limit < 1:
                raise InputError(
                    f"--{name} must be a number of tokens above 0, not {limit}: leave it out for no limit."
                )
        if (
            self.max_length is not None
            and self.max_prompt_length is not None
            and self.max_prompt_length >= self.max_length
        ):
            raise InputError(
                f"--max_prompt_length {self.max_prompt_length} leaves no token for a response within --max_length "
                f"{self.max_length}: make it smaller."
            )

    @classmethod
    def from_args(cls, data_args: DataArguments) -> Self:
        """The limits that the flags name."""
        return cls(data_args.max_length, data_args.max_prompt_length, data_args.max_target_length, data_args.overlong)


@dataclass
class LengthCounts:
    """What the limits did, for the log and run.json. One row is counted once per `fit_row` call."""

    rows: int = 0
    dropped_long_prompt: int = 0
    dropped_same_after_cut: int = 0
    shortened_rows: int = 0
    shortened_responses: int = 0
    cut_tokens: int = 0

    def as_dict(self, prefix: str = "") -> dict[str, int]:
        """Name and count of each, for the log."""
        return {prefix + name: count for name, count in asdict(self).items()}

    def __add__(self, other: Self) -> Self:
        """Sum of two counts: of two ranks, or of two data-loader workers."""
        return type(self)(*(a + b for a, b in zip(asdict(self).values(), asdict(other).values(), strict=True)))


@dataclass(frozen=True)
class Fit:
    """`responses` within the limits; or None, the `reason` why the row cannot be used, and how it is counted."""

    responses: list[list[int]] | None
    reason: str | None = None
    kind: Literal["long_prompt", "same_after_cut"] | None = None


def fit(prompt_tokens: int, responses: Sequence[Sequence[int]], limits: LengthLimits) -> Fit:
    """Shorten K responses to the limits, or say why the row cannot be used.

    Args:
        prompt_tokens: tokens of the prompt, image tokens included.
        responses: (K, any) token ids, end token included. A shortened response loses its end token, because it does not
            end there.
        limits: `max_length` bounds prompt + one response, also when K responses share one packed row.
    """
    longest_prompt = min(
        limits.max_prompt_length if limits.max_prompt_length is not None else prompt_tokens,
        limits.max_length - 1 if limits.max_length is not None else prompt_tokens,  # one token for the response
    )
    if prompt_tokens > longest_prompt:
        name = "max_prompt_length" if longest_prompt == limits.max_prompt_length else "max_length"
        reason = (
            f"its prompt of {prompt_tokens} tokens (image tokens included) does not fit --{name} "
            f"{getattr(limits, name)}: raise the limit, use smaller images, or shorten the prompt"
        )
        return Fit(None, reason, "long_prompt")
    room = min(
        limits.max_length - prompt_tokens if limits.max_length is not None else max(map(len, responses), default=0),
        limits.max_target_length if limits.max_target_length is not None else max(map(len, responses), default=0),
    )
    cut = [list(ids[:room]) for ids in responses]
    if len(cut) > 1 and all(ids == cut[0] for ids in cut):
        reason = (
            f"its {len(cut)} responses are the same tokens once they are cut to {room}: raise --max_target_length or "
            "--max_length"
        )
        return Fit(None, reason, "same_after_cut")
    return Fit(cut)


def fit_row(
    prompt_tokens: int,
    responses: Sequence[Sequence[int]],
    limits: LengthLimits,
    counts: LengthCounts,
    where: str = "a row",
) -> list[list[int]] | None:
    """`fit`, counted in `counts`: the shortened responses, or None for a row to leave out.

    Raises:
        InputError: with `--overlong error`, for a row that `drop` would leave out. `where` names it: the row's column
            of that name.
    """
    counts.rows += 1
    fitted = fit(prompt_tokens, responses, limits)
    if fitted.responses is None:
        if limits.overlong == "error":
            raise InputError(f"{where}: {fitted.reason}, or leave such rows out with --overlong drop.")
        if fitted.kind == "long_prompt":
            counts.dropped_long_prompt += 1
        else:
            counts.dropped_same_after_cut += 1
        return None
    lost = [len(before) - len(after) for before, after in zip(responses, fitted.responses, strict=True)]
    counts.cut_tokens += sum(lost)
    counts.shortened_responses += sum(n > 0 for n in lost)
    counts.shortened_rows += any(lost)
    return fitted.responses
