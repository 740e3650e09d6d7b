"""One of the checks of benchmarks/gpu_checks.sh: runs it and writes its figures to N.json after each part.

python -m benchmarks.gpu_checks 7 --out DIR
"""

import common.compat  # noqa: F401  isort: skip  (must come before transformers)
import argparse
import contextlib
import json
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from datasets import Dataset
from torch import nn

import args as flags_of
import train_dpo
import train_ppo
from args import run
from base import logps
from base.rollout import Sampled
from base.rollout_cache import StaticRolloutCache
from benchmarks import memory, models
from benchmarks.dpo_vs_trl import Case, our_trainer, trl_side
from benchmarks.memory import GIB, Setup
from benchmarks.steps import Side, Timings, machine
from common.flags import FlagParser
from data import DataSplits
from tests import zoo

GPU = torch.cuda.is_available()
SIZE = "7b" if GPU else "tiny"
LAYERS = 4  # of the stand-ins that have the width of 7B models
LORA = "--use_lora True --lora_r 16"
Figures = dict[str, Any]


def no_reward(responses: list[str], **_: object) -> list[float]:
    """The length of each answer."""
    return [float(len(response)) for response in responses]


class Workplace:
    """A temporary folder with tiny pairs, and the flags that name them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        pairs = []
        for i in range(8):
            zoo.image(i).save(folder / f"{i}.png")
            pair = {"prompt": "What is this?" + " photo" * (i % 3), "chosen": "A red square", "rejected": "two circles"}
            pairs.append({"image": f"{i}.png", **pair})
        (folder / "pairs.json").write_text(json.dumps(pairs))

    def history(self, script: ModuleType, flags: str, model: str = "llava") -> list[Figures]:
        """Run a script on a tiny checkpoint; what it logged."""
        out = Path(tempfile.mkdtemp(dir=self.folder))
        script.main(
            f"--model_name_or_path {zoo.checkpoint(model)} --dataset_name plain_dpo --data_path {self.folder}/pairs.json "
            f"--image_root {self.folder} --output_dir {out} --save_strategy no --disable_tqdm True --seed 0 "
            f"--per_device_train_batch_size 4 {'' if GPU else '--use_cpu True'} {flags}".split()
        )
        return json.loads((out / "trainer_state.json").read_text())["log_history"]


PPO = f"--reward_fn {__file__}:no_reward --rollouts_per_prompt 2 --response_length 6 --num_sample_generations 0"


def peak() -> float | None:
    """GiB at most since the last call."""
    if not GPU:
        return None
    found = torch.cuda.max_memory_allocated() / GIB
    torch.cuda.reset_peak_memory_stats()
    return found


def attempt(figures: Figures, name: str, part: Callable[[], Figures]) -> None:
    """Run one part; what it raises is a figure too."""
    started = time.perf_counter()
    try:
        figures[name] = part()
    except Exception as error:
        traceback.print_exc()
        figures[name] = {"failed": f"{type(error).__name__}: {error}"[:300]}
    figures[name] |= {"seconds": round(time.perf_counter() - started, 1), "peak_gib": peak()}


# ---------------------------------------------------------------------------------------------------------------------
# The checks
# ---------------------------------------------------------------------------------------------------------------------


def ppo_in_a_process_group(place: Workplace, figures: Figures) -> None:
    """Two updates with NCCL: every logged number is reduced."""

    def part() -> Figures:
        history = place.history(train_ppo, f"{LORA} --bf16 True --max_steps 2 {PPO}")
        last = [entry for entry in history if "objective/kl" in entry][-1]
        return {name: last[name] for name in ("objective/kl_coef", "objective/kl", "first/ratio_deviation")}

    attempt(figures, "lora bf16", part)


def ppo_precisions(place: Workplace, figures: Figures) -> None:
    """The types of keys and values in rollouts."""
    for name, flags in {
        "full bf16": "--bf16 True",
        "lora fp16": f"{LORA} --fp16 True",
        "qlora bf16": f"{LORA} --q_lora True --bf16 True",
    }.items():
        attempt(figures, name, lambda flags=flags: _ppo_keys(place, flags))


def _ppo_keys(place: Workplace, flags: str) -> Figures:
    seen: set[str] = set()
    update = StaticRolloutCache.update

    def watched(cache: StaticRolloutCache, *states: torch.Tensor, **more: object) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = update(cache, *states, **more)
        seen.update((str(keys.dtype), str(values.dtype)))
        return keys, values

    with mock.patch.object(StaticRolloutCache, "update", watched):
        history = place.history(train_ppo, f"{flags} --max_steps 1 {PPO}")
    return {"cache": sorted(seen), "ratio_deviation": history[0]["first/ratio_deviation"]}


def losses_on_logits(place: Workplace, figures: Figures) -> None:
    """chip and povid read lm_head outside of autocast."""
    for loss in ("chip", "povid"):
        flags = f"{LORA} --bf16 True --loss_type {loss} --max_steps 2"
        attempt(figures, loss, lambda flags=flags: {"losses": _losses(place.history(train_dpo, flags))})


def _losses(history: list[Figures]) -> list[float]:
    return [entry["loss"] for entry in history if "loss" in entry]


def cached_reference(place: Workplace, figures: Figures) -> None:
    """Without learning every margin is 0 and every loss ln 2."""
    still = "--bf16 True --precompute_ref_log_probs True --learning_rate 1e-12 --max_steps 4 --logging_steps 1"
    # DeepSpeed last: it stays switched on in the process
    cases = {"full": "--freeze_vision_tower True", "zero2 lora": f"{LORA} --deepspeed ds_configs/zero2.json"}
    for name, flags in cases.items():

        def part(flags: str = flags) -> Figures:
            history = place.history(train_dpo, f"{still} {flags} --ref_log_probs_dir {tempfile.mkdtemp()}")
            margins = [entry["rewards/margins"] for entry in history if "rewards/margins" in entry]
            return {"losses": _losses(history), "margins": margins}

        attempt(figures, name, part)


@contextlib.contextmanager
def stand_in(family: str, folder: Path) -> Iterator[Path]:
    """A checkpoint of the width of a 7B model with LAYERS layers; tiny without a GPU."""
    decoder = models.decoder
    with mock.patch.object(models, "decoder", lambda *a: decoder(*a) | {"num_hidden_layers": LAYERS}):
        yield models.build(family, SIZE, folder / family, torch.bfloat16 if GPU else torch.float32)


def dpo_steps(place: Workplace, figures: Figures) -> None:
    """Seconds, peak and first margins of both layouts, online and cached, beside benchmarks/memory.py; and TRL's steps."""
    for family in ("llava", "qwen2_5_vl"):
        with stand_in(family, place.folder) as checkpoint:
            for share in (True, False):
                for cached in (False, True):
                    flags = f"--share_prefix {share} --precompute_ref_log_probs {cached} {'--bf16 True' if GPU else '--use_cpu True'}"
                    name = f"{family} {'packed' if share else 'plain'} {'cached' if cached else 'online'}"
                    attempt(figures, name, lambda f=family, c=checkpoint, o=flags: _dpo_steps(f, c, o, place.folder))
            attempt(figures, f"{family} beside TRL", lambda f=family, c=checkpoint: _beside_trl(f, c, place.folder))


