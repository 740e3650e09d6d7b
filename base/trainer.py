"""Trainers of SFT, DPO and reward models, thin on transformers.Trainer. A paper changes one method of a subclass.

VLSFTTrainer: `compute_loss`.
VLDPOTrainer: `response_logps` -> `reference_logps` -> `preference_loss` -> `log_metrics`.
VLRMTrainer: `response_rewards` -> `ranking_loss` -> `log_metrics`.
"""

import base.compat  # noqa: F401  isort: skip  (must come before transformers)
import functools
import json
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from trl.models.utils import prepare_deepspeed
from trl.trainer.utils import disable_dropout_in_model, use_adapter

from base.errors import InputError
from base.packing import scatter_to_responses
from base.processor import VLProcessor
from base.reward import last_token_positions
from losses import PreferenceBatch, bradley_terry, get_loss, preference_loss, row_mean

Batch = dict[str, Any]

REFERENCE_ADAPTER = "ref"  # name of the frozen copy of an adapter that training continues (TRL's name)


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout of a model to 0: a log-ratio of two passes would measure its noise. Attention takes its rate from a plain number."""
    disable_dropout_in_model(model)
    for module in model.modules():
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0


class VLTrainer(Trainer):
    """What all trainers share: images encoded once per step, response log-probs, metrics averaged over steps and ranks."""

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        processor: VLProcessor,
        data_collator: Any,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | None = None,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            model: an adapter's model, maybe wrapped by peft.
            processor: saved with every checkpoint.
            kwargs: go to transformers.Trainer.
        """
        if args.gradient_checkpointing and args.gradient_checkpointing_kwargs is None:
            # Reentrant checkpointing drops the gradients of a frozen base with LoRA.
            args.gradient_checkpointing_kwargs = {"use_reentrant": False}
        if isinstance(model, PeftModel):
            # Adapters with another hat (a frozen reference, ...) are not part of the result.
            model.save_pretrained = functools.partial(model.save_pretrained, selected_adapters=["default"])
        super().__init__(
            model=model,
            args=args,
            processing_class=processor,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            **kwargs,
        )
        self._metrics: dict[str, dict[str, list[Tensor]]] = {"train": defaultdict(list), "eval": defaultdict(list)}

    # -- the model's view of a batch -------------------------------------------------------------------------------------

    def base_model(self, model: nn.Module) -> nn.Module:
        """The adapter's model inside DDP, DeepSpeed and peft wrappers."""
        model = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        return model.get_base_model() if isinstance(model, PeftModel) else model

    def image_inputs(self, model: nn.Module, batch: Batch) -> dict[str, Any]:
        """What stands for the images in every forward of this step.

        Features, computed once, while nothing on the vision side trains. Otherwise the pixels: they must go through the wrapped model's own
        forward, which DDP and DeepSpeed watch, and a pass with other vision weights needs its own features.
        """
        core = self.base_model(model)
        if core.vision_trains():
            return batch["img_input_dict"]
        training = core.training
        core.eval()  # a frozen encoder has no dropout (InstructBLIP's Q-Former has some)
        with torch.no_grad(), self.accelerator.autocast():
            features = core.encode_images(batch["img_input_dict"])
        core.train(training)
        return features

    def completion_logps(self, model: nn.Module, batch: Batch, image_inputs: dict[str, Any]) -> Tensor:
        """Log-probs of all response tokens of a packed batch: (R, T) float32, zero where padded."""
        mask = batch["completion_mask"]
        core = self.base_model(model)
        outputs = model(
            **core.packed_inputs(batch["input_ids"], batch["segment_ids"], image_inputs, batch["packed"]),
            completion_index=batch["completion_index"][mask],
            completion_ids=batch["completion_ids"][mask],
        )
        return scatter_to_responses(outputs.logps, mask)

    # -- metrics ------------------------------------------------------------------------------------------------------------

    def store_metrics(self, metrics: dict[str, Tensor]) -> None:
        """Keep per-sample values, (n,) each, until the next log; log averages all samples since then, over all ranks."""
        mode = "train" if self.model.training else "eval"
        for name, values in metrics.items():
            values = values.detach().float().flatten()
            # nan-safe sums are kept instead of the values: two numbers per step
            self._metrics[mode][name].append(torch.stack([values.sum(), values.new_tensor(values.numel())]))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "eval" if any(name.startswith("eval_") for name in logs) else "train"
        for name, sums in self._metrics[mode].items():
            total, count = self.accelerator.reduce(torch.stack(sums).sum(0), reduction="sum").tolist()
            if count:  # none: a source without a pair since the last log
                logs[name if mode == "train" else f"eval_{name}"] = total / count
        self._metrics[mode].clear()
        super().log(logs, start_time)

    def prediction_step(
        self, model: nn.Module, inputs: Batch, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor, None, None]:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs).detach(), None, None


