"""The faults that the suite must see. One that no longer applies is an error: follow the code, or take the fault out.

Each is a slip that somebody could make, whose result looks healthy: the loss falls, the run ends. To add one, write the
function, the code in it (once there; layout does not count) and what stands there instead, and name the quickest tests that
should fail. `python -m tests.mutants --only "words of the fault"` tries it.
"""

from tests.mutants.mutant import Mutant

MUTANTS: list[Mutant] = []


def faults(file: str, tests: str, **of: dict[str, tuple[str, ...]]) -> None:
    """Add the faults of a file: `words_in_the_names_of_its_tests={fault: (function, code, what stands there instead)}`."""
    for words, changes in of.items():
        for fault, (function, old, new) in changes.items():
            MUTANTS.append(Mutant(fault, file, function, old, new, tests, words.replace("__or__", " or ")))


# ---------------------------------------------------------------------------------------------------------------- PPO

faults(
    "base/ppo_trainer.py",
    "tests/test_paths_ppo.py",
    penalty_grows={
        "KL penalty of the wrong sign": (
            "VLPPOTrainer.token_rewards",
            "losses.kl_per_token(logps, ref_logps, self.args.kl_estimator)",
            "losses.kl_per_token(ref_logps, logps, self.args.kl_estimator)",
        ),
        "KL penalty with another coefficient than that of the flags": (
            "VLPPOTrainer.token_rewards",
            "losses.token_rewards(scores, kl, mask, self.ppo_state.kl_coef)",
            "losses.token_rewards(scores, kl, mask, 0.05)",
        ),
    },
    whitened={
        "whiten_rewards ignored": ("VLPPOTrainer.token_rewards", "self.args.whiten_rewards", "False"),
        "whitened rewards lose their mean": (
            "VLPPOTrainer.token_rewards",
            "self._whiten(rewards, mask, shift_mean=False)",
            "self._whiten(rewards, mask)",
        ),
        "advantages not whitened": (
            "VLPPOTrainer.advantages",
            "(self._whiten(advantages, mask), returns)",
            "(advantages, returns)",
        ),
        "advantages not centred": (
            "VLPPOTrainer.advantages",
            "(self._whiten(advantages, mask), returns)",
            "(self._whiten(advantages, mask, shift_mean=False), returns)",
        ),
        "gamma ignored": (
            "VLPPOTrainer.advantages",
            "losses.gae(rewards, values, mask, args.gamma, args.lam)",
            "losses.gae(rewards, values, mask, 1.0, args.lam)",
        ),
        "lam ignored": (
            "VLPPOTrainer.advantages",
            "losses.gae(rewards, values, mask, args.gamma, args.lam)",
            "losses.gae(rewards, values, mask, args.gamma, 0.95)",
        ),
        "returns whitened": (
            "VLPPOTrainer.advantages",
            "(self._whiten(advantages, mask), returns)",
            "(self._whiten(advantages, mask), self._whiten(returns, mask))",
        ),
    },
    both_clips={
        "cliprange ignored": ("VLPPOTrainer.policy_and_value_loss", "args.cliprange", "0.2"),
        "cliprange_value ignored": ("VLPPOTrainer.policy_and_value_loss", "args.cliprange_value", "0.2"),
        "value loss clipped around the returns": (
            "VLPPOTrainer.policy_and_value_loss",
            "losses.clipped_value_loss(values, r.values, r.returns, args.cliprange_value)",
            "losses.clipped_value_loss(values, r.returns, r.values, args.cliprange_value)",
        ),
    },
    vf_coef={
        "vf_coef ignored in the gradient": ("VLPPOTrainer._micro_step", "args.vf_coef", "0.1"),
        "vf_coef ignored in the logged loss": ("VLPPOTrainer.log_metrics", "args.vf_coef", "0.1"),
    },
    controller={
        "controller fed with the KL per token": (
            "VLPPOTrainer.log_metrics",
            'self._mean_everywhere(metrics["objective/kl"])',
            'self._mean_everywhere(metrics["objective/kl"] / metrics["val/response_length"])',
        ),
    },
    tower={
        "value function reads the policy's images": (
            "VLPPOTrainer.policy_pass",
            "self._inputs(r, Role.VALUE) if Role.VALUE in r.images else None",
            "None",
        ),
    },
    evaluation_repeats={
        "evaluation draws anew every time": (
            "VLPPOTrainer.evaluate",
            'stable_seed(self.args.seed, "eval")',
            'stable_seed(self.args.seed, "eval", torch.rand(1).item())',
        ),
        "evaluation's length is a sum": ("VLPPOTrainer.evaluate", "length / count", "length"),
        "evaluation leaves out the prompts of a short last batch": (
            "VLPPOTrainer.evaluate",
            "n < math.ceil(len(data) / size)",
            "n < len(data) // size",
        ),
        "evaluation gives every micro batch the same places": (
            "VLPPOTrainer.evaluate",
            "[*range(starts[n], min(starts[n] + size, len(data)))]",
            "[*range(0, min(size, len(data)))]",
        ),
    },
)
faults(
    "base/on_policy.py",
    "tests/test_paths_ppo.py",
    clipped_on_both_sides={
        "reward clip without a lower bound": (
            "OnPolicyTrainer._total",
            "total.clamp(-clip, clip)",
            "total.clamp(max=clip)",
        ),
        "reward clip without an upper bound": (
            "OnPolicyTrainer._total",
            "total.clamp(-clip, clip)",
            "total.clamp(-clip)",
        ),
        "weights of rewards ignored": (
            "OnPolicyTrainer._total",
            "reward.weight * parts[reward.name].nan_to_num(nan=0.0)",
            "parts[reward.name].nan_to_num(nan=0.0)",
        ),
    },
    tower={
        "vision weights of a role ignored": (
            "OnPolicyTrainer.prepare_rollouts",
            "self._on_any_process(self.role_model.has_own_vision(role))",
            "False",
        ),
        "value model's images encoded by the policy": (
            "OnPolicyTrainer._encode",
            "self._encode_with(roles.value_backbone, img_inputs)",
            "self._encode_with(policy, img_inputs)",
        ),
        "reward adapter's images encoded by the policy": (
            "OnPolicyTrainer._encode",
            "adapter_active(roles.backbone, role.adapter)",
            "adapter_active(roles.backbone, Role.POLICY.adapter)",
        ),
    },
)
faults(
    "base/update_loop.py",
    "tests/test_paths_ppo.py",
    random_numbers={
        "every update samples with the same random numbers": (
            "UpdateLoop._run_epoch",
            'stable_seed(args.seed, "rollout", self.state.global_step)',
            'stable_seed(args.seed, "rollout")',
        ),
    },
)
faults(
    "base/ppo_batches.py",
    "tests/test_paths_ppo.py",
    mini_batches={
        "mini batches equal in every update": (
            "mini_batches",
            'stable_seed(seed, "mini", update, ppo_epoch, rank * blocks + block)',
            'stable_seed(seed, "mini", ppo_epoch, rank * blocks + block)',
        ),
        "mini batches do not depend on the seed": (
            "mini_batches",
            'stable_seed(seed, "mini", update, ppo_epoch, rank * blocks + block)',
            'stable_seed("mini", update, ppo_epoch, rank * blocks + block)',
        ),
    },
)
faults(
    "base/ppo_metrics.py",
    "tests/test_paths_ppo.py",
    rlhf_reward={
        "rlhf_reward adds the penalty": ("rollout_metrics", "scores - kl_coef * penalty", "scores + kl_coef * penalty"),
        "non_score_reward of the wrong sign": ("rollout_metrics", "-kl_coef * penalty", "kl_coef * penalty"),
        "KL of an answer is a mean": (
            "sequence_kl",
            "torch.where(r.mask, r.logps - r.ref_logps, 0).sum(1)",
            "torch.where(r.mask, r.logps - r.ref_logps, 0).mean(1)",
        ),
    },
)
faults(
    "base/sampling.py",
    "tests/test_paths_ppo.py",
    answer_ends={
        "the template's end of turn is no end": (
            "end_token_ids",
            "sorted({of_template, *of_checkpoint})",
            "sorted({*of_checkpoint})",
        ),
        "the checkpoint's end tokens are no ends": (
            "end_token_ids",
            "sorted({of_template, *of_checkpoint})",
            "[of_template]",
        ),
    },
)
faults(
    "models/assemble.py",
    "tests/test_paths_ppo.py",
    continued={"the reference of a continued adapter is the bare base": ("load_reference", "plan.is_adapter", "False")},
)

