"""DPO steps of TRL's trainer and of ours, alternating, on the same rows, weights, adapter, optimizer and batch.

    OMP_NUM_THREADS=2 python -m benchmarks.dpo_vs_trl --size cpu --out benchmarks/results
    python -m benchmarks.dpo_vs_trl --size 7b --steps 10 --out benchmarks/results      (a GPU with 80 GB; bf16)
    python -m benchmarks.dpo_vs_trl --size cpu --case llava-50 --case "llava-*"        (some cases)

Seconds are compute + data: forward, backward, clipping and optimizer; and turning rows into a batch in the main
process. Processor time counts this process alone, so other load on the machine, which adds to wall time, hardly changes
it. TRL has no cached reference for images, so both of our columns are compared with the same steps of TRL. Losses of
all sides are compared step by step.
"""

import fnmatch
import gc
import itertools
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
import trl
from datasets import Dataset
from PIL import Image

import args as flags
import train_dpo
from base.trainer import VLDPOTrainer
from benchmarks import floor
from benchmarks.models import SIZES, build, lora_targets, rows
from benchmarks.steps import LoadWatch, Side, Timings, machine, markdown, matmul_rate, take_turns, write
from common.flags import FlagParser
from data import DataSplits

Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    name: str
    family: str
    answer: int  # tokens of every answer
    batch: int = 2  # rows
    responses: int = 2
    common: float = 0.0  # share of an answer's tokens that all answers of a row begin with
    checkpointing: bool = False
    lora: bool = True


CASES = [
    *(Case(f"llava-{n}", "llava", n) for n in (50, 150, 400)),
    Case("llava_next-50", "llava_next", 50),
    Case("qwen2_5_vl-50", "qwen2_5_vl", 50),
    Case("internvl-50", "internvl", 50),
    Case("smolvlm-50", "smolvlm", 50),
    Case("smolvlm_256m-50", "smolvlm_256m", 50),
    Case("llava_wide-50", "llava_wide", 50),
    Case("llava-50-checkpointing", "llava", 50, checkpointing=True),
    Case("llava-50-full", "llava", 50, lora=False),
    Case("llava-50-four", "llava", 50, batch=1, responses=4),
    Case("llava-150-edited", "llava", 150, common=0.5),
]
MORE_CASES = [  # run only when named
    *(Case(f"{f}-{n}", f, n) for f in ("llava_next", "qwen2_5_vl", "internvl", "smolvlm") for n in (150, 400)),
    Case("llava-400-checkpointing", "llava", 400, checkpointing=True),
    Case("llava-150-four", "llava", 150, batch=1, responses=4),
]


def our_trainer(case: Case, checkpoint: Path, data: list[Row], options: str, cache: Path) -> VLDPOTrainer:
    """The trainer that train_dpo.py builds."""
    lora = "--use_lora True --lora_r 16 --lora_alpha 32 --lora_dropout 0" if case.lora else ""
    parsed = flags.parse(
        flags.ModelArguments,
        flags.DataArguments,
        flags.LoraArguments,
        flags.DPOConfig,
        argv=f"--model_name_or_path {checkpoint} --dataset_name x --output_dir {checkpoint}/ours --disable_tqdm True --seed 0 "
        f"--per_device_train_batch_size {case.batch} --learning_rate 1e-4 --max_steps 1000 --ref_log_probs_dir {cache} "
        f"--gradient_checkpointing {case.checkpointing} {lora} {options}".split(),
    )
    trainer, _ = train_dpo.build(*parsed, data=DataSplits(Dataset.from_list(data), None, {}))
    if trainer.args.precompute_ref_log_probs:
        trainer.precompute_reference_logps()
    return trainer


def our_side(case: Case, checkpoint: Path, data: list[Row], options: str, cache: Path) -> Side:
    """Our trainer and its batches, to take turns with TRL's."""
    trainer = our_trainer(case, checkpoint, data, options, cache)
    dataset, collate = trainer.train_dataset, trainer.data_collator
    starts = range(0, len(dataset), case.batch)
    return Side(trainer, [lambda s=s: collate([dataset[i] for i in range(s, s + case.batch)]) for s in starts])


