"""Proximal policy optimisation (1707.06347) of vision-language models against rewards, on packed rows.

One update, and the method that a paper changes:
    1. rollout       sample rollouts_per_prompt answers to each prompt                         `rollout`
    2. score         reward adapters, reward models, functions, their weighted sum             `score`
    3. passes        log-probs, reference log-probs and values of every answer token           `evaluate_tokens`
    4. rewards       -kl_coef * KL at every token, the score at the last one                   `token_rewards`
    5. advantages    GAE, whitened over the update; or against the other answers to the prompt `advantages`
    6. optimise      num_ppo_epochs passes of clipped policy and value losses                  `policy_and_value_loss`
    7. metrics       TRL's names

Batch sizes count rollouts (answers), not prompts:
    micro batch   per_device_train_batch_size                            one forward and backward on one device
    mini batch    micro * gradient_accumulation_steps * devices          one optimizer step
    update        mini * num_mini_batches                                one rollout phase
A micro batch is per_device_train_batch_size / rollouts_per_prompt prompts with all their answers. It is packed once and
its images are encoded once; both serve every pass of the update.

Departures from TRL's former PPO (1.10), besides those of losses/ppo.py:
    1. Policy and value losses are means over the tokens of a mini batch, over accumulation steps and devices; there
       over each micro batch.
    2. Advantages and rewards are whitened over the update of all devices; there per device.
    3. Micro batches, not single rollouts, are shuffled between mini batches, one of each block of num_mini_batches per
       mini batch: every device then gives each mini batch the same number of tokens' rows, and the number of devices
       does not change a result.
    4. A sampled token depends on --seed, the update, the prompt's place in it and the answer's number only, not on
       global random state.
    5. The images of a frozen vision side are encoded once per update; with --freeze_vision_tower full fine-tuning
       freezes the projector too.
    6. With --rollout_url an inference server samples (base/server_rollouts.py); its answers are weighed as TRL weighs those of vLLM.
    7. Image placeholders are never sampled. With --top_p below 1 sampling leaves out the tail, while log-probs are
       those of the whole vocabulary.
"""

import dataclasses
import math
import uuid
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset
from torch import Tensor, nn

import losses
from args import PPOConfig
from base.adapters import Role
from base.batch import PPOBatch
from base.dynamic_sampling import choose, groups_of, micro_batch_of
from base.on_policy import OnPolicyTrainer
from base.packing import scatter_to_responses
from base.ppo_batches import PromptBatches, mini_batches
from base.ppo_metrics import (
    group_metrics,
    reward_metrics,
    rollout_metrics,
    sequence_kl,
    token_metrics,
    warn_of_another_policy,
    warn_of_collapse,
)
from base.rewards import Reward
from base.rollout import Advantages, AnswerLogps, Answers, Evaluated, Prompts, Sampled, Scored
from base.server_rollouts import ServerRollouts, adapter_parameters, gathered, refuse_unserved
from base.trainer import disable_dropout
from base.update_loop import UpdateLoop
from base.value import VLModelWithValueHead
from common.errors import InputError
from common.seeds import stable_seed