# ---------------------------------------------------------------------------------------------------------------- DPO

faults(
    "base/trainer.py",
    "tests/test_paths_dpo.py",
    metrics_by_hand__or__equal_rewards={
        "rewards/rejected without beta": (
            "VLDPOTrainer.log_metrics",
            '{"rewards/chosen": chosen, "rewards/rejected": rejected, "rewards/accuracies": chosen > rejected, '
            '"rewards/margins": chosen - rejected}',
            '{"rewards/chosen": chosen, "rewards/rejected": rejected / self.beta, "rewards/accuracies": chosen > rejected, '
            '"rewards/margins": chosen - rejected}',
        ),
        "accuracies reversed": ("VLDPOTrainer.log_metrics", "chosen > rejected", "chosen < rejected"),
        "ties count as right in DPO": ("VLDPOTrainer.log_metrics", "chosen > rejected", "chosen >= rejected"),
        "margins negated": ("VLDPOTrainer.log_metrics", "chosen - rejected", "rejected - chosen"),
        "logps of the two sides swapped": (
            "VLDPOTrainer.log_metrics",
            '{"logps/chosen": pairs.policy.chosen, "logps/rejected": pairs.policy.rejected}',
            '{"logps/chosen": pairs.policy.rejected, "logps/rejected": pairs.policy.chosen}',
        ),
        "implicit rewards with beta 0.1 whatever the flag": (
            "VLDPOTrainer.log_metrics",
            "implicit_rewards(pairs, self.beta)",
            "implicit_rewards(pairs, 0.1)",
        ),
    },
    mixture={
        "parts of a mixture all log the first loss": (
            "VLDPOTrainer.log_metrics",
            '{f"loss/{name}": part for name, part in parts.items()}',
            '{f"loss/{name}": next(iter(parts.values())) for name in parts}',
        ),
    },
    epoch_corrupts={
        "the trainer never says the epoch": (
            "VLDPOTrainer.__init__",
            "self.add_callback(SetEpoch(self.data_collator))",
            "None",
        ),
    },
)
faults(
    "base/callbacks.py",
    "tests/test_paths_dpo.py",
    epoch_corrupts={"the epoch is always the first": ("SetEpoch.on_epoch_begin", "int(state.epoch or 0)", "0")},
)
faults(
    "base/trainer.py",
    "tests/test_preference_losses.py",
    running_delta_is={
        "MPO's delta moves in evaluation": ("VLDPOTrainer.preference_loss", "self.model.training", "True"),
        "MPO's delta is of plain log-ratios": (
            "VLDPOTrainer.preference_loss",
            "implicit_rewards(pairs, self.beta)",
            "implicit_rewards(pairs, 1.0)",
        ),
    },
)
faults(
    "base/vl_trainer.py",
    "tests/test_paths_dpo.py",
    whatever_dropout={
        "dropout of attention left on": ("disable_dropout", '"drop" in name', "False"),
        "dropout of a CLIP tower's attention left on": (
            "disable_dropout",
            '"drop" in name',
            'name == "attention_dropout"',
        ),
    },
)
faults(
    "base/collator.py",
    "tests/test_paths_dpo.py",
    share_nothing={
        "the policy's negatives share a beginning": (
            "VLDPODataCollatorWithPadding.encode_rows",
            "common_beginning(row) if self._share_beginnings else 0",
            "common_beginning(row)",
        ),
    },
    numbers_of_responses={
        "numbers of responses misplaced behind copies": (
            "VLDPODataCollatorWithPadding._add_columns.of_responses",
            "values[places.of([range(len(row[column])) for row in features])] = torch.tensor(given)",
            "values[: len(given)] = torch.tensor(given)",
        ),
    },
    counted_anew={
        "lengths cached though an image changed": (
            "VLDataCollator.lengths",
            "dataset.map(count, num_proc=num_proc, remove_columns=dataset.column_names, load_from_cache_file=False, "
            'desc="Counting tokens")',
            "dataset.map(count, num_proc=num_proc, remove_columns=dataset.column_names, "
            'new_fingerprint="the-same", desc="Counting tokens")',
        ),
    },
    lengths_are_limited={
        "length limits ignored by the collator": (
            "VLDPODataCollatorWithPadding.encode_rows",
            "fit(len(prompt), [response], self.limits)",
            "fit(len(prompt), [response], LengthLimits())",
        ),
        "no row is dropped for its length": (
            "VLDPODataCollatorWithPadding._fit",
            "fit_row(len(prompt), self._responses(row), self.limits, counts, row.get('where') or where)",
            "self._responses(row)",
        ),
    },
)
faults(
    "base/views.py",
    "tests/test_paths_dpo.py",
    first_of_several={
        "image_rejected replaces all images": (
            "image_rejected_view",
            '[row["image_rejected"], *row["images"][1:]]',
            '[row["image_rejected"]] * len(row["images"])',
        ),
        "image_rejected replaces the last image": (
            "image_rejected_view",
            '[row["image_rejected"], *row["images"][1:]]',
            '[*row["images"][:-1], row["image_rejected"]]',
        ),
    },
    no_marks={
        "marks of images left in text-only rows": (
            "without_images",
            "remove_image_placeholder(content)",
            "content",
        ),
    },
)
faults(
    "base/reference_cache.py",
    "tests/test_paths_dpo.py",
    two_adapters={
        "the cache's key lacks the reference adapter": (
            "weights_digest",
            'is_policy and isinstance(model, PeftModel) and ".default." in f"{name}."',
            '".lora_" in name',
        ),
        "the cache's key lacks the weights' values": (
            "weights_digest",
            "digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())",
            "None",
        ),
    },
    processors_files={
        "the cache's key lacks the contents of the processor's files": (
            "processor_digest",
            "path.name.encode() + path.read_bytes()",
            "path.name.encode()",
        ),
    },
    ranks={
        "a row's key lacks the further columns": (
            "row_key",
            '{name: row.get(name) for name in columns if name != "image_rejected"}',
            "{}",
        ),
        "a row's key lacks the second image": (
            "row_key",
            '[row["image_rejected"]] if "image_rejected" in columns else []',
            "[]",
        ),
    },
    whole_or_not_there={
        "the cache's files are written in place": (
            "ReferenceCache.flush",
            "with replacing(path) as beside:\n    save_file(self._held, beside, {'blake2b': _digest(self._held)})",
            "save_file(self._held, path, {'blake2b': _digest(self._held)})",
        ),
    },
)
faults(
    "base/reference_pass.py",
    "tests/test_paths_dpo.py",
    precision__or__layout={
        "the cache's key lacks the autocast": ("about_reference", "precision", '""'),
        "the cache's key lacks the layout": ("about_reference", "collator.share_prefix", "True"),
    },
)

# -------------------------------------------------------------------------------------------------------------- model