def trl_side(
    case: Case, checkpoint: Path, data: list[Row], initial: dict[str, torch.Tensor] | None, dtype: str
) -> Side:
    """TRL's DPOTrainer with a row per pair, starting from the same adapter."""
    pairs = [
        {
            "images": [Image.open(row["images"][0])],
            "prompt": row["prompt"],
            "chosen": [{"role": "assistant", "content": row["responses"][a]}],
            "rejected": [{"role": "assistant", "content": row["responses"][b]}],
        }
        for row in data
        for a, b in itertools.combinations(range(case.responses), 2)
    ]
    size = len(pairs) // len(data) * case.batch
    config = trl.DPOConfig(
        output_dir=str(checkpoint / "trl"),
        per_device_train_batch_size=size,
        learning_rate=1e-4,
        max_steps=1000,
        max_length=None,
        gradient_checkpointing=case.checkpointing,
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        bf16=dtype == "bfloat16",
        disable_tqdm=True,
        model_init_kwargs=None if case.lora else {"dtype": "float32"},
    )
    targets = None
    model: Any = str(checkpoint)
    if case.lora:
        model = transformers.AutoModelForImageTextToText.from_pretrained(
            checkpoint, dtype=dtype, attn_implementation=_best_attention()
        )
        targets = peft.LoraConfig(
            r=16,
            lora_alpha=32,
            lora_dropout=0,
            task_type="CAUSAL_LM",
            target_modules=lora_targets(model),
        )
    trainer = trl.DPOTrainer(
        model=model,
        processing_class=transformers.AutoProcessor.from_pretrained(checkpoint),
        train_dataset=Dataset.from_list(pairs),
        args=config,
        peft_config=targets,
    )
    if case.lora:
        with torch.no_grad():
            for name, parameter in trainer.model.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(initial[name])
    else:  # ours keeps the tower frozen, so TRL's must too
        trainer.model.get_encoder(modality="image").requires_grad_(False)
    dataset, collate = trainer.train_dataset, trainer.data_collator
    starts = range(0, len(dataset), size)
    return Side(trainer, [lambda s=s: collate([dataset[i] for i in range(s, s + size)]) for s in starts])


def _best_attention() -> str:
    return "flash_attention_2" if transformers.utils.is_flash_attn_2_available() else "sdpa"


def run_case(case: Case, size: str, steps: int, one_by_one: bool) -> dict[str, Any]:
    """Measure one case: seconds, losses, memory and ratios."""
    dtype = torch.bfloat16 if size == "7b" else torch.float32
    precision = "--bf16 True" if size == "7b" else "" if torch.cuda.is_available() else "--use_cpu True"
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = build(case.family, size, Path(folder), dtype)
        data = rows(case.family, size, checkpoint, case.answer, 2 * case.batch, case.responses, case.common)
        initial: dict[str, torch.Tensor] = {}
        facts: dict[str, Any] = {}

        def ours(options: str) -> Side:
            side = our_side(case, checkpoint, data, f"{precision} {options}", checkpoint / "reference")
            if not initial:
                parameters = side.trainer.model.named_parameters()
                initial.update({n: p.detach().clone() for n, p in parameters if p.requires_grad and case.lora})
                facts.update(_facts(case, side))
            return side

        makers = {
            "online": lambda: ours(""),
            "cached": lambda: ours("--precompute_ref_log_probs True"),
            "trl": lambda: trl_side(case, checkpoint, data, initial, str(dtype).removeprefix("torch.")),
        }
        timings: dict[str, Timings] = {}
        with LoadWatch() as load:
            for names in [[name] for name in makers] if one_by_one else [list(makers)]:
                sides = {name: makers[name]() for name in names}
                take_turns(sides, steps)
                timings |= {name: side.timings for name, side in sides.items()}
                if "online" in sides:
                    profile = sides["online"].profile()
                del sides
                gc.collect()
                torch.cuda.empty_cache()
            rate = matmul_rate(facts["tokens_packed"], facts["width"], facts["inner"], dtype)
    theirs, ours_only = timings["trl"], ("online", "cached")
    floors = {name: facts["macs"][name] / rate for name in ours_only}
    return {
        "case": asdict(case),
        "size": size,
        "facts": facts,
        "timings": {
            name: asdict(t) | {"step": t.step, "step_compute": t.step_compute, "step_cpu": t.step_cpu}
            for name, t in timings.items()
        },
        "ratio": {name: theirs.step / timings[name].step for name in ours_only},
        "ratio_cpu": {name: theirs.step_cpu / timings[name].step_cpu for name in ours_only},
        "ratio_compute": {name: theirs.step_compute / timings[name].step_compute for name in ours_only},
        "memory_ratio": {name: timings[name].peak_mib / theirs.peak_mib for name in ours_only},
        "tokens_per_second": {name: facts["tokens_plain"] / t.step for name, t in timings.items()},
        "largest_loss_difference": max(
            abs(a - b) for name in ours_only for a, b in zip(timings[name].losses, theirs.losses, strict=True)
        ),
        "macs_per_second": rate,
        "floor": floors,
        "over_floor": {name: timings[name].step_compute / floors[name] for name in ours_only},
        "profile": profile,
        "load": load.mean,
    }


