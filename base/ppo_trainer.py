"""Proximal policy optimisation (1707.06347) of vision-language models against rewards, on packed rows.

One update, and the method that a paper changes:
    1. rollout       sample rollouts_per_prompt answers to each prompt                         `rollout`
    2. score         reward adapters, reward models, functions, their weighted sum             `score`
    3. passes        log-probs, reference log-probs and values of every answer token           `evaluate_tokens`
    4. rewards       -kl_coef * KL at every token, the score at the last one                   `token_rewards`
    5. advantages    GAE, whitened over the update                                             `advantages`
    6. optimise      num_ppo_epochs passes of clipped policy and value losses                  `policy_and_value_loss`
    7. metrics       TRL's names

Batch sizes count rollouts (answers), not prompts:
    micro batch   per_device_train_batch_size                            one forward and backward on one device
    mini batch    micro * gradient_accumulation_steps * devices          one optimizer step
    update        mini * num_mini_batches                                one rollout phase
A micro batch is per_device_train_batch_size / rollouts_per_prompt prompts with all their answers. It is packed once and its images are encoded
once; both serve every pass of the update.

Departures from TRL's former PPO (1.10), besides those of losses.py:
    1. Policy and value losses are means over the tokens of a mini batch, over accumulation steps and devices; there over each micro batch.
    2. Advantages and rewards are whitened over the update of all devices; there per device.
    3. Micro batches, not single rollouts, are shuffled between mini batches, one of each block of num_mini_batches per mini batch: every device
       then gives each mini batch the same number of tokens' rows, and the number of devices does not change a result.
    4. A sampled token depends on --seed, the update, the prompt's place in it and the answer's number only, not on global random state.
    5. The images of a frozen vision side are encoded once per update; with --freeze_vision_tower full fine-tuning freezes the projector too.
    6. Image placeholders are never sampled. With --top_p below 1 sampling leaves out the tail, while log-probs are those of the whole vocabulary.
"""

import functools
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import GenerationConfig, LogitsProcessorList, TrainerCallback, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_callback import ExportableState
from trl.models.utils import prepare_deepspeed, unwrap_model_for_generation

import losses
from args import PPOConfig
from base.adapters import adapter_active
from base.checkpoints import _ignore_sigterm
from base.features import slim_features, tile_images
from base.packing import last_token_positions, scatter_to_responses
from base.reward import score_rows
from base.rewards import Reward, call_reward_fn
from base.rollout import BatchSizes, PromptBatches, Rollouts, SeededSampling, cut_after_end, mini_batches
from base.samples import write_samples
from base.trainer import VLHeadTrainer, disable_dropout
from base.value import POLICY, REFERENCE, VALUE_ADAPTER, VLModelWithValueHead
from common.errors import InputError
from common.seeds import stable_seed
from common.tensors import to_device

logger = logging.getLogger(__name__)

# ---------------------------------------------------------------------------------------------------------------------
# State that a checkpoint carries besides weights and optimizer
# ---------------------------------------------------------------------------------------------------------------------


class PPOState(TrainerCallback, ExportableState):
    """KL coefficient, first entropy and length, and metrics not yet logged: saved in trainer_state.json with every checkpoint."""

    def __init__(self, kl_coef: float = 0.0) -> None:
        self.kl_coef = kl_coef
        self.first: dict[str, float] = {}
        self.warned: list[str] = []
        self.pending: dict[str, list[float]] = {}  # name -> sum, count on this device

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": dict(vars(self))}

    def restore(self, saved: dict[str, Any]) -> None:
        vars(self).update(saved["attributes"])


# ---------------------------------------------------------------------------------------------------------------------
# Trainer
# ---------------------------------------------------------------------------------------------------------------------