class VLPPOTrainer(OnPolicyTrainer, UpdateLoop):
    """PPO; one step of the trainer (of --logging_steps, --save_steps, the schedule, ...) is one update."""

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
        if args.reads_reference and ref_model is None and not hasattr(model.backbone, "peft_config"):
            raise ValueError("Full fine-tuning needs ref_model, a frozen copy of the initial policy.")
        for m in (model, *([ref_model] if ref_model is not None else [])):
            disable_dropout(m)
        super().__init__(model, args, *rest, **kwargs)
        self.ref_model = self._prepare_frozen(ref_model) if ref_model is not None else None
        self.prepare_rollouts(rewards, [Role.VALUE] if args.has_value_function else [])
        self.server = None
        if args.rollout_url is not None:
            in_vision = any(f".{Role.POLICY.adapter}." in name for name in model.core.vision_parameters())
            refuse_unserved(model.backbone.peft_config[Role.POLICY.adapter], in_vision)
            end_ids, never = self.sampler.end_ids, model.core.image_placeholder_ids
            vocabulary = model.core.get_output_embeddings().out_features
            self.server = ServerRollouts(args, self.data_collator, self._name_of_run(), end_ids, never, vocabulary)

    @staticmethod
    def _name_of_run() -> str:
        """A name that no other run has, the same on all devices."""
        (name,) = broadcast_object_list([uuid.uuid4().hex[:8]])
        return str(name)

    @property
    def role_model(self) -> VLModelWithValueHead:
        """The policy with its value function, on which the reward adapters hang."""
        return self.accelerator.unwrap_model(self.model)

    def _adapter_pass(self, r: Sampled, role: Role) -> Tensor:
        return self.model_wrapped(**self._inputs(r, role), completion_index=r.batch["last_tokens"], role=role)

    def kl_to_reference(self, r: Evaluated) -> Tensor | None:
        """Of each answer in nats, (R,)."""
        return sequence_kl([r])

    def base_model(self, model: nn.Module) -> nn.Module:
        """The adapter's model inside everything; the value function's backbone is one itself."""
        model = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        return model.core if isinstance(model, VLModelWithValueHead) else model

    def update(self, micro_batches: Sequence[PPOBatch], seed: int, places: Sequence[list[int]]) -> None:
        """One update; called by UpdateLoop."""
        # 1. rollout
        sampled = self.rollout(micro_batches, seed, places)
        # 2. score
        scored = self.score(sampled)
        if self.args.dynamic_sampling:
            scored = self.replace_uniform_groups(scored, seed)
        # 3. log-probs, reference log-probs, values
        evaluated = self.evaluate_tokens(scored)
        # 4. token rewards, 5. advantages
        rollouts = self.estimate_advantages(evaluated)
        # 6. optimise
        sums = self.optimise(rollouts)
        # 7. metrics
        self.log_metrics(rollouts, sums)
        self._write_samples(rollouts)
        self._tokens_seen = self._tokens_seen + sum((r.batch["segment_ids"] >= 0).sum() for r in rollouts)
        self.unscored.forget()

    def sample_answers(self, prompts: Sequence[Prompts], seed: int) -> list[Sampled]:
        """As OnPolicyTrainer's, or by the server of --rollout_url."""
        if self.server is not None:
            return self._rollout_on_server(self.server, prompts, seed)
        return super().sample_answers(prompts, seed)

    def _rollout_on_server(self, server: ServerRollouts, prompts: Sequence[Prompts], seed: int) -> list[Sampled]:
        """Give the server the policy, let it sample. If it fails on any device all stop as for a reward function: nothing is lost."""
        found = {m: kept for m, p in enumerate(prompts) if (kept := self.unscored.get(p.tokens, p.places)) is not None}
        missing = [m for m in range(len(prompts)) if m not in found]
        failure = None
        with self.phase("rollout", len(missing)) as bar:

            def done(n: int, answers: Answers, logps: AnswerLogps | None) -> None:
                found[missing[n]] = answers, logps
                bar.update()

            backbone = self.accelerator.unwrap_model(self.model, keep_torch_compile=False).backbone
            try:
                with gathered(adapter_parameters(backbone)):
                    server.push(backbone, self.state.global_step, self.accelerator.is_main_process)
                server.sample([prompts[m] for m in missing], seed, done)
            except InputError as error:
                failure = error
        for m, (answers, logps) in found.items():
            self.unscored.put(prompts[m].tokens, prompts[m].places, answers, logps)
        self._stop_if_any_failed(failure, "The rollout server")
        return [self._lay_out(p, *found[m]) for m, p in enumerate(prompts)]

    # -- 1. rollout and 2. score (base/on_policy.py), with dynamic sampling ----------------------------------------------

    @torch.no_grad()
    def replace_uniform_groups(self, scored: Sequence[Scored], seed: int) -> list[Scored]:
        """Put groups whose scores differ in the place of those whose scores are all the same (DAPO's dynamic sampling).

        Prompts from outside of the update are sampled until there are enough, --max_num_gen_batches rounds at most;
        then uniform groups fill what is left. Which prompts come is a function of --seed and the update, and all
        devices share them: their number does not change which groups are taken.
        """
        sizes, world, rank = self.sizes, self.accelerator.num_processes, self.accelerator.process_index
        index_of = PromptBatches(len(self.train_dataset), sizes, rank, self.args.seed).by_place(self.state.global_step)

        def collated(places: list[int]) -> PPOBatch:
            return self.data_collator([self.train_dataset[index_of(place)] for place in places])

        groups = gather_object([g for r in scored for g in groups_of(r)])  # of all devices
        wanted, rounds, next_place = len(groups), 1, len(groups)
        while rounds < self.args.max_num_gen_batches and (lacking := wanted - sum(not g.uniform for g in groups)) > 0:
            local = math.ceil(lacking / (sizes.micro_prompts * world)) * sizes.micro_prompts  # prompts on each device
            start = next_place + rank * local
            places = [[*range(i, i + sizes.micro_prompts)] for i in range(start, start + local, sizes.micro_prompts)]
            further = self.score(self.rollout([collated(of_batch) for of_batch in places], seed, places))
            groups += gather_object([g for r in further for g in groups_of(r)])
            next_place, rounds = next_place + local * world, rounds + 1
        self.store_sums({"val/generation_rounds": torch.tensor([float(rounds), 1.0], device=self.args.device)})
        chosen = choose(groups, wanted)
        if all(g.place < wanted for g in chosen):
            return list(scored)
        # All are packed anew: under ZeRO-3 the vision tower runs on all devices or on none.
        local = sizes.micro_prompts * sizes.micro_batches
        here = chosen[rank * local : (rank + 1) * local]
        parts = [here[i : i + sizes.micro_prompts] for i in range(0, local, sizes.micro_prompts)]
        return [
            micro_batch_of(part, lambda places: self._prompts(collated(places), places), self._lay_out)
            for part in parts
        ]

    # -- 3. log-probs, reference log-probs, values ---------------------------------------------------------------------

    @torch.no_grad()
    def evaluate_tokens(self, scored: Sequence[Scored], evaluating: bool = False) -> list[Evaluated]:
        """Log-probs, values and entropies of the policy, and log-probs of the reference, as far as anything reads them."""
        evaluated, args = [], self.args
        with self.phase("log-probs and values", len(scored)) as bar:
            for r in scored:
                logps = values = entropy = None
                if args.reads_old_logps or (evaluating and args.reads_reference):
                    logps, values, entropy = self.policy_pass(self.model_wrapped, r)
                ref_logps = self._reference_pass(r) if args.reads_reference else None
                evaluated.append(Evaluated(**vars(r), logps=logps, ref_logps=ref_logps, values=values, entropy=entropy))
                bar.update()
        return evaluated

    def policy_pass(self, model: nn.Module, r: Sampled) -> tuple[Tensor, Tensor | None, Tensor]:
        """Log-probs at the sampling temperature, values (None without a value function) and entropies of all answer tokens, (R, T) each."""
        out = model(
            **self._inputs(r, Role.POLICY),
            **self._tokens(r),
            role=Role.POLICY,
            with_entropy=True,
            value_inputs=self._inputs(r, Role.VALUE) if Role.VALUE in r.images else None,
        )
        found = (out.logps, out.get("state_values"), out.entropy)
        return tuple(None if x is None else scatter_to_responses(x, r.mask) for x in found)

    def _reference_pass(self, r: Sampled) -> Tensor:
        inputs = {**self._inputs(r, Role.REFERENCE), **self._tokens(r)}
        if self.ref_model is None:
            logps = self.model_wrapped(**inputs, role=Role.REFERENCE)
        else:
            logps = self.ref_model(**inputs).logps
        return scatter_to_responses(logps, r.mask)

    def _tokens(self, r: Sampled) -> dict[str, Any]:
        return {
            "completion_index": r.batch["completion_index"].flatten()[r.batch["completion_places"]],
            "completion_ids": r.batch["completion_ids"].flatten()[r.batch["completion_places"]],
            "temperature": self.args.temperature,
        }

    # -- 4. token rewards, 5. advantages -------------------------------------------------------------------------------

    def token_rewards(self, scores: Tensor, logps: Tensor | None, ref_logps: Tensor | None, mask: Tensor) -> Tensor:
        """-kl_coef * KL at every token, the score at the last one: (R,), (R, T) each -> (R, T)."""
        kl = torch.zeros(mask.shape, device=mask.device)
        if logps is not None and ref_logps is not None:
            kl = losses.kl_per_token(logps, ref_logps, self.args.kl_estimator)
        rewards = losses.token_rewards(scores, kl, mask, self.ppo_state.kl_coef)
        return self._whiten(rewards, mask, shift_mean=False) if self.args.whiten_rewards else rewards

    def advantages(
        self, rewards: Tensor, values: Tensor | None, mask: Tensor, groups: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Advantages, and returns for the value function, (R, T) each. With GAE they are whitened over the update of all devices.

        Args:
            rewards, values: (R, T); values are None without a value function.
            groups: (R,) long, equal for answers to one prompt.
        """
        args = self.args
        if args.advantage_estimator == "gae":
            advantages, returns = losses.gae(rewards, values, mask, args.gamma, args.lam)
            return self._whiten(advantages, mask), returns
        if args.advantage_estimator == "reinforce_plus_plus":
            return self._whiten(losses.discounted_returns(rewards, mask, args.gamma), mask), None
        scores = torch.where(mask, rewards, 0).sum(1)  # (R,) the KL of the whole answer taken off
        everywhere, all_groups = self.accelerator.gather(scores), self.accelerator.gather(groups)
        if args.advantage_estimator == "rloo":
            advantages = losses.rloo_advantages(everywhere, all_groups)
        else:
            scale = args.scale_rewards if args.advantage_estimator == "grpo" else "none"
            advantages = losses.grpo_advantages(everywhere, all_groups, scale)
        start = self.accelerator.process_index * len(scores)
        advantages = losses.over_tokens(advantages[start : start + len(scores)], mask)
        if args.advantage_estimator == "reinforce_plus_plus_baseline":
            advantages = self._whiten(advantages, mask)
        return advantages, None

    def _whiten(self, values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
        everywhere, everywhere_mask = self.accelerator.gather(values), self.accelerator.gather(mask)
        try:
            whitened = losses.masked_whiten(everywhere, everywhere_mask, shift_mean)
        except ValueError as error:
            raise InputError(
                "The answers of an update have one token in all, and one number has no variance to be whitened with: raise "
                "--per_device_train_batch_size, --gradient_accumulation_steps or --response_length."
            ) from error
        start = self.accelerator.process_index * len(values)
        return whitened[start : start + len(values)]

    def estimate_advantages(self, evaluated: Sequence[Evaluated]) -> list[Advantages]:
        """Token rewards and advantages of the whole update at once.

        Raises:
            InputError: an advantage is not finite; names the rows.
        """
        T = self.args.response_length

        def wide(tensors: Sequence[Tensor | None]) -> Tensor | None:
            if any(t is None for t in tensors):
                return None
            return torch.cat([nn.functional.pad(t, (0, T - t.shape[1])) for t in tensors])

        mask = wide([r.mask for r in evaluated])  # (all R, response_length), so that devices can be joined
        scores = torch.cat([r.scores for r in evaluated])
        logps, ref_logps = wide([r.logps for r in evaluated]), wide([r.ref_logps for r in evaluated])
        rewards = self.token_rewards(scores, logps, ref_logps, mask)
        groups = torch.cat([r.groups for r in evaluated])
        advantages, returns = self.advantages(rewards, wide([r.values for r in evaluated]), mask, groups)
        sizes = [len(r.texts) for r in evaluated]
        of_micro_batch = advantages.split(sizes), returns.split(sizes) if returns is not None else [None] * len(sizes)
        result = []
        for r, a, g in zip(evaluated, *of_micro_batch, strict=True):
            length = r.mask.shape[1]
            parts = {"advantages": a[:, :length], "returns": g[:, :length] if g is not None else None}
            loss_mask, counted = self._enters_loss(r)
            result.append(Advantages(**vars(r), **parts, loss_mask=loss_mask, counted=counted))
            self._check_advantages(result[-1])
        return result

    def _check_advantages(self, r: Advantages) -> None:
        """Raise InputError where advantages are not finite: with what is the cause, which is not the reward."""
        try:
            self._check_finite("The advantage", r.advantages, r)
        except InputError:
            fix = "lower --learning_rate, or compute in a wider type"
            for name, what in (("logps", "A log-prob"), ("ref_logps", "A reference log-prob"), ("values", "A value")):
                if getattr(r, name) is not None:
                    self._check_finite(what, getattr(r, name), r, fix)
            raise

    def _enters_loss(self, r: Scored) -> tuple[Tensor, Tensor]:
        """Tokens of the policy's loss, (R, T), and answers that its mean counts, (R,)."""
        args, counted = self.args, torch.ones_like(r.ended)
        if args.drop_uniform_groups or args.dynamic_sampling:
            counted = ~losses.uniform_groups(r.scores, r.groups)
        mask = r.mask & counted[:, None]
        return (mask & r.ended[:, None] if args.mask_truncated_completions else mask), counted

    # -- 6. optimise ---------------------------------------------------------------------------------------------------

    def policy_and_value_loss(
        self, logps: Tensor, values: Tensor | None, r: Advantages
    ) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """Clipped losses of every token, (R, T) each (the value's None without a value function), and per-token statistics."""
        args, log_ratio = self.args, None
        if args.importance_sampling_level == "sequence":
            log_ratio = losses.sequence_log_ratio(logps, r.logps, r.mask)
        policy_loss, policy_clipped = losses.clipped_policy_loss(
            logps, r.logps, r.advantages, args.cliprange, args.cliprange_high, args.delta, log_ratio
        )
        if r.sampler_logps is not None:
            policy_loss = policy_loss * losses.truncated_importance_weights(
                r.logps, r.sampler_logps, args.rollout_importance_cap
            )
        statistics = {"policy_clipped": policy_clipped}
        if args.kl_in_loss:
            statistics["kl"] = kl = losses.kl_per_token(logps, r.ref_logps, "k3")
            if args.use_bias_correction_kl:
                kl = kl * torch.exp(logps - r.logps if log_ratio is None else log_ratio)
            policy_loss = policy_loss + args.kl_in_loss * kl
        if values is None:
            return policy_loss, None, statistics
        value_loss, value_clipped = losses.clipped_value_loss(values, r.values, r.returns, args.cliprange_value)
        return policy_loss, value_loss, statistics | {"value_clipped": value_clipped}

    def optimise(self, rollouts: Sequence[Advantages]) -> dict[str, Tensor]:
        """num_ppo_epochs passes over the rollouts; returns (sum, number of tokens) over all steps for the metrics."""
        args, model = self.args, self.model_wrapped
        model.train()
        sums: dict[str, list[Tensor]] = defaultdict(list)
        with self.phase("optimise", args.num_ppo_epochs * self.sizes.micro_batches) as bar:
            for ppo_epoch in range(args.num_ppo_epochs):
                parts = mini_batches(self.sizes, args.process_index, args.seed, self.state.global_step, ppo_epoch)
                for m, part in enumerate(parts):
                    counts = self._mini_batch_counts([rollouts[i] for i in part])
                    for i in part:
                        with self.accumulating(model, last=i == part[-1]):
                            of_step = self._micro_step(model, rollouts[i], counts, first=ppo_epoch == 0 and m == 0)
                        for name, values in of_step.items():
                            sums[name].append(values)
                        bar.update()
                    self.optimizer_step(model)
        return {name: torch.stack(values).sum(0) for name, values in sums.items()}

    def _loss_count(self, r: Advantages) -> Tensor:
        return losses.loss_count(r.loss_mask, self.args.loss_type, self.args.response_length, int(r.counted.sum()))

    def _mini_batch_counts(self, rollouts: Sequence[Advantages]) -> Tensor:
        """What the policy's and the value's loss of a mini batch are divided by, over all devices, (2,)."""
        counts = [torch.stack([self._loss_count(r), r.mask.sum()]) for r in rollouts]
        return self.accelerator.reduce(sum(counts), reduction="sum").clamp(min=1)

    def _micro_step(self, model: nn.Module, r: Advantages, counts: Tensor, first: bool) -> dict[str, Tensor]:
        """Forward and backward of a micro batch; for `counts` see _mini_batch_counts."""
        args = self.args
        with self.compute_loss_context_manager():
            logps, values, entropy = self.policy_pass(model, r)
            if r.logps is None:  # the only step of an update: the sampler is the policy itself
                r = dataclasses.replace(r, logps=logps.detach())
            policy_loss, value_loss, statistics = self.policy_and_value_loss(logps, values, r)
        # Means over the whole mini batch; DDP and DeepSpeed divide by the number of devices.
        policy_scale, value_scale = self.accelerator.num_processes / counts
        policy_sum = losses.loss_sum(policy_loss, r.loss_mask, args.loss_type)
        loss = policy_scale * policy_sum
        if value_loss is not None:
            value_sum = torch.where(r.mask, value_loss, 0).sum()
            loss = loss + value_scale * (args.vf_coef * value_sum)
        self.backward(loss)
        with torch.no_grad():
            sums = {"loss/policy_avg": torch.stack([policy_sum, self._loss_count(r)])}
            if value_loss is not None:
                sums["loss/value_avg"] = torch.stack([value_sum, r.mask.sum()])
            sums = {name: values.detach().float() for name, values in sums.items()}
            return sums | token_metrics(r, logps, entropy, statistics, first and args.reads_old_logps)

    # -- 7. metrics ----------------------------------------------------------------------------------------------------

    def log_metrics(self, rollouts: Sequence[Advantages], sums: dict[str, Tensor]) -> None:
        """Store TRL's metrics, warn of a collapsed policy, and move the KL coefficient."""
        args, state = self.args, self.ppo_state
        metrics = rollout_metrics(rollouts, state.kl_coef, args.kl_estimator, args.rollout_importance_cap)
        if args.compares_answers:
            metrics |= group_metrics(rollouts)
        if len(self.rewards) > 1 or not args.has_value_function:
            metrics |= reward_metrics(rollouts, self.rewards)
        self.model.train()
        self.store_metrics(metrics)
        self.store_sums(sums)
        loss = sums["loss/policy_avg"].clone()
        if args.has_value_function:
            value_sum, tokens = sums["loss/value_avg"]
            loss[0] += args.vf_coef * value_sum * (loss[1] / tokens)
        self.store_sums({"loss": loss})
        self.add_loss(loss[0] / loss[1].clamp(min=1))
        length, _ = self._mean_everywhere(metrics["val/response_length"])
        if rollouts[0].entropy is not None:
            entropy, _ = self._mean_everywhere(torch.cat([r.entropy[r.mask] for r in rollouts]))
        else:  # no pass before the optimiser's own
            entropy = self._ratio_everywhere(sums["policy/entropy_avg"])[0]
        warn_of_collapse(state, self.state.global_step + 1, entropy=entropy, length=length)
        if self.server is not None:
            deviation = self._ratio_everywhere(sums["first/ratio_deviation"])[0]
            warn_of_another_policy(state, self.state.global_step + 1, deviation)
        if args.target_kl is not None:
            kl, count = self._mean_everywhere(metrics["objective/kl"])
            state.kl_coef = losses.adaptive_kl_coef(state.kl_coef, kl, args.target_kl, args.kl_horizon, count)

    def _mean_everywhere(self, values: Tensor) -> tuple[float, int]:
        """Mean and number over all devices: what is compared with a limit must be the same on every one."""
        return self._ratio_everywhere(torch.stack([values.sum(), values.new_tensor(float(values.numel()))]))

    def _ratio_everywhere(self, here: Tensor) -> tuple[float, int]:
        """Sum and count on this device, (2,) -> mean and count over all devices."""
        total, count = self.accelerator.reduce(here, reduction="sum").tolist()
        return total / max(count, 1), int(count)

    # -- evaluation ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Dataset | None = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Sample one answer set per evaluation prompt, always with the same random numbers; mean score, KL, length.

        Every device takes every num_processes-th micro batch.
        """
        data = eval_dataset if eval_dataset is not None else self.eval_dataset
        size, world, rank = self.sizes.micro_prompts, self.accelerator.num_processes, self.accelerator.process_index
        starts = list(range(0, len(data), size))
        starts += starts[: -len(starts) % world]  # every device makes the same number of passes
        sums = torch.zeros(5, device=self.args.device)
        for n in range(rank, len(starts), world):
            places = [*range(starts[n], min(starts[n] + size, len(data)))]
            batch = self.data_collator([data[i] for i in places])
            sampled = self.rollout([batch], stable_seed(self.args.seed, "eval"), [places])
            (r,) = self.evaluate_tokens(self.score(sampled), evaluating=True)
            if n < math.ceil(len(data) / size):  # not one of the repeated ones
                kl = sequence_kl([r])
                kl = kl.sum() if kl is not None else sums.new_zeros(())
                scored, answers = (~r.scores.isnan()).sum(), kl.new_tensor(len(r.texts))
                sums += torch.stack([r.scores.nansum(), scored, kl, r.mask.sum(), answers])
        scores, scored, kl, length, count = self.accelerator.reduce(sums, reduction="sum").tolist()
        metrics = {
            f"{metric_key_prefix}_objective/scores": scores / max(scored, 1),
            f"{metric_key_prefix}_objective/kl": kl / count,
            f"{metric_key_prefix}_val/response_length": length / count,
        }
        if not self.args.reads_reference:
            del metrics[f"{metric_key_prefix}_objective/kl"]
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.check_best_metric(metrics)
        return metrics
