"""Trainer of reward models: `response_rewards` -> `ranking_loss` -> `log_metrics`. A paper changes one method of a subclass."""

from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from args import RMConfig
from base.batch import Batch
from base.calibration import draw_calibration
from base.reward import VLRewardModel
from base.vl_trainer import VLHeadTrainer, disable_dropout
from losses import bradley_terry, row_mean, sample_mean


class VLRMTrainer(VLHeadTrainer):
    """Bradley-Terry on the K responses of a row, read at their last tokens. One forward and one vision pass per prompt.

    With K > 2 every ordered pair of a row counts, and a row counts once: InstructGPT, 2203.02155 eq. 1.
    """

    args: RMConfig

    def __init__(self, model: VLRewardModel, args: RMConfig, *rest: Any, **kwargs: Any) -> None:
        disable_dropout(model)
        super().__init__(model, args, *rest, **kwargs)
        self.model_accepts_loss_kwargs = True  # `compute_loss` divides by the rows of the whole step
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
            batch["input_ids"],
            batch["segment_ids"],
            self.image_inputs(model, batch),
            batch["packed"],
            batch["layout"],
        )
        return model(**inputs, completion_index=batch["last_tokens"])

    def response_scores(self, model: nn.Module, batch: Batch) -> Tensor:
        """The rewards, (R,): they should depend on the image."""
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
            "mean_reward": rewards[batch["counted"]],
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
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Mean loss over the rows with a pair; stores the metrics."""
        rewards = self.response_rewards(model, inputs)
        self.log_metrics(rewards.detach(), inputs)
        per_row = self.ranking_loss(rewards, inputs)  # empty if all responses of these rows are equally good
        if not self.model.training:
            self.store_metrics({"loss": per_row})
        if num_items_in_batch is None:
            loss = sample_mean(per_row, max(len(per_row), 1))
        else:  # DDP and DeepSpeed average over devices
            loss = sample_mean(per_row, num_items_in_batch[0].clamp(min=1) / self.args.world_size)
        return (loss, {"rewards": rewards}) if return_outputs else loss

    def count_items(self, batch: Batch) -> Tensor:
        """Rows with a pair, (1,)."""
        return torch.tensor([len(batch["rows"][batch["chosen"]].unique())])

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As Trainer's; also draws accuracy by margin into `calibration.png` of the run folder."""
        self._margins.clear()
        metrics = super().evaluate(*args, **kwargs)
        margins = gather_object(torch.cat(self._margins).tolist() if self._margins else [])
        if self.args.should_save and margins:
            draw_calibration(margins, self.args.output_dir)
        return metrics