faults(
    "base/logps.py",
    "tests/test_paths_model.py",
    native_logits={
        "no temperature in the chunked path": (
            "token_logps",
            "ChunkedLogProbFunction.apply(hidden, lm_head.weight, lm_head.bias, token_ids, temperature, VOCAB_CHUNK, cap, 1.0, "
            "outputs)",
            "ChunkedLogProbFunction.apply(hidden, lm_head.weight, lm_head.bias, token_ids, 1.0, VOCAB_CHUNK, cap, 1.0, outputs)",
        ),
        "no soft cap in the chunked path": (
            "token_logps",
            "ChunkedLogProbFunction.apply(hidden, lm_head.weight, lm_head.bias, token_ids, temperature, VOCAB_CHUNK, cap, 1.0, "
            "outputs)",
            "ChunkedLogProbFunction.apply(hidden, lm_head.weight, lm_head.bias, token_ids, temperature, VOCAB_CHUNK, None, 1.0, "
            "outputs)",
        ),
        "no temperature in the plain path": (
            "token_logps",
            "capped(lm_head(hidden).float(), cap) / temperature",
            "capped(lm_head(hidden).float(), cap)",
        ),
        "no soft cap in the plain path": (
            "token_logps",
            "capped(lm_head(hidden).float(), cap) / temperature",
            "lm_head(hidden).float() / temperature",
        ),
        "the soft cap behind the temperature": (
            "token_logps",
            "capped(lm_head(hidden).float(), cap) / temperature",
            "capped(lm_head(hidden).float() / temperature, cap)",
        ),
    },
    divergences={
        "no soft cap in the KL over the vocabulary": (
            "all_logits",
            "capped(nn.functional.linear(hidden, lm_head.weight, lm_head.bias).float(), softcap(model))",
            "nn.functional.linear(hidden, lm_head.weight, lm_head.bias).float()",
        ),
        "KL of the wrong direction": (
            "_VocabularyKL.forward",
            "token_kl(all_logits(reference, ref), all_logits(policy, own))",
            "token_kl(all_logits(policy, own), all_logits(reference, ref))",
        ),
        "no gradient to a head that trains": (
            "_VocabularyKL.backward",
            "(sum(found[i]) if i in found else None for i in (1, 2))",
            "(None for i in (1, 2))",
        ),
        "gradients without the sign of what follows": (
            "_VocabularyKL.backward",
            "torch.autograd.grad(kl, [inputs[i] for i in needed], outer)",
            "torch.autograd.grad(kl, [inputs[i] for i in needed], outer.abs())",
        ),
        "no soft cap in the logits of tokens": ("token_logits", "capped(logits, softcap(model))", "logits"),
    },
)
faults(
    "base/model.py",
    "tests/test_paths_model.py",
    placeholder={
        "placeholders of videos may be generated": (
            "VLModelMixin.image_placeholder_ids",
            '("image", "video", "audio")',
            '("image", "audio")',
        ),
        "placeholders of images may be generated": (
            "VLModelMixin.image_placeholder_ids",
            '("image", "video", "audio")',
            '("video", "audio")',
        ),
    },
)

# ------------------------------------------------------------------------------------------------------------- videos

faults(
    "models/qwen2_vl/__init__.py",
    "tests/test_videos.py",
    packed_logps={
        "positions of videos without their time": (
            "MRopeMixin.packed_position_ids",
            '("image_grid_thw", "video_grid_thw", "second_per_grid_ts")',
            '("image_grid_thw", "video_grid_thw")',
        ),
    },
)
faults(
    "models/frames.py",
    "tests/test_videos.py",
    packed_logps={
        "videos of different length without the end of a line": ("_video_by_video", "(part, ending)", "(part,)"),
    },
)
faults(
    "base/videos.py",
    "tests/test_videos.py",
    by_hand={
        "every frame of a clip is the first": (
            "load_clip",
            "np.stack([found[i] for i in indices])",
            "np.stack([found[min(indices)] for i in indices])",
        ),
        "frames of a video chosen by the class's numbers, not by the flag": (
            "sampled",
            "video_processor.sample_frames(metadata, num_frames=frames, fps=fps)",
            "video_processor.sample_frames(metadata, num_frames=8)",
        ),
    },
)
faults(
    "data/videos.py",
    "tests/test_videos.py",
    every_bad_video={"films that are cut off pass": ("_check_film", "whole < header.frames", "whole < 0")},
)
faults(
    "data/verify.py",
    "tests/test_videos.py",
    its_copy={
        "a film does not tell a row from others": (
            "verify_row",
            "[*(found.signature for found in checked), *films, *others]",
            "[*(found.signature for found in checked), *others]",
        )
    },
)

# --------------------------------------------------------------------------------------------------------------- data

for _name in ("rlhfv", "rlaifv", "mmrlhf"):
    faults(
        f"data/{_name}.py",
        "tests/test_paths_data.py",
        chosen_answer={f"chosen and rejected swapped in {_name}": ("convert", "[0, 1]", "[1, 0]")},
    )
faults(
    "data/conversational.py",
    "tests/test_paths_data.py",
    ranks_beside={
        "the column rankings ignored": ("ranked", 'record.get("rankings")', 'record.get("")'),
        "the lowest score is the best": (
            "dense_ranks",
            "sorted(set(scores), reverse=True)",
            "sorted(set(scores))",
        ),
    },
)
faults(
    "data/verify.py",
    "tests/test_paths_data.py",
    another_image={
        "rows with the same question are one group": ("_keys", 'b"".join(signatures[:shown])', 'b""'),
    },
)
faults(
    "data/__init__.py",
    "tests/test_paths_data.py",
    conversation={
        "a system message alone is the prompt": ("_last_answer_off", "messages[:-1]", "messages[:1]"),
        "a conversation's last answer is part of the prompt": ("_last_answer_off", "messages[:-1]", "messages"),
        "earlier turns are no part of the prompt": ("_last_answer_off", "messages[:-1]", "messages[-2:-1]"),
    },
)
faults(
    "data/source.py",
    "tests/test_paths_data.py",
    read_anew={"rows are kept whatever the loaders' code": ("to_rows", "code_state()", '""')},
)
faults(
    "data/files.py",
    "tests/test_paths_data.py",
    state_covers={
        "the state of the code leaves out the formats": (
            "code_state",
            'path.name not in ("check.py", "scenes.py", "shapes.py")',
            'path.name == "rows.py"',
        )
    },
)

# ------------------------------------------------------------------------------------------------------------ scripts

for _name in ("rm", "dpo"):
    faults(
        f"train_{_name}.py",
        "tests/test_paths_scripts.py",
        pairs_are={
            f"train_{_name} ignores --pairs": ("build", "data_args.pairs", '"all"'),
            f"train_{_name} ignores --score_margin": ("build", "data_args.score_margin", "None"),
        },
        share_prefix={f"train_{_name} ignores --share_prefix": ("build", "plan.share_prefix", "True")},
    )
for _name in ("sft", "rm", "dpo", "ppo"):
    faults(
        f"train_{_name}.py",
        "tests/test_paths_scripts.py",
        length_limits={
            f"train_{_name} ignores the length limits": (
                "build",
                "LengthLimits.from_args(data_args)",
                "LengthLimits()",
            ),
        },
    )
faults(
    "train_ppo.py",
    "tests/test_paths_scripts.py",
    share_prefix={"train_ppo ignores --share_prefix": ("build", "plan.share_prefix", "True")},
)
faults(
    "train_sft.py",
    "tests/test_paths_scripts.py",
    train_on={"train_sft ignores --train_on": ("build", "data_args.train_on", '"all"')},
)
faults(
    "train_dpo.py",
    "tests/test_paths_scripts.py",
    losses_need={
        "train_dpo ignores --diffusion_step": ("build", "training_args.diffusion_step", "500"),
        "train_dpo ignores --corruption": ("build", "training_args.corruption", '"crop"'),
    },
)
faults(
    "models/assemble.py",
    "tests/test_paths_scripts.py",
    goes_on_training={
        "a loaded adapter is frozen": (
            "_load",
            "load_model(plan.checkpoint, dtype=getattr(torch, plan.dtype), "
            'use_flash_attention_2=plan.attention == "flash_attention_2", bits=plan.bits, is_trainable=True)',
            "load_model(plan.checkpoint, dtype=getattr(torch, plan.dtype), "
            'use_flash_attention_2=plan.attention == "flash_attention_2", bits=plan.bits)',
        ),
    },
)
faults(
    "base/trainer.py",
    "tests/test_paths_scripts.py",
    sfts_loss={
        "SFT ignores the number of tokens of the global batch": (
            "VLSFTTrainer.compute_loss",
            "num_items_in_batch is None",
            "True",
        ),
        "SFT's loss is a sum": (
            "VLSFTTrainer.compute_loss",
            "-outputs.logps.sum() / num_items_in_batch[0]",
            "-outputs.logps.sum()",
        ),
    },
)
faults(
    "data/bins.py",
    "tests/test_bins.py",
    by_hand={
        "the first bin with room takes a row, not the fullest": (
            "best_fit",
            "at = bisect_left(rooms, lengths[row])",
            "at = len(rooms) - 1 if rooms and rooms[-1] >= lengths[row] else len(rooms)",
        ),
    },
    too_full={
        "a bin may be one token too full": (
            "best_fit",
            "bisect_left(rooms, lengths[row])",
            "bisect_left(rooms, lengths[row] - 1)",
        ),
    },
    loader={
        "of a batch of bins the first alone": (
            "Bins.__getitems__",
            "[row for index in indices for row in self[index]]",
            "[row for index in indices[:1] for row in self[index]]",
        ),
    },
)
faults(
    "base/trainer.py",
    "tests/test_equivalence.py",
    divided_again={
        "SFT's loss is divided by the micro batches as well": (
            "VLSFTTrainer.__init__",
            "self.model_accepts_loss_kwargs = True",
            "pass",
        ),
    },
)
faults(
    "base/trainer.py",
    "tests/test_bins.py",
    apart={
        "--packing takes rows one by one": ("VLSFTTrainer.get_train_dataloader", "self.bins is None", "True"),
    },
)
faults(
    "base/rm_trainer.py",
    "tests/test_paths_scripts.py",
    equal_rewards={
        "ties count as right in reward models": ("VLRMTrainer.log_metrics", "chosen > rejected", "chosen >= rejected"),
        "the margin of the wrong sign": (
            "VLRMTrainer.log_metrics",
            '{"accuracy": right, "margin": chosen - rejected, "mean_reward": rewards[batch["counted"]], "rewards/chosen": chosen, '
            '"rewards/rejected": rejected}',
            '{"accuracy": right, "margin": rejected - chosen, "mean_reward": rewards[batch["counted"]], "rewards/chosen": chosen, '
            '"rewards/rejected": rejected}',
        ),
    },
)