class VLPPOTrainer(VLHeadTrainer):
    """PPO. One step of the trainer (of --logging_steps, --save_steps, the learning-rate schedule, ...) is one update."""

    def __init__(
        self,
        model: VLModelWithValueHead,
        args: PPOConfig,
        *rest: Any,
        rewards: Sequence[Reward],
        ref_model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            model: policy and value function; the reward adapters of `rewards` hang on it.
            rewards: at least one.
            ref_model: frozen copy of the policy; None with LoRA, where the reference is the base.
        """
        self.sizes = BatchSizes.of(args)
        if ref_model is None and not hasattr(model.backbone, "peft_config"):
            raise ValueError("Full fine-tuning needs ref_model, a frozen copy of the initial policy.")
        for m in (model, ref_model, *(r.model for r in rewards)):
            if m is not None:
                disable_dropout(m)
        super().__init__(model, args, *rest, **kwargs)
        self.model_accepts_loss_kwargs = True
        self.rewards = list(rewards)
        self.ref_model = self._prepare_frozen(ref_model)
        for reward in self.rewards:
            if reward.model is not None:
                reward.model = self.accelerator.unwrap_model(self._prepare_frozen(reward.model))
        self.ppo_state = PPOState(args.kl_coef)
        self.add_callback(self.ppo_state)
        self.own_vision = {r.hat for r in self.rewards if r.hat is not None and model.own_vision(r.hat)}
        if self._on_any_process(model.value_has_own_vision()):
            self.own_vision.add("value")

    def _prepare_frozen(self, model: nn.Module | None) -> nn.Module | None:
        if model is None:
            return None
        model.requires_grad_(False)
        model.eval()
        if self.is_deepspeed_enabled:
            return prepare_deepspeed(model, self.accelerator)
        return self.accelerator.prepare_model(model, evaluation_mode=True)

    def base_model(self, model: nn.Module) -> nn.Module:
        """The adapter's model inside everything; the value function's backbone is one itself."""
        model = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        return model.core if isinstance(model, VLModelWithValueHead) else model

    # -- 1. rollout ------------------------------------------------------------------------------------------------------

    def rollout(
        self, micro_batches: Sequence[dict[str, Any]], seed: int, places: Sequence[list[int]]
    ) -> list[Rollouts]:
        """Encode the images of every micro batch once and sample answers.

        Args:
            micro_batches: of the collator.
            seed: of this rollout phase.
            places: for each micro batch the place of its prompts among all prompts of the phase, on all devices.
        """
        self.model.eval()
        device, K = self.args.device, self.args.rollouts_per_prompt
        rollouts = []
        for batch, place in zip(micro_batches, places, strict=True):
            images = to_device(self.data_collator.processor.pad_img_inputs(batch["img_input_dict"]), device)
            rollouts.append(
                Rollouts(batch["rows"], batch["prompts"], batch["img_input_dict"], {"": self._encode(images)}, place)
            )
        per_call = max(1, self.args.local_rollout_forward_batch_size // (self.sizes.micro_prompts * K))
        if self._on_any_process(len({len(row["images"]) for r in rollouts for row in r.rows}) > 1):
            per_call = 1  # some families lay out the images of a batch by its fullest row
        with self._generation_model() as core, self.phase("rollout", len(rollouts)) as bar:
            for start in range(0, len(rollouts), per_call):
                group = rollouts[start : start + per_call]
                answers = self._generate(core, group, seed)
                for r, of_prompts in zip(group, answers, strict=True):
                    self._pack(r, of_prompts)
                bar.update(len(group))
        return rollouts

    def _encode(self, images: dict[str, Any], model: nn.Module | None = None) -> dict[str, Any]:
        """Features while the vision side is frozen, else pixels. Entries per token are left to `pack`."""
        inputs = self.image_inputs(model if model is not None else self.model, {"img_input_dict": images})
        per_token = self.data_collator.processor.per_token_keys
        return slim_features({k: v for k, v in inputs.items() if k not in per_token})

    @contextmanager
    def _generation_model(self) -> Iterator[nn.Module]:
        """The adapter's model, its weights gathered unless told otherwise, without the checkpoint's own sampling settings."""
        gather = self.args.ds3_gather_for_generation
        with unwrap_model_for_generation(
            self.model_wrapped, self.accelerator, gather_deepspeed3_params=gather
        ) as model:
            core = model.core
            owners = [m for m in core.modules() if isinstance(getattr(m, "generation_config", None), GenerationConfig)]
            before = [m.generation_config for m in owners]
            try:
                for m in owners:
                    m.generation_config = GenerationConfig()
                yield core
            finally:
                for m, config in zip(owners, before, strict=True):
                    m.generation_config = config

    @property
    def end_ids(self) -> list[int]:
        """Tokens that end an answer: the template's end of turn, and the checkpoint's own end tokens."""
        processor, core = self.data_collator.processor, self.base_model(self.model)
        ids = {processor.encode_response("")[-1]}
        own = core.generation_config.eos_token_id if core.generation_config is not None else None
        return sorted(ids | set(own if isinstance(own, list) else [own] if own is not None else []))

    @torch.no_grad()
    def _generate(self, core: nn.Module, group: Sequence[Rollouts], seed: int) -> list[list[list[list[int]]]]:
        """Answers of each micro batch: [micro batch][prompt][answer] -> token ids, up to and with the end token."""
        args, K, collator = self.args, self.args.rollouts_per_prompt, self.data_collator
        prompts = [p for r in group for _ in range(K) for p in r.prompts]  # every micro batch K times
        tokens = [collator.per_token(r.img_inputs) for r in group for _ in range(K)]
        uniforms = torch.cat(
            [
                torch.rand(K, args.response_length, generator=torch.Generator().manual_seed(stable_seed(seed, place)))
                for r in group
                for place in r.places
            ]
        )  # (prompts, K) rows of uniforms, prompt by prompt
        order, first = [], 0
        for r in group:
            order += [first + b * K + k for k in range(K) for b in range(len(r.prompts))]
            first += len(r.prompts) * K
        inputs = collator.pad_for_generation(prompts, {k: [v for t in tokens for v in t[k]] for k in tokens[0]})
        images = [self._images_to_read(core, r) for r in group]
        inputs = to_device(inputs, args.device) | tile_images([i for i in images for _ in range(K)])
        sampling = SeededSampling(uniforms[order].to(args.device), args.temperature, args.top_p)
        end_ids = self._end_ids
        with self.accelerator.autocast():
            sequences = core.generate(
                **inputs,
                do_sample=False,  # the processor samples
                max_new_tokens=args.response_length,
                eos_token_id=end_ids,
                pad_token_id=collator.processor.tokenizer.pad_token_id,
                use_cache=True,
                logits_processor=LogitsProcessorList([sampling]),
                **core.rollout_cache,
                # Weights that are shared out need all ranks at every token, until the longest answer of all ranks has ended.
                synced_gpus=is_deepspeed_zero3_enabled() and args.world_size > 1 and not args.ds3_gather_for_generation,
            )
        length = inputs["input_ids"].shape[1]
        if sequences.shape[1] > length and torch.equal(sequences[:, :length], inputs["input_ids"]):
            sequences = sequences[:, length:]  # given embeddings, generate returns new tokens only
        generated = iter(cut_after_end(row, end_ids) for row in sequences.tolist())
        answers = []
        for r in group:
            rounds = [[next(generated) for _ in r.prompts] for _ in range(K)]
            answers.append([[rounds[k][b] for k in range(K)] for b in range(len(r.prompts))])
        return answers

    def _images_to_read(self, core: nn.Module, r: Rollouts) -> dict[str, Any]:
        """What generation reads of a micro batch's images: features. Where the tower trains it runs here, on every rank as often."""
        if not core.vision_trains():
            return r.images[""]
        images = to_device(self.data_collator.processor.pad_img_inputs(r.img_inputs), self.args.device)
        with self.accelerator.autocast():
            if self.args.world_size > 1 and images.get("pixel_values") is None:
                core.encode_images(self._prepare_inputs(self.dummy_images))
            features = slim_features(core.encode_images(images))
        return {k: v for k, v in features.items() if k not in self.data_collator.processor.per_token_keys}

    def _pack(self, rollouts: Rollouts, answers: list[list[list[int]]]) -> None:
        """Lay out prompts and answers once for all passes."""
        K, B = self.args.rollouts_per_prompt, len(rollouts.prompts)
        per_token = self.data_collator.per_token(rollouts.img_inputs)
        rollouts.batch = to_device(self.data_collator.pack(rollouts.prompts, answers, per_token), self.args.device)
        if self.data_collator.share_prefix:
            order = [(b, k) for b in range(B) for k in range(K)]
        else:
            order = [(b, k) for k in range(K) for b in range(B)]
            rollouts.images = {hat: tile_images([images] * K) for hat, images in rollouts.images.items()}
        rollouts.prompt_of = [b for b, _ in order]
        tokenizer = self.data_collator.processor.tokenizer
        rollouts.texts = [tokenizer.decode(answers[b][k], skip_special_tokens=True).strip() for b, k in order]
        rollouts.ended = torch.tensor([answers[b][k][-1] in self._end_ids for b, k in order], device=self.args.device)

    # -- 2. score --------------------------------------------------------------------------------------------------------

    def score(self, rollouts: Sequence[Rollouts]) -> None:
        """Fill `parts` and `scores`: the weighted sum of all rewards, minus the penalty for a missing end, clipped.

        Raises:
            InputError: a reward is not finite; names the rows.
        """
        args = self.args
        for reward in self.rewards:
            with self.phase(f"reward {reward.name}", len(rollouts)) as bar:
                if reward.function is not None:
                    parts = call_reward_fn(reward.name, reward.function, rollouts)
                else:
                    parts = []
                    for r in rollouts:
                        parts.append(self._score_by_model(reward, r))
                        bar.update()
            for r, part in zip(rollouts, parts, strict=True):
                r.parts[reward.name] = part.to(args.device).float()
                self._check_finite(f"Reward {reward.name}", r.parts[reward.name], r)
        for r in rollouts:
            total = sum(reward.weight * r.parts[reward.name] for reward in self.rewards)
            total = losses.penalize_missing_eos(total, r.ended, args.missing_eos_penalty)
            r.scores = total if args.reward_clip is None else total.clamp(-args.reward_clip, args.reward_clip)

    @torch.no_grad()
    def _score_by_model(self, reward: Reward, r: Rollouts) -> Tensor:
        if reward.hat is not None:
            batch = r.batch
            inputs = self._inputs(r, reward.hat)
            return self.model_wrapped(
                **inputs, completion_index=last_token_positions(batch["segment_ids"]), hat=reward.hat
            )
        K = self.args.rollouts_per_prompt
        texts: list[list[str]] = [[] for _ in r.rows]
        for p, text in zip(r.prompt_of, r.texts, strict=True):
            texts[p].append(text)
        rows = [row | {"responses": of_row} for row, of_row in zip(r.rows, texts, strict=True)]
        with self.accelerator.autocast():
            scores = score_rows(
                reward.model,
                reward.processor,
                rows,
                len(rows),
                self.data_collator.share_prefix,
                dummy_images=reward.dummy_images if self.args.world_size > 1 else None,
            )
        taken = [0] * len(rows)
        flat = []
        for p in r.prompt_of:
            flat.append(scores[p][taken[p]])
            taken[p] += 1
        assert taken == [K] * len(rows)
        return torch.tensor(flat)

    @staticmethod
    def _check_finite(what: str, values: Tensor, r: Rollouts) -> None:
        bad = (~values.isfinite()).reshape(len(r.texts), -1).any(1).nonzero()[:, 0].tolist()
        if bad:
            raise InputError(
                f"{what} is not finite for {', '.join(r.where(i) for i in bad[:5])}: mend the reward or the row."
            )

    # -- 3. log-probs, reference log-probs, values ------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate_tokens(self, rollouts: Sequence[Rollouts]) -> None:
        """Fill logps, values, entropy (policy) and ref_logps (reference), (R, T) each."""
        with self.phase("log-probs and values", len(rollouts)) as bar:
            for r in rollouts:
                r.logps, r.values, r.entropy = self.policy_pass(self.model_wrapped, r)
                r.ref_logps = self._reference_pass(r)
                bar.update()

    def policy_pass(self, model: nn.Module, r: Rollouts) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probs at the sampling temperature, values and entropies of all answer tokens, (R, T) each."""
        mask = r.mask
        out = model(
            **self._inputs(r, POLICY),
            **self._tokens(r),
            hat=POLICY,
            with_entropy=True,
            value_inputs=self._inputs(r, "value") if "value" in self.own_vision else None,
        )
        return tuple(scatter_to_responses(x, mask) for x in (out.logps, out.state_values, out.entropy))

    def _reference_pass(self, r: Rollouts) -> Tensor:
        if self.ref_model is None:
            logps = self.model_wrapped(**self._inputs(r, REFERENCE), **self._tokens(r), hat=REFERENCE)
        else:
            logps = self.ref_model(**self._inputs(r, REFERENCE), **self._tokens(r)).logps
        return scatter_to_responses(logps, r.mask)

    def _tokens(self, r: Rollouts) -> dict[str, Any]:
        return {
            "completion_index": r.batch["completion_index"][r.mask],
            "completion_ids": r.batch["completion_ids"][r.mask],
            "temperature": self.args.temperature,
        }

    def _inputs(self, r: Rollouts, hat: str) -> dict[str, Any]:
        """Arguments of a forward under a hat: the packed row and the features that belong to the hat's vision side."""
        core = self.base_model(self.model)
        key = hat if hat in self.own_vision else ""
        if key not in r.images:
            r.images[key] = self._own_features(r, hat)
        batch = r.batch
        images = {**r.images[key], **batch["img_input_dict"]}
        return core.packed_inputs(batch["input_ids"], batch["segment_ids"], images, batch["packed"])

    def _own_features(self, r: Rollouts, hat: str) -> dict[str, Any]:
        """Features of a hat with vision weights of its own, once per update."""
        model = self.accelerator.unwrap_model(self.model)
        images = to_device(self.data_collator.processor.pad_img_inputs(r.img_inputs), self.args.device)
        if hat == "value" and model.value_backbone is not None:
            features = self._encode(images, model.value_backbone)
        else:
            with adapter_active(model.backbone, VALUE_ADAPTER if hat == "value" else hat):
                features = self._encode(images)
        per_token = self.data_collator.processor.per_token_keys
        features = {k: v for k, v in features.items() if k not in per_token}
        copies = 1 if self.data_collator.share_prefix else self.args.rollouts_per_prompt
        return tile_images([features] * copies)

    # -- 4. token rewards, 5. advantages -----------------------------------------------------------------------------------

    def token_rewards(self, scores: Tensor, logps: Tensor, ref_logps: Tensor, mask: Tensor) -> Tensor:
        """-kl_coef * KL at every token, the score at the last one: (R,), (R, T) each -> (R, T)."""
        kl = losses.kl_per_token(logps, ref_logps, self.args.kl_estimator)
        rewards = losses.token_rewards(scores, kl, mask, self.ppo_state.kl_coef)
        return self._whiten(rewards, mask, shift_mean=False) if self.args.whiten_rewards else rewards

    def advantages(self, rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """GAE: advantages, whitened over the update of all devices, and returns, (R, T) each."""
        advantages, returns = losses.gae(rewards, values, mask, self.args.gamma, self.args.lam)
        return self._whiten(advantages, mask), returns

    def _whiten(self, values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
        everywhere, everywhere_mask = self.accelerator.gather(values), self.accelerator.gather(mask)
        whitened = losses.masked_whiten(everywhere, everywhere_mask, shift_mean)
        start = self.accelerator.process_index * len(values)
        return whitened[start : start + len(values)]

    def _rewards_and_advantages(self, rollouts: Sequence[Rollouts]) -> None:
        T = self.args.response_length

        def wide(tensors: Sequence[Tensor]) -> Tensor:
            return torch.cat([nn.functional.pad(t, (0, T - t.shape[1])) for t in tensors])

        mask = wide([r.mask for r in rollouts])  # (all R, response_length), so that devices can be joined
        scores = torch.cat([r.scores for r in rollouts])
        logps, ref_logps = wide([r.logps for r in rollouts]), wide([r.ref_logps for r in rollouts])
        rewards = self.token_rewards(scores, logps, ref_logps, mask)
        advantages, returns = self.advantages(rewards, wide([r.values for r in rollouts]), mask)
        sizes = [len(r.texts) for r in rollouts]
        for r, a, g in zip(rollouts, advantages.split(sizes), returns.split(sizes), strict=True):
            r.advantages, r.returns = a[:, : r.mask.shape[1]], g[:, : r.mask.shape[1]]
            self._check_finite("The advantage", r.advantages, r)

    # -- 6. optimise -------------------------------------------------------------------------------------------------------

    def policy_and_value_loss(
        self, logps: Tensor, values: Tensor, r: Rollouts
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Clipped losses of every token, (R, T) each, and per-token statistics."""
        args = self.args
        policy_loss, policy_clipped = losses.clipped_policy_loss(logps, r.logps, r.advantages, args.cliprange)
        value_loss, value_clipped = losses.clipped_value_loss(values, r.values, r.returns, args.cliprange_value)
        return policy_loss, value_loss, {"policy_clipped": policy_clipped, "value_clipped": value_clipped}

    def optimise(self, rollouts: Sequence[Rollouts]) -> dict[str, Tensor | float]:
        """num_ppo_epochs passes over the rollouts; returns sums over tokens of all steps for the metrics."""
        args, accelerator, model = self.args, self.accelerator, self.model_wrapped
        model.train()
        stats: dict[str, list[Tensor]] = {}
        total = args.num_ppo_epochs * self.sizes.micro_batches
        with self.phase("optimise", total) as bar:
            for ppo_epoch in range(args.num_ppo_epochs):
                parts = mini_batches(self.sizes, args.process_index, args.seed, self.state.global_step, ppo_epoch)
                for m, part in enumerate(parts):
                    tokens = accelerator.reduce(sum(rollouts[i].mask.sum() for i in part), reduction="sum")
                    for n, i in enumerate(part):
                        last = n == len(part) - 1
                        accelerator.gradient_state._set_sync_gradients(last)
                        with self._sync_context(model, last):
                            self._micro_step(model, rollouts[i], tokens, stats, first=ppo_epoch == 0 and m == 0)
                        bar.update()
                    grad_norm = self._clip_grad_norm(model) if args.max_grad_norm > 0 else None
                    self._grad_norm = self._get_grad_norm(model, grad_norm=grad_norm)
                    self.optimizer.step()
                    model.zero_grad()
        return {name: torch.stack(values).sum(0) for name, values in stats.items()}

    def _sync_context(self, model: nn.Module, last: bool) -> Any:
        return nullcontext() if last or self.is_deepspeed_enabled else self.accelerator.no_sync(model)

    def _micro_step(
        self, model: nn.Module, r: Rollouts, tokens: Tensor, stats: dict[str, list[Tensor]], first: bool
    ) -> None:
        args, mask = self.args, r.mask
        with self.compute_loss_context_manager():
            logps, values, entropy = self.policy_pass(model, r)
            policy_loss, value_loss, flags = self.policy_and_value_loss(logps, values, r)
        # Mean over the tokens of the whole mini batch; DDP and DeepSpeed divide by the number of devices.
        scale = self.accelerator.num_processes / tokens
        policy_sum, value_sum = (torch.where(mask, x, 0).sum() for x in (policy_loss, value_loss))
        kwargs = {"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}
        self.accelerator.backward(scale * (policy_sum + args.vf_coef * value_sum), **kwargs)
        with torch.no_grad():
            ratio = torch.exp(logps - r.logps)
            sums = {
                "loss/policy_avg": policy_sum,
                "loss/value_avg": value_sum,
                "policy/approxkl_avg": losses.approx_kl_per_token(logps, r.logps)[mask].sum(),
                "policy/clipfrac_avg": flags["policy_clipped"][mask].sum(),
                "policy/entropy_avg": entropy[mask].sum(),
                "val/clipfrac_avg": flags["value_clipped"][mask].sum(),
                "val/ratio": ratio[mask].sum(),
                "val/ratio_var": ((ratio[mask] - 1) ** 2).sum(),
            }
            if (
                first
            ):  # before the first optimizer step of the update policy and sampler are the same: 0 and 0, up to rounding
                sums["first/approxkl"] = losses.approx_kl_per_token(logps, r.logps)[mask].sum()
                sums["first/ratio_deviation"] = (ratio[mask] - 1).abs().sum()
            for name, value in sums.items():
                stats.setdefault(name, []).append(torch.stack([value.detach().float(), mask.sum().float()]))

    # -- 7. metrics --------------------------------------------------------------------------------------------------------

    def log_metrics(self, rollouts: Sequence[Rollouts], stats: dict[str, Tensor]) -> None:
        """Store TRL's metrics, warn of a collapsed policy, and move the KL coefficient."""
        state = self.ppo_state
        kl = torch.cat([torch.where(r.mask, r.logps - r.ref_logps, 0).sum(1) for r in rollouts])  # (all R,)
        penalty = torch.cat(
            [
                torch.where(r.mask, losses.kl_per_token(r.logps, r.ref_logps, self.args.kl_estimator), 0).sum(1)
                for r in rollouts
            ]
        )
        scores = torch.cat([r.scores for r in rollouts])
        lengths = torch.cat([r.mask.sum(1) for r in rollouts]).float()
        entropy = torch.cat([r.entropy[r.mask] for r in rollouts])
        metrics = {
            "objective/kl": kl,
            "objective/entropy": torch.cat([-torch.where(r.mask, r.logps, 0).sum(1) for r in rollouts]),
            "objective/non_score_reward": -state.kl_coef * penalty,
            "objective/rlhf_reward": scores - state.kl_coef * penalty,
            "objective/scores": scores,
            "objective/kl_coef": torch.full((1,), state.kl_coef),
            "val/response_length": lengths,
            "val/ended": torch.cat([r.ended for r in rollouts]).float(),
        }
        if len(self.rewards) > 1:
            metrics |= {f"reward/{w.name}": torch.cat([r.parts[w.name] for r in rollouts]) for w in self.rewards}
        self.model.train()
        self.store_metrics(metrics)
        for name, sums in stats.items():
            self._metrics["train"][name].append(sums)
        loss = stats["loss/policy_avg"] + self.args.vf_coef * stats["loss/value_avg"]
        loss[1] = stats["loss/policy_avg"][1]
        self._metrics["train"]["loss"].append(loss)
        self._tr_loss += loss[0] / loss[1]
        # What is compared with a limit must be the same number on every device.
        means = torch.stack([kl.sum(), entropy.sum(), lengths.sum(), torch.tensor(float(len(kl)), device=kl.device),
                             torch.tensor(float(len(entropy)), device=kl.device)])  # fmt: skip
        kl_sum, entropy_sum, length_sum, rollout_count, token_count = self.accelerator.reduce(means, "sum").tolist()
        self._warn_of_collapse({"entropy": entropy_sum / token_count, "length": length_sum / rollout_count})
        if self.args.target_kl is not None:
            state.kl_coef = losses.adaptive_kl_coef(
                state.kl_coef, kl_sum / rollout_count, self.args.target_kl, self.args.kl_horizon, int(rollout_count)
            )

    def _warn_of_collapse(self, now: dict[str, float]) -> None:
        """Entropy below 5 %, or answers below 20 %, of the first update's."""
        state = self.ppo_state
        for name, limit in (("entropy", 0.05), ("length", 0.2)):
            first = state.first.setdefault(name, now[name])
            if now[name] < limit * first and name not in state.warned:
                state.warned.append(name)
                logger.warning(
                    "Update %d: the policy has collapsed, mean %s %.3g is below %.0f %% of the first update's %.3g. "
                    "Raise --kl_coef or lower --learning_rate.",
                    self.state.global_step + 1, name, now[name], 100 * limit, first,
                )  # fmt: skip

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs["episode"] = self.state.global_step * self.sizes.update_rollouts
        super().log(logs, start_time)

    # -- the loop ----------------------------------------------------------------------------------------------------------

    def _run_epoch(self, model: nn.Module, epoch: int, train_dataloader: DataLoader, trial: Any = None,
                   ignore_keys_for_eval: Any = None, start_time: float | None = None,
                   resume_from_checkpoint: str | None = None, epochs_trained: int = 0, **_: Any) -> None:  # fmt: skip
        """One pass over the prompts; called by Trainer.train, which has prepared model, optimizer and state."""
        if self.state.global_step >= self.state.max_steps:  # resumed from the checkpoint of the last update
            self.control.should_training_stop = True
            return
        args, sizes, order = self.args, self.sizes, train_dataloader.batch_sampler
        order.epoch, order.first_update = epoch, self.state.global_step - epoch * order.updates
        if resume_from_checkpoint is not None and epoch == epochs_trained:
            self._load_rng_state(resume_from_checkpoint)
        self._end_ids = self.end_ids
        micro_batches = iter(train_dataloader)
        for update in range(order.first_update, order.updates):
            self.control = self.callback_handler.on_step_begin(args, self.state, self.control)
            seed = stable_seed(args.seed, "rollout", self.state.global_step)
            local = sizes.micro_prompts * sizes.micro_batches
            starts = range(args.process_index * local, (args.process_index + 1) * local, sizes.micro_prompts)
            places = [[*range(s, s + sizes.micro_prompts)] for s in starts]

            # 1. rollout
            rollouts = self.rollout([next(micro_batches) for _ in starts], seed, places)
            # 2. score
            self.score(rollouts)
            # 3. log-probs, reference log-probs, values
            self.evaluate_tokens(rollouts)
            # 4. token rewards, 5. advantages
            self._rewards_and_advantages(rollouts)
            # 6. optimise
            stats = self.optimise(rollouts)
            # 7. metrics
            self.log_metrics(rollouts, stats)

            learning_rate = self._get_learning_rate()
            if not self.accelerator.optimizer_step_was_skipped:
                self.lr_scheduler.step()
            self.state.global_step += 1
            self.state.epoch = epoch + (update + 1) / order.updates
            self._write_samples(rollouts)
            del rollouts
            self.control = self.callback_handler.on_step_end(args, self.state, self.control)
            self._maybe_log_save_evaluate(
                self._tr_loss,
                self._grad_norm,
                model,
                trial,
                epoch,
                ignore_keys_for_eval,
                start_time,
                learning_rate=learning_rate,
            )
            if self.control.should_epoch_stop or self.control.should_training_stop:
                break
        self.control = self.callback_handler.on_epoch_end(args, self.state, self.control)
        self._maybe_log_save_evaluate(
            self._tr_loss, self._grad_norm, model, trial, epoch, ignore_keys_for_eval, start_time
        )

    @contextmanager
    def phase(self, name: str, total: int) -> Iterator[Any]:
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

    def _write_samples(self, rollouts: Sequence[Rollouts]) -> None:
        every = self.args.num_sample_generations and max(1, self.state.max_steps // self.args.num_sample_generations)
        if not every or not self.is_world_process_zero() or (self.state.global_step - 1) % every:
            return
        samples = [
            {
                "images": r.rows[p]["images"],
                "prompt": r.rows[p]["prompt"],
                "response": r.texts[i],
                "reward": r.scores[i].item(),
                "kl": torch.where(r.mask[i], r.logps[i] - r.ref_logps[i], 0).sum().item(),
            }
            for r in rollouts
            for i, p in enumerate(r.prompt_of)
        ][:16]
        write_samples(samples, Path(self.args.output_dir), self.state.global_step, self.callback_handler.callbacks)

    # -- what Trainer asks for ------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        order = PromptBatches(len(self.train_dataset), self.sizes, self.args.process_index, self.args.seed)
        return DataLoader(
            self.train_dataset,
            batch_sampler=order,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            worker_init_fn=functools.partial(_ignore_sigterm, None),
        )

    def set_initial_training_values(self, args: TrainingArguments, dataloader: DataLoader) -> tuple[int, ...]:
        """Count in updates: (epochs, updates per epoch, prompts, rollouts, rollouts per update, updates per epoch, updates)."""
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
        for name, sums in self.ppo_state.pending.items():
            self._metrics["train"][name].append(torch.tensor(sums, device=self.args.device))
        return result

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        # Sums over all devices: only one device's state is written.
        pending = {
            name: self.accelerator.reduce(torch.stack(sums).sum(0), reduction="sum") / self.accelerator.num_processes
            for name, sums in self._metrics["train"].items()
        }
        self.ppo_state.pending = {name: sums.tolist() for name, sums in pending.items()}
        super()._save_checkpoint(*args, **kwargs)

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Dataset | None = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Sample one answer set per evaluation prompt, always with the same random numbers; mean score, KL, length.

        Every device takes every num_processes-th micro batch.
        """
        data = eval_dataset if eval_dataset is not None else self.eval_dataset
        size, world, rank = self.sizes.micro_prompts, self.accelerator.num_processes, self.accelerator.process_index
        self._end_ids = self.end_ids
        starts = list(range(0, len(data), size))
        starts += starts[: -len(starts) % world]  # every device makes the same number of passes
        sums = torch.zeros(4, device=self.args.device)
        for n in range(rank, len(starts), world):
            places = [*range(starts[n], min(starts[n] + size, len(data)))]
            batch = self.data_collator([data[i] for i in places])
            rollouts = self.rollout([batch], stable_seed(self.args.seed, "eval"), [places])
            self.score(rollouts)
            self.evaluate_tokens(rollouts)
            r = rollouts[0]
            if n < math.ceil(len(data) / size):  # not one of the repeated ones
                kl = torch.where(r.mask, r.logps - r.ref_logps, 0).sum()
                sums += torch.stack([r.scores.sum(), kl, r.mask.sum().float(), kl.new_tensor(len(r.texts))])
        scores, kl, length, count = self.accelerator.reduce(sums, reduction="sum").tolist()
        metrics = {
            f"{metric_key_prefix}_objective/scores": scores / count,
            f"{metric_key_prefix}_objective/kl": kl / count,
            f"{metric_key_prefix}_val/response_length": length / count,
        }
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics
