"""Trainers of SFT, DPO and reward models, thin on transformers.Trainer. A paper changes one method of a subclass.

VLSFTTrainer: `compute_loss`.
VLDPOTrainer: `response_logps` -> `reference_logps` -> `preference_loss` -> `log_metrics`.
VLRMTrainer: `response_rewards` -> `ranking_loss` -> `log_metrics`.
"""

import dataclasses
import functools
import importlib.metadata
import logging
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset, List, Value
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers.integrations import is_deepspeed_zero3_enabled
from trl.models.utils import prepare_deepspeed
from trl.trainer.utils import disable_dropout_in_model, use_adapter

from args import DPOConfig, RMConfig, VLConfig
from base.adapters import REFERENCE_ADAPTER
from base.batch import Batch
from base.calibration import draw_calibration
from base.callbacks import RunningDelta, SetEpoch
from base.checkpoints import SafeCheckpoints
from base.logps import TOKEN_CHUNK, token_logits, vocabulary_kl
from base.model import CompletionOutput
from base.packing import last_token_positions, scatter_to_responses
from base.processor import VLProcessor
from base.reference_cache import (
    COLUMN,
    ReferenceCache,
    default_folder,
    processor_digest,
    row_key,
    weights_digest,
)
from common.errors import InputError
from losses import (
    PreferenceBatch,
    bradley_terry,
    check_losses,
    get_loss,
    implicit_rewards,
    needs_of,
    preference_loss,
    row_mean,
    sample_mean,
    update_running_mean,
)

logger = logging.getLogger(__name__)


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout of a model to 0: a log-ratio of two passes would measure its noise. Attention takes its rate from a plain number."""
    disable_dropout_in_model(model)
    for module in model.modules():
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0


class VLTrainer(SafeCheckpoints):
    """What all trainers share: images encoded once per step, response log-probs, metrics averaged over steps and ranks."""

    def __init__(
        self,
        model: nn.Module,
        args: VLConfig,
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
        if args.log_image_sensitivity and eval_dataset is None:
            raise InputError(
                "--log_image_sensitivity is measured on evaluation rows: add --eval_ratio or --eval_data_path."
            )
        grouped = args.train_sampling_strategy in ("group_by_length", "batch_rebalance")
        if grouped and train_dataset is not None and args.length_column_name not in train_dataset.column_names:
            with args.main_process_first(desc="counting tokens"):
                train_dataset = data_collator.with_lengths(train_dataset, args.length_column_name)
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
        images = batch["img_input_dict"]
        # A rank whose rows have no image runs the tower all the same, or ZeRO-3 would wait for it, and DDP for its gradients. So does a single
        # process whose tower trains: to the optimizer a gradient of 0 is not the same as none.
        several, text_only, trains = self.args.world_size > 1, images.get("pixel_values") is None, core.vision_trains()
        dummy = self._prepare_inputs(self.dummy_images) if text_only and (several or trains) else None
        if trains:
            return images | {"dummy_images": dummy or {}} if several or text_only else images
        training = core.training
        core.eval()  # a frozen encoder has no dropout (InstructBLIP's Q-Former has some)
        with torch.no_grad(), self.accelerator.autocast():
            features = core.encode_images(images)
            if dummy is not None:
                core.encode_images(dummy)
        core.train(training)
        return features

    @functools.cached_property
    def dummy_images(self) -> Batch:
        """Image inputs of one grey picture, for rows without images."""
        return self.processing_class.dummy_images()

    def completion_outputs(self, model: nn.Module, batch: Batch, image_inputs: dict[str, Any]) -> CompletionOutput:
        """Log-probs (N,) and hidden states (N, D) of the N response tokens of a packed batch, response after response."""
        mask = batch["completion_mask"]
        core = self.base_model(model)
        index, ids = batch["completion_index"][mask], batch["completion_ids"][mask]
        if "scored" in batch:  # what responses share goes through lm_head once
            index, ids = index[batch["scored"]], ids[batch["scored"]]
        outputs = model(
            **core.packed_inputs(batch["input_ids"], batch["segment_ids"], image_inputs, batch["packed"]),
            completion_index=index,
            completion_ids=ids,
        )
        if "scored" in batch:
            outputs.logps, outputs.hidden = outputs.logps[batch["scored_as"]], outputs.hidden[batch["scored_as"]]
        return outputs

    def completion_logps(self, model: nn.Module, batch: Batch, image_inputs: dict[str, Any]) -> Tensor:
        """Log-probs of all response tokens of a packed batch: (R, T) float32, zero where padded."""
        outputs = self.completion_outputs(model, batch, image_inputs)
        return scatter_to_responses(outputs.logps, batch["completion_mask"])

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

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        metrics = super().evaluate(*args, **kwargs)
        if self.args.log_image_sensitivity:
            sensitivity = {"eval_image_sensitivity": self.image_sensitivity(self.eval_dataset)}
            self.log(dict(sensitivity))
            metrics |= sensitivity
        return metrics

    def response_scores(self, model: nn.Module, batch: Batch) -> Tensor:
        """One number per response (or conversation) that should depend on the image: its log-prob, or its reward."""
        raise NotImplementedError

    def image_sensitivity(self, dataset: Dataset, num_rows: int = 64) -> float:
        """Mean absolute change of `response_scores` when a row gets the images of the next one: 0 for a model that ignores images.

        On the first `num_rows` rows; a row without images, or next to one with another number of images, keeps its own and is not counted.
        """
        rows = [dataset[i] for i in range(min(num_rows, len(dataset)))]
        changes, size = [], max(2, self.args.per_device_eval_batch_size)
        self.model.eval()
        for start in range(0, len(rows), size):
            batch_rows = rows[start : start + size]
            others = batch_rows[1:] + batch_rows[:1]
            swapped = [
                (row, row | {"images": other["images"]})
                for row, other in zip(batch_rows, others, strict=True)
                if row["images"] and len(row["images"]) == len(other["images"]) and row["images"] != other["images"]
            ]
            if not swapped:
                continue
            with torch.no_grad(), self.compute_loss_context_manager():
                own, other = (
                    self.response_scores(self.model_wrapped, self._prepare_inputs(self.data_collator(list(side))))
                    for side in zip(*swapped, strict=True)
                )
            changes.append((own - other).abs().float().cpu())
        return torch.cat(changes).mean().item() if changes else float("nan")

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

    def response_scores(self, model: nn.Module, batch: Batch) -> Tensor:
        """Log-prob of each conversation's trained tokens, (B,)."""
        rows = torch.div(batch["completion_index"], batch["input_ids"].shape[1], rounding_mode="floor")
        logps = self.compute_loss(model, batch, return_outputs=True)[1].logps
        return logps.new_zeros(len(batch["input_ids"])).index_add(0, rows, logps)