# -------------------------------------------------------------------------------------------------------- checkpoints

faults(
    "base/resume.py",
    "tests/test_paths_checkpoints.py",
    largest_number={
        "checkpoint-9 is newer than checkpoint-10": (
            "newest_whole_checkpoint",
            "sorted(checkpoints_of(output_dir).items(), reverse=True)",
            "sorted(checkpoints_of(output_dir).items(), key=lambda item: item[1], reverse=True)",
        ),
        "the oldest checkpoint is resumed": (
            "newest_whole_checkpoint",
            "sorted(checkpoints_of(output_dir).items(), reverse=True)",
            "sorted(checkpoints_of(output_dir).items())",
        ),
    },
)
faults(
    "base/checkpoints.py",
    "tests/test_paths_checkpoints.py",
    best_checkpoint={
        "--save_total_limit deletes the best": (
            "SafeCheckpoints._move_old_checkpoints",
            "{by_step[now], *([str(Path(best))] if best else [])}",
            "{by_step[now]}",
        ),
        "--save_total_limit ignored": (
            "SafeCheckpoints._move_old_checkpoints",
            "self.args.save_total_limit or len(by_step)",
            "len(by_step)",
        ),
    },
    on_disk={
        "the final model is copied into place": (
            "SafeCheckpoints.save_model",
            "os.replace(file, place)",
            "shutil.copy(file, place)",
        ),
        "the final model is not synchronised": ("SafeCheckpoints.save_model", "flush(folder)", "None"),
        "checkpoints are not synchronised": ("SafeCheckpoints._save_checkpoint", "flush(folder / name)", "None"),
    },
)
faults(
    "models/merging.py",
    "tests/test_paths_checkpoints.py",
    bits_of_a_run={
        "run.json above a checkpoint is not seen": (
            "bits_of",
            "(Path(adapter), Path(adapter).parent)",
            "(Path(adapter),)",
        ),
        "bits without --q_lora count": ("bits_of", 'flags["bits"] if flags.get("q_lora") else None', 'flags["bits"]'),
    },
)

# --------------------------------------------------------------------------------------------------------- evaluation

faults(
    "eval/ledger.py",
    "tests/test_paths_eval.py",
    another_adapter={
        f"another {key} goes on in the same file": (
            "",
            '("task", "data_sha256", "image_dir", "limit", "checkpoint", "adapter", "weights", "prompt", "generation")',
            repr(
                tuple(
                    k
                    for k in "task data_sha256 image_dir limit checkpoint adapter weights prompt generation".split()
                    if k != key
                )
            ),
        )
        for key in ("adapter", "limit", "prompt")
    },
)
faults(
    "eval/generate.py",
    "tests/test_paths_eval.py",
    nucleus={
        "--top_p ignored": (
            "generation_settings",
            '("max_new_tokens", "num_beams", "temperature", "top_p")',
            '("max_new_tokens", "num_beams", "temperature")',
        ),
        "--seed of sampled answers ignored": ("answer_rows", "args.seed + number", "number"),
    },
    random_state={
        "answers come from the process's random state": ("Answerer.answer", "torch.manual_seed(seed)", "None")
    },
    without_an_image={
        "rows without images join those with": (
            "plan",
            'last is not None and last[0]["images"] and not last[0].get("videos")',
            "last is not None",
        ),
        "rows without images are grouped as one image": (
            "plan",
            "key and len(members) <= batch_size",
            "len(members) <= batch_size",
        ),
    },
    max_new_tokens={
        "--max_new_tokens ignored": (
            "generation_settings",
            '("max_new_tokens", "num_beams", "temperature", "top_p")',
            '("num_beams", "temperature", "top_p")',
        )
    },
)
faults(
    "eval/benchmark_files.py",
    "tests/test_paths_eval.py",
    marks_stand={
        "marks in another order than the images": (
            "with_image_marks",
            "sorted(named) == [str(i + 1) for i in range(images)] == named",
            "sorted(named) == [str(i + 1) for i in range(images)]",
        ),
    },
)
faults(
    "eval/choice.py",
    "tests/test_paths_eval.py",
    last_mention={
        "MMMU's first mention wins": (
            "mmmu_letter",
            "max(position, key=position.__getitem__)",
            "min(position, key=position.__getitem__)",
        ),
        "MMMU's bracketed letter by its first mention": ("mmmu_letter", 'text.rfind(f"({c})")', 'text.find(f"({c})")'),
        "MMMU's option text by its first mention": (
            "mmmu_letter",
            "lower.rfind(option.lower())",
            "-lower.rfind(option.lower())",
        ),
    },
)
faults(
    "eval/mathvista.py",
    "tests/test_paths_eval.py",
    first_bracketed={"MathVista's last letter wins": ("normalise", "bracketed[0]", "bracketed[-1]")},
)

# ---------------------------------------------------------------------------------------------------- RL without a critic