def _facts(case: Case, side: Side) -> dict[str, Any]:
    """Token counts of a batch, and the multiply-adds that a step on it needs."""
    trainer, batch = side.trainer, side.batches[0]()
    core = trainer.base_model(trainer.model)
    text = core.config.get_text_config()
    shared = (batch["segment_ids"] == 0).sum(1).tolist()
    own = [[int((row == k).sum()) for k in range(1, case.responses + 1)] for row in batch["segment_ids"]]
    packed = [floor.Row(s, tuple(n)) for s, n in zip(shared, own, strict=True)]
    scored = len(batch["scored"] if "scored" in batch else batch["completion_places"])
    tower = floor.tower_macs(core, trainer._prepare_inputs(batch)["img_input_dict"])
    macs = {
        name: floor.step_macs(
            floor.decoder_of(text),
            packed,
            scored,
            tower,
            online=name == "online",
            lora=case.lora,
            checkpointing=case.checkpointing,
        )
        for name in ("online", "cached")
    }
    sequences = sum(s + n for s, row in zip(shared, own, strict=True) for n in row)  # what a plain layout would run
    return {
        "macs": macs,
        "tower_macs": tower,
        "tokens_packed": sum(row.tokens for row in packed),
        "tokens_plain": sequences,
        "width": text.hidden_size,
        "inner": text.intermediate_size,
    }


def profile_table(found: list[dict[str, Any]]) -> str:
    """Where our online step's time goes."""
    return markdown(
        [{"case": f["case"]["name"], **{kind: f"{share:.0%}" for kind, share in f["profile"].items()}} for f in found]
    )


def table(found: list[dict[str, Any]]) -> str:
    """Seconds of a step (compute + data), ratios, memory, distance to the floor, losses."""
    lines = []
    for f in found:
        seconds = {
            name: f"{t['step_compute']:.2f} + {t['step'] - t['step_compute']:.2f}" for name, t in f["timings"].items()
        }
        lines.append(
            {
                "case": f["case"]["name"],
                "TRL, s": seconds["trl"],
                "ours, s": seconds["online"],
                "ours cached, s": seconds["cached"],
                "faster": f"{f['ratio']['online']:.2f} / {f['ratio']['cached']:.2f}",
                "faster in processor time": f"{f['ratio_cpu']['online']:.2f} / {f['ratio_cpu']['cached']:.2f}",
                "tokens/s": " / ".join(f"{f['tokens_per_second'][name]:,.0f}" for name in ("trl", "online", "cached")),
                "peak memory, MiB": " / ".join(
                    f"{f['timings'][name]['peak_mib']:,.0f}" for name in ("trl", "online", "cached")
                ),
                "memory": f"{f['memory_ratio']['online']:.2f} / {f['memory_ratio']['cached']:.2f}",
                "over floor": f"{f['over_floor']['online']:.2f} / {f['over_floor']['cached']:.2f}",
                "last losses": " / ".join(
                    f"{f['timings'][name]['losses'][-1]:.5f}" for name in ("trl", "online", "cached")
                ),
                "load": f["load"],
            }
        )
    return markdown(lines)


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Measure the cases asked for, print and write the table."""
    parser = FlagParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="cpu")
    parser.add_argument("--case", action="append", help="names or patterns; all of the default table otherwise")
    parser.add_argument("--steps", type=int, default=3, help="measured steps of every side")
    parser.add_argument("--out", help="folder for dpo_vs_trl_SIZE.json and .md")
    options = parser.parse_args(argv)
    cases = CASES
    if options.case:
        cases = [c for c in CASES + MORE_CASES if any(fnmatch.fnmatch(c.name, pattern) for pattern in options.case)]
        if not cases:
            parser.error(
                f"no case is called {' or '.join(options.case)}: {', '.join(c.name for c in CASES + MORE_CASES)}"
            )
    found, about = [], machine()
    for case in cases:
        # With three copies of a 7B model in memory at once, far smaller batches would fit.
        found.append(run_case(case, options.size, options.steps, one_by_one=options.size == "7b"))
        heading = (
            f"{about['date']}, {about['device']}, {about['threads']} threads, torch {about['torch']}, {about['commit']}"
        )
        write(
            f"dpo_vs_trl_{options.size}",
            {"machine": about, "cases": found},
            f"{heading}\n\n{table(found)}\n\nOur online step:\n\n{profile_table(found)}",
            options.out,
        )
    return found


if __name__ == "__main__":
    main()
