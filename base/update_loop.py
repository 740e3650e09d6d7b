"""transformers' Trainer for algorithms whose step is an update: rollouts first, then several optimizer steps.

Of PPO's files this one alone touches what Trainer and accelerate keep private (`_run_epoch`, `_tr_loss`,
`_set_sync_gradients`, ...): a new version of either is met here. It knows prompts, updates and optimizer steps; what an
update computes, with which advantages and with or without a value function, is `update` of a subclass.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainingArguments
from transformers.optimization import GreedyLR
from transformers.trainer_callback import ExportableState

from args import PPOConfig
from base.batch import PPOBatch
from base.checkpoints import ignore_sigterm
from base.ppo_batches import BatchSizes, PromptBatches
from base.trainer import VLHeadTrainer
from common.seeds import stable_seed
from data.stream import StreamedRows


class PPOState(TrainerCallback, ExportableState):
    """What a checkpoint carries besides weights and optimizer, in trainer_state.json.

    Attributes:
        kl_coef: the KL coefficient now.
        first: entropy and length of the first update.
        warned: collapses that were warned of.
        pending: metrics not yet logged: name -> sum, count on one device.
    """

    def __init__(self, kl_coef: float = 0.0) -> None:
        self.kl_coef = kl_coef
        self.first: dict[str, float] = {}
        self.warned: list[str] = []
        self.pending: dict[str, list[float]] = {}

    def state(self) -> dict[str, Any]:
        """What Trainer writes."""
        return {"args": {}, "attributes": dict(vars(self))}

    def restore(self, saved: dict[str, Any]) -> None:
        """Go on from what was written."""
        vars(self).update(saved["attributes"])


class UpdateLoop(VLHeadTrainer):
    """One step of the trainer (of --logging_steps, --save_steps, the schedule, ...) is one call of `update`."""

    def __init__(self, model: nn.Module, args: PPOConfig, *rest: Any, **kwargs: Any) -> None:
        self.sizes = BatchSizes.of(args)
        super().__init__(model, args, *rest, **kwargs)
        self.model_accepts_loss_kwargs = True  # `backward` gets losses that are divided already
        self.ppo_state = PPOState(args.kl_coef)
        self.add_callback(self.ppo_state)
        self._grad_norm: Tensor | float | None = None
        self._where: list[str] = []  # the rows of the update

    # -- for a subclass ------------------------------------------------------------------------------------------------

    def update(self, micro_batches: Sequence[PPOBatch], seed: int, places: Sequence[list[int]]) -> None:
        """Learn from one update's prompts: roll out, make optimizer steps, store metrics.

        Args:
            micro_batches: of the collator, those of this device.
            seed: of the rollouts of this update.
            places: for each micro batch the place of its prompts among all prompts of the update, on all devices.
        """
        raise NotImplementedError

    @contextmanager
    def accumulating(self, model: nn.Module, last: bool) -> Iterator[None]:
        """Around forward and backward of a micro batch; the last one of a mini batch joins the devices' gradients."""
        self.accelerator.gradient_state._set_sync_gradients(last)
        with nullcontext() if last or self.is_deepspeed_enabled else self.accelerator.no_sync(model):
            yield

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss. They are divided by the number of devices, not by the accumulation steps."""
        self.bad_steps.see_loss(loss)
        self.accelerator.backward(loss, **({"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}))

    def optimizer_step(self, model: nn.Module) -> None:
        """Clip the gradients, move the weights."""
        self.bad_steps.see_rows(self._where)
        grad_norm = self._clip_grad_norm(model) if self.args.max_grad_norm > 0 else None
        self._grad_norm = self._get_grad_norm(model, grad_norm=grad_norm)
        self.optimizer.step()
        model.zero_grad()

    def store_sums(self, sums: dict[str, Tensor]) -> None:
        """Keep (sum, count) of each metric until the next log, which averages over updates and devices."""
        for name, values in sums.items():
            self._metrics["train"][name].append(values)

    def add_loss(self, loss: Tensor) -> None:
        """What `train_loss` of the run averages."""
        self._tr_loss += torch.where(loss.isfinite(), loss, 0)  # one that is not finite was skipped

    # -- the loop ------------------------------------------------------------------------------------------------------

    def _run_epoch(
        self,
        model: nn.Module,
        epoch: int,
        train_dataloader: DataLoader,
        trial: "optuna.Trial | dict[str, Any] | None" = None,  # noqa: F821  (as Trainer declares it)
        ignore_keys_for_eval: list[str] | None = None,
        start_time: float | None = None,
        resume_from_checkpoint: str | None = None,
        epochs_trained: int = 0,
        **_: Any,
    ) -> None:
        """One pass over the prompts; called by Trainer.train, which has prepared model, optimizer and state."""
        if self.state.global_step >= self.state.max_steps:  # resumed from the checkpoint of the last update
            self.control.should_training_stop = True
            return
        args, sizes, order = self.args, self.sizes, train_dataloader.batch_sampler
        order.epoch, order.first_update = epoch, self.state.global_step - epoch * order.updates
        if resume_from_checkpoint is not None and epoch == epochs_trained:
            self._load_rng_state(resume_from_checkpoint)
        log_save_evaluate = functools.partial(
            self._maybe_log_save_evaluate,
            model=model,
            trial=trial,
            epoch=epoch,
            ignore_keys_for_eval=ignore_keys_for_eval,
            start_time=start_time,
        )
        local = sizes.micro_prompts * sizes.micro_batches
        starts = range(args.process_index * local, (args.process_index + 1) * local, sizes.micro_prompts)
        places = [[*range(start, start + sizes.micro_prompts)] for start in starts]
        micro_batches = iter(train_dataloader)
        for update in range(order.first_update, order.updates):
            self.control = self.callback_handler.on_step_begin(args, self.state, self.control)
            seed = stable_seed(args.seed, "rollout", self.state.global_step)
            of_update = [next(micro_batches) for _ in places]
            self._where = [place for batch in of_update for place in self.data_collator.places(batch["rows"])]
            self.update(of_update, seed, places)
            learning_rate = self._get_learning_rate()
            waits = isinstance(
                self.lr_scheduler, ReduceLROnPlateau | GreedyLR
            )  # for an evaluation, where Trainer tells it
            if not waits and not self.accelerator.optimizer_step_was_skipped:
                self.lr_scheduler.step()
            self.state.global_step += 1
            self.state.epoch = epoch + (update + 1) / order.updates
            self.control = self.callback_handler.on_step_end(args, self.state, self.control)
            log_save_evaluate(self._tr_loss, self._grad_norm, learning_rate=learning_rate)
            if self.control.should_epoch_stop or self.control.should_training_stop:
                break
        self.control = self.callback_handler.on_epoch_end(args, self.state, self.control)
        log_save_evaluate(self._tr_loss, self._grad_norm)

    def metrics_of_evaluation(self) -> None:
        """Not known before answers are sampled."""
        return

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As Trainer's, with the number of rollouts so far."""
        if "loss" in logs:
            logs["episode"] = self.state.global_step * self.sizes.update_rollouts
        super().log(logs, start_time)

    # -- what Trainer asks for -----------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        """Micro batches of this device, in the order of `PromptBatches`."""
        in_order = isinstance(self.train_dataset, StreamedRows)
        order = PromptBatches(len(self.train_dataset), self.sizes, self.args.process_index, self.args.seed, in_order)
        return DataLoader(
            self.train_dataset,
            batch_sampler=order,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            worker_init_fn=functools.partial(ignore_sigterm, None),
        )

    def set_initial_training_values(self, args: TrainingArguments, dataloader: DataLoader) -> tuple[int, ...]:
        """(epochs, updates per epoch, prompts, rollouts, rollouts per update, updates per epoch, updates)."""
        updates = dataloader.batch_sampler.updates
        max_steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * updates)
        rollouts = self.sizes.update_rollouts
        epochs = math.ceil(max_steps / updates)
        return epochs, updates, len(self.train_dataset), max_steps * rollouts, rollouts, updates, max_steps

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        result = super()._init_training_state(*args, **kwargs)
        saved = self.state.stateful_callbacks.get(PPOState.__name__)
        if saved is not None:
            self.ppo_state.restore(saved)
        pending = self.ppo_state.pending
        self.store_sums({name: torch.tensor(sums, device=self.args.device) for name, sums in pending.items()})
        return result

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        # Sums over all devices: only one device's state is written.
        pending = {
            name: self.accelerator.reduce(torch.stack(sums).sum(0), reduction="sum") / self.accelerator.num_processes
            for name, sums in self._metrics["train"].items()
        }
        self.ppo_state.pending = {name: sums.tolist() for name, sums in pending.items()}
        super()._save_checkpoint(*args, **kwargs)