faults(
    "losses/policy_gradient.py",
    "tests/test_policy_gradient.py",
    grpo_is_trl={
        "GRPO's deviation without Bessel's correction": (
            "group_std",
            "(squares / (counts - 1).clamp(min=1)).sqrt()",
            "(squares / counts).sqrt()",
        ),
        "the batch's deviation is the group's": (
            "grpo_advantages",
            "group_std(scores, torch.zeros_like(groups))",
            "group_std(scores, groups)",
        ),
        "scores are not centred": ("grpo_advantages", "scores - group_mean(scores, groups)", "scores"),
    },
    any_order={
        "groups are neighbours": (
            "_sum_by_group",
            "groups.unique(return_inverse=True)",
            "(None, torch.arange(len(groups)) // 2)",
        ),
    },
    rloo_is={
        "RLOO's baseline holds the own score": ("rloo_advantages", "(sums - scores) / (counts - 1)", "sums / counts"),
    },
    reinforce_plus_plus_is_verl={
        "returns are not discounted": (
            "discounted_returns",
            "rewards[:, t] + gamma * running",
            "rewards[:, t] + running",
        ),
        "returns run forward": ("discounted_returns", "reversed(range(rewards.shape[1]))", "range(rewards.shape[1])"),
    },
    losses_and_gradients={
        "an answer's mean is over the padded width": (
            "loss_sum",
            "kept.sum(1) / mask.sum(1).clamp(min=1)",
            "kept.mean(1)",
        ),
        "dr_grpo counts tokens": ("loss_count", "answers * max_length", "mask.sum()"),
        "GSPO's ratio is a sum": ("sequence_log_ratio", "mask.sum(1, keepdim=True).clamp(min=1)", "1"),
    },
    overlong={
        "overlong answers are rewarded": (
            "overlong_penalty",
            "-factor * ((lengths - (max_length - buffer)) / buffer).clamp(min=0)",
            "factor * ((lengths - (max_length - buffer)) / buffer).clamp(min=0)",
        ),
        "the penalty starts a buffer too late": (
            "overlong_penalty",
            "lengths - (max_length - buffer)",
            "lengths - max_length",
        ),
    },
)
faults(
    "base/ppo_trainer.py",
    "tests/test_rl.py",
    kl_is_taken_off={
        "RLOO with GRPO's advantages": ("VLPPOTrainer.advantages", 'args.advantage_estimator == "rloo"', "False"),
        "the score without its KL": (
            "VLPPOTrainer.advantages",
            "torch.where(mask, rewards, 0).sum(1)",
            "torch.where(mask, rewards, 0).gather(1, mask.sum(1, keepdim=True) - 1)[:, 0]",
        ),
    },
    compared_with={
        "groups of a micro batch are those of the first prompt": (
            "VLPPOTrainer.estimate_advantages",
            "torch.cat([r.groups for r in evaluated])",
            "torch.cat([0 * r.groups for r in evaluated])",
        ),
    },
    truncated={
        "--mask_truncated_completions ignored": (
            "VLPPOTrainer._enters_loss",
            "mask & r.ended[:, None] if args.mask_truncated_completions else mask",
            "mask",
        ),
    },
    uniform_groups={
        "--drop_uniform_groups ignored": (
            "VLPPOTrainer._enters_loss",
            "args.drop_uniform_groups or args.dynamic_sampling",
            "args.dynamic_sampling",
        ),
    },
)
faults(
    "base/ppo_trainer.py",
    "tests/test_paths_ppo.py",
    scaled={
        "--scale_rewards ignored": (
            "VLPPOTrainer.advantages",
            'args.scale_rewards if args.advantage_estimator == "grpo" else "none"',
            '"group" if args.advantage_estimator == "grpo" else "none"',
        ),
        "reinforce_plus_plus_baseline is not whitened": (
            "VLPPOTrainer.advantages",
            'args.advantage_estimator == "reinforce_plus_plus_baseline"',
            "False",
        ),
        "reinforce_plus_plus ignores gamma": (
            "VLPPOTrainer.advantages",
            "losses.discounted_returns(rewards, mask, args.gamma)",
            "losses.discounted_returns(rewards, mask, 1.0)",
        ),
    },
    loss_of_answers={
        "--importance_sampling_level ignored": (
            "VLPPOTrainer.policy_and_value_loss",
            'args.importance_sampling_level == "sequence"',
            "False",
        ),
        "--cliprange_high ignored": ("VLPPOTrainer.policy_and_value_loss", "args.cliprange_high", "None"),
        "--delta ignored": ("VLPPOTrainer.policy_and_value_loss", "args.delta", "None"),
        "--kl_in_loss with another coefficient": (
            "VLPPOTrainer.policy_and_value_loss",
            "args.kl_in_loss * kl",
            "0.04 * kl",
        ),
        "--kl_in_loss with k1": (
            "VLPPOTrainer.policy_and_value_loss",
            'losses.kl_per_token(logps, r.ref_logps, "k3")',
            'losses.kl_per_token(logps, r.ref_logps, "k1")',
        ),
        "the reference of --kl_in_loss is the sampler": (
            "VLPPOTrainer.policy_and_value_loss",
            'losses.kl_per_token(logps, r.ref_logps, "k3")',
            'losses.kl_per_token(logps, r.logps, "k3")',
        ),
        "--use_bias_correction_kl ignored": (
            "VLPPOTrainer.policy_and_value_loss",
            "args.use_bias_correction_kl",
            "False",
        ),
    },
    loss_type={
        "--loss_type ignored in the sum": (
            "VLPPOTrainer._micro_step",
            "losses.loss_sum(policy_loss, r.loss_mask, args.loss_type)",
            'losses.loss_sum(policy_loss, r.loss_mask, "dapo")',
        ),
        "--loss_type ignored in the count": (
            "VLPPOTrainer._loss_count",
            "self.args.loss_type",
            '"dapo"',
        ),
        "dr_grpo divides by the longest answer": (
            "VLPPOTrainer._loss_count",
            "self.args.response_length",
            "r.loss_mask.shape[1]",
        ),
    },
    penalty_grows={
        "the controller moves a coefficient that nobody reads": (
            "VLPPOTrainer.token_rewards",
            "self.ppo_state.kl_coef",
            "self.args.kl_coef",
        ),
        "the KL is a bonus": (
            "VLPPOTrainer.token_rewards",
            "losses.token_rewards(scores, kl, mask, self.ppo_state.kl_coef)",
            "losses.token_rewards(scores, -kl, mask, self.ppo_state.kl_coef)",
        ),
        "--kl_estimator ignored": ("VLPPOTrainer.token_rewards", "self.args.kl_estimator", '"k1"'),
    },
    whitened={
        "whitening always centres": (
            "VLPPOTrainer._whiten",
            "losses.masked_whiten(everywhere, everywhere_mask, shift_mean)",
            "losses.masked_whiten(everywhere, everywhere_mask)",
        ),
    },
    controller={
        "the controller starts from the flag every time": (
            "VLPPOTrainer.log_metrics",
            "losses.adaptive_kl_coef(state.kl_coef, kl, args.target_kl, args.kl_horizon, count)",
            "losses.adaptive_kl_coef(args.kl_coef, kl, args.target_kl, args.kl_horizon, count)",
        ),
        "the controller counts updates, not answers": (
            "VLPPOTrainer.log_metrics",
            "losses.adaptive_kl_coef(state.kl_coef, kl, args.target_kl, args.kl_horizon, count)",
            "losses.adaptive_kl_coef(state.kl_coef, kl, args.target_kl, args.kl_horizon, 1)",
        ),
    },
)
faults(
    "base/ppo_batches.py",
    "tests/test_paths_ppo.py",
    mini_batches={
        "mini batches equal in every epoch of an update": (
            "mini_batches",
            'stable_seed(seed, "mini", update, ppo_epoch, rank * blocks + block)',
            'stable_seed(seed, "mini", update, rank * blocks + block)',
        ),
    },
)
faults(
    "common/seeds.py",
    "tests/test_paths_ppo.py",
    a_seed_is={
        "seeds depend on the process": ("stable_seed", "repr(parts).encode()", "str(hash(repr(parts))).encode()"),
    },
)
faults(
    "base/update_loop.py",
    "tests/test_paths_ppo.py",
    not_yet_logged={
        "metrics not yet logged are lost on resume": (
            "UpdateLoop._init_training_state",
            "self.store_sums({name: torch.tensor(sums, device=self.args.device) for name, sums in pending.items()})",
            "None",
        ),
        "metrics not yet logged are not saved": (
            "UpdateLoop._save_checkpoint",
            "{name: sums.tolist() for name, sums in pending.items()}",
            "{}",
        ),
    },
)
faults(
    "base/shared_prefill.py",
    "tests/test_shared_prefill.py",
    qwen2_vl={
        "packed answers stay at their prompt's last position": (
            "_PackedStep.logits_after",
            "self.position + 1",
            "self.position",
        ),
        "packed answers see the padding of prompts": ("_PackedStep.__init__", "mask is None or mask.all()", "True"),
    },
    mllama={
        "prompts are repeated in another order than answers": (
            "_repeated",
            "torch.arange(B, device=input_ids.device).repeat_interleave(K)",
            "torch.arange(B, device=input_ids.device).repeat(K)",
        ),
    },
)

# -------------------------------------------------------------------------------------------- before and around the steps

