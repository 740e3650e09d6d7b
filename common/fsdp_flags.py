"""What --fsdp and --fsdp_config ask for, or the config file of `accelerate launch`: how base/fsdp.py shares a model out.

All three have names for more than FSDP2 does here. What would change the result and is not done is refused by name.
"""

import json
import re
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import InputError


@dataclass(frozen=True)
class Sharding:
    """How FSDP2 shares a model out over the processes.

    Attributes:
        layers: names of the classes whose modules are gathered one at a time; without any, base/fsdp.py finds the layers.
        reshard_after_forward: whether a layer's weights are given up after its forward and gathered again for its
            backward (as in ZeRO-3), or are kept until then.
    """

    layers: tuple[str, ...] = ()
    reshard_after_forward: bool = True

    @property
    def words(self) -> str:
        """As a value of --fsdp."""
        return f"{'full_shard' if self.reshard_after_forward else 'shard_grad_op'} auto_wrap"

    @property
    def config(self) -> dict[str, Any]:
        """As a value of --fsdp_config."""
        layers = {"transformer_layer_cls_to_wrap": [*self.layers]} if self.layers else {}
        return {"version": 2, "reshard_after_forward": self.reshard_after_forward, **layers}


# Settings that are accepted with one value alone, and what to say of the others
_ONLY: dict[str, tuple[str, str]] = {
    "version": ("2", "FSDP1 is not supported, and transformers gives it up: leave it out, or give 2"),
    "auto_wrap_policy": (
        "transformer_based_wrap",
        "only TRANSFORMER_BASED_WRAP is supported, which gathers one layer after the other",
    ),
    "state_dict_type": (
        "full_state_dict",
        "checkpoints are written whole here, as from one process: leave it out, or give FULL_STATE_DICT",
    ),
    "cpu_offload": ("false", "is not supported: --deepspeed ds_configs/zero3_offload.json moves weights to the host"),
    "activation_checkpointing": ("false", "is spelt --gradient_checkpointing True here"),
    "cpu_ram_efficient_loading": ("false", "is not supported: every process reads the checkpoint"),
    "min_num_params": ("0", "only TRANSFORMER_BASED_WRAP is supported, which does not count parameters"),
}
_SYNONYMS = {"offload_params": "cpu_offload", "transformer_cls_names_to_wrap": "transformer_layer_cls_to_wrap"}
_NOT_FSDP2 = {
    "offload": "does not work here: --deepspeed ds_configs/zero3_offload.json moves weights to the host",
    "hybrid_shard": "does not work here: full_shard shares the weights out over all processes",
    "hybrid_shard_zero2": "does not work here: shard_grad_op shares out over all processes",
    "no_shard": "shares nothing out: leave --fsdp out, which is DDP",
}


def sharding_of(fsdp: str | bool | list[str] | None, config: str | dict[str, Any] | None) -> Sharding | None:
    """Of the values of --fsdp and --fsdp_config; None without FSDP.

    Raises:
        InputError: something that is not supported, or not known; says what to write instead.
    """
    words = " ".join(fsdp) if isinstance(fsdp, list) else str(fsdp or "")
    given = [word.lower() for word in re.split(r"[\s,]+", words) if word]
    if not given or given == ["false"]:
        if config:
            raise InputError('--fsdp_config does nothing alone: add --fsdp "full_shard auto_wrap".')
        return None
    settings = _settings(config)
    if given != ["true"]:
        for word in given:
            if word in _NOT_FSDP2:
                raise InputError(f"--fsdp {word} {_NOT_FSDP2[word]}.")
            if word not in ("full_shard", "shard_grad_op", "auto_wrap"):
                raise InputError(f'--fsdp {word} is unknown: write --fsdp "full_shard auto_wrap".')
        how = [word for word in given if word != "auto_wrap"]
        if len(how) != 1 or "auto_wrap" not in given:
            raise InputError(
                f"--fsdp {words} does not say "
                + ("that one layer after the other is gathered" if how else "how weights are shared out")
                + f': write --fsdp "{how[0] if how else "full_shard"} auto_wrap".'
            )
        settings.setdefault("reshard_after_forward", how[0] == "full_shard")
    return _sharding(settings, lambda name: f"--fsdp_config {name}")


def sharding_of_launcher(environment: MutableMapping[str, str]) -> Sharding | None:
    """What `accelerate launch` has been told of FSDP, which it says in environment variables; None if nothing.

    The variable that switches accelerate's own FSDP on is removed: base/fsdp.py does its work.

    Raises:
        InputError: the config asks for what is not supported.
    """
    if environment.pop("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return None
    names = {
        "version": "FSDP_VERSION",
        "auto_wrap_policy": "FSDP_AUTO_WRAP_POLICY",
        "state_dict_type": "FSDP_STATE_DICT_TYPE",
        "cpu_offload": "FSDP_OFFLOAD_PARAMS",
        "activation_checkpointing": "FSDP_ACTIVATION_CHECKPOINTING",
        "reshard_after_forward": "FSDP_RESHARD_AFTER_FORWARD",
        "transformer_layer_cls_to_wrap": "FSDP_TRANSFORMER_CLS_TO_WRAP",
    }
    settings = {name: environment[variable] for name, variable in names.items() if environment.get(variable)}
    settings.setdefault("version", 1)  # accelerate's default
    return _sharding(settings, lambda name: f"{names[name].lower()} in the config of accelerate launch")


def _settings(config: str | dict[str, Any] | None) -> dict[str, Any]:
    """The entries of --fsdp_config, a file or JSON, under their names without `fsdp_`."""
    if isinstance(config, str):
        try:
            text = config if config.lstrip().startswith("{") else Path(config).read_text(encoding="utf-8")
            config = json.loads(text)
        except (OSError, ValueError) as error:
            raise InputError(f"--fsdp_config {config} cannot be read ({error}): give a JSON file.") from error
    if config is not None and not isinstance(config, dict):
        raise InputError("--fsdp_config must be a JSON object.")
    entries = {name.removeprefix("fsdp_"): value for name, value in (config or {}).items()}
    return {_SYNONYMS.get(name, name): value for name, value in entries.items()}


def _sharding(settings: dict[str, Any], spelt: Callable[[str], str]) -> Sharding:
    """Args: spelt: the name of a setting, as the user wrote it."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        text = str(value).lower()
        if name in _ONLY:
            allowed, why = _ONLY[name]
            if text != allowed:
                raise InputError(f"{spelt(name)} {value}: {why}.")
        elif name == "reshard_after_forward":
            if text not in ("true", "false"):
                raise InputError(
                    f"{spelt(name)} {value}: give true (as ZeRO-3) or false (weights stay until backward)."
                )
            found[name] = text == "true"
        elif name == "transformer_layer_cls_to_wrap":
            names = value.split(",") if isinstance(value, str) else value or ()
            found["layers"] = tuple(name.strip() for name in names)
        else:
            raise InputError(
                f"{spelt(name)} is not a setting of FSDP2 here: leave it out "
                f"({', '.join([*_ONLY, 'reshard_after_forward', 'transformer_layer_cls_to_wrap'])} are read)."
            )
    return Sharding(**found)
