"""Pages with the model's own answers while SFT and DPO train: before training, and now, beside what the data say."""

import functools
import json
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import logging

from base.samples import STYLE, asked_and_told, card, prompt_text, report_table
from base.videos import shown_pictures
from base.vl_trainer import VLTrainer
from common.files import write_json, write_text
from common.pages import page

logger = logging.get_logger(__name__)

PROMPTS = 4  # of a page
GREW = 2.0  # answers against those before training


class AnswerSamples(TrainerCallback):
    """Pages with answers to the first held-out rows (of training, if none are held out): before training, then --num_sample_generations times.

    A run with fewer steps than that writes none, nor one under ZeRO-3 or FSDP, where an answer would need all processes at every token.
    """

    def __init__(self, trainer: VLTrainer) -> None:
        self.trainer = trainer
        self.warned = False

    @functools.cached_property
    def rows(self) -> list[dict[str, Any]]:
        """The rows of every page."""
        data = self.trainer.eval_dataset if self.trainer.eval_dataset is not None else self.trainer.train_dataset
        return [data[i] for i in range(min(PROMPTS, len(data)))]

    def _every(self, args: Any, state: TrainerState) -> int:
        if not args.num_sample_generations or not state.is_world_process_zero:
            return 0
        if is_deepspeed_zero3_enabled() or args.sharding is not None:
            return 0
        return state.max_steps // args.num_sample_generations

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The answers before training; a run that goes on has them already."""
        if self._every(args, state) and not (state.global_step and self._before(args).is_file()):
            self._write(args, state.global_step)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The answers now."""
        every = self._every(args, state)
        if every and (state.global_step % every == 0 or state.global_step == state.max_steps):
            self._write(args, state.global_step)

    def _before(self, args: Any) -> Path:
        return Path(args.output_dir) / "samples" / "before.json"

    def _write(self, args: Any, step: int) -> None:
        now = self.trainer.greedy_answers(self.rows)
        if not step:
            write_json(self._before(args), now)
        before = json.loads(self._before(args).read_text()) if self._before(args).is_file() else None
        cards, table = [], []
        for i, row in enumerate(self.rows):
            prompt, told = asked_and_told(row)
            answers = [(label, text, "") for label, text in told]
            answers += [("before training", before[i], "")] if before else []
            answers += [(f"at step {step}", now[i], "")] if step else []
            pictures = shown_pictures(row)
            cards.append(card(pictures, prompt, answers))
            table += [(pictures, (prompt_text(prompt), label, text)) for label, text, _ in answers]
        title = f"Answers at step {step}"
        path = Path(args.output_dir) / "samples" / f"step-{step:06d}.html"
        write_text(path, page(title, f"<h1>{title}</h1>{''.join(cards)}", STYLE))
        report_table(("prompt", "whose", "answer"), table, step, self.trainer.callback_handler.callbacks)
        if step and before and any(before) and not self.warned:
            grown = sum(map(len, now)) / sum(map(len, before))
            self.warned = grown > GREW
            if self.warned:
                logger.warning(
                    f"Answers are {grown:.1f} times as long as before training ({path}): look whether they are better, or whether "
                    "chosen answers are only longer."
                )