faults(
    "base/self_check.py",
    "tests/test_paths_model.py",
    check_sees={
        "the check never stops a run": ("check_log_probs", "found <= tolerance", "True"),
        "differences of both signs cancel": (
            "check_log_probs.difference",
            "(_logps(model, batch, images, plain) - expected).abs().mean().item()",
            "abs((_logps(model, batch, images, plain) - expected).mean().item())",
        ),
        "the check compares a forward with itself": (
            "check_log_probs",
            "_native_logps(model, padded)",
            "_logps(model, padded, padded['img_input_dict'])",
        ),
        "the check leaves images out of the layout of training": (
            "check_log_probs",
            'difference(batch, model.encode_images(batch["img_input_dict"]))',
            'difference(padded, padded["img_input_dict"])',
        ),
    },
    check_sees_and_names={
        "the check leaves the model in eval mode": ("check_log_probs", "model.train(training)", "None"),
    },
)
faults(
    "base/run_folder.py",
    "tests/faults/test_run_folder.py",
    another_runs_checkpoint={
        "another base is taken for the same run": (
            "_why_another_run",
            'run.get("base_fingerprint") and fingerprint and run["base_fingerprint"] != fingerprint',
            "False",
        ),
        "another script is taken for the same run": ("_why_another_run", "config != old_config", "False"),
        "the optimizer and the seed are not compared": (
            "",
            '["optim", "seed", "value_adapter", "vision_lr", "projector_lr", "loraplus_lr_ratio"]',
            '["value_adapter", "vision_lr", "projector_lr", "loraplus_lr_ratio"]',
        ),
    },
    other_settings={
        "a changed learning rate is not said": (
            "_changes",
            "not name.startswith(_NEUTRAL_PREFIXES)",
            'not name.startswith((*_NEUTRAL_PREFIXES, "learning"))',
        ),
        "history of a run is lost": ("record_run", '[*(before or {}).get("history", []), entry]', "[entry]"),
    },
    other_rows={
        "other rows are taken for the same": ("record_run", "was != now and was and now", "False"),
    },
    used_folder={
        "another run's files stay": (
            "record_run",
            "args.should_save and args.overwrite_output_dir and not resumed_from",
            "False",
        ),
        "the user's own files are removed": (
            "_written_by_runs",
            "{path for pattern in _OF_A_RUN for path in out.glob(pattern) if path.name not in own}",
            "set(out.glob('*'))",
        ),
        "what this run has written is removed": (
            "_remove_other_run",
            "_found.get(path) != path.lstat().st_mtime_ns",
            "False",
        ),
    },
    overwriting={
        "overwriting takes the model it starts from": (
            "open_run",
            "Path(value).exists() and out.resolve() in (Path(value).resolve(), *Path(value).resolve().parents)",
            "False",
        ),
    },
    share_a_folder={
        "two runs share a folder": ("lock", "fcntl.lockf(_held, fcntl.LOCK_EX | fcntl.LOCK_NB)", "None"),
    },
    run_json_lies={
        "a checkpoint's run.json is not looked at": (
            "run_of",
            "(Path(folder), Path(folder).parent)",
            "(Path(folder).parent,)",
        ),
    },
)

# ------------------------------------------------------------------------------------------- the same slips in other words

for _name, _old in {
    "rlhfv": '[text["chosen"], text["rejected"]]',
    "rlaifv": '[record["chosen"], record["rejected"]]',
    "mmrlhf": '[record["chosen"], record["rejected"]]',
}.items():
    faults(
        f"data/{_name}.py",
        "tests/test_paths_data.py",
        chosen_answer={f"the answers of {_name} are read in the other order": ("convert", _old, f"{_old}[::-1]")},
    )
faults(
    "data/__init__.py",
    "tests/test_paths_data.py",
    conversation={
        "a system message is no part of the prompt": ("_last_answer_off", "messages[:-1]", "messages[1:-1]"),
    },
)
faults(
    "data/verify.py",
    "tests/test_paths_data.py",
    another_image={
        "a group is its images, whatever is asked": (
            "_keys",
            '_key(b"".join(signatures[:shown]), asked)',
            '_key(b"".join(signatures[:shown]), "")',
        ),
    },
)
faults(
    "data/files.py",
    "tests/test_paths_data.py",
    state_covers={
        "the state of the code is that of its files' names": (
            "code_state",
            "digest.update(path.read_bytes())",
            "digest.update(path.name.encode())",
        ),
    },
)
faults(
    "base/trainer.py",
    "tests/test_paths_dpo.py",
    metrics_by_hand={
        "rewards/chosen without beta": (
            "VLDPOTrainer.log_metrics",
            '{"rewards/chosen": chosen, "rewards/rejected": rejected, "rewards/accuracies": chosen > rejected, '
            '"rewards/margins": chosen - rejected}',
            '{"rewards/chosen": chosen / self.beta, "rewards/rejected": rejected, "rewards/accuracies": chosen > rejected, '
            '"rewards/margins": chosen - rejected}',
        ),
        "logps are those of the reference": (
            "VLDPOTrainer.log_metrics",
            '{"logps/chosen": pairs.policy.chosen, "logps/rejected": pairs.policy.rejected}',
            '{"logps/chosen": pairs.reference.chosen, "logps/rejected": pairs.reference.rejected}',
        ),
    },
)
faults(
    "base/callbacks.py",
    "tests/test_paths_dpo.py",
    epoch_corrupts={
        "the epoch is a share of the run": (
            "SetEpoch.on_epoch_begin",
            "int(state.epoch or 0)",
            "int((state.epoch or 0) / (args.num_train_epochs + 1))",
        ),
    },
)
faults(
    "base/vl_trainer.py",
    "tests/test_paths_dpo.py",
    metrics_by_hand={
        "metrics are sums": (
            "VLTrainer.log",
            "sum(total / count for total, count in parts)",
            "sum(total for total, count in parts)",
        ),
    },
)
faults(
    "base/reference_cache.py",
    "tests/test_paths_dpo.py",
    two_adapters={
        "the cache's key holds the names of weights alone": (
            "weights_digest",
            "tensor.cpu().contiguous().flatten().view(torch.uint8).numpy()",
            "str(tensor.shape).encode()",
        ),
    },
    ranks={
        "a row's key lacks its responses": (
            "row_key",
            '[prompt, row["responses"], {name: row.get(name) for name in columns if name != "image_rejected"}]',
            '[prompt, {name: row.get(name) for name in columns if name != "ranks"}]',
        ),
    },
)
faults(
    "base/logps.py",
    "tests/test_paths_model.py",
    native_logits={
        "the soft cap is looked for under another name": (
            "softcap",
            '"final_logit_softcapping"',
            '"attn_logit_softcapping"',
        ),
        "the soft cap cuts instead of bending": (
            "capped",
            "cap * torch.tanh(logits / cap)",
            "logits.clamp(-cap, cap)",
        ),
    },
)
faults(
    "base/sampling.py",
    "tests/test_paths_ppo.py",
    answer_ends={
        "of several end tokens of the checkpoint the first counts": (
            "end_token_ids",
            "sorted({of_template, *of_checkpoint})",
            "sorted({of_template, *of_checkpoint[:1]})",
        ),
    },
)
faults(
    "base/resume.py",
    "tests/test_paths_checkpoints.py",
    largest_number={
        "the newest checkpoint is the one written last": (
            "newest_whole_checkpoint",
            "sorted(checkpoints_of(output_dir).items(), reverse=True)",
            "sorted(checkpoints_of(output_dir).items(), key=lambda item: Path(item[1]).stat().st_mtime, reverse=True)",
        ),
    },
)
faults(
    "base/checkpoints.py",
    "tests/test_paths_checkpoints.py",
    best_checkpoint={
        "--save_total_limit deletes the newest": (
            "SafeCheckpoints._move_old_checkpoints",
            "{by_step[now], *([str(Path(best))] if best else [])}",
            "{*([str(Path(best))] if best else [])}",
        ),
    },
)
faults(
    "models/assemble.py",
    "tests/test_paths_scripts.py",
    goes_on_training={
        "a loaded adapter's weights ask for no gradient": (
            "load_policy",
            "parameter.requires_grad",
            "not parameter.requires_grad_(False)",
        ),
    },
)
faults(
    "models/assemble.py",
    "tests/test_paths_scripts.py",
    goes_on_training={
        "the reference of a continued adapter is what trains in DPO": (
            "load_reference",
            "policy.set_adapter(Role.POLICY.adapter)",
            "policy.set_adapter(Role.REFERENCE.adapter)",
        ),
    },
)
faults(
    "eval/ledger.py",
    "tests/test_paths_eval.py",
    settings_of_its_file={
        f"another {key} goes on in the same file": (
            "",
            '("task", "data_sha256", "image_dir", "limit", "checkpoint", "adapter", "weights", "prompt", "generation")',
            repr(
                tuple(
                    k
                    for k in "task data_sha256 image_dir limit checkpoint adapter weights prompt generation".split()
                    if k != key
                )
            ),
        )
        for key in ("task", "data_sha256", "image_dir", "checkpoint", "weights", "generation")
    },
)