class VLSFTTrainer(VLTrainer):
    """Cross-entropy of the assistant's tokens, averaged over all of them in the global batch."""

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        outputs = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            use_cache=False,
            **self.image_inputs(model, inputs),
            completion_index=inputs["completion_index"],
            completion_ids=inputs["completion_ids"],
        )
        if num_items_in_batch is None:
            loss = -outputs.logps.mean()
        else:
            # Trained tokens of the whole global batch; DDP then averages gradients over ranks.
            loss = -outputs.logps.sum() / num_items_in_batch
            loss = loss * (self.accelerator.num_processes if self.args.average_tokens_across_devices else 1)
        return (loss, outputs) if return_outputs else loss


class VLDPOTrainer(VLTrainer):
    """Preference losses of losses.py on packed rows.

    The reference is a frozen copy (`ref_model`), or, when the policy is a LoRA model, the same model with its adapter switched off.
    """

    def __init__(
        self, model: nn.Module, args: TrainingArguments, *rest: Any, ref_model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        for name in args.loss_type:
            try:
                get_loss(name)
            except ValueError as error:
                raise InputError(str(error)) from error
        if ref_model is None and not isinstance(model, PeftModel):
            raise ValueError("Full fine-tuning needs ref_model, a frozen copy of the initial model.")
        for m in (model, ref_model):
            if m is not None:
                disable_dropout(m.get_base_model() if isinstance(m, PeftModel) else m)
        super().__init__(model, args, *rest, **kwargs)
        # The loss is a mean over pairs: Trainer must divide it by the accumulation steps.
        self.model_accepts_loss_kwargs = False
        self.ref_model = self._prepare_reference(ref_model)

    def _prepare_reference(self, ref_model: nn.Module | None) -> nn.Module | None:
        if ref_model is None:
            return None
        ref_model.requires_grad_(False)
        if self.is_deepspeed_enabled:
            return prepare_deepspeed(ref_model, self.accelerator)
        return self.accelerator.prepare_model(ref_model, evaluation_mode=True)

    # -- the four steps that papers change -----------------------------------------------------------------------------------

    def response_logps(self, model: nn.Module, batch: Batch) -> Tensor:
        """Policy log-probs of every response token, (R, T)."""
        return self.completion_logps(model, batch, batch["image_inputs"])

    def reference_logps(self, batch: Batch) -> Tensor:
        """Reference log-probs of every response token, (R, T), without gradient."""
        with torch.no_grad(), self.reference_context() as reference:
            return self.completion_logps(reference, batch, batch["image_inputs"])

    def preference_loss(
        self, policy: Tensor, reference: Tensor | None, batch: Batch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of each pair (M,), and the unweighted parts of a mixture."""
        return preference_loss(
            self.preference_batch(policy, reference, batch),
            self.args.loss_type,
            self.args.loss_weights,
            vars(self.args),
        )

    def log_metrics(self, policy: Tensor, reference: Tensor | None, parts: dict[str, Tensor], batch: Batch) -> None:
        """Store TRL's metrics: implicit rewards beta * log-ratio, their accuracy and margin, and log-probs."""
        pairs = self.preference_batch(policy, reference, batch)
        metrics = {"logps/chosen": pairs.chosen_logps, "logps/rejected": pairs.rejected_logps}
        if reference is not None:
            chosen = self.args.beta * (pairs.chosen_logps - pairs.ref_chosen_logps)
            rejected = self.args.beta * (pairs.rejected_logps - pairs.ref_rejected_logps)
            metrics |= {
                "rewards/chosen": chosen,
                "rewards/rejected": rejected,
                "rewards/accuracies": chosen > rejected,
                "rewards/margins": chosen - rejected,
            }
        if len(parts) > 1:
            metrics |= {f"loss/{name}": part for name, part in parts.items()}
        self.store_metrics(metrics)

    # -------------------------------------------------------------------------------------------------------------------------

    @contextmanager
    def reference_context(self) -> Iterator[nn.Module]:
        """Enter the reference: the frozen copy, the adapter as it was loaded, or the policy with its adapter switched off."""
        if self.ref_model is not None:
            yield self.ref_model
            return
        policy = self.accelerator.unwrap_model(self.model)
        with use_adapter(policy, REFERENCE_ADAPTER if REFERENCE_ADAPTER in policy.peft_config else None):
            yield self.model_wrapped

    def preference_batch(self, policy: Tensor, reference: Tensor | None, batch: Batch) -> PreferenceBatch:
        """The M pairs of a batch as losses.py reads them."""
        chosen, rejected = batch["chosen"], batch["rejected"]
        lengths = batch["completion_mask"].sum(1)  # (R,)
        logps = policy.sum(1)  # (R,)
        ref = reference.sum(1) if reference is not None else None
        return PreferenceBatch(
            chosen_logps=logps[chosen],
            rejected_logps=logps[rejected],
            chosen_lengths=lengths[chosen],
            rejected_lengths=lengths[rejected],
            ref_chosen_logps=ref[chosen] if ref is not None else None,
            ref_rejected_logps=ref[rejected] if ref is not None else None,
        )

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        batch = inputs | {"image_inputs": self.image_inputs(model, inputs)}
        reference = (
            None if all(get_loss(name).reference_free for name in self.args.loss_type) else self.reference_logps(batch)
        )
        policy = self.response_logps(model, batch)
        per_pair, parts = self.preference_loss(policy, reference, batch)
        self.log_metrics(policy.detach(), reference, parts, batch)
        loss = per_pair.mean()
        return (loss, {"policy": policy}) if return_outputs else loss


class VLHeadTrainer(VLTrainer):
    """What trainers of a backbone with a scalar head share: finding the adapter's model inside, saving and loading both parts."""

    def base_model(self, model: nn.Module) -> nn.Module:
        """The adapter's model inside DDP, DeepSpeed, head and peft."""
        return self.accelerator.unwrap_model(model, keep_torch_compile=False).core

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        output_dir = output_dir if output_dir is not None else self.args.output_dir
        self.accelerator.unwrap_model(self.model).save_pretrained(output_dir, state_dict=state_dict)
        self.processing_class.save_pretrained(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.accelerator.unwrap_model(model if model is not None else self.model).load_checkpoint(
            resume_from_checkpoint
        )


class VLRMTrainer(VLHeadTrainer):
    """Bradley-Terry on the K responses of a row, read at their last tokens. One forward and one vision pass per prompt.

    With K > 2 every ordered pair of a row counts, and a row counts once: InstructGPT, 2203.02155 eq. 1.
    """

    def __init__(self, model: nn.Module, args: TrainingArguments, *rest: Any, **kwargs: Any) -> None:
        disable_dropout(model)
        super().__init__(model, args, *rest, **kwargs)
        # The loss is a mean over rows: Trainer must divide it by the accumulation steps.
        self.model_accepts_loss_kwargs = False
        self._margins: list[Tensor] = []
        # Every rank must log the same names, whatever its rows are from.
        self._sources = sorted(
            {
                source
                for data in (self.train_dataset, self.eval_dataset)
                if data is not None and "source" in data.column_names
                for source in data.unique("source")
                if source is not None
            }
        )

    # -- the two steps that papers change ------------------------------------------------------------------------------------

    def response_rewards(self, model: nn.Module, batch: Batch) -> Tensor:
        """Reward of every response, (R,) float32."""
        core = self.base_model(model)
        inputs = core.packed_inputs(
            batch["input_ids"], batch["segment_ids"], self.image_inputs(model, batch), batch["packed"]
        )
        return model(**inputs, completion_index=last_token_positions(batch["segment_ids"]))

    def ranking_loss(self, rewards: Tensor, batch: Batch) -> Tensor:
        """Loss of each row that has a pair, (rows,): the mean over its pairs, each with its margin if the data has one."""
        per_pair = bradley_terry(
            rewards[batch["chosen"]],
            rewards[batch["rejected"]],
            batch.get("margin"),
            self.args.center_rewards_coefficient,
        )
        return row_mean(per_pair, batch["rows"][batch["chosen"]])

    def log_metrics(self, rewards: Tensor, batch: Batch) -> None:
        """Store accuracy (ties are wrong), margin, rewards of both sides, and the accuracy of every source."""
        chosen, rejected = rewards[batch["chosen"]], rewards[batch["rejected"]]
        right = chosen > rejected
        metrics = {
            "accuracy": right,
            "margin": chosen - rejected,
            "mean_reward": rewards,
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
        }
        if len(self._sources) > 1:
            of_pair = [batch["source"][row] for row in batch["rows"][batch["chosen"]].tolist()]
            for source in self._sources:
                metrics[f"accuracy/{source}"] = right[[i for i, name in enumerate(of_pair) if name == source]]
        self.store_metrics(metrics)
        if not self.model.training:
            self._margins.append((chosen - rejected).cpu())

    # -------------------------------------------------------------------------------------------------------------------------

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        rewards = self.response_rewards(model, inputs)
        if not len(inputs["chosen"]):  # all responses of these rows are equally good
            return rewards.sum() * 0.0
        self.log_metrics(rewards.detach(), inputs)
        loss = self.ranking_loss(rewards, inputs).mean()
        return (loss, {"rewards": rewards}) if return_outputs else loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As Trainer's; also draws accuracy by margin into `calibration.png` of the run folder."""
        self._margins.clear()
        metrics = super().evaluate(*args, **kwargs)
        margins = gather_object(torch.cat(self._margins).tolist() if self._margins else [])
        if self.args.should_save and margins:
            draw_calibration(margins, self.args.output_dir)
        return metrics


def draw_calibration(margins: Sequence[float], output_dir: str, num_bins: int = 8) -> list[dict[str, float]]:
    """Write `calibration.png` and `calibration.json`: how often the model is right, by how sure it is.

    A Bradley-Terry model that is calibrated is right with probability σ(|margin|).

    Args:
        margins: reward of chosen minus reward of rejected, one per pair.

    Returns:
        Per bin of equal count: mean |margin|, accuracy, σ(|margin|) and number of pairs.
    """
    from matplotlib.figure import Figure  # slow to import; without pyplot no display is touched

    ordered = sorted(margins, key=abs)
    bins = [
        chunk
        for i in range(num_bins)
        if (chunk := ordered[i * len(ordered) // num_bins : (i + 1) * len(ordered) // num_bins])
    ]
    table = [
        {
            "margin": sum(map(abs, chunk)) / len(chunk),
            "accuracy": sum(m > 0 for m in chunk) / len(chunk),
            "expected": sum(1 / (1 + math.exp(-abs(m))) for m in chunk) / len(chunk),
            "pairs": len(chunk),
        }
        for chunk in bins
    ]
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    (Path(output_dir) / "calibration.json").write_text(json.dumps(table, indent=2) + "\n")
    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(
        [b["margin"] for b in table], [b["accuracy"] for b in table], "o-", label=f"this model, {len(margins)} pairs"
    )
    axes.plot([b["margin"] for b in table], [b["expected"] for b in table], "--", color="grey", label="σ(|margin|)")
    axes.set(xlabel="|reward of chosen - reward of rejected|", ylabel="share of pairs ranked right", ylim=(0, 1.05))
    axes.legend(loc="lower right")
    figure.savefig(Path(output_dir) / "calibration.png", dpi=120)
    return table
