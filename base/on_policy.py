"""Trainers that learn from answers of their own: sampling answers to prompts, and what the answers are worth.

    Prompts --rollout--> Sampled --score--> Scored        base/rollout.py says what each holds

PPO and its relatives make advantages of the scores (ppo_trainer.py), online DPO makes pairs (online_dpo.py).
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from trl.models.utils import prepare_deepspeed, unwrap_model_for_generation

import losses
from args import RolloutFlags
from base.adapters import Role, adapter_active
from base.batch import ImageInputs, PPOBatch
from base.features import has_images, pooled_features
from base.reward_calls import UnscoredAnswers
from base.rewards import AdapterReward, FunctionReward, ModelReward, Reward
from base.rollout import AnswerLogps, Answers, Images, Prompts, Sampled, Scored
from base.samples import Sample, write_samples
from base.sampling import Sampler, end_token_ids, plain_generation_config
from base.value import VLModelWithValueHead
from base.videos import count_media, media_of, shown_pictures
from base.vl_trainer import VLTrainer, disable_dropout
from common.errors import InputError
from common.tensors import to_device


class OnPolicyTrainer(VLTrainer):
    """Samples --rollouts_per_prompt answers to each prompt and scores them.

    A subclass calls `prepare_rollouts` once its model is there, and says where reward adapters hang (`role_model`,
    `_adapter_pass`).
    """

    args: RolloutFlags

    def prepare_rollouts(self, rewards: Sequence[Reward], further_roles: Sequence[Role] = ()) -> None:
        """Freeze and place reward models, check what functions ask for, and find the roles that see images with weights of their own.

        Args:
            rewards: at least one.
            further_roles: of `role_model`, besides those of the reward adapters.

        Raises:
            InputError: a function cannot be called with what the data have.
        """
        args, core = self.args, self.base_model(self.model)
        self.rewards = list(rewards)
        self.unscored = UnscoredAnswers(args.output_dir, args.process_index)
        for reward in self.rewards:
            if isinstance(reward, ModelReward):
                disable_dropout(reward.model)
                reward.model = self.accelerator.unwrap_model(self._prepare_frozen(reward.model))
            if isinstance(reward, FunctionReward):
                for data in filter(None, (self.train_dataset, self.eval_dataset)):
                    reward.check_columns(data)
        self.sampler = Sampler(args, self.data_collator, end_token_ids(self.data_collator.processor, core))
        adapters = [reward.role for reward in self.rewards if isinstance(reward, AdapterReward)]
        self.roles_with_own_vision = [
            role for role in (*further_roles, *adapters) if self._on_any_process(self.role_model.has_own_vision(role))
        ]

    # -- for a subclass ------------------------------------------------------------------------------------------------

    @property
    def role_model(self) -> VLModelWithValueHead | None:
        """The model on which reward adapters hang; None where no role needs one."""
        raise NotImplementedError

    def _adapter_pass(self, r: Sampled, role: Role) -> Tensor:
        """What a reward adapter says of every answer, (R,)."""
        raise NotImplementedError

    # ------------------------------------------------------------------------------------------------------------------

    @contextmanager
    def phase(self, name: str, total: int) -> Iterator[tqdm]:
        """A progress bar that names the phase."""
        bar = tqdm(
            total=total,
            desc=f"update {self.state.global_step + 1}/{self.state.max_steps}: {name}",
            unit="micro batch",
            leave=False,
            disable=self.args.disable_tqdm or not self.is_world_process_zero(),
        )
        with bar:
            yield bar

    # -- rollout -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def rollout(self, micro_batches: Sequence[PPOBatch], seed: int, places: Sequence[list[int]]) -> list[Sampled]:
        """Encode the images of every micro batch once and sample answers.

        Args:
            micro_batches: of the PPO collator, those of this device.
            seed: with a prompt's place and an answer's number it decides the answer.
            places: for each micro batch the place of its prompts among all prompts that are sampled, on all devices.
        """
        self.model.eval()
        args = self.args
        self.unscored.begin(
            seed=seed, step=self.state.global_step, sampling=[args.temperature, args.top_p, args.response_length]
        )
        prompts = [self._prompts(batch, place) for batch, place in zip(micro_batches, places, strict=True)]
        return self.sample_answers(prompts, seed)

    def sample_answers(self, prompts: Sequence[Prompts], seed: int) -> list[Sampled]:
        """Answers to the micro batches of `rollout`, those that a failed run has left taken first."""
        args = self.args
        micro_batch = len(prompts[0].rows) * args.rollouts_per_prompt
        at_once = max(1, args.local_rollout_forward_batch_size // micro_batch)
        media = {count_media(media_of(row)) for p in prompts for row in p.rows}
        if self._on_any_process(len(media) > 1 or any(videos for _, videos in media)):
            at_once = 1  # some families lay out the images of a batch by its fullest row, or its videos by the longest
        sampled = []
        with self._generating_model() as core, self.phase("rollout", len(prompts)) as bar:
            for start in range(0, len(prompts), at_once):
                group = prompts[start : start + at_once]
                kept = [self.unscored.get(p.tokens, p.places) for p in group]
                answers = [found[0] for found in kept if found is not None]
                if self._on_any_process(None in kept):
                    images = [self._images_to_read(core, p) for p in group]
                    with self.accelerator.autocast():
                        answers = self.sampler.sample(core, group, images, seed)
                for p, of_prompts in zip(group, answers, strict=True):
                    self.unscored.put(p.tokens, p.places, of_prompts)
                sampled += [self._lay_out(p, of_prompts) for p, of_prompts in zip(group, answers, strict=True)]
                bar.update(len(group))
        return sampled

    def _prompts(self, batch: PPOBatch, places: list[int]) -> Prompts:
        """A micro batch of the collator, its images encoded."""
        images = batch["img_input_dict"]
        return Prompts(batch["rows"], batch["prompts"], images, self._encode(images), places)

    def _lay_out(self, prompts: Prompts, answers: Answers, logps: AnswerLogps | None = None) -> Sampled:
        return Sampled.of(prompts, answers, self.data_collator, self.sampler.end_ids, self.args.device, logps)

    def _encode(self, img_inputs: ImageInputs) -> Images:
        """Features (pixels while the vision side trains) for the policy and roles with a vision side of their own."""
        policy, roles = self.accelerator.unwrap_model(self.model), self.role_model
        images = {Role.POLICY: self._encode_with(policy, img_inputs)}
        for role in self.roles_with_own_vision:
            if role == Role.VALUE and roles.value_backbone is not None:
                images[role] = self._encode_with(roles.value_backbone, img_inputs)
            else:
                with adapter_active(roles.backbone, role.adapter):
                    images[role] = self._encode_with(policy, img_inputs)
        return images

    def _encode_with(self, model: nn.Module, img_inputs: ImageInputs) -> ImageInputs:
        """Image inputs without their entries per token, which are laid out with the answers."""
        inputs = self.image_inputs(model, {"img_input_dict": self._padded_images(img_inputs)})
        per_token = self.data_collator.processor.per_token_keys
        return pooled_features({k: v for k, v in inputs.items() if k not in per_token})

    def _padded_images(self, img_inputs: ImageInputs) -> ImageInputs:
        return to_device(self.data_collator.processor.pad_img_inputs(img_inputs), self.args.device)

    @contextmanager
    def _generating_model(self) -> Iterator[nn.Module]:
        """The adapter's model without the checkpoint's sampling settings, weights gathered unless told otherwise."""
        gather = self.args.ds3_gather_for_generation
        with (
            unwrap_model_for_generation(self.model_wrapped, self.accelerator, gather_deepspeed3_params=gather) as model,
            plain_generation_config(core := self.base_model(model)),
        ):
            yield core

    def _images_to_read(self, core: nn.Module, prompts: Prompts) -> ImageInputs:
        """The features that generation reads. Where the vision side trains, the tower runs here, once on every rank."""
        if not core.vision_trains():
            return prompts.images[Role.POLICY]
        images = self._padded_images(prompts.img_inputs)
        with self.accelerator.autocast():
            if self.args.world_size > 1 and not has_images(images):
                core.encode_images(to_device(self.dummy_images, self.args.device))
            features = pooled_features(core.encode_images(images))
        return {k: v for k, v in features.items() if k not in self.data_collator.processor.per_token_keys}

    # -- score ---------------------------------------------------------------------------------------------------------

    def score(self, sampled: Sequence[Sampled]) -> list[Scored]:
        """The weighted sum of all rewards, minus the penalty for a missing end, clipped.

        Raises:
            InputError: a reward is not finite; names the rows.
        """
        parts: list[dict[str, Tensor]] = [{} for _ in sampled]
        for reward in self.rewards:
            for r, part, values in zip(sampled, parts, self._values_of(reward, sampled), strict=True):
                part[reward.name] = values.to(self.args.device).float()
                if not isinstance(reward, FunctionReward):  # a function may return None: it has checked its values
                    self._check_finite(f"Reward {reward.name}", part[reward.name], r)
        return [
            Scored(**vars(r), parts=part, scores=self._total(r, part)) for r, part in zip(sampled, parts, strict=True)
        ]

    def _total(self, r: Sampled, parts: dict[str, Tensor]) -> Tensor:
        clip = self.args.reward_clip
        total = sum(reward.weight * parts[reward.name].nan_to_num(nan=0.0) for reward in self.rewards)
        total[torch.stack([*parts.values()]).isnan().all(0)] = math.nan  # no reward applies to the answer
        if not self.args.compares_answers:
            self._check_finite("Every reward function returned None, so that the score", total, r)
        total = losses.penalize_missing_eos(total, r.ended, self.args.missing_eos_penalty)
        if self.args.overlong_buffer is not None:
            lengths, longest = r.mask.sum(1).float(), self.args.response_length
            total = total + losses.overlong_penalty(
                lengths, longest, self.args.overlong_buffer, self.args.overlong_penalty
            )
        return total if clip is None else total.clamp(-clip, clip)

    @torch.no_grad()
    def _values_of(self, reward: Reward, sampled: Sequence[Sampled]) -> list[Tensor]:
        """One reward of every answer, (R,) per micro batch."""
        values = []
        with self.phase(f"reward {reward.name}", len(sampled)) as bar:
            if isinstance(reward, FunctionReward):
                return self._values_of_function(reward, sampled)
            for r in sampled:
                if isinstance(reward, AdapterReward):
                    value = self._adapter_pass(r, reward.role)
                else:
                    dummy_images = reward.dummy_images if self.args.world_size > 1 else None
                    with self.accelerator.autocast():
                        value = reward.score(r, self.data_collator.share_prefix, dummy_images)
                values.append(value)
                bar.update()
        return values

    def _values_of_function(self, reward: FunctionReward, sampled: Sequence[Sampled]) -> list[Tensor]:
        """`reward.score`. If it fails on any device all stop, with a checkpoint and the answers on disk: nothing is lost."""
        values, failure = [], None
        try:
            values = reward.score(sampled)
        except InputError as error:
            failure = error
        self._stop_if_any_failed(failure, f"Reward {reward.name}")
        return values

    def _stop_if_any_failed(self, failure: InputError | None, what: str) -> None:
        """End the run on all devices if something outside of it failed on any, with a checkpoint and the answers on disk."""
        if not self._on_any_process(failure is not None):
            return
        kept = ""
        if self.is_in_train:
            self.unscored.write()
            if (
                self.state.global_step
                and not (Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}").exists()
            ):
                self._save_checkpoint(self.model, None)
            kept = f" The answers are kept in {self.args.output_dir}: --resume_from_checkpoint True goes on with them."
        said = str(failure or f"{what} failed on another process").rstrip(".")
        raise InputError(f"{said}.{kept}") from failure

    @staticmethod
    def _check_finite(what: str, values: Tensor, r: Sampled, fix: str = "fix the reward or the row") -> None:
        bad = (~values.isfinite()).reshape(len(r.texts), -1).any(1).nonzero()[:, 0].tolist()
        if bad:
            raise InputError(f"{what} is not finite for {', '.join(r.where(i) for i in bad[:5])}: {fix}.")

    def _inputs(self, r: Sampled, role: Role) -> dict[str, Any]:
        """Arguments of a forward in a role: the packed row, and the images as the role's vision side sees them."""
        batch = r.batch
        images = {**r.images.get(role, r.images[Role.POLICY]), **batch["img_input_dict"]}
        core = self.base_model(self.model)
        return core.packed_inputs(batch["input_ids"], batch["segment_ids"], images, batch["packed"], batch["layout"])

    # -- samples -------------------------------------------------------------------------------------------------------

    def kl_to_reference(self, r: Scored) -> Tensor | None:
        """Hook: KL of each answer in nats, (R,), for the page; None where no pass has computed it."""
        return None

    def _write_samples(self, rollouts: Sequence[Scored]) -> None:
        step, tables = self.state.global_step, self.args.num_sample_generations
        every = tables and max(1, self.state.max_steps // tables)
        if not every or not self.is_world_process_zero() or step % every:
            return
        samples = []
        for r in rollouts:
            kl = self.kl_to_reference(r)
            kls = [None] * len(r.texts) if kl is None else kl.tolist()
            pictures = [shown_pictures(row) for row in r.rows]
            for b, text, score, of_answer in zip(r.prompt_of, r.texts, r.scores.tolist(), kls, strict=True):
                samples.append(Sample(pictures[b], r.rows[b]["prompt"], text, score, of_answer))
        write_samples(samples[:16], Path(self.args.output_dir), step + 1, self.callback_handler.callbacks)

    # -- models --------------------------------------------------------------------------------------------------------

    def _prepare_frozen(self, model: nn.Module) -> nn.Module:
        model.requires_grad_(False)
        model.eval()
        if self.is_deepspeed_enabled:
            return prepare_deepspeed(model, self.accelerator)
        return self.accelerator.prepare_model(model, evaluation_mode=True)