def _side(family: str, checkpoint: Path, flags: str, folder: Path) -> Side:
    case = Case(family, family, 50)
    data = models.rows(family, SIZE, checkpoint, 50, 8)
    trainer = our_trainer(case, checkpoint, data, flags, folder / "cache")
    if trainer.args.precompute_ref_log_probs:
        trainer.precompute_reference_logps()
    batches = [lambda: trainer.data_collator([trainer.train_dataset[i] for i in range(case.batch)])]
    return Side(trainer, batches)


def _dpo_steps(family: str, checkpoint: Path, flags: str, folder: Path) -> Figures:
    side = _side(family, checkpoint, flags, folder)
    losses = [side.step(measure=n > 0) for n in range(4)]
    side.measure_memory()
    batch = side.batches[0]()
    script = "dpo_cached" if "log_probs True" in flags else "dpo"
    prompt, own = int((batch["segment_ids"] == 0).sum(1).max()), 50
    setup = Setup(script, "lora", max_prompt_length=prompt, max_target_length=own, lora_r=16, bf16=GPU,
                  per_device_train_batch_size=len(batch["input_ids"]), gradient_checkpointing=False)  # fmt: skip
    computed = memory.memory(str(checkpoint), setup)
    return {
        "first_loss": losses[0],
        "s_per_step": side.timings.step_compute,
        "peak_mib": side.timings.peak_mib,
        "computed_mib": (computed["total"] - computed["assumed"]) / 2**20 if batch["packed"] else None,
    }


