"""What the trainers share: images encoded once per step, log-probs of packed rows, metrics over steps and ranks."""

import functools
import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Sampler, SequentialSampler
from transformers import EarlyStoppingCallback, PrinterCallback, ProgressCallback
from transformers.trainer_utils import TrainOutput
from trl.trainer.utils import disable_dropout_in_model

from args import VLConfig
from base.adapters import Role
from base.batch import Batch, ImageInputs
from base.callbacks import EvaluateAtEnd
from base.checkpoints import SafeCheckpoints
from base.collator import VLDataCollator
from base.features import has_images, pooled_features
from base.fsdp import in_root
from base.learning_rates import learning_rates, split_by_rate
from base.log_lines import Bars, LogLines
from base.lora_start import Moved, start_from_inputs
from base.model import CompletionOutput, VLModelMixin
from base.packing import scatter_to_responses
from base.processor import VLProcessor
from base.run_page import RunPage
from base.samples import asked_and_told
from base.sampling import end_token_ids, plain_generation_config
from base.self_check import SelfCheck
from base.videos import count_media, media_of
from common.errors import InputError
from common.tensors import to_device
from data.stream import StreamedRows


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout of a model to 0: its noise would be part of the log-ratio of two passes.

    Many layers keep a rate as a float and not as a module (`dropout`, `attention_dropout`, `drop_prob`, ...): every
    float whose name says so is set to 0 as well.
    """
    disable_dropout_in_model(model)
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, float) and "drop" in name:
                setattr(module, name, 0.0)


def sum_and_count(values: Tensor) -> Tensor:
    """Any shape -> (2,) float32. Two numbers per step instead of the values; a NaN stays visible."""
    values = values.detach().float().flatten()
    return torch.stack([values.sum(), values.new_full((), values.numel())])


class FilledUp(torch.utils.data.Dataset):
    """Rows and then, up to a multiple, the first of them again with `repeated`: every device evaluates equally many batches.

    Collators give a repeated row no pair and no trained token, so that it runs and does not count.
    """

    def __init__(self, rows: Dataset, multiple: int) -> None:
        self.rows = rows
        self.length = -(-len(rows) // multiple) * multiple

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index % len(self.rows)]
        return row | {"repeated": True} if index >= len(self.rows) else row


class VLTrainer(SafeCheckpoints):
    """The base of all trainers."""

    args: VLConfig

    def __init__(
        self,
        model: nn.Module,
        args: VLConfig,
        processor: VLProcessor,
        data_collator: VLDataCollator,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | None = None,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            model: an adapter's model, maybe wrapped by peft.
            processor: saved with every checkpoint.
            kwargs: go to transformers.Trainer.

        Raises:
            InputError: --log_image_sensitivity without evaluation rows, or a learning rate of what does not train.
        """
        if args.log_image_sensitivity and eval_dataset is None:
            raise InputError(
                "--log_image_sensitivity is measured on evaluation rows: add --eval_ratio or --eval_data_path."
            )
        if args.train_sampling_strategy in ("group_by_length", "batch_rebalance"):  # the former groups evaluation too
            with args.main_process_first(desc="counting tokens"):
                train_dataset, eval_dataset = (
                    d
                    if d is None or args.length_column_name in d.column_names
                    else data_collator.with_lengths(d, args.length_column_name)
                    for d in (train_dataset, eval_dataset)
                )
        if isinstance(model, PeftModel):
            # Other adapters in memory (a frozen reference, ...) are not part of the result.
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
        self._tokens_seen: Tensor | int = 0
        # The way of pinned batches to the device is not waited for
        self.accelerator.dataloader_config.non_blocking = args.dataloader_pin_memory
        self.remove_callback(PrinterCallback)
        if not args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(Bars())
        self.add_callback(LogLines())
        self.add_callback(SelfCheck(self))
        self.add_callback(RunPage(lambda: self.tokens_seen, getattr(self, "beta", 1.0)))
        if self.eval_dataset is not None:
            self.add_callback(EvaluateAtEnd())
        if args.early_stopping_patience is not None:
            self.add_callback(EarlyStoppingCallback(args.early_stopping_patience))
        self._rates = learning_rates(self.model, args) if args.rates_differ else None
        # Parameters and modules of the vision side: finding them walks the whole tree, which every step would pay for
        self._vision: WeakKeyDictionary[nn.Module, tuple[list[nn.Parameter], list[nn.Module]]] = WeakKeyDictionary()
        # Sums and counts, (2,), or (2, 2) for the sum of two means
        self._metrics: dict[str, dict[str, list[Tensor]]] = {"train": defaultdict(list), "eval": defaultdict(list)}

    def _start_from_data(self, policy: PeftModel) -> None:
        """--init_lora_weights eva, on rows in random order, shared out over processes. No number of the run's own is drawn."""
        self.model.to(self.args.device)  # which DeepSpeed would do later
        rank, ranks = self.args.process_index, self.args.world_size
        loader = DataLoader(
            self.train_dataset,
            self._train_batch_size * ranks,
            shuffle=True,
            collate_fn=lambda rows: Moved(self._prepare_inputs(self.data_collator(rows[rank::ranks]))),
            generator=torch.Generator().manual_seed(self.args.seed),
            drop_last=ranks > 1,  # which would leave a process without rows
        )
        with self.accelerator.autocast():
            start_from_inputs(policy, loader, lambda batch: self.response_scores(self.model, batch))

    @property
    def tokens_seen(self) -> int:
        """Tokens that this process has trained on or (PPO) sampled and read, padding left out."""
        return int(self._tokens_seen)

    def training_step(self, model: nn.Module, inputs: Batch, *args: Any, **kwargs: Any) -> Tensor:
        """As Trainer's; counts the tokens."""
        mask = inputs["segment_ids"] >= 0 if "segment_ids" in inputs else inputs["attention_mask"]
        self._tokens_seen = self._tokens_seen + mask.sum()  # stays on the device: no step waits for it
        return super().training_step(model, inputs, *args, **kwargs)

    # -- the model's view of a batch -------------------------------------------------------------------------------------

    def _prepare_input(self, data: Any) -> Any:
        """Move a batch to the device. Only image inputs get DeepSpeed's precision: log-probs and numbers of the data stay float32."""
        if isinstance(data, Mapping):
            return {
                k: self._prepare_images(v) if k == "img_input_dict" else self._prepare_input(v) for k, v in data.items()
            }
        return to_device(data, self.args.device)

    def _prepare_images(self, images: ImageInputs) -> ImageInputs:
        """Move image inputs to the device, under DeepSpeed in its precision."""
        zero = self.accelerator.state.deepspeed_plugin if self.is_deepspeed_enabled else None
        return to_device(images, self.args.device, zero and zero.hf_ds_config.dtype())

    def base_model(self, model: nn.Module) -> VLModelMixin:
        """The family's model inside DDP, DeepSpeed and peft wrappers."""
        model = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        return model.get_base_model() if isinstance(model, PeftModel) else model

    def image_inputs(self, model: nn.Module, batch: Batch) -> dict[str, Any]:
        """What stands for the images in every forward of this step.

        Features, computed once, if nothing on the vision side trains. Otherwise the pixels: they must go through the forward of the wrapped model,
        which DDP and DeepSpeed watch, and each pass with other vision weights computes its own features.
        """
        core = self.base_model(model)
        if core not in self._vision:
            self._vision[core] = [*core.vision_parameters().values()], core.vision_modules()
        parameters, modules = self._vision[core]
        images = batch["img_input_dict"]
        # A rank whose rows have no image runs the tower all the same: else ZeRO-3 would wait for it, and DDP for its gradients. So does a single
        # process whose tower trains: Adam moves a parameter whose gradient is 0 and skips one whose gradient is None.
        several, text_only = self.args.world_size > 1, not has_images(images)
        trains = any(p.requires_grad for p in parameters)
        dummy = self._prepare_images(self.dummy_images) if text_only and (several or trains) else None
        if trains:
            return images | {"dummy_images": dummy or {}} if several or text_only else images
        for module in modules:  # no dropout in a frozen encoder (InstructBLIP's Q-Former has some)
            module.training = False
        with torch.no_grad(), self.accelerator.autocast():
            features = in_root(model, lambda: core.encode_images(images))
            if dummy is not None:
                in_root(model, lambda: core.encode_images(dummy))
        return pooled_features(features)

    @functools.cached_property
    def dummy_images(self) -> Batch:
        """Image inputs of one grey picture, for rows without images."""
        return self.processing_class.dummy_images()

    @torch.no_grad()
    def greedy_answers(self, rows: Sequence[dict[str, Any]], max_new_tokens: int = 64) -> list[str]:
        """The model's likeliest answers to the prompts of rows, one at a time, on this process alone. No random number is drawn."""
        core, processor = self.base_model(self.model), self.processing_class
        ends, training, answers = end_token_ids(processor, core), self.model.training, []
        self.model.eval()
        with plain_generation_config(core), self.accelerator.autocast():
            for row in rows:
                prompt, _ = asked_and_told(row)
                (ids,), img_inputs = processor.encode_conversations([prompt], [media_of(row)])
                images = self._prepare_images(processor.pad_img_inputs(img_inputs))
                inputs = torch.tensor([ids], device=self.args.device)
                out = core.generate(
                    input_ids=inputs,
                    attention_mask=torch.ones_like(inputs),
                    **images,
                    do_sample=False,
                    max_new_tokens=max_new_tokens,
                    eos_token_id=ends,
                    pad_token_id=processor.tokenizer.pad_token_id,
                )[0]
                if len(out) >= len(ids) and out[: len(ids)].tolist() == ids:
                    out = out[len(ids) :]  # else only new tokens are there
                answers.append(processor.decode_response(out.tolist()))
        self.model.train(training)
        return answers

    def completion_outputs(
        self, model: nn.Module, batch: Batch, image_inputs: dict[str, Any], with_entropy: bool = False
    ) -> CompletionOutput:
        """Log-probs (N,) and hidden states (N, D) of the N response tokens of a packed batch, response after response."""
        core, places = self.base_model(model), batch["completion_places"]
        index, ids = batch["completion_index"].flatten()[places], batch["completion_ids"].flatten()[places]
        if "scored" in batch:  # what responses share goes through lm_head once
            index, ids = index[batch["scored"]], ids[batch["scored"]]
        outputs = model(
            **core.packed_inputs(
                batch["input_ids"], batch["segment_ids"], image_inputs, batch["packed"], batch["layout"]
            ),
            completion_index=index,
            completion_ids=ids,
            **({"with_entropy": True} if with_entropy else {}),
        )
        if "scored" in batch:
            for name, values in dict(outputs).items():
                setattr(outputs, name, values[batch["scored_as"]])
        return outputs

    def completion_logps(self, model: nn.Module, batch: Batch, image_inputs: dict[str, Any]) -> Tensor:
        """Log-probs of all response tokens of a packed batch: (R, T) float32, zero where padded."""
        outputs = self.completion_outputs(model, batch, image_inputs)
        return scatter_to_responses(outputs.logps, batch["completion_mask"])

    # -- what a loss is a mean over -------------------------------------------------------------------------------------------

    def count_items(self, batch: Batch) -> Tensor:
        """Hook: how many of each kind of thing the losses of a batch are means over, (n,)."""
        raise NotImplementedError

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> Tensor | None:
        """`num_items_in_batch` of `compute_loss`: `count_items` over all micro batches of an optimizer step, on all devices.

        Divided by them, accumulated micro batches, ranks and one large batch give the same loss, however unequal they are.
        """
        if not batch_samples:
            return None
        counts = torch.stack([self.count_items(batch) for batch in batch_samples]).sum(0)
        return self.accelerator.reduce(counts.to(device, torch.float32), reduction="sum")

    # -- metrics ------------------------------------------------------------------------------------------------------------

    def store_metrics(self, metrics: dict[str, Tensor]) -> None:
        """Keep per-sample values, (n,) each, until the next log; log averages all samples since then, over all ranks."""
        mode = "train" if self.model.training else "eval"
        for name, values in metrics.items():
            self._metrics[mode][name].append(sum_and_count(values))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As Trainer's, with the stored metrics averaged over samples, steps and ranks."""
        mode = "eval" if any(name.startswith("eval_") for name in logs) else "train"
        sums = {name: torch.stack(values).sum(0).view(-1, 2) for name, values in self._metrics[mode].items()}
        # One reduction and one read for all of them
        totals = self.accelerator.reduce(torch.cat([*sums.values()]), reduction="sum").tolist() if sums else []
        read = iter(totals)
        for name, of_metric in sums.items():
            parts = [*itertools.islice(read, len(of_metric))]
            # Else a data source without a pair, or no good answer since the last log
            if all(count for _, count in parts):
                logs[name if mode == "train" else f"eval_{name}"] = sum(total / count for total, count in parts)
        self._metrics[mode].clear()
        super().log(logs, start_time)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As Trainer's, with the image sensitivity if asked for."""
        metrics = super().evaluate(*args, **kwargs)
        if self.args.log_image_sensitivity:
            sensitivity = {"eval_image_sensitivity": self.image_sensitivity(self.eval_dataset)}
            self.log(dict(sensitivity))
            metrics |= sensitivity
        self.check_best_metric(metrics)
        return metrics

    def check_best_metric(self, metrics: dict[str, float]) -> None:
        """Raise InputError if an evaluation during training lacks the metric that --metric_for_best_model names."""
        asked = self.args.metric_for_best_model
        if self.is_in_train and asked is not None and f"eval_{asked.removeprefix('eval_')}" not in metrics:
            names = sorted(name.removeprefix("eval_") for name in metrics if name.startswith("eval_"))
            raise InputError(
                f"--metric_for_best_model {asked} is not what evaluation logs: choose from {', '.join(names)}."
            )

    def response_scores(self, model: nn.Module, batch: Batch) -> Tensor:
        """One number per response (or conversation) that should depend on the image: its log-prob, or its reward."""
        raise NotImplementedError

    def image_sensitivity(self, dataset: Dataset, num_rows: int = 64) -> float:
        """Mean absolute change of `response_scores` when a row gets the images of the next one: 0 for a model that ignores images.

        Measured on the first `num_rows` rows; videos count as images. Left out are rows without images, and rows whose next one has
        more or fewer images.
        """
        rows = [dataset[i] for i in range(min(num_rows, len(dataset)))]
        changes, size = [], max(2, self.args.per_device_eval_batch_size)
        self.model.eval()
        for start in range(0, len(rows), size):
            batch_rows = rows[start : start + size]
            others = batch_rows[1:] + batch_rows[:1]
            swapped = [
                (row, row | {name: other.get(name) for name in ("images", "videos")})
                for row, other in zip(batch_rows, others, strict=True)
                if (own := media_of(row))
                and own != (of_other := media_of(other))
                and count_media(own) == count_media(of_other)
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

    # -- training rows ------------------------------------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        """As Trainer's; streamed rows come in order, they are shuffled where they are read."""
        rows = train_dataset if train_dataset is not None else self.train_dataset
        return SequentialSampler(rows) if isinstance(rows, StreamedRows) else super()._get_train_sampler(train_dataset)

    def _load_callback_state(self) -> None:
        """As Trainer's; early stopping goes on waiting where it was, as long as this run's flag says."""
        super()._load_callback_state()
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, EarlyStoppingCallback):
                callback.early_stopping_patience = self.args.early_stopping_patience

    # -- learning rates -----------------------------------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """As Trainer's, with a learning rate of their own for the parts that flags name."""
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if fresh and self._rates is not None:
            split_by_rate(optimizer, self._rates)
        return optimizer

    # -- evaluation ---------------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """As Trainer's; an adapter that starts from the data does so first.

        Raises:
            InputError: --metric_for_best_model names a metric that evaluation does not log.
        """
        asked = (self.args.metric_for_best_model or "loss").removeprefix("eval_")
        if asked != "loss" and self.eval_dataset is not None and not self.is_deepspeed_enabled:
            names = self.metrics_of_evaluation()
            if names is not None and asked not in names:
                raise InputError(
                    f"--metric_for_best_model {self.args.metric_for_best_model} is not what evaluation logs: choose from "
                    f"{', '.join(['loss', *sorted(names - {'loss'})])}."
                )
        policy = next((m for m in self.model.modules() if isinstance(m, PeftModel)), None)
        config = policy and policy.peft_config[Role.POLICY.adapter]
        if config and config.init_lora_weights == "eva":
            if not resume_from_checkpoint:  # whose weights come from its file
                self._start_from_data(policy)
            config.init_lora_weights, config.eva_config = True, None  # what is saved starts nowhere else again
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def metrics_of_evaluation(self) -> set[str] | None:
        """Names that evaluation logs, read off one row; None where that cannot say."""
        training = self.model.training
        self.shard_model()
        self.model.eval()
        with self.accelerator.autocast():  # which the model enters by itself once it is prepared
            self.prediction_step(self.model, self.data_collator([self.eval_dataset[0]]), True)
        self.model.train(training)
        names = {*self._metrics["eval"]}
        self._metrics["eval"].clear()
        return names | ({"image_sensitivity"} if self.args.log_image_sensitivity else set())

    def get_eval_dataloader(self, eval_dataset: Dataset | None = None) -> DataLoader:
        """As Trainer's, over `FilledUp` rows: no row is left out, and none counts twice."""
        rows = eval_dataset if eval_dataset is not None else self.eval_dataset
        fill = self.args.world_size > 1 or self.args.dataloader_drop_last
        return super().get_eval_dataloader(
            FilledUp(rows, self.args.eval_batch_size * self.args.world_size if fill else 1)
        )

    def _get_eval_sampler(self, eval_dataset: FilledUp) -> list[int]:
        """In order, or by length: the same on every device, and without random numbers, which training would miss."""
        order = [*range(len(eval_dataset))]
        if self.args.train_sampling_strategy == "group_by_length":
            lengths = eval_dataset.rows[self.args.length_column_name][:]
            order.sort(key=lambda i: -lengths[i % len(lengths)])
        return order

    def prediction_step(
        self, model: nn.Module, inputs: Batch, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, None, None]:
        """As Trainer's. Where `compute_loss` stores the metric "loss", `log` makes `eval_loss` of it, whatever the batches are."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs).detach()
        return None if "loss" in self._metrics["eval"] else loss, None, None


class VLHeadTrainer(VLTrainer):
    """The base of trainers whose model is a backbone with a scalar head: finds the family's model inside, saves and loads both parts."""

    def base_model(self, model: nn.Module) -> VLModelMixin:
        """The family's model inside DDP, DeepSpeed, head and peft."""
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
