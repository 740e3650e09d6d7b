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

# ---------------------------------------------------------------------------------------- what an examiner would try

faults(
    "base/ppo_trainer.py",
    "tests/test_paths_ppo.py",
    teaches_the_value_alone={
        "answers that are left out still count in grpo's mean": (
            "VLPPOTrainer._loss_count",
            "int(r.counted.sum())",
            "len(r.counted)",
        ),
        "the value's loss is divided by the tokens of the policy's": (
            "VLPPOTrainer._mini_batch_counts",
            "torch.stack([self._loss_count(r), r.mask.sum()])",
            "torch.stack([self._loss_count(r), r.loss_mask.sum()])",
        ),
        "the value function learns nothing of truncated answers": (
            "VLPPOTrainer._micro_step",
            "torch.where(r.mask, value_loss, 0)",
            "torch.where(r.loss_mask, value_loss, 0)",
        ),
        "the denominators of the two losses change places": (
            "VLPPOTrainer._micro_step",
            "policy_scale, value_scale = self.accelerator.num_processes / counts",
            "value_scale, policy_scale = self.accelerator.num_processes / counts",
        ),
    },
    vf_coef={
        "the logged loss adds the value's sum over other tokens": (
            "VLPPOTrainer.log_metrics",
            "loss[1] / tokens",
            "1.0",
        ),
    },
    controller={
        "the first update's entropy is taken over padding": (
            "VLPPOTrainer.log_metrics",
            "torch.cat([r.entropy[r.mask] for r in rollouts])",
            "torch.cat([r.entropy.flatten() for r in rollouts])",
        ),
    },
    loss_type={
        "tokens of prompts are not counted as seen": (
            "VLPPOTrainer.update",
            '(r.batch["segment_ids"] >= 0).sum()',
            '(r.batch["segment_ids"] > 0).sum()',
        ),
    },
)
faults(
    "base/ppo_trainer.py",
    "tests/test_ppo.py",
    first_step_and_one_vision_pass={
        "metrics of the first step are those of the first pass": (
            "VLPPOTrainer.optimise",
            "ppo_epoch == 0 and m == 0",
            "ppo_epoch == 0",
        ),
    },
    scoring_passes_are_those_of_each_answer_alone={
        "log-probs are those at temperature 1": ("VLPPOTrainer._tokens", "self.args.temperature", "1.0"),
    },
)
faults(
    "base/ppo_trainer.py",
    "tests/test_rl.py",
    dynamic_sampling_is_bounded={
        "dynamic sampling goes on for a round too many": (
            "VLPPOTrainer.replace_uniform_groups",
            "rounds < self.args.max_num_gen_batches",
            "rounds <= self.args.max_num_gen_batches",
        ),
    },
    dynamic_sampling_fills_an_update_with_groups_that_differ={
        "further rounds sample the places of the first": (
            "VLPPOTrainer.replace_uniform_groups",
            "next_place + local * world",
            "next_place",
        ),
        "uniform groups count as found": (
            "VLPPOTrainer.replace_uniform_groups",
            "sum(not g.uniform for g in groups)",
            "sum(g.uniform for g in groups)",
        ),
    },
    evaluation_leaves_out_what_no_reward_applies_to={
        "answers without a score enter the mean score of an evaluation": (
            "VLPPOTrainer.evaluate",
            "scores / max(scored, 1)",
            "scores / max(count, 1)",
        ),
    },
)
faults(
    "base/ppo_metrics.py",
    "tests/test_paths_ppo.py",
    tokens_by_hand={
        "the probability ratio upside down": (
            "token_metrics",
            "torch.exp(logps - r.logps)",
            "torch.exp(r.logps - logps)",
        ),
        "ratio_var is a deviation": ("token_metrics", "(ratio[mask] - 1) ** 2", "(ratio[mask] - 1).abs()"),
        "the value's clipped share leaves out truncated answers": (
            "token_metrics",
            'statistics["value_clipped"][r.mask].sum().float()',
            'statistics["value_clipped"][mask].sum().float()',
        ),
    },
    answers_by_hand={
        "entropy of the wrong sign": (
            "rollout_metrics",
            "-torch.where(r.mask, r.logps, 0).sum(1)",
            "torch.where(r.mask, r.logps, 0).sum(1)",
        ),
        "the logged penalty is that of k1 whatever --kl_estimator": (
            "rollout_metrics",
            "losses.kl_per_token(r.logps, r.ref_logps, kl_estimator)",
            'losses.kl_per_token(r.logps, r.ref_logps, "k1")',
        ),
        "the weights that are logged are those of the server over the policy": (
            "rollout_metrics",
            "losses.truncated_importance_weights(ours, theirs, cap)",
            "losses.truncated_importance_weights(theirs, ours, cap)",
        ),
        "differences of both signs cancel in what is logged of a server": (
            "rollout_metrics",
            "(ours - theirs).abs()",
            "ours - theirs",
        ),
        "an answer that is just right counts as wrong": (
            "reward_metrics",
            "values >= reward.right_from",
            "values > reward.right_from",
        ),
    },
    groups_by_hand={
        "reward_std is that of the batch": (
            "group_metrics",
            "losses.group_std(scores, groups)",
            "losses.group_std(scores, 0 * groups)",
        ),
    },
)
faults(
    "base/ppo_metrics.py",
    "tests/test_ppo.py",
    collapse_is_warned_of_with_the_step={
        "the first update is forgotten": (
            "warn_of_collapse",
            "state.first.setdefault(name, now[name])",
            "state.first.get(name, now[name])",
        ),
    },
)
faults(
    "base/ppo_batches.py",
    "tests/test_ppo.py",
    every_prompt_comes_once_per_epoch_and_devices_share_one_order={
        "prompts come in one order in every epoch": (
            "PromptBatches._order",
            'stable_seed(self.seed, "prompts", self.epoch)',
            'stable_seed(self.seed, "prompts")',
        ),
        "a resumed epoch begins with its first update": (
            "PromptBatches.__iter__",
            "range(self.first_update, self.updates)",
            "range(self.updates - self.first_update)",
        ),
    },
)
faults(
    "base/ppo_batches.py",
    "tests/test_rl.py",
    further_prompts={
        "further prompts are the same in every update": (
            "PromptBatches.by_place",
            'stable_seed(self.seed, "other prompts", step)',
            'stable_seed(self.seed, "other prompts")',
        ),
    },
    further_prompts_by_their_place={
        "further prompts may be those of the update": ("PromptBatches.by_place", "i not in taken", "True"),
    },
)
faults(
    "base/update_loop.py",
    "tests/test_ppo.py",
    resume_after_any_update_is_bit_for_bit={
        "the KL coefficient starts anew in a resumed run": (
            "PPOState.restore",
            'vars(self).update(saved["attributes"])',
            'vars(self).update(saved["attributes"] | {"kl_coef": self.kl_coef})',
        ),
    },
    collapse={
        "a resumed run measures collapses by its own first update": (
            "PPOState.restore",
            'vars(self).update(saved["attributes"])',
            'vars(self).update(saved["attributes"] | {"first": {}})',
        ),
    },
)
faults(
    "base/update_loop.py",
    "tests/test_paths_ppo.py",
    vf_coef={
        "the gradients of a mini batch stay for the next": ("UpdateLoop.optimizer_step", "model.zero_grad()", "None"),
    },
    random_numbers={
        "the epoch is that before the update": (
            "UpdateLoop._run_epoch",
            "epoch + (update + 1) / order.updates",
            "epoch + update / order.updates",
        ),
    },
    length_of_a_run={
        "a part of an epoch loses its last update": (
            "UpdateLoop.set_initial_training_values",
            "math.ceil(args.num_train_epochs * updates)",
            "int(args.num_train_epochs * updates)",
        ),
    },
)
faults(
    "base/on_policy.py",
    "tests/test_rl.py",
    a_reward_may_say_that_it_does_not_apply={
        "a score is missing where one of several rewards is": (
            "OnPolicyTrainer._total",
            "torch.stack([*parts.values()]).isnan().all(0)",
            "torch.stack([*parts.values()]).isnan().any(0)",
        ),
    },
    truncated_answers_and_overlong_penalty={
        "--overlong_penalty ignored": ("OnPolicyTrainer._total", "self.args.overlong_penalty", "1.0"),
    },
)
faults(
    "base/on_policy.py",
    "tests/test_paths_ppo.py",
    same_sampling={
        "answers kept at another temperature are taken": (
            "OnPolicyTrainer.rollout",
            "[args.temperature, args.top_p, args.response_length]",
            "[args.top_p, args.response_length]",
        ),
    },
    clipped_at_last={
        "the penalty for a missing end is taken off after the clip": (
            "OnPolicyTrainer._total",
            "return total if clip is None else total.clamp(-clip, clip)",
            (
                "return total if clip is None else losses.penalize_missing_eos(losses.penalize_missing_eos(total, r.ended, "
                "-self.args.missing_eos_penalty if self.args.missing_eos_penalty else None).clamp(-clip, clip), r.ended, "
                "self.args.missing_eos_penalty)"
            ),
        ),
        "the overlong penalty falls from the longest answer on": (
            "OnPolicyTrainer._total",
            "losses.overlong_penalty(lengths, longest, self.args.overlong_buffer, self.args.overlong_penalty)",
            "losses.overlong_penalty(lengths, lengths.max(), self.args.overlong_buffer, self.args.overlong_penalty)",
        ),
    },
)
faults(
    "base/dynamic_sampling.py",
    "tests/test_rl.py",
    dynamic_sampling_fills_an_update_with_groups_that_differ={
        "all groups are as uniform as the first": ("groups_of", "uniform[numbers[0]]", "uniform[0]"),
        "uniform groups are taken first": ("choose", "(g.uniform, g.place)", "(not g.uniform, g.place)"),
    },
    stands_at_it={
        "scores of replaced groups stay prompt by prompt": ("micro_batch_of", "[flat[i] for i in order]", "flat"),
    },
)
faults(
    "base/rollout.py",
    "tests/test_paths_ppo.py",
    loss_type={
        "of several end tokens the first alone ends an answer": (
            "Sampled.of",
            "ids[-1] in end_ids",
            "ids[-1] == end_ids[0]",
        ),
    },
)
faults(
    "base/rollout.py",
    "tests/test_rl.py",
    stands_at_it={
        "a server's log-probs stay prompt by prompt": (
            "Sampled.of",
            "[logp for b, k in order for logp in sampler_logps[b][k]]",
            "[logp for b in range(B) for k in range(K) for logp in sampler_logps[b][k]]",
        ),
    },
    answers_are_compared_with_those_to_their_own_prompt={
        "prompts of different micro batches are one group": (
            "Sampled.groups",
            "[self.places[b] for b in self.prompt_of]",
            "self.prompt_of",
        ),
    },
)
faults(
    "base/sampling.py",
    "tests/test_ppo.py",
    sampling_does_not_depend_on_how_many_are_generated_at_once={
        "all answers to a prompt draw the same numbers": (
            "Sampler._uniforms",
            "torch.rand(shape, generator=torch.Generator().manual_seed(stable_seed(seed, place)))",
            "torch.rand(shape[1], generator=torch.Generator().manual_seed(stable_seed(seed, place))).expand(shape)",
        ),
    },
    sampling_follows_the_distribution={
        "a token of probability 0 may be sampled": (
            "SeededSampling.__call__",
            "cumulative <= target",
            "cumulative < target",
        ),
    },
    follows_the_distribution={
        "the nucleus is that of temperature 1": (
            "SeededSampling.__call__",
            "self.top_p(input_ids, scores)",
            "self.top_p(input_ids, scores * self.temperature) / self.temperature",
        ),
    },
)
faults(
    "base/sampling.py",
    "tests/test_paths_ppo.py",
    sampling_is_that={
        "PPO's --top_p ignored": (
            "Sampler.sample",
            "SeededSampling(uniforms.to(args.device), args.temperature, args.top_p)",
            "SeededSampling(uniforms.to(args.device), args.temperature)",
        ),
        "rollouts are sampled at temperature 1": (
            "Sampler.sample",
            "SeededSampling(uniforms.to(args.device), args.temperature, args.top_p)",
            "SeededSampling(uniforms.to(args.device), 1.0, args.top_p)",
        ),
    },
)
faults(
    "losses/policy_gradient.py",
    "tests/test_paths_ppo.py",
    groups_by_hand={
        "groups whose scores differ little are uniform": ("uniform_groups", "1e-8", "0.1"),
    },
)
faults(
    "losses/ppo.py",
    "tests/test_losses.py",
    adaptive_kl_coef={
        "the KL coefficient moves the wrong way": (
            "adaptive_kl_coef",
            "1 + error * num_samples / horizon",
            "1 - error * num_samples / horizon",
        ),
    },
)
faults(
    "args/ppo.py",
    "tests/test_rl.py",
    passes_that_are_read={
        "the second mini batch is compared with itself": (
            "PPOConfig.reads_old_logps",
            "self.num_ppo_epochs > 1 or self.num_mini_batches > 1",
            "self.num_ppo_epochs > 1",
        ),
    },
    defaults_of_estimators={
        "flags by estimator have the defaults of gae": (
            "PPOConfig._fill_in_for_estimator",
            "with_critic if self.has_value_function else without",
            'with_critic if without is None or name == "temperature" else with_critic if self.has_value_function else without',
        ),
        "PPO's lambda is 0.9 by default": ("", "(0.95, None)", "(0.9, None)"),
        "PPO's KL coefficient is 0.1 by default": ("", "(0.05, 0.0)", "(0.1, 0.0)"),
        "GRPO makes four passes by default": ("", "(4, 1)", "(4, 4)"),
    },
)
faults(
    "args/ppo.py",
    "tests/test_paths_ppo.py",
    length_of_a_run={
        "--total_episodes counts updates": (
            "PPOConfig.__post_init__",
            "self.total_episodes // size",
            "self.total_episodes",
        ),
    },
)
faults(
    "base/preference_inputs.py",
    "tests/test_preference_losses.py",
    stands_at_its_answer={
        "changed tokens of the two answers change places": (
            "preference_batch",
            '{"chosen_changed": batch["chosen_changed"], "rejected_changed": batch["rejected_changed"]}',
            '{"chosen_changed": batch["rejected_changed"], "rejected_changed": batch["chosen_changed"]}',
        ),
        "the text-only log-probs change places": (
            "preference_batch",
            '{"text_only_chosen": text_only[chosen], "text_only_rejected": text_only[rejected]}',
            '{"text_only_chosen": text_only[rejected], "text_only_rejected": text_only[chosen]}',
        ),
        "the chosen answer has the rejected one's length": (
            "preference_batch",
            "lengths[chosen]",
            "lengths[batch['rejected']]",
        ),
        "the corrupted image is read of the rejected answer": (
            "_pair_logps",
            'logps[batch["corrupted_of"][chosen]]',
            'logps[batch["corrupted_of"][chosen] - 1]',
        ),
        "the policy's own answer is the given one": (
            "_pair_logps",
            'logps[batch["negative_of"][chosen]]',
            "logps[rejected]",
        ),
        "the second image is not read": ("_pair_logps", 'logps[batch["image_rejected_of"][chosen]]', "logps[chosen]"),
    },
    token_kl_and_logit_shift_against_full_logits={
        "the KLs of the two answers change places": (
            "preference_batch",
            '{"chosen_token_kl": kl[chosen], "rejected_token_kl": kl[rejected]}',
            '{"chosen_token_kl": kl[rejected], "rejected_token_kl": kl[chosen]}',
        ),
        "the KL over the vocabulary has policy and reference exchanged": (
            "preference_batch",
            "vocabulary_kl(reference.head, reference.hidden, policy.head, policy.hidden)",
            "vocabulary_kl(policy.head, policy.hidden, reference.head, reference.hidden)",
        ),
        "what the image does for a token has the wrong sign": (
            "_logit_shift",
            "logits - logits[corrupted.clamp(min=0)]",
            "logits[corrupted.clamp(min=0)] - logits",
        ),
    },
    a_loss_reads_columns_of_the_users_own={
        "severity of the chosen answer in the place of the rejected one's": (
            "preference_batch",
            "Sides(values[chosen], values[rejected])",
            "Sides(values[rejected], values[chosen])",
        ),
    },
    negatives_are_the_policys_own_tokens={
        "the policy's answer begins with the given token": (
            "with_negatives",
            "torch.where(mask, said, ids[negatives, : said.shape[1]])",
            "torch.where(mask, said.roll(1, 1), ids[negatives, : said.shape[1]])",
        ),
    },
)
faults(
    "base/preference_inputs.py",
    "tests/test_equivalence.py",
    the_loss_of_ragged_rows_by_hand={
        "tokens of all answers count as chosen ones": (
            "pairs_and_chosen_tokens",
            'batch["completion_mask"].sum(1)[counted].sum()',
            'batch["completion_mask"].sum()',
        ),
    },
)
faults(
    "base/preference_inputs.py",
    "tests/test_kto.py",
    losses_kl_and_metrics_are_trls={
        "good answers are the first half": ("unpaired_batch", 'batch["desirable"]', 'batch["desirable"].flip(0)'),
    },
)
faults(
    "base/views.py",
    "tests/test_preference_losses.py",
    corrupted_image_is_one_more_row_and_one_more_picture={
        "v' repeats the worse answers": (
            "better_responses",
            "{better for better, _ in pairs} or {0}",
            "{worse for _, worse in pairs} or {0}",
        ),
    },
    the_draw={
        "v' has the images of the first row": ("View.of", "list(others)", "list(images[0])"),
    },
)
faults(
    "base/views.py",
    "tests/test_kto.py",
    answers_move_on_by_one_within_a_batch={
        "the first answer of a batch takes the last of the batch before": (
            "fixed_mismatches",
            "last if last > start else start - 1",
            "start - 1",
        ),
    },
)
faults(
    "base/collator.py",
    "tests/test_equivalence.py",
    evaluation_does_not_depend_on_its_batches={
        "rows that fill up an evaluation count in SFT": (
            "VLSFTDataCollatorWithPadding.__call__",
            'row.get("repeated")',
            "False",
        ),
    },
)
faults(
    "base/collator.py",
    "tests/test_preference_losses.py",
    the_draw_depends_on_seed_epoch_and_row_alone={
        "v' does not depend on --seed": (
            "VLDPODataCollatorWithPadding._draw",
            "stable_seed(self.seed, self.epoch, [(row['prompt'], row['responses']) for row in rows])",
            "stable_seed(self.epoch, [(row['prompt'], row['responses']) for row in rows])",
        ),
        "noise on the pixels of v": (
            "VLDPODataCollatorWithPadding._diffused",
            "torch.cat([pixels[:first], noisy, pixels[last:]])",
            "torch.cat([noisy, pixels[first:]])",
        ),
    },
    negatives_are={
        "POVID's policy speaks on the clean image": (
            "VLDPODataCollatorWithPadding._probe",
            "self.corruption == 'diffusion' and pixels is not None",
            "False",
        ),
    },
)
faults(
    "base/collator.py",
    "tests/test_fast_paths.py",
    batches_are_grouped_by_packed_length={
        "lengths of rows leave prompts out": (
            "VLDPODataCollatorWithPadding.length",
            'batch["segment_ids"] >= 0',
            'batch["segment_ids"] > 0',
        ),
    },
    cached_reference_gives_the_same_losses={
        "a row takes the cached log-probs of the row before": (
            "VLDPODataCollatorWithPadding._reference",
            "(row_of == b)[:, None]",
            "(row_of == (b + 1) % len(features))[:, None]",
        ),
    },
)
faults(
    "base/collator.py",
    "tests/test_rm.py",
    loss_is_the_mean_over_rows_of_the_mean_over_ordered_pairs={
        "a row's margin is given once": (
            "VLDPODataCollatorWithPadding._add_columns",
            "[float(row[column]) for row, row_pairs in zip(features, pairs, strict=True) for _ in row_pairs]",
            "[float(features[0][column]) for row, row_pairs in zip(features, pairs, strict=True) for _ in row_pairs]",
        ),
    },
)
faults(
    "base/collator.py",
    "tests/test_paths_scripts.py",
    metrics_of_sources_and_rows_that_only_fill_up_a_batch={
        "source of the row before": (
            "VLRMDataCollatorWithPadding.__call__",
            '[row.get("source") for row in features]',
            '[features[b - 1].get("source") for b in range(len(features))]',
        ),
    },
)
faults(
    "base/trainer.py",
    "tests/test_equivalence.py",
    evaluated_losses={
        "the tokens of an evaluation's SFT part are pairs": (
            "VLDPOTrainer._store_evaluated_losses",
            "self.count_items(batch)[1]",
            "self.count_items(batch)[0]",
        ),
    },
    accumulated_micro_batches_are_one_large_batch={
        "a mixture's chosen tokens are those of the micro batch": (
            "VLDPOTrainer.compute_loss",
            "chosen_tokens / pairs",
            "self.count_items(batch)[1] / self.count_items(batch)[0]",
        ),
    },
)
faults(
    "base/trainer.py",
    "tests/test_kto.py",
    losses_kl_and_metrics_are_trls={
        "KTO's margin adds the two sides": (
            "VLDPOTrainer._log_answers",
            "sum_and_count(-rewards[~good])",
            "sum_and_count(rewards[~good])",
        ),
        "KTO's log-probs of good answers are those of bad ones": (
            "VLDPOTrainer._log_answers",
            '{"logps/chosen": answers.policy[good], "logps/rejected": answers.policy[~good]}',
            '{"logps/chosen": answers.policy[~good], "logps/rejected": answers.policy[good]}',
        ),
    },
)
faults(
    "base/trainer.py",
    "tests/test_paths_scripts.py",
    goes_on_training={
        "the reference of a loaded adapter is the bare base in DPO": (
            "VLDPOTrainer.reference_context",
            "REFERENCE_ADAPTER if REFERENCE_ADAPTER in policy.peft_config else None",
            "None",
        ),
    },
    sfts_loss={
        "SFT's evaluated loss has the wrong sign": (
            "VLSFTTrainer.compute_loss",
            '{"loss": -outputs.logps}',
            '{"loss": outputs.logps}',
        ),
    },
)
faults(
    "base/vl_trainer.py",
    "tests/test_equivalence.py",
    sensitivity={
        "the sensitivity to images is a sum over batches": (
            "VLTrainer.image_sensitivity",
            "torch.cat(changes).mean().item()",
            "torch.cat(changes).sum().item()",
        ),
        "the sensitivity to images lets both signs cancel": (
            "VLTrainer.image_sensitivity",
            "(own - other).abs().float().cpu()",
            "(own - other).float().cpu()",
        ),
        "images of an evaluation are exchanged for the row's own": (
            "VLTrainer.image_sensitivity",
            "batch_rows[1:] + batch_rows[:1]",
            "batch_rows[0:1] + batch_rows[1:]",
        ),
    },
    evaluation_does_not_depend_on_its_batches={
        "the first row that fills up an evaluation counts twice": (
            "FilledUp.__getitem__",
            "index >= len(self.rows)",
            "index > len(self.rows)",
        ),
        "the last rows of an evaluation are dropped": (
            "VLTrainer.get_eval_dataloader",
            "fill = self.args.world_size > 1 or self.args.dataloader_drop_last",
            "fill = self.args.world_size > 1",
        ),
    },
)
faults(
    "base/vl_trainer.py",
    "tests/test_paths_dpo.py",
    whatever_dropout={
        "tokens of prompts are not counted in training": (
            "VLTrainer.training_step",
            'inputs["segment_ids"] >= 0',
            'inputs["segment_ids"] > 0',
        ),
    },
)
faults(
    "base/rm_trainer.py",
    "tests/test_rm.py",
    loss_is_the_mean_over_rows_of_the_mean_over_ordered_pairs={
        "a row counts as often as it has pairs": (
            "VLRMTrainer.ranking_loss",
            'row_mean(per_pair, batch["rows"][batch["chosen"]])',
            'row_mean(per_pair, batch["chosen"])',
        ),
        "margins of the data ignored": ("VLRMTrainer.ranking_loss", 'batch.get("margin")', "None"),
        "--center_rewards_coefficient ignored": (
            "VLRMTrainer.ranking_loss",
            "self.args.center_rewards_coefficient",
            "None",
        ),
    },
    row_of_equals={
        "rows without a pair are part of the mean": (
            "VLRMTrainer.count_items",
            'len(batch["rows"][batch["chosen"]].unique())',
            'len(batch["rows"].unique())',
        ),
    },
    learns_reports_and_reloads={
        "margins of the evaluation before stay in the calibration": (
            "VLRMTrainer.evaluate",
            "self._margins.clear()",
            "None",
        ),
    },
)
faults(
    "base/rm_trainer.py",
    "tests/test_paths_scripts.py",
    metrics_of_sources={
        "the mean reward leaves out the second of a pair": (
            "VLRMTrainer.log_metrics",
            'rewards[batch["counted"]]',
            'rewards[batch["chosen"]]',
        ),
    },
)
faults(
    "base/heads.py",
    "tests/test_rm.py",
    rewards_are_those_of_each_answer_alone={
        "rewards lie on the grid of bf16": (
            "ScalarHead.forward",
            "torch.autocast(hidden.device.type, enabled=False)",
            "torch.autocast(hidden.device.type, dtype=torch.bfloat16)",
        ),
    },
    resume_continues_bit_for_bit={
        "a resumed run has a fresh head": ("HeadModel.load_checkpoint", "self.head is not None", "False"),
    },
)
faults(
    "base/reference_cache.py",
    "tests/test_paths_dpo.py",
    keys_cover_by_hand={
        "a row's key lacks earlier turns": (
            "row_key",
            'processor.render(row["prompt"], add_generation_prompt=True, images=images, videos=videos)',
            'row["prompt"][-1]["content"]',
        ),
        "the cache's key lacks buffers": (
            "weights_digest",
            "[*model.named_parameters(), *model.named_buffers()]",
            "[*model.named_parameters()]",
        ),
    },
)
faults(
    "base/reference_cache.py",
    "tests/test_fast_paths.py",
    whatever_matters_changes_the_key={
        "a row's key lacks its images": (
            "row_key",
            '[*row["images"], *films, *([row["image_rejected"]] if "image_rejected" in columns else [])]',
            '[*films, *([row["image_rejected"]] if "image_rejected" in columns else [])]',
        ),
    },
)
faults(
    "base/reference_cache.py",
    "tests/test_videos.py",
    the_reference_cache_sees_another_film={
        "a row's key lacks its films": (
            "row_key",
            '[*row["images"], *films, *([row["image_rejected"]] if "image_rejected" in columns else [])]',
            '[*row["images"], *([row["image_rejected"]] if "image_rejected" in columns else [])]',
        ),
    },
)
faults(
    "base/reference_pass.py",
    "tests/test_fast_paths.py",
    whatever_matters_changes_the_key={
        "the cache's key lacks the length limits": ("about_reference", "dataclasses.asdict(collator.limits)", "{}"),
        "the cache's key lacks the processor": ("about_reference", "processor_digest(processor)", '""'),
    },
    cached_reference_gives_the_same_losses={
        "a row's images may change unseen once the reference has read them": (
            "ReferencePass.add_to",
            "image_states(row)",
            "[]",
        ),
    },
    a_second_image_of_the_row_is_cached_too={
        "log-probs of the further image are kept with those of the row before": (
            "ReferencePass._compute",
            "row_of == b",
            "batch['rows'] == b",
        ),
    },
)
faults(
    "base/reference_pass.py",
    "tests/test_paths_dpo.py",
    keys_cover_by_hand={
        "the cache's key lacks the pairs of a second image": (
            "about_reference",
            "[collator.pairs, collator.score_margin] if second_image else None",
            "None",
        ),
        "the cache's key lacks the configuration": (
            "about_reference",
            '{k: v for k, v in config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}',
            "{}",
        ),
    },
)
faults(
    "data/pairs.py",
    "tests/test_data.py",
    pairs_of_ranked_responses={
        "a pair that is just far enough apart is left out": (
            "ordered_pairs",
            "gaps.get(pair, -1) >= least",
            "gaps.get(pair, -1) > least",
        ),
        "a negative margin keeps the smallest gap": (
            "ordered_pairs",
            "max((g for g in gaps.values() if g > 0), default=0)",
            "min((g for g in gaps.values() if g > 0), default=0)",
        ),
        "best against second best": ("ordered_pairs", "(levels[0][0], levels[-1][0])", "(levels[0][0], levels[1][0])"),
        "a score of 0 is a missing one": (
            "ordered_pairs",
            "(better := scores[i]) is not None and (worse := scores[j]) is not None",
            "(better := scores[i]) and (worse := scores[j])",
        ),
    },
)
faults(
    "data/lengths.py",
    "tests/test_data_lengths.py",
    cut_and_prompts={
        "a prompt that just fits is dropped": (
            "fit",
            "prompt_tokens > longest_prompt",
            "prompt_tokens >= longest_prompt",
        ),
        "a prompt may fill --max_length whole": ("fit", "limits.max_length - 1", "limits.max_length"),
        "answers are cut at their beginning": ("fit", "list(ids[:room])", "list(ids[-room:])"),
        "--max_length bounds the answer alone": ("fit", "limits.max_length - prompt_tokens", "limits.max_length"),
    },
    counted={
        "shortened rows are counted by their answers": ("fit_row", "any(lost)", "sum(n > 0 for n in lost)"),
    },
)
faults(
    "data/splits.py",
    "tests/test_data.py",
    held_out_rows_stay_when_rows_are_added={
        "more than --eval_ratio is held out": ("held_out", '"right"', '"left"'),
    },
    evaluation_rows_are_never_training_rows_by_content={
        "the split does not depend on the seed": ("held_out", "_shuffled(keys, seed)", "_shuffled(keys, 0)"),
    },
    data_ratio={
        "--data_ratio takes the first rows": (
            "kept",
            "np.random.default_rng(seed).permutation(num_rows)",
            "np.arange(num_rows)",
        ),
    },
    interleaving={
        "a set that repeats has one order in every repetition": (
            "interleaved",
            "np.concatenate([rng.permutation(size) for _ in range(-(-quota // size))] or [rows[:0]])[:quota]",
            "np.concatenate([rng.permutation(size)] * -(-quota // size) or [rows[:0]])[:quota]",
        ),
    },
    interleaving_follows_the_weights_and_is_even={
        "sets follow each other": (
            "interleaved",
            "np.argsort(np.concatenate(place), kind='stable')",
            "np.arange(total)",
        ),
        "all sets have equal shares": (
            "_quotas",
            "np.cumsum(weights) / np.sum(weights) * total",
            "np.arange(1, len(weights) + 1) / len(weights) * total",
        ),
    },
)
faults(
    "data/__init__.py",
    "tests/test_data.py",
    evaluation_rows_are_never_training_rows_by_content={
        "--data_ratio ignored in training": ("load_train_eval", "~out & keep", "~out"),
        "--data_ratio ignored in the held-out rows": ("load_train_eval", "out & keep", "out"),
    },
    eval_data_path_takes_its_rows_out_of_training={
        "rows of --eval_data_path stay in training": (
            "load_train_eval",
            "np.isin(group, np.concatenate([part.group for part in eval_parts]))",
            "np.isin(group, np.concatenate([part.content for part in eval_parts]))",
        ),
    },
    pair_of_the_flags={
        "--pairs does not say which rows hold a pair": (
            "checked_rows",
            "args.pairs if preference else None",
            "'all' if preference else None",
        ),
    },
)
faults(
    "data/__init__.py",
    "tests/test_data_layouts.py",
    labels_of_single={
        "a prompt's row keeps its label": (
            "_as_prompts",
            "features_of(have, False).keys() - features.keys()",
            "features_of('preference', False).keys() - features.keys()",
        ),
    },
)
faults(
    "data/verify.py",
    "tests/test_data.py",
    keys_of_rows={
        "rows that differ in their ranks are one row": ("_keys", 'row.get("ranks")', "None"),
        "rows that differ in their label are one row": ("_keys", 'kind == "unpaired"', "False"),
        "rows that differ in the key of their answer are one row": ("_keys", 'row.get("reference")', "None"),
        "spaces make another question": (
            "_keys",
            '" ".join(first_user_text(messages).replace(IMAGE_MARK, " ").replace(VIDEO_MARK, " ").split())',
            'first_user_text(messages).replace(IMAGE_MARK, " ").replace(VIDEO_MARK, " ")',
        ),
        "a margin of 0 needs no scores": ("_check_pairs", "score_margin >= 0", "score_margin > 0"),
        "the picture of image_rejected does not tell a row": (
            "verify_row",
            "[*(found.signature for found in checked), *films, *others]",
            "[*(found.signature for found in checked), *films]",
        ),
    },
    images_are_looked_at_as_asked={
        "--check_images sample looks at the first rows alone": ("verify_batch", "index % every == 0", "index < every"),
    },
)
faults(
    "data/hadpo.py",
    "tests/test_data_layouts.py",
    hadpo_descriptions_are_one_row_of_all_answers={
        "HA-DPO's answers change places": (
            "convert",
            "[0] * len(good) + [1] * len(bad)",
            "[1] * len(good) + [0] * len(bad)",
        ),
        "a question that was answered right is a pair": ("convert", 'record.get("correct")', "False"),
    },
    hadpo={
        "every picture is described on the same request": (
            "convert",
            "DESCRIBE[int(str(number)) % len(DESCRIBE)]",
            "DESCRIBE[0]",
        ),
    },
)
faults(
    "data/plain_dpo.py",
    "tests/test_data.py",
    plain_dpo_takes_one_image_several_or_none={
        "chosen and rejected swapped in plain_dpo": ("convert", "[0, 1]", "[1, 0]"),
    },
)
faults(
    "data/vlfeedback_paired.py",
    "tests/test_data.py",
    vlfeedback_parquet_with_ties_and_ratings_that_are_no_numbers={
        "a response's score is the sum of its aspects": ("_score", "sum(ratings) / len(ratings)", "sum(ratings)"),
        "a response's score is its first aspect's": ("_score", "sum(ratings) / len(ratings)", "ratings[0]"),
    },
)
faults(
    "data/conversational.py",
    "tests/test_data_layouts.py",
    layout_is_read_as_it_is_meant={
        "chosen and rejected swapped in any other set": (
            "_preference",
            '[_answer(chosen, "chosen"), _answer(rejected, "rejected")]',
            '[_answer(rejected, "rejected"), _answer(chosen, "chosen")]',
        ),
        "chosen and rejected swapped beside a conversation": (
            "_with_rejected",
            '[_answer(chosen, "messages"), _answer(rejected, name)]',
            '[_answer(rejected, name), _answer(chosen, "messages")]',
        ),
        "an instruction's input is left out": (
            "asked",
            "f\"{value}\\n{text_of(record['input'], '`input`')}\".strip(\"\\n\")",
            'f"{value}".strip("\\n")',
        ),
    },
    layout_of_the_documentation={
        "earlier turns follow the question": ("asked", "[*earlier, *messages]", "[*messages, *earlier]"),
    },
    labels_of_single_answers={
        "labels are turned over": (
            "_unpaired",
            '{"prompt": messages[:-1], "responses": [messages[-1]["content"]], "label": label}',
            '{"prompt": messages[:-1], "responses": [messages[-1]["content"]], "label": not label}',
        ),
    },
)
faults(
    "data/conversational.py",
    "tests/test_paths_data.py",
    ranks_beside={
        "scores go before ranks": (
            "ranked",
            "dense_ranks(scores) if ranks is None else numbers_of(ranks, '`ranks`', len(responses))",
            "dense_ranks(scores) if scores is not None else numbers_of(ranks, '`ranks`', len(responses))",
        ),
    },
)
faults(
    "data/rows.py",
    "tests/test_data_layouts.py",
    scores_written={
        "scores under rating_chosen change places": (
            "",
            '("rating_chosen", "rating_rejected")',
            '("rating_rejected", "rating_chosen")',
        ),
        "scores under chosen_rating change places": (
            "",
            '("chosen_rating", "rejected_rating")',
            '("rejected_rating", "chosen_rating")',
        ),
        "scores under score_chosen change places": (
            "",
            '("score_chosen", "score_rejected")',
            '("score_rejected", "score_chosen")',
        ),
    },
    labels_of_single={
        "undesirable answers are good ones": (
            "",
            (
                '((True, ("true", "1", "yes", "good", "desirable", "chosen")), (False, ("false", "0", "no", "bad", '
                '"undesirable", "rejected")))'
            ),
            (
                '((True, ("true", "1", "yes", "good", "desirable", "chosen", "undesirable")), (False, ("false", "0", "no", '
                '"bad", "rejected")))'
            ),
        ),
    },
)
faults(
    "data/rows.py",
    "tests/test_data.py",
    plain_dpo_takes_one_image_several_or_none={
        "images without a mark stand behind the question": (
            "_place_marks",
            'mark * number + first["content"]',
            'first["content"] + mark * number',
        ),
        "severity of the two answers changes places": (
            "preference",
            "row[name] = number_of(value, label) if of == 'row' else numbers_of(value, label, len(responses))",
            "row[name] = number_of(value, label) if of == 'row' else numbers_of(value, label, len(responses))[::-1]",
        ),
    },
    system_and_earlier={
        "images without a mark stand in the last question": (
            "_place_marks",
            'next(message for message in messages if message["role"] == "user")',
            '[message for message in messages if message["role"] == "user"][-1]',
        ),
    },
    every_bad_row_is_refused_with_its_reason={
        "responses that are equal but for spaces are two": ("_check_responses", "text.strip()", "text"),
    },
)
faults(
    "data/stream.py",
    "tests/test_streaming.py",
    evaluation_rows_are_never_training_rows={
        "streamed rows may be evaluation rows": (
            "StreamedRows._problem",
            "verdict.group in self.held_out",
            "verdict.content in self.held_out",
        ),
    },
    conversations_and_pairs_serve_as_prompts={
        "a streamed prompt holds its answer": ("RowStream.as_kind", "messages[:-1]", "messages"),
    },
    rows_are_drawn_from_a_buffer={
        "a row that was drawn is drawn again": ("StreamedRows._drawn", "buffer[place] = row", "None"),
    },
    several_sets_get_their_shares={
        "streams take turns whatever their weights": (
            "StreamedRows._mixed",
            "weight * (sum(taken) + 1) / sum(self.weights) - n",
            "-n",
        ),
    },
    drawn_set={
        "--streaming reads rows of one micro batch": (
            "streaming_of",
            "training_args.train_batch_size * training_args.gradient_accumulation_steps * training_args.world_size",
            "training_args.train_batch_size * training_args.world_size",
        ),
    },
)
faults(
    "base/processor.py",
    "tests/test_processor.py",
    labels_are_the_assistants_text_and_its_end_token={
        "--train_on last trains the first answer": (
            "VLProcessor._fill_in",
            "not remaining",
            "len(remaining) == len(answers) - 1",
        ),
    },
    last_answer_begins={
        "the last answer begins a token too late": ("answer_start", "i + 1", "i + 2"),
    },
)
faults(
    "base/processor.py",
    "tests/test_models.py",
    packed_rows_equal={
        "a response's tokens have the kind of the last token of the prompt": (
            "VLProcessor.follow_tokens",
            "values[-1] if of_response is None else of_response",
            "values[-1]",
        ),
    },
)
faults(
    "base/processor.py",
    "tests/test_ppo.py",
    a_cut_answer_is_worth_the_same_to_adapter_and_model={
        "answers that were cut off end": (
            "VLProcessor.encode_responses",
            "[self.encode_response(response, end) for response, end in zip(responses, ends, strict=True)]",
            "[self.encode_response(response) for response, end in zip(responses, ends, strict=True)]",
        ),
    },
)
faults(
    "base/logps.py",
    "tests/test_paths_model.py",
    log_probs_are_those_of_the_native_logits={
        "the entropy is that of temperature 1 in the plain path": (
            "token_logps",
            "torch.distributions.Categorical(logits=logits)",
            "torch.distributions.Categorical(logits=logits * temperature)",
        ),
    },
    gradients_of_divergences={
        "the head's bias is left out of the divergences": (
            "all_logits",
            "nn.functional.linear(hidden, lm_head.weight, lm_head.bias)",
            "nn.functional.linear(hidden, lm_head.weight)",
        ),
        "no gradient to the head's bias": (
            "_VocabularyKL.backward",
            "torch.autograd.grad(kl, [inputs[i] for i in needed], outer)",
            (
                "[g if i < 2 else torch.zeros_like(g) for i, g in zip(needed, torch.autograd.grad(kl, [inputs[i] for i in "
                "needed], outer))]"
            ),
        ),
    },
)
faults(
    "base/logps.py",
    "tests/test_preference_losses.py",
    stands_at_its_answer={
        "the head's bias is left out of the logits of tokens": (
            "token_logits",
            "logits if lm_head.bias is None else logits + lm_head.bias[token_ids]",
            "logits",
        ),
    },
)
faults(
    "base/packing.py",
    "tests/test_fast_paths.py",
    common_beginning_leaves_every_response_a_token={
        "all of the shortest answer may be shared": (
            "common_beginning",
            "min(map(len, responses)) - 1",
            "min(map(len, responses))",
        ),
    },
)
faults(
    "base/packing.py",
    "tests/test_packing.py",
    every_response_restarts_behind_the_prompt={
        "answers go on behind the prompt and the answers before": (
            "packed_positions",
            "offset_in_segment(segment_ids) + torch.where(segment_ids == 0, 0, shared_length)",
            "torch.arange(segment_ids.shape[1], device=segment_ids.device).expand_as(segment_ids)",
        ),
    },
    a_response_sees_the_prompt_and_itself_only={
        "answers see each other": ("packed_mask", "key == query", "key > 0"),
    },
    no_other_run={
        "two images beside each other see each other": (
            "same_span",
            "number[:, :, None] == number[:, None, :]",
            "inside[:, None, :]",
        ),
    },
    layout_of_two_rows_by_hand={
        "the first token of an answer is predicted one place too early": (
            "pack_rows",
            "torch.arange(P - 1, P + S)",
            "torch.arange(P - 2, P + S - 1)",
        ),
    },
)
faults(
    "base/corruption.py",
    "tests/test_preference_losses.py",
    corruptions_by_hand={
        "noise without the schedule's root": ("diffuse", "(1 - kept).sqrt() * noise", "(1 - kept) * noise"),
        "noise of another step": (
            "diffuse",
            "torch.cumprod(1 - betas, dim=0)[step]",
            "torch.cumprod(1 - betas, dim=0)[step - 1]",
        ),
        "a crop of a fifth to all of the picture": (
            "corrupt_picture",
            "rng.uniform(0.01, 0.2)",
            "rng.uniform(0.2, 1.0)",
        ),
        "patches cover a quarter": ("corrupt_picture", "rng.permutation(256)[:128]", "rng.permutation(256)[:64]"),
    },
    the_draw_depends_on_seed_epoch_and_row_alone={
        "a row keeps its own picture": (
            "swap_pictures",
            "[*pictures[b + 1:], *pictures[:b]]",
            "[*pictures[b:], *pictures[:b]]",
        ),
    },
)
faults(
    "base/callbacks.py",
    "tests/test_preference_losses.py",
    running_delta_survives_a_resume={
        "the running mean is forgotten in a checkpoint": (
            "RunningDelta.state",
            '{"mean": self.mean.item(), "count": int(self.count)}',
            '{"mean": 0.0, "count": 0}',
        ),
    },
    running_delta_is_the_mean_reward_of_training_batches={
        "the running mean weighs every batch alike": (
            "RunningDelta.with_rewards",
            "mean_here.expand(count).cpu()",
            "mean_here.cpu()",
        ),
    },
)
faults(
    "base/online_dpo.py",
    "tests/test_online_dpo.py",
    flags_by_hand={
        "every step of online DPO samples with the same numbers": (
            "OnlineDPO.answered",
            'stable_seed(args.seed, "rollout", self.state.global_step)',
            'stable_seed(args.seed, "rollout")',
        ),
        "the margin of scores has the wrong sign": (
            "OnlineDPO.rollout_metrics",
            "r.scores[chosen] - r.scores[rejected]",
            "r.scores[rejected] - r.scores[chosen]",
        ),
        "online DPO ignores --score_margin": (
            "OnlineDPO.preferences",
            "scored_pairs(values, self.pairs, self.score_margin)",
            "scored_pairs(values, self.pairs, None)",
        ),
        "online DPO ignores --pairs": (
            "OnlineDPO.preferences",
            "scored_pairs(values, self.pairs, self.score_margin)",
            'scored_pairs(values, "all", self.score_margin)',
        ),
        "prompts that fill up an evaluation count in online DPO": (
            "OnlineDPO.rollout_metrics",
            "counts & ~values.isnan()",
            "~values.isnan()",
        ),
        "prompts that fill up an evaluation give pairs in online DPO": (
            "OnlineDPO.preferences",
            "not row.get('repeated')",
            "True",
        ),
        "losses of online DPO in evaluation mode": ("OnlineDPO.answered", "self.model.train()", "None"),
    },
    evaluation_samples_the_same_answers={
        "evaluation of online DPO samples anew every time": (
            "OnlineDPO.prediction_step",
            'stable_seed(self.args.seed, "eval")',
            'stable_seed(self.args.seed, "eval", self.state.global_step)',
        ),
        "prompts of an evaluation share their random numbers": (
            "OnlineDPO.prediction_step",
            'stable_seed(row.get("where"), row["prompt"])',
            "0",
        ),
    },
)
faults(
    "train_dpo.py",
    "tests/test_online_dpo.py",
    flags_by_hand={
        "train_dpo --online hands no pairs on": ("build", "answers |= pairs", "pass"),
    },
)
faults(
    "base/server_rollouts.py",
    "tests/test_server_rollouts.py",
    asked_and_taken={
        "prompts of different micro batches share a seed on the server": (
            "ServerRollouts._body",
            "stable_seed(seed, prompts.places[b])",
            "stable_seed(seed, b)",
        ),
        "a server samples at temperature 1": ("ServerRollouts._body", "args.temperature or 1.0", "1.0"),
        "a server samples without --top_p": ("ServerRollouts._body", "args.top_p", "1.0"),
        "a server may sample placeholders of images": (
            "ServerRollouts._body",
            "{str(token): -100 for token in self.never}",
            "{}",
        ),
        "a server stops at the first end token alone": ("ServerRollouts._body", "self.end_ids", "self.end_ids[:1]"),
        "a server keeps the checkpoint's top-k": ("ServerRollouts._body", "-1", "50"),
        "a server's log-probs are those of the last tokens": (
            "ServerRollouts._logps",
            "(answer.logps or [])[:tokens]",
            "(answer.logps or [])[-tokens:]",
        ),
        "a server's answers may be longer than --response_length": (
            "ServerRollouts._ids",
            "cut_after_end(ids, self.end_ids)[: self.args.response_length]",
            "cut_after_end(ids, self.end_ids)",
        ),
    },
)
faults(
    "base/shared_prefill.py",
    "tests/test_shared_prefill.py",
    nothing_but_padding={
        "an answer goes on behind its end": (
            "answers_of_one_prefill",
            "torch.where(going_on, tokens, padding)",
            "tokens",
        ),
    },
)
faults(
    "base/rollout_cache.py",
    "tests/test_shared_prefill.py",
    one_prefill_samples_what_k_prefills_sample={
        "families with windows get a static cache": ("rollout_cache", "core.static_rollout_cache", "True"),
    },
)
faults(
    "base/rollout_cache.py",
    "tests/test_rollout_cache.py",
    cache_is_16_bit_under_autocast={
        "the cache is in the type of the weights": (
            "_InTypeOfAttention.update",
            "torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else value_states.dtype",
            "value_states.dtype",
        ),
    },
)
faults(
    "base/reward_calls.py",
    "tests/faults/test_reward_calls.py",
    answers_of_another_update_are_not_taken={
        "answers are taken for other places": (
            "UnscoredAnswers.get",
            "json.dumps([*zip(places, prompts, strict=True)])",
            "next(iter(self._kept), '')",
        ),
    },
    failed_update_goes_on_with_its_answers={
        "the answers of an update stay for the next": (
            "UnscoredAnswers.forget",
            "self.path.unlink(missing_ok=True)",
            "None",
        ),
    },
)
faults(
    "base/rewards.py",
    "tests/test_rl.py",
    functions_get_the_columns_in_both_signatures={
        "a function sees the first prompt of every micro batch": (
            "FunctionReward.score",
            "r.rows[r.prompt_of[i]]",
            "r.rows[0]",
        ),
    },
    stands_at_it={
        "tokens of an answer hold its padding": (
            "FunctionReward.score",
            'r.batch["completion_ids"][i][r.mask[i]].tolist()',
            'r.batch["completion_ids"][i].tolist()',
        ),
    },
    a_reward_may_say_that_it_does_not_apply={
        "None of a reward function is 0": (
            "FunctionReward.score_texts",
            "math.nan if v is None else _number(v)",
            "0.0 if v is None else _number(v)",
        ),
    },
)
faults(
    "base/rewards.py",
    "tests/test_ppo.py",
    a_cut_answer_is_worth_the_same_to_adapter_and_model={
        "scores of reward models stay prompt by prompt": (
            "ModelReward.score",
            "[scores[b][k] for b, k in sampled.order]",
            "[s for of_prompt in scores for s in of_prompt]",
        ),
    },
    rewards_are_summed_with_weights_penalty_and_clip={
        "a reward has the weight of the one before": (
            "rewards_of.add",
            "args.reward_weights[n]",
            "args.reward_weights[n - 1]",
        ),
    },
)
faults(
    "base/reward_functions.py",
    "tests/test_reward_functions.py",
    keys={
        "the tolerance is absolute": ("number", "allowed * abs(right) + 1e-9", "allowed + 1e-9"),
        "of several numbers the first counts": ("_last_number", "found[-1]", "found[0]"),
        "of several answers the first counts": ("final_answer", "tagged[-1]", "tagged[0]"),
        "an answer that says neither is right where the key says neither": (
            "yes_no",
            "_yes(final_answer(r)) == _yes(final_answer(s)) is not None",
            "_yes(final_answer(r)) == _yes(final_answer(s))",
        ),
    },
)
faults(
    "eval/generate.py",
    "tests/test_eval_generate.py",
    flags_come_before_the_family_before_greedy_search={
        "sampled answers are of the 50 likeliest tokens": (
            "generation_settings",
            '{"temperature": 1.0, "top_p": 1.0, "top_k": 0}',
            '{"temperature": 1.0, "top_p": 1.0}',
        ),
    },
    other_settings_do_not_go_into_the_same_file={
        "the checkpoint's settings go before flags": (
            "generation_settings",
            "settings |= given",
            "settings = given | settings",
        ),
    },
    flags_come_before={
        "--seed is not recorded": ("generation_settings", 'recorded["seed"] = args.seed', "None"),
    },
    a_checkpoints_settings_reach_generation_when_asked_for={
        "a checkpoint's repetition penalty stays in evaluation": (
            "take_settings",
            "GenerationConfig(**{name: getattr(config, name) for name in tokens})",
            "config",
        ),
    },
    likelihood_is_the_mean_loss_of_each_choice={
        "a choice's loss is a sum": ("choice_losses", "-logps.sum(1) / mask.sum(1)", "-logps.sum(1)"),
        "choices are asked with the question and its options": ("choice_losses", 'r["bare_question"]', 'r["question"]'),
    },
    plan_keeps={
        "pictures of equal length are one": (
            "image_key",
            'hashlib.sha1(i["bytes"]).hexdigest()',
            'str(len(i["bytes"]))',
        ),
    },
    shared_features_give_the_answers_of_a_plain_batch={
        "pictures of one size are one": (
            "EncodedBatches.encode_messages",
            "digest.update(value.contiguous().view(torch.uint8).numpy())",
            "None",
        ),
    },
    other_settings={
        "another suffix goes on in the same file": ("describe", '{"suffix": getattr(args, "suffix", None)}', "{}"),
    },
    adapter_answers={
        "an adapter's own processor is not read": ("processor_for", "processor_path(adapter) == adapter", "False"),
    },
)
faults(
    "eval/score.py",
    "tests/test_eval_reward.py",
    implicit_reward_is_beta_times_the_log_ratio={
        "the implicit reward has the wrong sign": ("implicit_reward.score", "logps - ref_logps", "ref_logps - logps"),
        "the reference of the implicit reward is the policy": (
            "implicit_reward.score",
            "adapter_active(policy.model, None)",
            "adapter_active(policy.model, 'default')",
        ),
        "--beta of the implicit reward ignored": (
            "implicit_reward.score",
            "args.beta * (logps - ref_logps)",
            "0.1 * (logps - ref_logps)",
        ),
    },
)
faults(
    "eval/score.py",
    "tests/test_rm.py",
    any_data_set={
        "equal rewards are right in the accuracy of a data set": (
            "score_data_set",
            "rewards[better] > rewards[worse]",
            "rewards[better] >= rewards[worse]",
        ),
    },
)
faults(
    "eval/judge.py",
    "tests/test_eval_judge.py",
    every_reply_is_asked_once_and_cached_by_content={
        "repeated questions have one reply": ("Judge.ask", "[body, sample]", "[body]"),
    },
    asked_once={
        "pictures have no part in the cache": ("Judge.ask", "[body, sample]", "[body | {'messages': prompt}, sample]"),
    },
)
faults(
    "eval/judged.py",
    "tests/test_eval_scorers.py",
    refomb_counts_wins_and_half_ties={
        "the model is A in RefoMB": (
            "score_refomb",
            '{"A": 0.0, "B": 1.0, "C": 0.5}',
            '{"A": 1.0, "B": 0.0, "C": 0.5}',
        ),
    },
    mmhal_is_official={
        "types of MMHal are blocks of 12": ("score_mmhal", "ratings[t::8]", "ratings[12 * t : 12 * t + 12]"),
    },
    hallusionbench_judged_uses_the_same_aggregation={
        "incorrect is correct": (
            "hallusion_verdict",
            '0 if "incorrect" in text else 1 if "correct" in text else 2',
            '1 if "correct" in text else 0 if "incorrect" in text else 2',
        ),
    },
)
faults(
    "eval/judged.py",
    "tests/test_eval_judge.py",
    grades_of_mmvet={
        "grades of MM-Vet's runs are mixed among rows": (
            "review_mmvet",
            "grades[i * runs:(i + 1) * runs]",
            "grades[i :: len(rows)]",
        ),
    },
)
faults(
    "eval/yesno.py",
    "tests/test_eval_scorers.py",
    pope_is_official={
        "POPE reads the whole answer": ("pope_parse", 'answer.split(".")[0]', "answer"),
    },
    hallusionbench_json_gives_both_aggregations={
        "hard and easy questions change places": (
            "_hallusion_repository",
            'r["visual_input"] == "2"',
            'r["visual_input"] == "1"',
        ),
    },
    mme_is_official={
        "acc+ takes one right question": (
            "score_mme",
            "sum(map(all, images.values()))",
            "sum(map(any, images.values()))",
        ),
    },
)
faults(
    "eval/choice.py",
    "tests/test_eval_scorers.py",
    mmbench_circular_is_official={
        "one right rotation is enough": (
            "score_mmbench",
            "all(right for _, right in members)",
            "any(right for _, right in members)",
        ),
        "the text of an option goes before its letter": (
            "infer_letter",
            "_by_letter(answer, choices) or _by_text(answer, choices)",
            "_by_text(answer, choices) or _by_letter(answer, choices)",
        ),
    },
    seed_likelihood_is_official={
        "the largest loss is chosen": (
            "score_seed_likelihood",
            "min(range(4), key=lambda i, x=row_losses: (math.isnan(x[i]), x[i]))",
            "max(range(4), key=lambda i, x=row_losses: (not math.isnan(x[i]), x[i]))",
        ),
    },
)
faults(
    "eval/reward_benchmarks.py",
    "tests/test_eval_scorers.py",
    vl_rewardbench_is_official={
        "VL-RewardBench counts ties": (
            "score_vlrewardbench",
            "p[int(r['better'])] > p[1 - int(r['better'])]",
            "p[int(r['better'])] >= p[1 - int(r['better'])]",
        ),
        "macro is the mean over questions": (
            "_vlrewardbench",
            "sum(shares.values()) / 3",
            "sum(pooled) / max(1, len(pooled))",
        ),
        "a swapped pair is read as shown": ("vlrewardbench_vote", "better if swapped else 1 - better", "1 - better"),
    },
)
faults(
    "eval/served.py",
    "tests/test_eval_served.py",
    samples={
        "rows share the seed on a server": ("_fields", 'settings["seed"] + n', 'settings["seed"]'),
    },
    test_samples={
        "a server takes the checkpoint's own settings": (
            "_fields",
            'not settings["checkpoint_settings"]',
            'settings["checkpoint_settings"]',
        ),
    },
)
faults(
    "eval/ledger.py",
    "tests/test_eval_generate.py",
    ranks_share_the_rows_and_any_number_of_them_can_go_on={
        "answers are merged as they were written": ("Ledger.finish", "(found[i] for i in self.ids)", "found.values()"),
    },
)
faults(
    "train_sft.py",
    "tests/test_paths_scripts.py",
    prompts_that_are_too_long_are_left_out_of_both_splits={
        "train_sft evaluates rows that are too long": (
            "build",
            "collator.drop_overlong(data.eval, data_args.dataset_num_proc)",
            "(data.eval, {})",
        ),
    },
)
faults(
    "train_rm.py",
    "tests/test_paths_scripts.py",
    prompts_that_are_too_long_are_left_out_of_both_splits={
        "train_rm evaluates rows that are too long": (
            "build",
            "collator.drop_overlong(data.eval, data_args.dataset_num_proc)",
            "(data.eval, {})",
        ),
    },
)
faults(
    "train_dpo.py",
    "tests/test_paths_scripts.py",
    prompts_that_are_too_long_are_left_out_of_both_splits={
        "train_dpo evaluates rows that are too long": (
            "build",
            "collator.drop_overlong(data.eval, data_args.dataset_num_proc)",
            "(data.eval, {})",
        ),
    },
)
faults(
    "train_ppo.py",
    "tests/test_paths_scripts.py",
    prompts_that_are_too_long_are_left_out_of_both_splits={
        "train_ppo evaluates rows that are too long": (
            "build",
            "collator.drop_overlong(data.eval, data_args.dataset_num_proc)",
            "(data.eval, {})",
        ),
    },
)
faults(
    "base/ppo_metrics.py",
    "tests/test_paths_ppo.py",
    metrics_of_answers_by_hand={
        "an answer without a score hides rlhf_reward": (
            "rollout_metrics",
            "(scores - kl_coef * penalty)[scored]",
            "scores - kl_coef * penalty",
        ),
    },
)
faults(
    "base/checkpoints.py",
    "tests/test_what_trains.py",
    a_resumed_run_has_the_rates_of_its_flags={
        "a resumed run keeps the weight decay that was saved": (
            "SafeCheckpoints._load_optimizer_and_scheduler",
            "group.update(option | {'lr': rate})",
            "group.update({'lr': rate})",
        ),
    },
    resumed_run_has_the_rates={
        "a resumed run begins its schedule again": (
            "SafeCheckpoints._load_optimizer_and_scheduler",
            "rate(schedule.last_epoch)",
            "rate(0)",
        ),
    },
)
faults(
    "base/checkpoints.py",
    "tests/test_resume.py",
    killed_after_the_last_checkpoint={
        "a finished run that is resumed takes a step": (
            "SafeCheckpoints._run_epoch",
            "self.state.global_step >= self.state.max_steps",
            "self.state.global_step > self.state.max_steps",
        ),
    },
)
faults(
    "base/checkpoints.py",
    "tests/test_paths_checkpoints.py",
    left_by_hand={
        "a checkpoint of a later step counts as the newest": (
            "SafeCheckpoints._move_old_checkpoints",
            "(step <= now, step)",
            "step",
        ),
    },
)
faults(
    "base/checkpoints.py",
    "tests/test_rm.py",
    learns_reports={
        "weights of an earlier run stay beside the new ones": ("SafeCheckpoints.save_model", "stale.unlink()", "None"),
    },
)
faults(
    "base/resume.py",
    "tests/faults/test_run_folder.py",
    damage_is_named={
        "a checkpoint whose bytes changed is whole": ("_other_than_written", "digest != found", "False"),
    },
    missing_state_is_seen={
        "a checkpoint without random state can be resumed": (
            "_missing_state",
            'not [*checkpoint.glob("rng_state*.pth")]',
            "False",
        ),
    },
)
faults(
    "base/resume.py",
    "tests/test_resume.py",
    halves_are_passed_over={
        "a checkpoint without optimizer can be resumed": (
            "_missing_state",
            'not (checkpoint / "optimizer.pt").is_file()',
            "False",
        ),
    },
)
faults(
    "base/videos.py",
    "tests/test_videos.py",
    frames_by_hand={
        "--video_fps ignored where the checkpoint says a number of frames": (
            "set_sampling",
            "frames is not None or fps is not None",
            "frames is not None",
        ),
        "a film that nobody decodes has another length": ("blank_clip", "len(indices)", "header.frames"),
    },
    packed_logps_are_those_of_the_familys_own_processor_and_model={
        "the length of a film is counted in frames": ("_metadata", "header.frames / header.fps", "header.frames"),
    },
)
faults(
    "base/lora_start.py",
    "tests/test_lora_variants.py",
    numbers_and_files_are_those_of_peft={
        "rsLoRA's scale is saved as LoRA's": (
            "LoraOnChangedBase.save_pretrained",
            "math.sqrt(2) if config.use_rslora else 2",
            "2",
        ),
    },
    a_dpo_run_its_reference_resumption_and_merge={
        "a resumed run reads the start with the wrong sign": (
            "split_start",
            "start[name] = -minus",
            "start[name] = minus",
        ),
    },
    eva_is_that_of_peft={
        "EVA reads prompts as well": (
            "start_from_inputs.answers",
            'batch["segment_ids"] > 0 if "segment_ids" in batch else batch["labels"] != -100',
            'batch["segment_ids"] >= 0 if "segment_ids" in batch else batch["labels"] >= -100',
        ),
    },
    the_reference_is_the_base_as_it_was={
        "the reference of PiSSA is a fresh adapter": (
            "keep_start",
            'set_peft_model_state_dict(model, {k: w for k, w in weights.items() if ".lora_" in k}, adapter_name=START)',
            "None",
        ),
    },
    loftq_makes_up_for_the_largest_part_of_the_rounding={
        "LoftQ takes the smallest components": ("start_as_rounding_error", "S[: len(A)]", "S[-len(A):]"),
    },
)
faults(
    "base/heads.py",
    "tests/test_what_trains.py",
    tied_to_the_embeddings={
        "a tied head of a reward model is frozen with the embeddings": (
            "freeze_lm_head",
            "lm_head is not None and lm_head.weight is not core.get_input_embeddings().weight",
            "lm_head is not None",
        ),
    },
)
faults(
    "base/other_heads.py",
    "tests/test_other_heads.py",
    vl_rlhf={
        "a head's bias is read as its weight": ("other_head", 'name.rpartition(".")[2]', '"weight"'),
    },
)
faults(
    "base/learning_rates.py",
    "tests/test_what_trains.py",
    rates_of_tower_and_projector={
        "the projector has the tower's rate": (
            "learning_rates",
            '{"vision_lr": core.get_vision_tower().parameters(), "projector_lr": core.projector_parameters()}',
            (
                '{"projector_lr": core.projector_parameters(), "vision_lr": [*core.get_vision_tower().parameters(), '
                "*core.projector_parameters()]}"
            ),
        ),
    },
    groups_of_rates_by_hand={
        "weight decay falls on what has none": (
            "split_by_rate",
            '{**group, "params": those, "lr": rate}',
            '{**optimizer.param_groups[0], "params": those, "lr": rate}',
        ),
    },
)
faults(
    "base/bad_steps.py",
    "tests/faults/test_not_finite.py",
    bad_steps_that_alternate_go_on={
        "bad steps count though good ones lie between": (
            "BadSteps.decide",
            "torch.where(bad, self._streak + 1, 0)",
            "self._streak + bad",
        ),
    },
    streak_by_hand={
        "of several micro batches the last one is looked at": (
            "BadSteps.see_loss",
            "bad if self._bad is None else self._bad | bad",
            "bad",
        ),
    },
    one_bad_step_is_skipped={
        "a step that is skipped decays the weights": (
            "_skip",
            "optimizer.found_inf = bad.float()",
            "model.zero_grad()",
        ),
    },
)
faults(
    "base/calibration.py",
    "tests/test_rm.py",
    calibration_table={
        "a tie is right in the calibration": ("draw_calibration", "m > 0", "m >= 0"),
        "the expected accuracy is that of the mean margin": (
            "draw_calibration",
            "sum(1 / (1 + math.exp(-abs(m))) for m in chunk) / len(chunk)",
            "1 / (1 + math.exp(-sum(map(abs, chunk)) / len(chunk)))",
        ),
    },
)
faults(
    "base/run_warnings.py",
    "tests/test_kto.py",
    weights_that_the_paper_does_not_take_are_said={
        "weights of KTO's answers divide": (
            "unbalanced",
            "desirable_weight * good / (undesirable_weight * bad)",
            "undesirable_weight * good / (desirable_weight * bad)",
        ),
    },
)
faults(
    "base/run_warnings.py",
    "tests/test_run_page.py",
    signs_of_a_run_that_goes_wrong={
        "lost nats are counted in rewards": (
            "run_warnings",
            "_mean(found['rewards/chosen'][-LAST:]) / beta",
            "_mean(found['rewards/chosen'][-LAST:])",
        ),
    },
    signs_of_a_run={
        "warnings look at the first steps": (
            "run_warnings",
            "(margin := _mean(found[name][-LAST:])) > SATURATED",
            "(margin := _mean(found[name][:LAST])) > SATURATED",
        ),
    },
)
faults(
    "data/sample.py",
    "tests/test_sample.py",
    ranks_of_scores={
        "an answer that some scorer leaves out has no score": (
            "ranked",
            "all(v is None for v in values)",
            "any(v is None for v in values)",
        ),
        "texts keep the order of sampling beside sorted scores": (
            "ranked",
            '[row["responses"][k] for k in order]',
            'row["responses"]',
        ),
        "scores of a scorer keep the order of sampling": ("ranked", "[values[k] for k in order]", "values"),
    },
)
faults(
    "eval/answer_scores.py",
    "tests/test_sample.py",
    claims_cost_a_point_for_every_no={
        "claims raise the score": (
            "Claims.score",
            "-float(sum(denied[q] for q in of_answer))",
            "float(sum(denied[q] for q in of_answer))",
        ),
        "claims that are affirmed cost a point": ("Claims.score", "denied[q]", "not denied[q]"),
    },
    ratings={
        "the first rating of a reply counts": ("rating", "found[-1]", "found[0]"),
    },
)
faults(
    "eval/benchmark_files.py",
    "tests/test_eval_data.py",
    public_formats_are_read={
        "SEED's videos are asked as images": ("_seed", 'video or r.get("data_type", "image") == "image"', "True"),
        "POPE's ids are those of all splits": ("_pope", "f\"{split}/{r['question_id']}\"", 'str(r["question_id"])'),
    },
    asked_by_hand={
        "HallusionBench's answers are turned over": (
            "_hallusion",
            '{"1": "Yes", "0": "No"}',
            '{"0": "Yes", "1": "No"}',
        ),
        "MMBench is asked without its hint": ("_mmbench", "_available(r.get('hint'))", "False"),
        "MMMU's images in the order of the row from the second on": ("_mmmu", "range(1, 8)", "range(2, 8)"),
        "MathVista is asked without its unit": ("mathvista_query", "problem.get('unit')", "None"),
    },
)
faults(
    "models/qwen2_vl/__init__.py",
    "tests/test_models.py",
    packed_rows_equal_single_rows={
        "an answer's positions go on behind the prompt's tokens": (
            "MRopeMixin.packed_position_ids",
            "positions.amax(dim=(0, 2))[:, None] + 1",
            "prompt.sum(1, keepdim=True)",
        ),
        "an answer begins at the prompt's last position": (
            "MRopeMixin.packed_position_ids",
            "positions.amax(dim=(0, 2))[:, None] + 1",
            "positions.amax(dim=(0, 2))[:, None]",
        ),
    },
)
faults(
    "models/gemma3/__init__.py",
    "tests/test_models.py",
    packed_rows_equal_single_rows={
        "the images of Gemma 3 see forward alone": ("Gemma3ForRL.packed_attention_mask", "mask | same_image", "mask"),
    },
)
faults(
    "models/paligemma/__init__.py",
    "tests/test_models.py",
    packed_rows_equal_single_rows={
        "PaliGemma's prompt is causal": (
            "PaliGemmaForRL.packed_attention_mask",
            "packing.packed_mask(segment_ids) | (prompt[:, :, None] & prompt[:, None, :])[:, None]",
            "packing.packed_mask(segment_ids)",
        ),
    },
)
faults(
    "models/paligemma/__init__.py",
    "tests/test_fast_paths.py",
    edited_answers_on_every_family={
        "shared beginnings of answers see both ways": (
            "PaliGemmaForRL.packed_attention_mask",
            '(segment_ids == 0) & (img_inputs["token_type_ids"] == 0)',
            "segment_ids == 0",
        ),
    },
)
faults(
    "models/mllama/__init__.py",
    "tests/test_models.py",
    sft_batch_with_padding={
        "Mllama's rows without image see others'": (
            "MllamaForRL.encode_images",
            "states.masked_fill(text_only.view(-1, 1, 1, 1, 1), 0)",
            "states",
        ),
        "Mllama's tokens before the image see absent images": (
            "MllamaForRL.hide_absent_images",
            "mask.masked_fill(absent, torch.finfo(mask.dtype).min)",
            "mask",
        ),
    },
)
faults(
    "base/model.py",
    "tests/test_packing.py",
    window_of_two={
        "the sliding window is one token too wide": (
            "VLModelMixin.packed_attention_mask",
            "position[:, :, None] - position[:, None, :] < window",
            "position[:, :, None] - position[:, None, :] <= window",
        ),
    },
)
faults(
    "base/model.py",
    "tests/test_what_trains.py",
    what_is_named_trains_and_nothing_else={
        "layers behind the one that is read train": ("VLModelMixin.vision_layers", "blocks[:max(numbers)]", "blocks"),
    },
)
faults(
    "models/assemble.py",
    "tests/test_what_trains.py",
    frozen_tower_train={
        "the first layers of the tower train": (
            "choose_what_trains",
            "layers[-plan.train_vision_layers:]",
            "layers[:plan.train_vision_layers]",
        ),
    },
)
faults(
    "models/assemble.py",
    "tests/test_lora_variants.py",
    numbers_and_files_are_those_of_peft={
        "--lora_alpha ignored": ("add_lora", "lora_args.lora_alpha", "16"),
        "--use_rslora ignored": ("add_lora", "lora_args.use_rslora", "False"),
    },
)
faults(
    "models/assemble.py",
    "tests/test_paths_scripts.py",
    share_prefix={
        "--bits without --q_lora quantises": (
            "LoadPlan.of",
            "model_args.bits if model_args.q_lora else None",
            "model_args.bits",
        ),
    },
)
faults(
    "args/training.py",
    "tests/test_rl.py",
    defaults_of_estimators={
        "the best checkpoint is the one of the lowest loss whatever the algorithm": (
            "VLConfig._fill_in_metric",
            "self.default_metric",
            '"loss"',
        ),
    },
)
faults(
    "losses/registry.py",
    "tests/test_losses.py",
    hyperparameter_of_zero={
        "a hyper-parameter of 0 is the loss's default": (
            "hyperparameters_of",
            "own.default if given.get(key) is None else given[key]",
            "given.get(key) or own.default",
        ),
    },
    combine={
        "without weights losses are a mean": ("combine", "[1.0] * len(losses)", "[1.0 / len(losses)] * len(losses)"),
    },
)
faults(
    "losses/registry.py",
    "tests/test_preference_losses.py",
    hyperparameters_are_attributes_with_the_losss_own_defaults={
        "a mixture's beta is the first loss's": ("common_hyperparameters", "len(found) == 1", "found"),
    },
)
faults(
    "losses/batch.py",
    "tests/test_losses.py",
    test_trl={
        "f-divergences leave out the reference": (
            "PreferenceBatch.log_ratio",
            "f(getattr(self.policy, item.name) - getattr(self.ref, item.name))",
            "f(getattr(self.policy, item.name)) - getattr(self.ref, item.name)",
        ),
    },
)
faults(
    "losses/reductions.py",
    "tests/test_losses.py",
    row_mean={
        "a row's pairs are summed": (
            "row_mean",
            "per_pair.new_zeros(len(rows)).index_add(0, index, per_pair) / counts",
            "per_pair.new_zeros(len(rows)).index_add(0, index, per_pair)",
        ),
    },
)
faults(
    "base/other_heads.py",
    "tests/test_other_heads.py",
    goes_before={
        "the model's own head goes before a value head": ("_files", "[*beside, *weights]", "[*weights, *beside]"),
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
