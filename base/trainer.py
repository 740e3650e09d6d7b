"""Trainers of SFT and DPO, thin on transformers.Trainer. A paper changes one method of a subclass.

VLSFTTrainer: `compute_loss`.
VLDPOTrainer: `response_logps` -> `reference_logps` -> `preference_loss` -> `log_metrics`.
VLRMTrainer (rm_trainer.py): `response_rewards` -> `ranking_loss` -> `log_metrics`.

What they share is in vl_trainer.py.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers.trainer_utils import TrainOutput
from trl.models.utils import prepare_deepspeed
from trl.trainer.utils import use_adapter

from args import DPOConfig, SFTConfig
from base.adapters import REFERENCE_ADAPTER
from base.batch import Batch
from base.callbacks import RunningDelta, SetEpoch
from base.logps import TOKEN_CHUNK, token_logits, vocabulary_kl
from base.model import CompletionOutput
from base.packing import scatter_to_responses
from base.reference_cache import COLUMN, ReferenceCache, default_folder
from base.reference_pass import ReferencePass, about_reference
from base.rm_trainer import VLRMTrainer
from base.vl_trainer import VLHeadTrainer, VLTrainer, disable_dropout
from common.errors import InputError
from losses import (
    PreferenceBatch,
    check_losses,
    get_loss,
    implicit_rewards,
    needs_of,
    preference_loss,
    sample_mean,
    update_running_mean,
)

__all__ = ["VLDPOTrainer", "VLHeadTrainer", "VLRMTrainer", "VLSFTTrainer", "VLTrainer", "disable_dropout"]


class VLSFTTrainer(VLTrainer):
    """Cross-entropy of the assistant's tokens, averaged over all of them in the global batch."""

    args: SFTConfig

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, CompletionOutput]:
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

    def response_scores(self, model: nn.Module, batch: Batch) -> Tensor:
        """Log-prob of each conversation's trained tokens, (B,)."""
        rows = torch.div(batch["completion_index"], batch["input_ids"].shape[1], rounding_mode="floor")
        logps = self.compute_loss(model, batch, return_outputs=True)[1].logps
        return logps.new_zeros(len(batch["input_ids"])).index_add(0, rows, logps)


