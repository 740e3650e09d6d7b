"""Trainers of SFT and DPO, thin on transformers.Trainer. A paper changes one method of a subclass.

VLSFTTrainer: `compute_loss`.
VLDPOTrainer: `response_logps` -> `reference_logps` -> (`kl_to_reference` of single answers) -> `preference_loss` -> `log_metrics`.
VLRMTrainer (rm_trainer.py): `response_rewards` -> `ranking_loss` -> `log_metrics`.

What they share is in vl_trainer.py.
"""

import dataclasses
import logging
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.trainer_utils import TrainOutput
from trl.models.utils import prepare_deepspeed

from args import DPOConfig, SFTConfig
from base.adapters import REFERENCE_ADAPTER, adapter_active
from base.answer_samples import AnswerSamples
from base.batch import Batch
from base.callbacks import RunningDelta, SetEpoch
from base.fsdp import layers_of, shard
from base.lora_start import LoraOnChangedBase
from base.model import CompletionOutput
from base.packing import scatter_to_responses
from base.preference_inputs import (
    ModelPass,
    mismatched_log_ratios,
    most_likely_tokens,
    pairs_and_chosen_tokens,
    preference_batch,
    unpaired_batch,
    with_negatives,
)
from base.reference_cache import COLUMN, ReferenceCache, default_folder
from base.reference_pass import ReferencePass, about_reference, weights_as
from base.rm_trainer import VLRMTrainer
from base.run_warnings import unbalanced
from base.views import fixed_mismatches
from base.vl_trainer import VLHeadTrainer, VLTrainer, disable_dropout, sum_and_count
from common.errors import InputError
from data.bins import Bins, best_fit
from losses import (
    check_losses,
    columns_of,
    common_hyperparameters,
    implicit_rewards,
    needs_of,
    preference_loss,
    sample_mean,
)

logger = logging.getLogger(__name__)

__all__ = ["VLDPOTrainer", "VLHeadTrainer", "VLRMTrainer", "VLSFTTrainer", "VLTrainer", "disable_dropout"]


class VLSFTTrainer(VLTrainer):
    """Cross-entropy of the assistant's tokens, averaged over all of them in the global batch."""

    args: SFTConfig

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # `compute_loss` divides by the tokens of the whole step; some classes (Qwen-VL's) tell Trainer to divide once more
        self.model_accepts_loss_kwargs = True
        self.add_callback(AnswerSamples(self))
        self.bins = self._packed() if self.args.packing and self.train_dataset is not None else None

    def _packed(self) -> list[list[int]]:
        """The training rows by bin of at most --max_length tokens.

        Raises:
            InputError: --max_length is missing, or the model's rows cannot lie end to end.
        """
        capacity, model = self.data_collator.limits.max_length, self.base_model(self.model)
        if capacity is None:
            raise InputError(
                "--packing fills rows up to --max_length: say how many tokens, for example --max_length 4096."
            )
        if not model.lays_end_to_end:
            raise InputError(
                f"--packing needs rows that can lie end to end, which those of {type(model).__name__} cannot here: leave it out."
            )
        with self.args.main_process_first(desc="counting tokens"):
            lengths = self.data_collator.lengths(self.train_dataset)
        bins = best_fit(lengths, capacity)
        logger.warning(
            f"Packing: {len(lengths)} conversations in {len(bins)} rows of at most {capacity} tokens, which are "
            f"{sum(lengths) / (len(bins) * capacity):.0%} full."
        )
        return bins

    def get_train_dataloader(self) -> DataLoader:
        """As Trainer's; with --packing over bins, whose rows lie end to end as those of any batch do."""
        if self.bins is None:
            return super().get_train_dataloader()
        return self._get_dataloader(
            Bins(self.train_dataset, self.bins),
            "Training",
            self._train_batch_size,
            self._get_train_sampler,
            is_training=True,
        )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, CompletionOutput]:
        """Mean cross-entropy of the trained tokens of the global batch."""
        outputs = self.completions(model, inputs)
        if not self.model.training:
            self.store_metrics({"loss": -outputs.logps})
        if num_items_in_batch is None:
            loss = -outputs.logps.sum() / max(len(outputs.logps), 1)
        else:
            # Trained tokens of the whole global batch; DDP then averages gradients over ranks.
            loss = -outputs.logps.sum() / num_items_in_batch[0]
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def count_items(self, batch: Batch) -> Tensor:
        """Trained tokens, (1,)."""
        return torch.tensor([len(batch["completion_ids"])])

    def completions(self, model: nn.Module, batch: Batch) -> CompletionOutput:
        """Log-probs of the N trained tokens."""
        inputs = self.base_model(model).packed_inputs(
            batch["input_ids"],
            batch["attention_mask"] - 1,  # one segment, and padding
            self.image_inputs(model, batch),
            packed=False,
            layout=batch["layout"],
        )
        return model(**inputs, completion_index=batch["completion_index"], completion_ids=batch["completion_ids"])

    def response_scores(self, model: nn.Module, batch: Batch) -> Tensor:
        """Log-prob of each conversation's trained tokens, (B,)."""
        rows = torch.div(batch["completion_index"], batch["input_ids"].shape[1], rounding_mode="floor")
        logps = self.completions(model, batch).logps
        return logps.new_zeros(len(batch["input_ids"])).index_add(0, rows, logps)