# -------------------------------------------------------------------------------------------------------- ported families

faults(
    "models/image_text.py",
    "tests/test_common_models.py",
    logits_to_keep={
        "logits_to_keep ignored": (
            "ImageTextForConditionalGeneration.forward",
            "slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep)",
            "outputs.last_hidden_state",
        ),
    },
    batching={
        "images of a batch in the reverse order": (
            "ImageTextModel.embed",
            "torch.cat(list(features.pooler_output))",
            "torch.cat(list(features.pooler_output)[::-1])",
        ),
    },
    attentions_have={
        "attention weights are not handed on": (
            "ImageTextForConditionalGeneration.forward",
            "outputs.attentions",
            "None",
        ),
    },
)
faults(
    "models/qwen_vl/modeling.py",
    "tests/test_common_models.py",
    missing_weights={
        "fixed positions of the pool are left as memory held them": (
            "QwenVLVisionModel._init_weights",
            "init.copy_(module.pos_embed, sincos_grid(width, int(n**0.5)))",
            "None",
        ),
    },
    mismatching={
        "images too few are passed over": (
            "QwenVLModel.get_placeholder_mask",
            "image_features is not None and mask.sum() != image_features.shape[0]",
            "image_features is not None and mask.sum() < image_features.shape[0]",
        ),
    },
)
faults(
    "models/internlm_xcomposer2/modeling.py",
    "tests/test_common_models.py",
    missing_weights={
        "partial LoRA is not initialised": (
            "InternLMXComposer2TextModel._init_weights",
            "isinstance(module, PartialLora)",
            "False",
        ),
    },
    batching={
        "the partial LoRA reads the first row's images": (
            "InternLMXComposer2Model._image_index",
            "input_ids.flatten() == self.config.image_token_id",
            "input_ids[0] == self.config.image_token_id",
        ),
    },
)
for _name in ("qwen_vl", "internlm_xcomposer2"):
    faults(
        f"models/{_name}/processing.py",
        "tests/test_common_processors.py",
        placeholders_are={
            f"a placeholder too few in {_name}": (
                f"{'QwenVL' if _name == 'qwen_vl' else 'InternLMXComposer2'}Processor.replace_image_token",
                "self.image_token * self.num_image_tokens",
                "self.image_token * (self.num_image_tokens - 1)",
            ),
        },
    )

# ------------------------------------------------------------------------------------------------------- and a few more

faults(
    "base/vl_trainer.py",
    "tests/test_paths_scripts.py",
    checks_log_probs={
        "no check before the first step": ("VLTrainer.__init__", "self.add_callback(SelfCheck(self))", "None"),
    },
)
faults(
    "base/self_check.py",
    "tests/test_paths_scripts.py",
    checks_log_probs={
        "the check always takes one row per response": (
            "SelfCheck.on_train_begin",
            'getattr(trainer.data_collator, "share_prefix", False)',
            "False",
        ),
    },
)
faults(
    "base/rm_trainer.py",
    "tests/test_paths_scripts.py",
    metrics_of_sources={
        "every source has the accuracy of all": (
            "VLRMTrainer.log_metrics",
            "right[[i for i, name in enumerate(of_pair) if name == source]]",
            "right",
        ),
        "rows that fill up a batch count": ("VLRMTrainer.log_metrics", 'rewards[batch["counted"]]', "rewards"),
    },
)
faults(
    "base/collator.py",
    "tests/test_paths_scripts.py",
    metrics_of_sources={
        "rows that fill up a batch form pairs": (
            "VLDPODataCollatorWithPadding.__call__",
            '[] if row.get("repeated") else ordered_pairs(row["ranks"], row.get("scores"), self.pairs, self.score_margin)',
            'ordered_pairs(row["ranks"], row.get("scores"), self.pairs, self.score_margin)',
        ),
    },
)
faults(
    "data/lengths.py",
    "tests/test_paths_scripts.py",
    length_limits={
        "the limits of prompt and answer are swapped": (
            "LengthLimits.from_args",
            "cls(data_args.max_length, data_args.max_prompt_length, data_args.max_target_length, data_args.overlong)",
            "cls(data_args.max_length, data_args.max_target_length, data_args.max_prompt_length, data_args.overlong)",
        ),
        "--overlong ignored": (
            "LengthLimits.from_args",
            "cls(data_args.max_length, data_args.max_prompt_length, data_args.max_target_length, data_args.overlong)",
            "cls(data_args.max_length, data_args.max_prompt_length, data_args.max_target_length)",
        ),
    },
)
faults(
    "eval/generate.py",
    "tests/test_paths_eval.py",
    nucleus={
        "--temperature ignored": (
            "generation_settings",
            '("max_new_tokens", "num_beams", "temperature", "top_p")',
            '("max_new_tokens", "num_beams", "top_p")',
        ),
        "answers are never sampled": ("generation_settings", "args.temperature > 0", "False"),
    },
)

# --------------------------------------------------------------------------------------------------------------- FSDP

faults(
    "base/fsdp.py",
    "tests/test_fsdp.py",
    weights_out_and_in_again={
        "weights that are loaded are lost with the gathered ones": ("_take_parts", "reshard(root)", "None"),
        "tied weights come apart in a checkpoint": (
            "whole_weights",
            "id(parameter) not in done",
            "True",
        ),
    },
    run_in_its_root__or__part_of_the_model={
        "the vision tower runs with parts of its weights": ("in_root", "isinstance(model, FSDPModule)", "False"),
    },
)
faults(
    "common/fsdp_flags.py",
    "tests/test_fsdp.py",
    config_of_accelerate={
        "accelerate shares a model out a second time": (
            "sharding_of_launcher",
            'environment.pop("ACCELERATE_USE_FSDP", "false")',
            'environment.get("ACCELERATE_USE_FSDP", "false")',
        ),
    },
    refused_says_what_to_write={
        "--fsdp full_shard gathers the whole model at once": (
            "sharding_of",
            'len(how) != 1 or "auto_wrap" not in given',
            "len(how) != 1",
        ),
    },
)

# ------------------------------------------------------------------------------------------------ kinds of adapters, rates

faults(
    "base/lora_start.py",
    "tests/test_lora_variants.py",
    numbers_and_files={
        "the saved adapter keeps its start": ("less_start", "first if is_A else -first", "first"),
        "the saved adapter has twice the scale": (
            "LoraOnChangedBase.save_pretrained",
            "config.r *= 2",
            "config.r *= 1",
        ),
    },
    another_processor={
        "a resumed run keeps the base of its own start": (
            "LoraOnChangedBase.load_saved",
            "layer.scaling[START] * (B @ A - now_B @ now_A).float()",
            "0",
        ),
    },
    loftq={
        "LoftQ forgets the scale": (
            "start_as_rounding_error",
            "(S[: len(A)] / layer.scaling[POLICY]).sqrt()",
            "S[: len(A)].sqrt()",
        ),
    },
)
faults(
    "base/learning_rates.py",
    "tests/test_what_trains.py",
    lora_plus={
        "LoRA+ speeds up lora_A": ("learning_rates.rate_of", '".lora_B." in name', '".lora_A." in name'),
    },
    rates_of_tower={
        "--projector_lr ignored": ("learning_rates", "flag if given else DEFAULT", "DEFAULT"),
    },
)
faults(
    "base/checkpoints.py",
    "tests/test_what_trains.py",
    resumed_run_has_the_rates={
        "a resumed run keeps the rate that was saved": (
            "SafeCheckpoints._load_optimizer_and_scheduler",
            "schedule.base_lrs = base_lrs",
            "base_lrs = schedule.base_lrs",
        ),
    },
)