def _beside_trl(family: str, checkpoint: Path, folder: Path) -> Figures:
    """Our steps and those of TRL from the same adapter, with 2 pairs, 4, 8, ... as long as they fit: equal batches, and each side's largest."""
    initial: dict[str, torch.Tensor] = {}

    def ours() -> Side:
        side = _side(family, checkpoint, "--bf16 True" if GPU else "--use_cpu True", folder)
        initial.update({n: p.detach().clone() for n, p in side.trainer.model.named_parameters() if p.requires_grad})
        return side

    def theirs() -> Side:
        data = models.rows(family, SIZE, checkpoint, 50, 8)
        return trl_side(Case(family, family, 50), checkpoint, data, initial, "bfloat16" if GPU else "float32")

    return {name: _larger_and_larger(make()) for name, make in (("ours", ours), ("trl", theirs))}


def _larger_and_larger(side: Side) -> Figures:
    """Seconds, pairs per second, peak and first loss by the number of pairs."""
    dataset, collate, found = side.trainer.train_dataset, side.trainer.data_collator, {}
    for pairs in (2, 4, 8, 16, 32, 64) if GPU else (2, 4):
        side.batches = [lambda n=pairs: collate([dataset[i % len(dataset)] for i in range(n)])]
        side.timings = Timings()
        try:
            losses = [side.step(measure=n > 0) for n in range(3)]
            side.measure_memory()
        except torch.OutOfMemoryError:
            break
        seconds, peak_mib = side.timings.step_compute, side.timings.peak_mib
        found[pairs] = {"s_per_step": seconds, "pairs_per_s": pairs / seconds, "peak_mib": peak_mib, "loss": losses[0]}
    return found


def launches_and_syncs(place: Workplace, figures: Figures) -> None:
    """Kernels of one DPO step by name, how many, and what the host waits for."""
    for family in ("llava", "qwen2_5_vl"):
        with stand_in(family, place.folder) as checkpoint:
            flags = "--share_prefix True " + ("--bf16 True" if GPU else "--use_cpu True")
            attempt(figures, family, lambda f=family, c=checkpoint, o=flags: _launches(_side(f, c, o, place.folder)))


def _launches(side: Side) -> Figures:
    side.step(measure=False)
    with torch.profiler.profile() as profile:
        side.step(measure=False)
    device = torch.autograd.DeviceType.CUDA if GPU else torch.autograd.DeviceType.CPU
    names = Counter(event.name for event in profile.events() if event.device_type == device)
    syncs = None
    if GPU:
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            side.step(measure=False)
        torch.cuda.set_sync_debug_mode("default")
        syncs = sum("synchroniz" in str(w.message) for w in caught)
    attention = {n[:120]: c for n, c in names.items() if any(k in n.lower() for k in ("attention", "flash", "fmha"))}
    return {"launches": sum(names.values()), "attention": attention, "most": names.most_common(15), "syncs": syncs}