class VLDPOTrainer(VLTrainer):
    """Preference losses (losses/) on packed rows, with pairs of answers or with single, labelled ones (KTO).

    The reference is a frozen copy (`ref_model`), or, when the policy is a LoRA model, the same model with its adapter switched off.
    """

    args: DPOConfig

    # Whether `policy.entropy` is there, for the `log_metrics` of a subclass
    with_entropy = False

    def __init__(
        self, model: nn.Module, args: DPOConfig, *rest: Any, ref_model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        """
        Args:
            rest, kwargs: as VLTrainer's.
            ref_model: needed with full fine-tuning, unless its log-probs are precomputed.

        Raises:
            InputError: the losses do not fit their flags or the columns of the data.
        """
        columns = kwargs["train_dataset"].column_names if kwargs.get("train_dataset") is not None else None
        try:
            check_losses(args.loss_type, args.loss_weights, vars(args), columns, args.precompute_ref_log_probs)
        except ValueError as error:
            raise InputError(str(error)) from error
        self.needs, self.columns = needs_of(args.loss_type), columns_of(args.loss_type)
        # β of the implicit rewards; where no loss has one they are plain log-ratios
        self.beta = common_hyperparameters(args.loss_type, vars(args)).get("beta", 1.0)
        self.reference_free = not args.reads_reference
        if args.precompute_ref_log_probs and self.reference_free:
            raise InputError(
                f"--precompute_ref_log_probs does nothing with --loss_type {' '.join(args.loss_type)}, which reads no reference."
            )
        has_one = ref_model is not None or isinstance(model, PeftModel) or args.precompute_ref_log_probs
        if args.reads_reference and not has_one:
            raise ValueError("Full fine-tuning needs ref_model, a frozen copy of the initial model.")
        trained_biases = isinstance(model, PeftModel) and any(a.bias != "none" for a in model.peft_config.values())
        if trained_biases and not (args.precompute_ref_log_probs or self.reference_free):
            raise InputError(
                "Trained biases belong to the base, which is the reference here: give --lora_bias none, or --precompute_ref_log_probs True."
            )
        for m in (model, ref_model):
            if m is not None:
                disable_dropout(m.get_base_model() if isinstance(m, PeftModel) else m)
        super().__init__(model, args, *rest, **kwargs)
        self.model_accepts_loss_kwargs = True  # `compute_loss` divides by the pairs of the whole step
        self.add_callback(SetEpoch(self.data_collator))
        self.add_callback(AnswerSamples(self))
        if "running_delta" in self.needs:
            self.add_callback(RunningDelta())
        self.ref_model = self._prepare_reference(ref_model)
        if args.row_kind == "unpaired" and isinstance(self.train_dataset, Dataset) and args.process_index == 0:
            weights = args.desirable_weight, args.undesirable_weight
            if said := unbalanced(self.train_dataset["label"][:], *weights):
                logger.warning(said)

    def _prepare_reference(self, ref_model: nn.Module | None) -> nn.Module | None:
        if ref_model is None:
            return None
        ref_model.requires_grad_(False)
        if self.is_deepspeed_enabled:
            return prepare_deepspeed(ref_model, self.accelerator)
        if self.args.sharding is not None:
            sharding = self.args.sharding
            shard(ref_model, layers_of(ref_model, sharding.layers), sharding.reshard_after_forward)
        return self.accelerator.prepare_model(ref_model, evaluation_mode=True)

    # -- the four steps that papers change -----------------------------------------------------------------------------------

    def response_logps(self, model: nn.Module, batch: Batch) -> ModelPass:
        """What the policy says of every response; with gradient, except without the image."""
        text_only = None
        if "text_only" in self.needs:
            with torch.no_grad():
                alone = batch["text_only"]
                text_only = self.completion_logps(model, alone, alone["img_input_dict"])
        return dataclasses.replace(self._pass(model, batch, self.with_entropy), text_only=text_only)

    def reference_logps(self, batch: Batch) -> ModelPass:
        """What the reference says of every response, without gradient."""
        if "reference_logps" in batch:
            return ModelPass(batch["reference_logps"])
        with torch.no_grad(), self.reference_context() as reference:
            return self._pass(reference, batch)

    def response_scores(self, model: nn.Module, batch: Batch) -> Tensor:
        """Policy log-prob of every response, (R,)."""
        return self.completion_logps(model, batch, batch["img_input_dict"]).sum(1)

    def preference_loss(
        self, policy: ModelPass, reference: ModelPass | None, batch: Batch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of each pair (M,) or single answer (N,), and the unweighted parts of a mixture."""
        if "answers" in batch:
            answers = unpaired_batch(policy, reference, batch)
            return preference_loss(answers, self.args.loss_type, self.args.loss_weights, vars(self.args))
        pairs = preference_batch(policy, reference, batch, self.needs, self.columns)
        if "running_delta" in self.needs:
            # Resuming puts another object in the place of the one that was added.
            delta = next(c for c in self.callback_handler.callbacks if isinstance(c, RunningDelta))
            rewards = torch.cat(implicit_rewards(pairs, self.beta))
            # Evaluation takes the mean as it is: its own batches must not matter.
            mean = delta.with_rewards(rewards, self.accelerator) if self.model.training else delta.mean.to(rewards)
            pairs = dataclasses.replace(pairs, running_delta=mean)
        return preference_loss(pairs, self.args.loss_type, self.args.loss_weights, vars(self.args))

    def log_metrics(
        self, policy: ModelPass, reference: ModelPass | None, parts: dict[str, Tensor], batch: Batch
    ) -> None:
        """Store TRL's metrics: implicit rewards beta * log-ratio, their accuracy and margin, and log-probs."""
        if len(parts) > 1:
            self.store_metrics({f"loss/{name}": part for name, part in parts.items()})
        if "answers" in batch:
            self._log_answers(policy, reference, batch)
            return
        pairs = preference_batch(policy, reference, batch)
        metrics = {"logps/chosen": pairs.policy.chosen, "logps/rejected": pairs.policy.rejected}
        if reference is not None:
            chosen, rejected = implicit_rewards(pairs, self.beta)  # (M,)
            metrics |= {
                "rewards/chosen": chosen,
                "rewards/rejected": rejected,
                "rewards/accuracies": chosen > rejected,
                "rewards/margins": chosen - rejected,
            }
        self.store_metrics(metrics)

    def _log_answers(self, policy: ModelPass, reference: ModelPass, batch: Batch) -> None:
        """TRL's metrics of single answers: chosen are the good ones, the margin is the difference of both means."""
        answers = unpaired_batch(policy, reference, batch)
        rewards, good = (self.beta * answers.log_ratio).detach(), answers.desirable
        metrics = {"logps/chosen": answers.policy[good], "logps/rejected": answers.policy[~good]}
        metrics |= {"rewards/chosen": rewards[good], "rewards/rejected": rewards[~good]}
        if answers.kl is not None:
            metrics["kl"] = answers.kl
        self.store_metrics(metrics)
        mode = "train" if self.model.training else "eval"
        self._metrics[mode]["rewards/margins"].append(
            torch.stack([sum_and_count(rewards[good]), sum_and_count(-rewards[~good])])
        )

    def kl_to_reference(self, policy: ModelPass, reference: ModelPass, batch: Batch) -> Tensor:
        """KL(policy || reference) as TRL's KTO estimates it, (): the mean over the mismatched answers of all devices, at least 0."""
        total = self.accelerator.reduce(sum_and_count(mismatched_log_ratios(policy, reference, batch)), reduction="sum")
        return (total[0] / total[1].clamp(min=1)).clamp(min=0)

    # -------------------------------------------------------------------------------------------------------------------------

    @contextmanager
    def reference_context(self) -> Iterator[nn.Module]:
        """Enter the reference: the frozen copy, the adapter as it was loaded, or the policy with its adapter switched off."""
        if self.ref_model is not None:
            yield self.ref_model
            return
        policy = self.accelerator.unwrap_model(self.model)
        if not isinstance(policy, PeftModel):  # --precompute_ref_log_probs
            if self.state.global_step:
                raise ValueError(
                    "These rows have no cached reference log-probs, and the policy is no longer its own reference."
                )
            yield self.model_wrapped
            return
        with adapter_active(policy, REFERENCE_ADAPTER if REFERENCE_ADAPTER in policy.peft_config else None):
            yield self.model_wrapped

    def _pass(self, model: nn.Module, batch: Batch, with_entropy: bool = False) -> ModelPass:
        outputs = self.completion_outputs(model, batch, batch["image_inputs"], with_entropy)
        mask = batch["completion_mask"]
        said = ModelPass(scatter_to_responses(outputs.logps, mask))
        if with_entropy:
            said = dataclasses.replace(said, entropy=scatter_to_responses(outputs.entropy, mask).detach())
        if self.needs & {"token_kl", "logit_shift"}:
            said = dataclasses.replace(said, hidden=outputs.hidden, head=self.base_model(model))
        return said

    def _with_policy_negatives(self, model: nn.Module, batch: Batch) -> Batch:
        """The batch with the policy's own tokens in the responses that stand ready for them."""
        probe = batch["probe"]
        with torch.no_grad():
            hidden = self.completion_outputs(model, probe, self.image_inputs(model, probe)).hidden
            return with_negatives(batch, most_likely_tokens(self.base_model(model), hidden))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Passes of reference and policy, the loss of each pair, their mean; stores the metrics."""
        if "policy_negative" in self.needs:
            inputs = self._with_policy_negatives(model, inputs)
        batch = inputs | {"image_inputs": self.image_inputs(model, inputs)}
        reference = None if self.reference_free else self.reference_logps(batch)
        policy = self.response_logps(model, batch)
        if "mismatched" in self.needs:
            batch["kl"] = self.kl_to_reference(policy, reference, batch)
        pairs, chosen_tokens = (self.count_items(batch) if num_items_in_batch is None else num_items_in_batch).float()
        pairs = pairs.clamp(min=1)
        per_pair, parts = self.preference_loss(
            policy, reference, batch | {"chosen_tokens_per_pair": chosen_tokens / pairs}
        )
        if self.model.training:
            self.log_metrics(policy, reference, parts, batch)
        else:
            self.log_metrics(policy, reference, {}, batch)
            self._store_evaluated_losses(policy, reference, batch)
        # DDP and DeepSpeed average over devices
        scale = 1 if num_items_in_batch is None else self.args.world_size
        loss = sample_mean(per_pair, pairs / scale)
        return (loss, {"policy": policy.logps}) if return_outputs else loss

    def count_items(self, batch: Batch) -> Tensor:
        """Pairs (or single answers), and the tokens of the chosen ones (of all), (2,)."""
        return pairs_and_chosen_tokens(batch)

    def _store_evaluated_losses(self, policy: ModelPass, reference: ModelPass | None, batch: Batch) -> None:
        """Metrics "loss" and, in a mixture, "loss/<name>": every pair and every chosen token of the evaluation counts once.

        How many chosen tokens there will be is not known yet. A loss is linear in 1 / chosen_tokens_per_pair: its part
        without them is what it is at infinity, the rest is a sum over chosen tokens.
        """

        def losses(chosen_tokens_per_pair: float) -> dict[str, Tensor]:
            number = policy.logps.new_tensor(chosen_tokens_per_pair)
            loss, parts = self.preference_loss(policy, reference, batch | {"chosen_tokens_per_pair": number})
            return {"loss": loss} | ({f"loss/{name}": part for name, part in parts.items()} if len(parts) > 1 else {})

        of_pairs, with_tokens = losses(math.inf), losses(1.0)
        tokens = self.count_items(batch)[1]
        for name, per_pair in of_pairs.items():
            of_tokens = torch.stack([(with_tokens[name] - per_pair).sum(), tokens.float()])
            self._metrics["eval"][name].append(torch.stack([sum_and_count(per_pair), of_tokens]))

    # -- the reference's log-probs before the first step: --precompute_ref_log_probs -------------------------------------------

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """As Trainer's; with `--precompute_ref_log_probs` the reference answers first."""
        if self.args.precompute_ref_log_probs:
            self.precompute_reference_logps()
        return super().train(*args, **kwargs)

    def precompute_reference_logps(self) -> None:
        """Give the data sets the column `reference_logps`, from disk where it is there, and drop the reference."""
        datasets = {name: getattr(self, name) for name in ("train_dataset", "eval_dataset")}
        datasets = {n: d for n, d in datasets.items() if d is not None and COLUMN not in d.column_names}
        if not datasets:
            return
        if "mismatched" in self.needs:  # which are drawn anew in every batch otherwise
            size = self.args.per_device_train_batch_size
            datasets = {
                name: rows.add_column("mismatched", fixed_mismatches([answer for (answer,) in rows["responses"]], size))
                for name, rows in datasets.items()
            }
        reference = self.model if self.ref_model is None else self.ref_model
        second_image = "image_rejected" in self.needs
        mixed = self.accelerator.mixed_precision
        about = about_reference(
            self.accelerator.unwrap_model(reference),
            self.base_model(reference).config,
            self.processing_class,
            self.data_collator,
            is_policy=self.ref_model is None,
            precision=f"deepspeed {mixed}, buffers float32" if self.is_deepspeed_enabled and mixed != "no" else mixed,
            second_image=second_image,
        )
        cache = ReferenceCache(self.args.ref_log_probs_dir or default_folder(), about)
        if self.is_deepspeed_enabled and self.ref_model is None:
            self.model.to(self.args.device)  # Trainer leaves it to DeepSpeed, which has not started
        self.shard_model()  # the digest above is that of the whole weights

        def reference_logps(batch: Batch) -> Tensor:
            batch = self._prepare_inputs(batch)
            batch["image_inputs"] = self.image_inputs(reference, batch)
            with self.accelerator.autocast():  # a prepared model enters it by itself, the policy is not prepared yet
                return self.reference_logps(batch).logps

        columns = ["image_rejected", "ranks", "scores"] if second_image else []
        columns += ["mismatched"] if "mismatched" in self.needs else []
        reference_pass = ReferencePass(self.args, cache, self.data_collator, reference_logps, columns)
        training = self.model.training
        self.model.eval()
        with self._as_deepspeed_computes():
            for name, dataset in datasets.items():
                setattr(self, name, reference_pass.add_to(dataset, name))
        self.model.train(training)
        self.ref_model = None
        needed = isinstance(self.model, LoraOnChangedBase)  # to save
        if isinstance(self.model, PeftModel) and REFERENCE_ADAPTER in self.model.peft_config and not needed:
            self.model.delete_adapter(REFERENCE_ADAPTER)

    def _as_deepspeed_computes(self) -> AbstractContextManager[None]:
        """The policy that answers before DeepSpeed starts, in the precision in which DeepSpeed will train it."""
        if not self.is_deepspeed_enabled or self.ref_model is not None or self.accelerator.mixed_precision == "no":
            return nullcontext()
        return weights_as(self.model, self.accelerator.state.deepspeed_plugin.hf_ds_config.dtype())