# ---------------------------------------------------------------------------------------------------------------- KTO

faults(
    "base/trainer.py",
    "tests/test_paths_dpo.py",
    ranks={
        "the reference is keyed without the ranks": (
            "VLDPOTrainer.precompute_reference_logps",
            '["image_rejected", "ranks", "scores"]',
            '["image_rejected"]',
        ),
    },
)
faults(
    "base/views.py",
    "tests/test_kto.py",
    move_on_by_one={
        "an answer is its own mismatched one": ("with_mismatched", "[*counted[-1:], *counted[:-1]]", "counted"),
        "repeated rows lend their answers": (
            "with_mismatched",
            '[row for row in rows if not row.get("repeated")]',
            "[*rows]",
        ),
    },
)
faults(
    "losses/unpaired.py",
    "tests/test_kto.py",
    kto_by_hand={
        "the KL is added to bad answers' log-ratios": (
            "kto",
            "torch.sigmoid(-above)",
            "torch.sigmoid(-beta * (batch.log_ratio + batch.kl))",
        ),
        "weights of good and bad answers change places": (
            "_weighted",
            "torch.where(batch.desirable, of_good * good, of_bad * bad)",
            "torch.where(batch.desirable, of_bad * good, of_good * bad)",
        ),
    },
)
faults(
    "base/trainer.py",
    "tests/test_kto.py",
    kl_over={
        "the KL may be negative": (
            "VLDPOTrainer.kl_to_reference",
            "(total[0] / total[1].clamp(min=1)).clamp(min=0)",
            "total[0] / total[1].clamp(min=1)",
        ),
    },
)
faults(
    "base/heads.py",
    "tests/test_other_heads.py",
    vl_rlhf={
        "another program's bias is dropped": (
            "load_head",
            "None if bias is None else nn.Parameter(bias.float())",
            "None",
        ),
    },
)
faults(
    "base/hub.py",
    "tests/test_hub.py",
    strategies={
        "a checkpoint is uploaded with hub_strategy end": (
            "HubUploads.push_checkpoint",
            "strategy == HubStrategy.END",
            "False",
        ),
    },
    model_files__or__adapter_head={
        "pickled arguments are uploaded": ("model_files", "name not in NOT_UPLOADED", "True"),
    },
)

faults(
    "base/run_page.py",
    "tests/test_run_page.py",
    read_once={
        "the whole log is read at every log": (
            "RunPage.on_log",
            "self._add(state.log_history[self.read :])",
            "self._add(state.log_history)",
        ),
        "a second training shows the curves of the first": (
            "RunPage.on_train_begin",
            "self.found, self.read = {}, 0",
            "self.found, self.read = self.found, 0",
        ),
    },
    fiftieth={
        "the page is drawn whatever it costs": (
            "not_before",
            "max(now + every, began + (now - began) / SHARE)",
            "now + every",
        ),
    },
    nothing_of_a_picture={"old pictures stay in memory": ("RunPage.write", "gc.collect()", "None")},
)
faults(
    "data/verify.py",
    "tests/test_data.py",
    asked_for_its_state={
        "every row asks for the state of its files": (
            "_state_of_files",
            "names = sorted(found)",
            "names = sorted(name for name in values.to_pylist() if name)",
        ),
        "the state of rejected images is left out": (
            "_state_of_files",
            '{"images", "videos", "image_rejected"}',
            '{"images", "videos"}',
        ),
    },
)
faults(
    "common/threads.py",
    "tests/test_data.py",
    threads_share={"a task for every item": ("map_in_threads", "range(0, len(items), PART)", "range(len(items))")},
)
# ------------------------------------------------------------------------------------------------------ inference servers

faults(
    "common/openai_client.py",
    "tests/test_openai_client.py",
    fields_that_a_server_refuses={
        "refused fields are sent again": ("OpenAIClient._accepted", "name not in self._left_out", "name"),
    },
    trouble_is_tried_again={
        "an overloaded server ends the run": ("", "_TRY_AGAIN = (408, 409, 429)", "_TRY_AGAIN = (408, 409)"),
    },
)
faults(
    "base/server_rollouts.py",
    "tests/test_server_rollouts.py",
    updates_through_a_server={
        "the server keeps the first policy": ("ServerRollouts.push", "step == self.step", "self.step is not None"),
        "old adapters stay on the server": ("ServerRollouts.push", "before is not None", "before is None"),
    },
)
faults(
    "base/ppo_trainer.py",
    "tests/test_server_rollouts.py",
    weigh_the_loss={
        "importance weights left out": (
            "VLPPOTrainer.policy_and_value_loss",
            "r.sampler_logps is not None",
            "False",
        ),
    },
    dead_server={
        "answers of a server that died are lost": (
            "VLPPOTrainer._rollout_on_server",
            "self.unscored.put(prompts[m].tokens, prompts[m].places, answers, logps)",
            "None",
        ),
    },
)
faults(
    "base/processor.py",
    "tests/test_server_rollouts.py",
    read_another_prompt={
        "the server's prompt is not counted": (
            "VLProcessor.check_served_prompt",
            "reply.prompt_tokens != len(ids)",
            "False",
        ),
    },
)
faults(
    "eval/served.py",
    "tests/test_eval_served.py",
    likelihood={
        "a choice's loss without its end": (
            "_logps",
            "[logp for logp in said[start:] if logp is not None] + end",
            "[logp for logp in said[start:] if logp is not None]",
        ),
    },
)

# ------------------------------------------------------------------------------------------ answers of the policy's own

faults(
    "base/online_dpo.py",
    "tests/test_online_dpo.py",
    pairs_by_score={
        "the worse answer is chosen": (
            "scored_pairs",
            "(known[better], known[worse])",
            "(known[worse], known[better])",
        ),
        "pairs of answers counted without those that have no score": (
            "scored_pairs",
            "(known[better], known[worse])",
            "(better, worse)",
        ),
    },
    accumulation={
        "micro batches of a step sample with the same numbers": (
            "OnlineDPO.answered",
            "(m * args.world_size + args.process_index) * size",
            "args.process_index * size",
        ),
    },
)
faults(
    "data/sample.py",
    "tests/test_sample.py",
    ranks_of_scores={
        "the worst answer first": ("ranked", "-totals[k]", "totals[k]"),
        "weights of scores ignored": ("ranked", "w * (v or 0.0)", "(v or 0.0)"),
    },
)
faults(
    "eval/answer_scores.py",
    "tests/test_sample.py",
    splits_answers={
        "a reply that is neither yes nor no costs a point": (
            "says_no",
            '(re.findall(r"\\w+", reply.lower()) or [""])[0] == "no"',
            '(re.findall(r"\\w+", reply.lower()) or [""])[0] != "yes"',
        ),
    },
)

faults(
    "base/rollout_cache.py",
    "tests/test_shared_prefill.py",
    one_prefill={
        "answers in a prompt's row have each other's keys": (
            "_PackedLayer.update",
            "room[:, :, :, self.steps] = new",
            "room[:, :, :, self.steps] = new.roll(1, 2)",
        )
    },
)
faults(
    "base/packed_attention.py",
    "tests/test_fast_paths.py",
    apart={
        "the padding of prompts is attended to": ("attend_apart", "shared.masked_fill(hidden, -math.inf)", "shared"),
        "a family's scale of scores is lost": ("attend_apart", "scaling is None", "True"),
    },
)
faults(
    "base/lora_start.py",
    "tests/test_lora_variants.py",
    eva_is={
        "EVA's start is found and not taken": (
            "start_from_inputs",
            "model.get_submodule(name).lora_A[POLICY].weight.copy_(weight)",
            "None",
        )
    },
)
faults(
    "common/errors.py",
    "tests/test_resume.py",
    python_drops={
        "a dropped Ctrl-C is forgotten": ("_interrupt_again", "again.start()", "None"),
    },
)
faults(
    "args/contradictions.py",
    "tests/test_data_check.py",
    conversations_show={
        "--train_on is refused where nothing trains": (
            "_refuse_flags_of_other_rows",
            'trains and not sft and flags.get("train_on", "all") != "all"',
            'not sft and flags.get("train_on", "all") != "all"',
        )
    },
)