class VLDPOTrainer(VLTrainer):
    """Preference losses of losses.py on packed rows.

    The reference is a frozen copy (`ref_model`), or, when the policy is a LoRA model, the same model with its adapter switched off.
    """

    args: DPOConfig

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
        self.needs = needs_of(args.loss_type)
        self.reference_free = all(get_loss(name).reference_free for name in args.loss_type)
        if args.precompute_ref_log_probs and self.reference_free:
            raise InputError(
                f"--precompute_ref_log_probs does nothing with --loss_type {' '.join(args.loss_type)}, which reads no reference."
            )
        if ref_model is None and not isinstance(model, PeftModel) and not args.precompute_ref_log_probs:
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
        # The loss is a mean over pairs: Trainer must divide it by the accumulation steps.
        self.model_accepts_loss_kwargs = False
        self.add_callback(SetEpoch(self.data_collator))
        if "running_delta" in self.needs:
            self.add_callback(RunningDelta())
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
        return self._logps(model, batch, "policy_hidden")

    def reference_logps(self, batch: Batch) -> Tensor:
        """Reference log-probs of every response token, (R, T), without gradient."""
        if "reference_logps" in batch:
            return batch["reference_logps"]
        with torch.no_grad(), self.reference_context() as reference:
            return self._logps(reference, batch, "reference_hidden")

    def response_scores(self, model: nn.Module, batch: Batch) -> Tensor:
        """Policy log-prob of every response, (R,)."""
        return self.completion_logps(model, batch, batch["img_input_dict"]).sum(1)

    def preference_loss(
        self, policy: Tensor, reference: Tensor | None, batch: Batch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of each pair (M,), and the unweighted parts of a mixture."""
        pairs = self.preference_batch(policy, reference, batch)
        return preference_loss(pairs, self.args.loss_type, self.args.loss_weights, vars(self.args))

    def log_metrics(self, policy: Tensor, reference: Tensor | None, parts: dict[str, Tensor], batch: Batch) -> None:
        """Store TRL's metrics: implicit rewards beta * log-ratio, their accuracy and margin, and log-probs."""
        chosen, rejected = policy.sum(1)[batch["chosen"]], policy.sum(1)[batch["rejected"]]  # (M,)
        metrics = {"logps/chosen": chosen, "logps/rejected": rejected}
        if reference is not None:
            chosen = self.args.beta * (chosen - reference.sum(1)[batch["chosen"]])
            rejected = self.args.beta * (rejected - reference.sum(1)[batch["rejected"]])
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
        if not isinstance(policy, PeftModel):  # --precompute_ref_log_probs
            if self.state.global_step:
                raise ValueError(
                    "These rows have no cached reference log-probs, and the policy is no longer its own reference."
                )
            yield self.model_wrapped
            return
        with use_adapter(policy, REFERENCE_ADAPTER if REFERENCE_ADAPTER in policy.peft_config else None):
            yield self.model_wrapped

    def _logps(self, model: nn.Module, batch: Batch, keep_hidden_as: str) -> Tensor:
        outputs = self.completion_outputs(model, batch, batch["image_inputs"])
        if self.needs & {"token_kl", "logit_shift"}:
            batch[keep_hidden_as] = outputs.hidden
        return scatter_to_responses(outputs.logps, batch["completion_mask"])

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        if "policy_negative" in self.needs:
            inputs = self._say_what_the_policy_says(model, inputs)
        batch = inputs | {"image_inputs": self.image_inputs(model, inputs)}
        reference = None if self.reference_free else self.reference_logps(batch)
        if "text_only" in self.needs:
            with torch.no_grad():
                batch["text_only_logps"] = self.completion_logps(
                    model, batch["text_only"], batch["text_only"]["img_input_dict"]
                )
        policy = self.response_logps(model, batch)
        per_pair, parts = self.preference_loss(policy, reference, batch)
        self.log_metrics(policy.detach(), reference, parts, batch)
        # Ranks may hold different numbers of pairs: divided by the mean of these numbers, DDP's average is the mean over all pairs.
        count = torch.tensor(float(per_pair.numel()), device=per_pair.device)
        loss = sample_mean(
            per_pair, self.accelerator.reduce(count, reduction="mean").clamp(min=1 / self.args.world_size)
        )
        return (loss, {"policy": policy}) if return_outputs else loss

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
        reference = self.model if self.ref_model is None else self.ref_model
        second_image = "image_rejected" in self.needs
        about = about_reference(
            self.accelerator.unwrap_model(reference),
            self.base_model(reference).config,
            self.processing_class,
            self.data_collator,
            is_policy=self.ref_model is None,
            mixed_precision=self.accelerator.mixed_precision,
            second_image=second_image,
        )
        cache = ReferenceCache(self.args.ref_log_probs_dir or default_folder(), about)
        if self.is_deepspeed_enabled and self.ref_model is None:
            self.model.to(self.args.device)  # Trainer leaves it to DeepSpeed, which has not started

        def reference_logps(batch: Batch) -> Tensor:
            batch = self._prepare_inputs(batch)
            batch["image_inputs"] = self.image_inputs(reference, batch)
            with self.compute_loss_context_manager():
                return self.reference_logps(batch)

        reference_pass = ReferencePass(self.args, cache, self.data_collator, reference_logps, second_image)
        training = self.model.training
        self.model.eval()
        for name, dataset in datasets.items():
            setattr(self, name, reference_pass.add_to(dataset, name))
        self.model.train(training)
        self.ref_model = None
        if isinstance(self.model, PeftModel) and REFERENCE_ADAPTER in self.model.peft_config:
            self.model.delete_adapter(REFERENCE_ADAPTER)

    # -- what losses read beyond plain log-probs: the keys of losses.NEEDS --------------------------------------------------

    def preference_batch(self, policy: Tensor, reference: Tensor | None, batch: Batch) -> PreferenceBatch:
        """The M pairs of a batch as losses.py reads them.

        Args:
            policy, reference: (R, T) log-probs of all responses of the batch, further rows of the collator included.
        """
        chosen, rejected, needs = batch["chosen"], batch["rejected"], self.needs  # (M,), (M,)
        mask = batch["completion_mask"]
        lengths, logps = mask.sum(1), policy.sum(1)  # (R,)
        fields: dict[str, Tensor | None] = {
            "chosen_logps": logps[chosen],
            "rejected_logps": logps[rejected],
            "chosen_lengths": lengths[chosen],
            "rejected_lengths": lengths[rejected],
        }
        # The policy's and the reference's log-probs, with the prefix of their fields.
        passes = {"": policy} | ({"ref_": reference} if reference is not None else {})
        for prefix, per_token in passes.items():
            summed = per_token.sum(1)
            if prefix:
                fields |= {"ref_chosen_logps": summed[chosen], "ref_rejected_logps": summed[rejected]}
            if "per_token" in needs:
                fields |= {
                    f"{prefix}chosen_per_token_logps": per_token[chosen],
                    f"{prefix}rejected_per_token_logps": per_token[rejected],
                }
            if "corrupted_image" in needs:
                fields[f"{prefix}corrupted_chosen_logps"] = summed[batch["corrupted_of"][chosen]]
            if "corrupted_image_per_token" in needs:
                fields[f"{prefix}corrupted_chosen_per_token_logps"] = per_token[batch["corrupted_of"][chosen]]
            if "image_rejected" in needs:
                fields[f"{prefix}image_rejected_chosen_logps"] = summed[batch["image_rejected_of"][chosen]]
            if "policy_negative" in needs:
                fields[f"{prefix}negative_logps"] = summed[batch["negative_of"][chosen]]
            if "logit_shift" in needs:
                shift = self._logit_shift(batch, "reference_hidden" if prefix else "policy_hidden")
                fields |= {
                    f"{prefix}chosen_logit_shift": shift[chosen],
                    f"{prefix}rejected_logit_shift": shift[rejected],
                }
        if "per_token" in needs:
            fields |= {"chosen_mask": mask[chosen], "rejected_mask": mask[rejected]}
        if "changed_tokens" in needs:
            fields |= {"chosen_changed": batch["chosen_changed"], "rejected_changed": batch["rejected_changed"]}
        if "text_only" in needs:
            text_only = batch["text_only_logps"].sum(1)
            fields |= {"text_only_chosen_logps": text_only[chosen], "text_only_rejected_logps": text_only[rejected]}
        if "token_kl" in needs:
            kl = self._token_kl(batch).sum(1)
            fields |= {"chosen_token_kl": kl[chosen], "rejected_token_kl": kl[rejected]}
        if "severity" in needs:
            fields["rejected_severity"] = batch["severity"][rejected]
        if "margin" in needs:
            fields["margin"] = batch["margin"]
        if "running_delta" in needs:
            fields["running_delta"] = self._running_delta(fields)
        return PreferenceBatch(**fields)

    def _logit_shift(self, batch: Batch, hidden_key: str) -> Tensor:
        """logit(y_t|v) - logit(y_t|v') of each response's own tokens, (R, T); zero for responses without a corrupted twin."""
        mask, twin = batch["completion_mask"], batch["corrupted_of"]
        logits = token_logits(self._scored_by(hidden_key), batch[hidden_key], batch["completion_ids"][mask])
        logits = scatter_to_responses(logits, mask)  # (R, T)
        return torch.where((twin >= 0)[:, None], logits - logits[twin.clamp(min=0)], 0)

    def _token_kl(self, batch: Batch) -> Tensor:
        """KL(reference || policy) over the whole vocabulary at each response token, (R, T)."""
        kl = vocabulary_kl(
            self._scored_by("reference_hidden"),
            batch["reference_hidden"],
            self._scored_by("policy_hidden"),
            batch["policy_hidden"],
        )
        return scatter_to_responses(kl, batch["completion_mask"])

    def _scored_by(self, hidden_key: str) -> nn.Module:
        """The model whose lm_head turns these hidden states into logits."""
        return self.base_model(
            self.ref_model if hidden_key == "reference_hidden" and self.ref_model is not None else self.model
        )

    def _say_what_the_policy_says(self, model: nn.Module, batch: Batch) -> Batch:
        """Fill the responses that stand ready for it with the policy's argmax tokens on v' under the chosen answer's teacher forcing."""
        probe = batch["probe"]
        mask = probe["completion_mask"]
        with torch.no_grad():
            hidden = self.completion_outputs(model, probe, self.image_inputs(model, probe)).hidden
            said = torch.cat(
                [self.base_model(model).get_output_embeddings()(h).argmax(-1) for h in hidden.split(TOKEN_CHUNK)]
            )
        said = scatter_to_responses(said, mask)  # (R', T')
        twins = batch["negative_of"][batch["negative_of"] >= 0]  # (R',) in the order of the probe's responses
        ids = batch["completion_ids"].clone()
        ids[twins, : said.shape[1]] = torch.where(mask, said, ids[twins, : said.shape[1]])
        # Response tokens stand in a row, and rows in the batch, in the order of the responses.
        input_ids = batch["input_ids"].masked_scatter(batch["segment_ids"] > 0, ids[batch["completion_mask"]])
        return batch | {"completion_ids": ids, "input_ids": input_ids}

    def _running_delta(self, fields: dict[str, Tensor | None]) -> Tensor:
        """Mean implicit reward of both sides over all training batches so far, this one included (MPO's delta)."""
        rewards = torch.cat(implicit_rewards(PreferenceBatch(**fields), self.args.beta))
        sums = self.accelerator.reduce(
            torch.stack([rewards.sum(), rewards.new_tensor(rewards.numel())]), reduction="sum"
        )
        # Resuming puts another object in the place of the one that was added.
        state = next(c for c in self.callback_handler.callbacks if isinstance(c, RunningDelta))
        mean, count = update_running_mean(state.mean, state.count, (sums[0] / sums[1]).expand(int(sums[1])).cpu())
        if self.model.training:
            state.mean, state.count = mean, count
        return mean.to(rewards.device)