class VLDPOTrainer(VLTrainer):
    """Preference losses of losses.py on packed rows.

    The reference is a frozen copy (`ref_model`), or, when the policy is a LoRA model, the same model with its adapter switched off.
    """

    def __init__(
        self, model: nn.Module, args: DPOConfig, *rest: Any, ref_model: nn.Module | None = None, **kwargs: Any
    ) -> None:
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
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
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
        # Ranks may hold different numbers of pairs: dividing by their mean makes DDP's average the mean over all pairs.
        count = torch.tensor(float(per_pair.numel()), device=per_pair.device)
        loss = sample_mean(
            per_pair, self.accelerator.reduce(count, reduction="mean").clamp(min=1 / self.args.world_size)
        )
        return (loss, {"policy": policy}) if return_outputs else loss

    # -- the reference's log-probs of the whole data set, before the first step ------------------------------------------------

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's; with `--precompute_ref_log_probs` the reference answers first, and is then dropped."""
        if self.args.precompute_ref_log_probs:
            self.precompute_reference_logps()
        return super().train(*args, **kwargs)

    def precompute_reference_logps(self) -> None:
        """Give the data sets the column `reference_logps`, from disk where it is there (base/reference_cache.py)."""
        names = [n for n in ("train_dataset", "eval_dataset") if getattr(self, n) is not None]
        names = [n for n in names if COLUMN not in getattr(self, n).column_names]
        if not names:
            return
        cache = ReferenceCache(self.args.ref_log_probs_dir or default_folder(), self._about_reference())
        rank, world = self.args.process_index, self.args.world_size
        for name in names:
            dataset = getattr(self, name)
            # What the reference is asked about beyond prompt, responses and images
            columns = ["image_rejected", "ranks", "scores"] if "image_rejected" in self.needs else []
            keys = self._row_keys(dataset, columns)
            there = set().union(*gather_object([cache.keys()]))  # one answer for all ranks, before any of them writes
            todo = list({key: i for i, key in enumerate(keys) if key not in there}.values())
            logger.info(
                "Reference log-probs of %s: %d of %d rows are in %s",
                name,
                len(keys) - len(todo),
                len(keys),
                cache.folder,
            )
            mine = [
                todo[i % len(todo)] for i in range(rank, -(-len(todo) // world) * world, world)
            ]  # every rank as many
            self._compute_reference(dataset.select(mine), [keys[i] for i in mine], cache, len(todo))
            self.accelerator.wait_for_everyone()
            values = cache.read(keys)
            setattr(
                self, name, dataset.add_column(COLUMN, [values[key] for key in keys], feature=List(Value("float32")))
            )
        self.ref_model = None
        if isinstance(self.model, PeftModel) and REFERENCE_ADAPTER in self.model.peft_config:
            self.model.delete_adapter(REFERENCE_ADAPTER)

    def _about_reference(self) -> dict[str, Any]:
        """Everything that changes the log-probs of every row."""
        reference = self.ref_model if self.ref_model is not None else self.model
        config = self.base_model(reference).config.to_dict()
        about = {
            "weights": weights_digest(self.accelerator.unwrap_model(reference), is_policy=self.ref_model is None),
            "config": {k: v for k, v in config.items() if k not in ("_name_or_path", "transformers_version")},
            "processor": processor_digest(self.processing_class),
            "limits": dataclasses.asdict(self.data_collator.limits),
            "autocast": self.accelerator.mixed_precision,
            "share_prefix": self.data_collator.share_prefix,
            "losses": sorted(self.needs & {"image_rejected"}),
            "pairs": [self.data_collator.pairs, self.data_collator.score_margin]
            if "image_rejected" in self.needs
            else None,
            "versions": {package: importlib.metadata.version(package) for package in ("torch", "transformers")},
        }
        if is_deepspeed_zero3_enabled():  # every rank holds a part of the weights
            about["weights"] = gather_object([about["weights"]])
        return about

    def _row_keys(self, dataset: Dataset, columns: list[str]) -> list[str]:
        """`row_key` of every row; each rank reads the images of its share."""
        rank, world = self.args.process_index, self.args.world_size
        with ThreadPoolExecutor() as pool:
            mine = pool.map(lambda i: row_key(dataset[i], columns), range(rank, len(dataset), world))
            shares = gather_object([list(tqdm(mine, "Reading rows", len(dataset) // world, disable=self._quiet()))])
        keys = [""] * len(dataset)
        for start, share in enumerate(shares):
            keys[start::world] = share
        return keys

    def _compute_reference(self, dataset: Dataset, keys: list[str], cache: ReferenceCache, total: int) -> None:
        """Write the reference's log-probs of these rows, this rank's share of `total`."""
        if self.is_deepspeed_enabled and self.ref_model is None:
            self.model.to(self.args.device)  # Trainer leaves it to DeepSpeed, which has not started
        size = self.args.precompute_ref_batch_size or self.args.per_device_train_batch_size
        loader = DataLoader(
            dataset,
            size,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )
        training = self.model.training
        self.model.eval()
        for step, batch in enumerate(tqdm(loader, f"Reference log-probs of {total} rows", disable=self._quiet())):
            batch = self._prepare_inputs(batch)
            batch["image_inputs"] = self.image_inputs(self.model if self.ref_model is None else self.ref_model, batch)
            with self.compute_loss_context_manager():
                logps = self.reference_logps(batch)
            rows = keys[step * size : (step + 1) * size]
            row_of = batch["rows"] % len(rows)
            for b, key in enumerate(rows):
                cache.add(key, logps[batch["completion_mask"] & (row_of == b)[:, None]])
        cache.flush()
        self.model.train(training)

    def _quiet(self) -> bool:
        return self.args.disable_tqdm or self.args.process_index > 0

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

    def __init__(self, model: nn.Module, args: RMConfig, *rest: Any, **kwargs: Any) -> None:
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

    def response_scores(self, model: nn.Module, batch: Batch) -> Tensor:
        """The same: what the image should change is the reward."""
        return self.response_rewards(model, batch)

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
        self.log_metrics(rewards.detach(), inputs)
        per_row = self.ranking_loss(rewards, inputs)  # of none, if all responses of these rows are equally good
        # Ranks may hold different numbers of rows with a pair: dividing by their mean makes DDP's average the mean over all of them.
        count = torch.tensor(float(per_row.numel()), device=per_row.device)
        loss = sample_mean(
            per_row, self.accelerator.reduce(count, reduction="mean").clamp(min=1 / self.args.world_size)
        )
        return (loss, {"rewards": rewards}) if return_outputs else loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As Trainer's; also draws accuracy by margin into `calibration.png` of the run folder."""
        self._margins.clear()
        metrics = super().evaluate(*args, **kwargs)
        margins = gather_object(torch.cat(self._margins).tolist() if self._margins else [])
        if self.args.should_save and margins:
            draw_calibration(margins, self.args.output_dir)
        return metrics
