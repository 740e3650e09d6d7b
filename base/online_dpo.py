"""Online DPO: preference losses on answers that the policy has just given (2402.04792).

One optimizer step:
    1. rollout and score   --rollouts_per_prompt answers to each of its prompts       base/on_policy.py
    2. pairs               of the answers to a prompt by their scores, as --pairs says `preferences`
    3. loss                as of any other rows                                         VLDPOTrainer.compute_loss
A micro batch is per_device_train_batch_size prompts with all their answers, in the tokens that were sampled: a text that
is tokenised anew may be other tokens. The reference is DPO's, and does not move.

Departures from TRL's OnlineDPOTrainer (trl.experimental.online_dpo, 1.16):
    1. K answers and all pairs of them (or the best against the worst, ...); there two answers.
    2. Answers of one score make no pair; there the first is chosen. A step without any pair moves nothing but momentum.
    3. The loss is a mean over the pairs of the step, over accumulation and devices; there of each micro batch.
    4. The prompts of a step are sampled before it, with accumulation too: by the policy before the step, as there.
    5. Dropout is off, in answers and in losses.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from args import DPOConfig
from base.adapters import Role
from base.answer_samples import AnswerSamples
from base.batch import Batch, ImageInputs, PPOBatch
from base.on_policy import OnPolicyTrainer
from base.ppo_metrics import group_metrics, reward_metrics
from base.rewards import Reward
from base.rollout import Sampled, Scored
from base.trainer import VLDPOTrainer
from base.value import VLModelWithValueHead
from common.seeds import stable_seed
from data.pairs import PairMode, ordered_pairs


def scored_pairs(scores: Sequence[float], mode: PairMode, score_margin: float | None) -> list[tuple[int, int]]:
    """Pairs (better, worse) of answers to one prompt; an answer without a score (NaN) is in none.

    Args:
        scores: (K,), larger is better.
        mode, score_margin: see `ordered_pairs`.
    """
    known = [k for k, score in enumerate(scores) if not math.isnan(score)]
    values = [scores[k] for k in known]
    pairs = ordered_pairs([-value for value in values], values, mode, score_margin)
    return [(known[better], known[worse]) for better, worse in pairs]


class OnlineDPO(OnPolicyTrainer):
    """What stands in front of a family's DPO trainer, see `online`."""

    args: DPOConfig

    def __init__(
        self,
        *args: Any,
        rewards: Sequence[Reward],
        role_model: VLModelWithValueHead | None,
        pairs: PairMode = "all",
        score_margin: float | None = None,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            args, kwargs: of VLDPOTrainer; the collator is PPO's, rows are prompts.
            rewards: at least one.
            role_model: around the policy, with the adapters of `rewards`; None if there are none.
            pairs, score_margin: which pairs of scored answers enter, see `ordered_pairs`.
        """
        super().__init__(*args, **kwargs)
        self._role_model, self.pairs, self.score_margin = role_model, pairs, score_margin
        self.remove_callback(AnswerSamples)  # the page shows rollouts
        self.prepare_rollouts(rewards)

    @property
    def role_model(self) -> VLModelWithValueHead | None:
        """The policy with the heads of reward adapters."""
        return self._role_model

    def _adapter_pass(self, r: Sampled, role: Role) -> Tensor:
        with self.accelerator.autocast():  # not the prepared model, which enters it by itself
            return self._role_model(**self._inputs(r, role), completion_index=r.batch["last_tokens"], role=role)

    def _padded_images(self, img_inputs: ImageInputs) -> ImageInputs:
        return self._prepare_images(self.data_collator.processor.pad_img_inputs(img_inputs))

    def _prepare_input(self, data: Any) -> Any:
        """As VLTrainer's; features are where they were computed, and must stay the class that models read."""
        return data if isinstance(data, ModelOutput) else super()._prepare_input(data)

    # -- training ------------------------------------------------------------------------------------------------------

    def get_batch_samples(
        self, epoch_iterator: Iterator[PPOBatch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Tensor | None]:
        """As Trainer's: the micro batches of an optimizer step, here answered and paired."""
        prompts = [*itertools.islice(epoch_iterator, num_batches)]
        return super().get_batch_samples(iter(self.answered(prompts) if prompts else []), num_batches, device)

    def answered(self, micro_batches: Sequence[PPOBatch]) -> list[Batch]:
        """The batches of a step for `compute_loss`, one for each micro batch of prompts on this device."""
        args, size = self.args, self.args.train_batch_size
        starts = [(m * args.world_size + args.process_index) * size for m in range(len(micro_batches))]
        places = [
            [start + b for b in range(len(batch["rows"]))] for start, batch in zip(starts, micro_batches, strict=True)
        ]
        seed = stable_seed(args.seed, "rollout", self.state.global_step)
        scored = self.score(self.rollout(micro_batches, seed, places))
        self.model.train()
        self.unscored.forget()
        self._write_samples(scored)
        return [self.preferences(r) for r in scored]

    def preferences(self, r: Scored) -> Batch:
        """A micro batch of answers as DPO's collator lays out those of data, with its pairs; stores the metrics of its answers."""
        answers, scores = r.by_prompt(range(len(r.texts))), r.by_prompt(r.scores.tolist())
        counted = [not row.get("repeated") for row in r.rows]
        pairs = [
            (of_prompt[better], of_prompt[worse])
            for of_prompt, values, counts in zip(answers, scores, counted, strict=True)
            if counts
            for better, worse in scored_pairs(values, self.pairs, self.score_margin)
        ]
        chosen, rejected = torch.tensor(pairs, dtype=torch.long, device=self.args.device).view(-1, 2).unbind(1)
        self.store_metrics(self.rollout_metrics(r, chosen, rejected))
        return {
            **r.batch,
            "image_inputs": {**r.images[Role.POLICY], **r.batch["img_input_dict"]},
            "chosen": chosen,
            "rejected": rejected,
            "where": self.data_collator.places(r.rows),
        }

    def rollout_metrics(self, r: Scored, chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
        """What is logged of the answers themselves, under TRL's names; rows that fill up an evaluation do not count."""
        counts = torch.tensor([not r.rows[b].get("repeated") for b in r.prompt_of], device=r.mask.device)
        of_answers = {
            "objective/scores": r.scores,
            "val/response_length": r.mask.sum(1).float(),
            "val/ended": r.ended.float(),
            **group_metrics([r]),
            **(reward_metrics([r], self.rewards) if len(self.rewards) > 1 and counts.all() else {}),
        }
        metrics = {
            name: values[counts & ~values.isnan()] if len(values) == len(counts) else values
            for name, values in of_answers.items()
        }
        return metrics | {"objective/scores_margin": r.scores[chosen] - r.scores[rejected]}

    def image_inputs(self, model: nn.Module, batch: Batch) -> ImageInputs:
        """As VLTrainer's; the rollout has encoded the images already."""
        return batch["image_inputs"] if "image_inputs" in batch else super().image_inputs(model, batch)

    # -- evaluation ----------------------------------------------------------------------------------------------------

    def prediction_step(self, model: nn.Module, inputs: PPOBatch, *args: Any, **kwargs: Any) -> Any:
        """As VLTrainer's, of answers that are sampled with the same random numbers at every evaluation."""
        places = [[stable_seed(row.get("where"), row["prompt"]) for row in inputs["rows"]]]
        (scored,) = self.score(self.rollout([inputs], stable_seed(self.args.seed, "eval"), places))
        return super().prediction_step(model, self.preferences(scored), *args, **kwargs)


def online(trainer: type[VLDPOTrainer]) -> type[VLDPOTrainer]:
    """A DPO trainer, a paper's own too, that learns from answers of its own; for further arguments see `OnlineDPO`."""
    return type(trainer.__name__, (OnlineDPO, trainer), {})
