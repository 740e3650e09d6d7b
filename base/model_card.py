"""README.md of a saved model: what it was trained from, on what, how, and with which result. peft would write an empty form."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from args import without_token

NAMES = {
    "SFTConfig": "supervised fine-tuning",
    "DPOConfig": "preference optimisation",
    "RMConfig": "a reward model",
    "PPOConfig": "policy optimisation against rewards",
}
# Of a config: what a reader looks for first
SETTINGS = (
    "loss_type loss_weights advantage_estimator learning_rate lr_scheduler_type per_device_train_batch_size gradient_accumulation_steps "
    "num_train_epochs max_steps kl_coef response_length seed"
).split()
NO_RESULT = ("epoch", "step", "total_flos")


def model_card(run: Mapping[str, Any], log_history: Sequence[Mapping[str, Any]], is_adapter: bool) -> str:
    """The text of README.md, as the hub reads it.

    Args:
        run: what run.json holds.
        log_history: of the trainer's state; of each number the last one is shown.
    """
    arguments = run["arguments"]
    config_name = next(name for name in arguments if name in NAMES)
    config, model = arguments[config_name], arguments["ModelArguments"]
    lora, data = arguments.get("LoraArguments", {}), arguments.get("DataArguments", {})
    base = (run.get("plan") or {}).get("base") or model["model_name_or_path"]
    head = ["---"]
    if not Path(base).is_dir():  # else no id of the hub, which would refuse the card
        head += [f"base_model: {base}"]
    head += [
        f"library_name: {'peft' if is_adapter else 'transformers'}",
        f"pipeline_tag: {'text-classification' if config_name == 'RMConfig' else 'image-text-to-text'}",
        f"tags: [vl-rlhf, {config_name.removesuffix('Config').lower()}{', lora' if is_adapter else ''}]",
        "---",
    ]
    lines = [
        f"# {Path(config['output_dir']).name}",
        "",
        f"{'A LoRA adapter for' if is_adapter else 'All weights of'} `{base}`, trained by {NAMES[config_name]}"
        + (f", continuing `{model['model_name_or_path']}`." if model["model_name_or_path"] != base else "."),
        "",
        "| | |",
        "|---|---|",
    ]
    facts: dict[str, Any] = {"base": f"`{base}`", "data": data.get("dataset_name"), "file": data.get("data_path")}
    about = run.get("data") or {}
    facts |= {"rows": about.get("train_rows"), "fingerprint of the rows": about.get("train_fingerprint")}
    facts |= {name: config.get(name) for name in SETTINGS if config.get(name) not in (None, -1)}
    facts |= {f"hyper-parameters of {name}": _shown(values) for name, values in (run.get("losses") or {}).items()}
    if lora.get("use_lora"):
        facts["LoRA"] = _shown(
            {name.removeprefix("lora_"): lora[name] for name in ("lora_r", "lora_alpha", "lora_dropout")}
        )
    if model.get("q_lora"):
        facts["quantised in training"] = f"{model['bits']} bits"
    facts |= {"processes": run.get("world_size"), "commit": (run.get("git") or {}).get("commit")}
    lines += [f"| {name} | {_cell(value)} |" for name, value in facts.items() if value not in (None, "", [])]
    last: dict[str, Any] = {}
    for entry in log_history:
        last |= {name: value for name, value in entry.items() if isinstance(value, int | float)}
    results = {
        name: value
        for name, value in last.items()
        if name not in NO_RESULT and "runtime" not in name and "_per_second" not in name
    }
    if results:
        lines += [
            "",
            f"## Last numbers, at step {last.get('step')}",
            "",
            "| | training | held-out rows |",
            "|---|---:|---:|",
        ]
        names = dict.fromkeys(name.removeprefix("eval_") for name in results)
        lines += [
            f"| {name} | {_number(results.get(name))} | {_number(results.get(f'eval_{name}'))} |" for name in names
        ]
    versions = ", ".join(f"{name} {version}" for name, version in (run.get("versions") or {}).items() if version)
    lines += ["", "## Command", "", "```", shlex.join(without_token(run["argv"])), "```", "", f"With {versions}."]
    return "\n".join([*head, *lines]) + "\n"


def _shown(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _cell(value: object) -> str:
    return (" ".join(map(str, value)) if isinstance(value, list) else str(value)).replace("|", "\\|")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