class _Head(nn.Module):
    """As much of a model as token log-probs read."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        self.config = argparse.Namespace(get_text_config=lambda: argparse.Namespace())

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.lm_head


def chunked_log_probs(place: Workplace, figures: Figures) -> None:
    """The chunked kernel against all logits at once: largest differences, seconds, peak."""
    V, D, N = (152064, 3584, 1024) if GPU else (4096, 64, 256)
    device, dtype = ("cuda", torch.bfloat16) if GPU else ("cpu", torch.float32)
    torch.manual_seed(0)
    model = _Head(V, D).to(device, dtype)
    states, ids = torch.randn(N, D, device=device, dtype=dtype), torch.randint(V, (N,), device=device)
    found: dict[str, tuple[torch.Tensor, ...]] = {}

    def part(limit: int, name: str) -> Figures:
        hidden = states.clone().requires_grad_(True)
        with mock.patch.object(logps, "MAX_LOGITS", limit):
            values, entropy = logps.token_logps(model, hidden, ids, with_entropy=True)
            values.sum().backward()
        found[name] = (values.detach(), entropy.detach(), hidden.grad)
        return {}

    for name, limit in (("plain", 1 << 40), ("chunked", 0), ("chunked again", 0)):
        attempt(figures, name, lambda n=name, limit=limit: part(limit, n))

    def differences() -> Figures:
        pairs = zip(found["plain"], found["chunked"], strict=True)
        names = ("log-probs", "entropy", "gradient")
        return {n: (a.float() - b.float()).abs().max().item() for n, (a, b) in zip(names, pairs, strict=True)}

    attempt(figures, "largest difference", differences)


def rollouts(place: Workplace, figures: Figures) -> None:
    """PPO with 16 rollouts at once: time, peak, and answers of sdpa beside FlashAttention-2."""
    kernels = {"sdpa": "", "flash_attention_2": "--use_flash_attention_2 True"}
    with stand_in("llava", place.folder) as checkpoint:
        data = models.rows("llava", SIZE, checkpoint, 50, 8)
        prompts = [{"images": r["images"], "prompt": r["prompt"]} for r in data]
        texts: dict[str, list[str]] = {}
        for name, flags in kernels.items():
            if name != "sdpa" and not GPU:
                figures[name] = {"skipped": "needs a GPU and flash-attn"}
                continue
            attempt(figures, name, lambda n=name, f=flags: _rollouts(checkpoint, prompts, f, texts, n))
        if len(texts) == 2:
            figures["equal answers"] = sum(a == b for a, b in zip(*texts.values(), strict=True))


def _rollouts(checkpoint: Path, prompts: list[dict], flags: str, texts: dict[str, list[str]], name: str) -> Figures:
    from_flags = flags_of.parse(
        flags_of.ModelArguments, flags_of.DataArguments, flags_of.LoraArguments, flags_of.PPOConfig,
        argv=f"--model_name_or_path {checkpoint} --dataset_name x --output_dir {checkpoint}/ppo --max_steps 1 {LORA} "
        f"--per_device_train_batch_size 16 --rollouts_per_prompt 2 --local_rollout_forward_batch_size 16 --share_prefix False "
        f"--response_length 32 --num_sample_generations 0 --disable_tqdm True --save_strategy no --seed 0 "
        f"--reward_fn {__file__}:no_reward {'--bf16 True' if GPU else '--use_cpu True'} {flags}".split(),
    )  # fmt: skip
    data = DataSplits(Dataset.from_list(prompts), None, {})
    trainer, _ = train_ppo.build(*from_flags, data=data)
    rollout, peaks = trainer.rollout, {}

    def watched(*args: object, **kwargs: object) -> list[Sampled]:
        sampled = rollout(*args, **kwargs)
        texts[name] = [text for r in sampled for text in r.texts]
        peaks["rollout_gib"] = peak()
        return sampled

    trainer.rollout = watched
    trainer.train()
    return {"answers": len(texts[name]), **peaks}


CHECKS = (
    ppo_in_a_process_group,
    ppo_precisions,
    losses_on_logits,
    cached_reference,
    dpo_steps,
    launches_and_syncs,
    chunked_log_probs,
    rollouts,
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run one check."""
    parser = FlagParser(description=__doc__)
    parser.add_argument("check", type=int, choices=range(1, len(CHECKS) + 1))
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(argv)
    check = CHECKS[options.check - 1]

    class Written(dict):
        """Figures that are on disk as soon as they are known: a check may be cut off."""

        def __setitem__(self, name: str, value: object) -> None:
            super().__setitem__(name, value)
            about = {"check": check.__name__, "what": check.__doc__, "machine": machine(), "figures": self}
            (options.out / f"{options.check}.json").write_text(json.dumps(about, indent=1, default=str))

    with tempfile.TemporaryDirectory() as folder:
        check(Workplace(Path(folder)), Written())


if __name__ == "__main__":
    run(main)
