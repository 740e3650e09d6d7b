"""Checkpoints that are whole or not there, and training that a cluster may stop.

    runs/dpo/.incomplete/checkpoint-40   while it is written; a run that is killed leaves it behind, the next save removes it
    runs/dpo/checkpoint-40               renamed when every file is on disk

SIGTERM, which a cluster sends before it takes a machine away, ends training after the current step: a checkpoint, then exit status EXIT_PREEMPTED.
"""

import functools
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import TrainOutput

from args import RUN_JSON
from base.bad_steps import BadSteps
from base.fsdp import ShardedTrainer
from base.hub import HubUploads, model_files
from base.layout import ADAPTER_CONFIG
from base.loading import load_weights
from base.lora_start import LoraOnChangedBase
from base.model_card import model_card
from base.resume import ASIDE, checkpoints_of, damage_of, newest_whole_checkpoint, write_checksums
from common.errors import InputError, disk_trouble, memory_trouble
from common.files import flush, make_valid_json, write_text
from common.tensors import first_not_finite

EXIT_PREEMPTED = 75  # sysexits.h EX_TEMPFAIL: nothing is wrong, start the same command again
EXIT_INTERRUPTED = 130  # as a shell reports Ctrl-C: 128 + SIGINT
_STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Preemption(TrainerCallback):
    """Stops after the step during which any process got SIGTERM, SIGHUP or Ctrl-C, with a checkpoint."""

    def __init__(self, on_any_process: Callable[[bool], bool]) -> None:
        self.asked = self.stopped = False
        self.by: int = signal.SIGTERM  # the signal that came last
        self.on_any_process = on_any_process

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals for the duration of training. A second Ctrl-C ends it at once."""

        def ask(number: int, _: Any) -> None:
            self.asked, self.by = True, number
            if number == signal.SIGINT:
                signal.signal(signal.SIGINT, signal.default_int_handler)

        # SIGHUP is a terminal that was closed; under nohup it is ignored, and stays so.
        numbers = [n for n in _STOPS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
        before = {number: signal.signal(number, ask) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # Every process must stop at the same step, and a launcher may signal them at different ones.
        """Stop with a checkpoint if any process was asked to."""
        if self.on_any_process(self.asked):
            self.stopped = control.should_save = control.should_training_stop = True


def ignore_sigterm(then: Callable[[int], None] | None, worker: int) -> None:
    """Let a data-loader worker survive the signal that the whole process group gets: the last step needs it."""
    for number in _STOPS:
        signal.signal(number, signal.SIG_IGN)
    if then is not None:
        then(worker)


class SafeCheckpoints(ShardedTrainer, HubUploads):
    """transformers.Trainer that writes checkpoints whole, resumes by the names on disk, and stops after SIGTERM."""

    _save_root: str | None = None

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """As Trainer's.

        Raises:
            SystemExit: with EXIT_PREEMPTED after a SIGTERM or SIGHUP, EXIT_INTERRUPTED after Ctrl-C, and a checkpoint.
        """
        self.__dict__.pop("bad_steps", None)  # of an earlier call
        self.shard_model()
        preemption = Preemption(self._on_any_process)
        self.add_callback(preemption)
        try:
            with preemption.listening():
                result = self._train_or_say_who_died(*args, **kwargs)
                self._report_bad_steps()
        finally:
            self.remove_callback(preemption)
        if preemption.stopped:
            interrupted = preemption.by == signal.SIGINT
            if self.is_world_process_zero():
                print(
                    f"Stopped by {'Ctrl-C' if interrupted else signal.Signals(preemption.by).name} after step {self.state.global_step}; "
                    "`--resume_from_checkpoint True` goes on from there.",
                    file=sys.stderr,
                )
            raise SystemExit(EXIT_INTERRUPTED if interrupted else EXIT_PREEMPTED)
        return result

    def _train_or_say_who_died(self, *args: Any, **kwargs: Any) -> TrainOutput:
        try:
            return super().train(*args, **kwargs)
        except (RuntimeError, MemoryError) as error:
            if memory := memory_trouble(error):
                with self._naming_last_checkpoint():
                    raise InputError(
                        f"Memory ran out in step {self.state.global_step + 1} ({memory}){self.bad_steps.named_rows()}: docs/faq.md lists "
                        "what takes less, the cheapest first (--gradient_checkpointing True, a smaller --per_device_train_batch_size)."
                    ) from error
            if "DataLoader worker" not in str(error):
                raise
            with self._naming_last_checkpoint():
                raise InputError(
                    f"A data worker has died ({' '.join(str(error).split())[:160]}): mostly of too little memory; lower "
                    "--dataloader_num_workers."
                ) from error

    def evaluate_alone(self, checkpoint: str | None = None) -> dict[str, float]:
        """Evaluate without training, and write `eval_results.json` and the trainer's state to the run's folder.

        Args:
            checkpoint: of an earlier run, whose weights are loaded first; None evaluates the model as it is.

        Raises:
            InputError: there are no evaluation rows.
        """
        if self.eval_dataset is None:
            raise InputError("--do_train False needs rows to evaluate on: add --eval_ratio or --eval_data_path.")
        if checkpoint is not None:
            self._load_from_checkpoint(checkpoint)
        self.shard_model()
        self.model_wrapped = self.accelerator.prepare_model(self.model, evaluation_mode=True)
        metrics = self.evaluate()
        self.save_metrics("eval", metrics)
        self.save_state()
        return metrics

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # Trainer compares the number of steps only after a step: resumed from the checkpoint of the last step, it would train one more.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _on_any_process(self, flag: bool) -> bool:
        if self.accelerator.num_processes == 1:
            return flag
        flags = torch.tensor(float(flag), device=self.args.device)
        return self.accelerator.reduce(flags, reduction="sum").item() > 0

    def get_train_dataloader(self) -> DataLoader:
        """As Trainer's; its workers survive SIGTERM until the last step is done."""
        loader = super().get_train_dataloader()
        for part in {id(x): x for x in (loader, getattr(loader, "base_dataloader", loader))}.values():
            part.worker_init_fn = functools.partial(ignore_sigterm, part.worker_init_fn)
        return loader

    # -- looking at every step -------------------------------------------------------------------------------------------

    @functools.cached_property
    def bad_steps(self) -> BadSteps:
        """Watches loss and gradient of every step."""

        def on_any_process(flag: Tensor) -> Tensor:
            if self.accelerator.num_processes == 1:
                return flag
            return self.accelerator.reduce(flag.to(self.args.device).float(), reduction="sum") > 0

        return BadSteps(1 if self.is_deepspeed_enabled else 2, not self.args.fp16, on_any_process)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """As Trainer's; the loss that is returned, for the log, is 0 where it is not finite: that step is skipped."""
        self.bad_steps.see_rows(inputs.get("where") or ())
        return self.bad_steps.see_loss(super().training_step(model, inputs, *args, **kwargs))

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | float | None = None) -> Tensor | float | None:
        # Called once per optimizer step, right before it.
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        with self._naming_last_checkpoint():
            self.bad_steps.decide(norm, self.state.global_step + 1, self.optimizer, model)
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As Trainer's; says how many steps were skipped since the last log, whose mean loss is then not a number."""
        if "loss" in logs and (skipped := self.bad_steps.skipped_since_last_call()):
            logs |= {"loss": float("nan"), "skipped_steps": skipped}
        super().log(logs, start_time)

    @contextmanager
    def _naming_last_checkpoint(self) -> Iterator[None]:
        """Add to an InputError which checkpoint of this run is whole."""
        try:
            yield
        except InputError as error:
            last = newest_whole_checkpoint(self.args.output_dir)
            kept = f"The last checkpoint, {last}, is whole." if last else "No checkpoint was saved before."
            raise InputError(f"{error} {kept}") from error

    def _report_bad_steps(self) -> None:
        """Before a save and at the end: what is still unread of the steps, and a look at the weights that train.

        Raises:
            InputError: the last steps or some weights are not finite.
        """
        with self._naming_last_checkpoint():
            self.bad_steps.report()
            trained = ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)
            bad = first_not_finite(trained)
            if self._on_any_process(bad is not None):
                raise InputError(
                    f"The weights after step {self.state.global_step} are not finite ({bad or 'on another process'}) and are not "
                    "saved: lower --learning_rate, or compute in a wider type (--bf16 True, --torch_dtype float32)."
                )

    # -- saving ----------------------------------------------------------------------------------------------------------

    def _get_output_dir(self, trial: Any) -> str:
        return self._save_root or super()._get_output_dir(trial)

    @contextmanager
    def _aside(self, what: str) -> Iterator[Path]:
        """A fresh folder to write `what` to.

        Raises:
            InputError: writing failed. The folder is then removed.
        """
        folder = Path(self.args.output_dir) / ASIDE
        if self.args.should_save:
            shutil.rmtree(folder, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._save_root = str(folder)
        try:
            yield folder
        except Exception as error:
            shutil.rmtree(folder, ignore_errors=True)
            if disk_trouble(error) is None and not isinstance(error, OSError | SafetensorError):
                raise
            last = newest_whole_checkpoint(self.args.output_dir)
            raise InputError(
                f"{what} could not be written to {self.args.output_dir} ({' '.join(str(error).split())[:200]}). "
                + (f"{last} is whole: free space and go on with --resume_from_checkpoint True." if last else "")
            ) from error
        finally:
            self._save_root = None

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        name = f"checkpoint-{self.state.global_step}"
        final = Path(self.args.output_dir) / name
        self._report_bad_steps()
        with self._aside(f"The checkpoint of step {self.state.global_step}") as folder:
            super()._save_checkpoint(model, trial)
            if self.state.best_global_step:
                # Trainer recorded where the best checkpoint is written; record where it will be, where every process looks for it.
                best = Path(self.args.output_dir) / f"checkpoint-{self.state.best_global_step}"
                if best.exists() or best == final:
                    self.state.best_model_checkpoint = str(best)
                    if self.args.should_save:
                        self.state.save_to_json(str(folder / name / TRAINER_STATE_NAME))
            self.accelerator.wait_for_everyone()  # all files of all processes are written
            if self.args.should_save:
                make_valid_json(folder / name / TRAINER_STATE_NAME)
                if (final.parent / RUN_JSON).is_file():
                    shutil.copyfile(final.parent / RUN_JSON, folder / name / RUN_JSON)  # which run it is of
                write_checksums(folder / name)
                flush(folder / name)
                if final.exists():  # of an earlier run
                    os.rename(final, folder / f"{name}.old")
                os.rename(folder / name, final)
                if self.args.push_to_hub and self.args.save_total_limit:
                    self._finish_current_push()  # of one that may be deleted now
                self._move_old_checkpoints(folder)
                shutil.rmtree(folder)
            self.accelerator.wait_for_everyone()
        self.push_checkpoint(final)

    def _move_old_checkpoints(self, folder: Path) -> None:
        """Move what --save_total_limit leaves out, never the newest or the best: deleted in place, a kill would leave half a checkpoint.

        The newest is the one of this step. One of a later step was passed over when the run went on from an older one. Times of change do not
        count: clocks go back.
        """
        now, best = self.state.global_step, self.state.best_model_checkpoint
        by_step = checkpoints_of(self.args.output_dir)
        protected = {by_step[now], *([str(Path(best))] if best else [])}
        others = [by_step[step] for step in sorted(by_step, key=lambda step: (step <= now, step))]
        others = [checkpoint for checkpoint in others if checkpoint not in protected]
        limit = self.args.save_total_limit or len(by_step)
        for checkpoint in others[: max(0, len(by_step) - max(limit, len(protected)))]:
            os.rename(checkpoint, folder / f"{Path(checkpoint).name}.old")

    def save_state(self) -> None:
        """As Trainer's, as JSON that every program reads."""
        super().save_state()
        if self.is_world_process_zero():
            make_valid_json(Path(self.args.output_dir) / TRAINER_STATE_NAME)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As Trainer's; files are written elsewhere and moved, so that none is ever half written."""
        if self._save_root is not None:  # part of a checkpoint, which is renamed as a whole
            super().save_model(output_dir, _internal_call=True)
            self._write_card(Path(output_dir or self._save_root))
            self._model_files = model_files(Path(output_dir or self._save_root))
            return
        out = Path(output_dir or self.args.output_dir)
        with self._aside("The model") as folder:
            super().save_model(str(folder), _internal_call=True)
            self._write_card(folder)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self._model_files = model_files(folder)
                flush(folder)
                moved: set[Path] = set()
                for file in sorted(folder.rglob("*")):
                    place = out / file.relative_to(folder)
                    if file.is_dir():
                        place.mkdir(parents=True, exist_ok=True)
                    else:
                        out.mkdir(parents=True, exist_ok=True)
                        os.replace(file, place)
                        moved.add(place)
                # Weights that an earlier run left would be loaded with the new ones, or instead of them.
                for pattern in ("*.safetensors", "*.safetensors.index.json", "adapter_config.json"):
                    for stale in {*out.glob(pattern)} - moved:
                        stale.unlink()
                shutil.rmtree(folder)
            self.accelerator.wait_for_everyone()
        if self.args.push_to_hub and not _internal_call and self.is_world_process_zero():
            self.upload_model()

    def _write_card(self, folder: Path) -> None:
        """README.md in place of the empty forms that peft writes, of what run.json says."""
        run = Path(self.args.output_dir) / RUN_JSON
        if not self.args.should_save or not run.is_file():
            return
        for form in folder.rglob("README.md"):
            form.unlink()
        is_adapter = (folder / ADAPTER_CONFIG).is_file()
        write_text(folder / "README.md", model_card(json.loads(run.read_text()), self.state.log_history, is_adapter))

    # -- loading ---------------------------------------------------------------------------------------------------------

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        model = self.accelerator.unwrap_model(model if model is not None else self.model)
        if isinstance(model, PeftModel) and not isinstance(model, LoraOnChangedBase):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        # Names on disk differ from names in memory. Trainer reads the file as it is: it would load nothing and only warn.
        load_weights(model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if reason := damage_of(best):
            with self._naming_last_checkpoint():
                raise InputError(
                    f"--load_best_model_at_end: {best}, the best checkpoint, cannot be loaded: {reason}. The model was not saved; "
                    "copy what another checkpoint holds, or train again."
                )
        if self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As Trainer's; rates, weight decay and schedule are those of this run's flags, which may differ from those that were saved."""
        schedule = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)  # accelerate's wrapper
        if checkpoint is None or not isinstance(schedule, LambdaLR):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        base_lrs = [*schedule.base_lrs]
        groups = schedule.optimizer.param_groups
        options = [{k: v for k, v in group.items() if k not in ("params", "lr")} for group in groups]
        if self.is_deepspeed_enabled:  # which has loaded its own already, with the rates that were saved
            base_lrs = base_lrs if self.args.rates_differ else [self.args.learning_rate] * len(base_lrs)
        super()._load_optimizer_and_scheduler(checkpoint)
        schedule.base_lrs = base_lrs
        rates = [base * rate(schedule.last_epoch) for base, rate in zip(base_lrs, schedule.lr_lambdas, strict=True)]
        for group, rate, option in zip(schedule.optimizer.param_groups, rates, options, strict=True):
            group.update(option | {"lr": rate})
        schedule._last_lr = rates
