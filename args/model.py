"""What is trained: the checkpoint, and the adapter on it."""

import re
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from common.errors import InputError


@dataclass
class ModelArguments:
    """Which checkpoint to train and how to load it."""

    title: ClassVar[str] = "Model"
    model_name_or_path: str = field(
        metadata={"help": "Hub id, checkpoint folder or LoRA adapter folder to start from."}
    )
    use_flash_attention_2: bool = field(
        default=False,
        metadata={
            "help": "FlashAttention-2. Packed rows use the kernel of it that torch brings, with and without this flag."
        },
    )
    torch_dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto",
        metadata={
            "help": "Precision of the loaded weights; auto is bfloat16 with --bf16, else float32, float16 too small in range for most."
        },
    )
    freeze_vision_tower: bool = field(
        default=True, metadata={"help": "Keep the vision encoder fixed; its features are then shared by every pass."}
    )
    train_vision_layers: int | None = field(
        default=None,
        metadata={
            "help": "Of a frozen vision tower let the last N layers train; with --lora_vision True they alone get adapters."
        },
    )
    train_projector: bool | None = field(
        default=None,
        metadata={
            "help": "Train the modules between vision tower and language model, all their weights; by default they train without "
            "--use_lora, and not with it.",
            "nargs": "?",
            "const": True,
        },
    )
    freeze_language_model: bool = field(
        default=False,
        metadata={
            "help": "Keep the language model fixed: the projector alone trains, and what else of the tower is named."
        },
    )
    q_lora: bool = field(
        default=False, metadata={"help": "Load the base in --bits and train LoRA on it (needs --use_lora)."}
    )
    bits: Literal[4, 8] = field(default=4, metadata={"help": "With --q_lora: 4 (NF4, double quantisation) or 8."})
    max_pixels: int | None = field(
        default=None,
        metadata={
            "help": "Larger pictures are shrunk (fewer tiles, where a family cuts them), saved with the processor; by default as the "
            "checkpoint says. Qwen2.5-VL: 784 pixels are a token, 1003520 are 1280."
        },
    )
    min_pixels: int | None = field(
        default=None, metadata={"help": "Qwen-VL and GLM-V: smaller pictures are enlarged to this."}
    )
    video_frames: int | None = field(
        default=None,
        metadata={
            "help": "So many frames, evenly spread, of every video that has more: for a bound on tokens and memory. Saved with the "
            "processor; by default as the checkpoint says, else as its family's authors do (docs/models.md)."
        },
    )
    video_fps: float | None = field(
        default=None,
        metadata={
            "help": "So many frames of each second of a video, for events that a fixed number of frames would miss in long ones."
        },
    )
    enable_thinking: bool = field(
        default=False,
        metadata={
            "help": "Let the model think before it answers, where its chat template has that switch (Qwen3.5, ...)."
        },
    )
    merge_first: bool = field(
        default=False,
        metadata={
            "help": "Merge the adapter that --model_name_or_path names into its base, and start from that; else the adapter itself continues."
        },
    )


# LoRA flags that were not given, where training does not continue an adapter
NEW_ADAPTER: dict[str, Any] = {
    "lora_r": 64,
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    "lora_target_modules": ["auto"],
    "lora_bias": "none",
    "use_dora": False,
    "use_rslora": False,
    "init_lora_weights": "default",
    "lora_vision": False,
}
# --init_lora_weights, and what is said of them; pissa_niter_N is pissa by N subspace iterations
LORA_INITS: dict[str, str] = {
    "default": "A random, B 0",
    "gaussian": "A normal, B 0",
    "orthogonal": "A and B orthogonal, their product 0",
    "pissa": "the largest singular values of each weight, 2404.02948; pissa_niter_16 is quicker",
    "olora": "the QR decomposition of each weight, 2406.01775",
    "loftq": "what --q_lora rounds off, 2310.08659",
    "eva": "A from what the layers read of the training data, B 0, 2410.07170",
}
CHANGE_BASE = ("pissa", "olora")  # take what the adapter starts with out of the base's weights
OF_NEW_ADAPTER = "by default the adapter's that training continues, of a new one"


@dataclass
class LoraArguments:
    """LoRA through peft. `parse` fills in what was not given, so that run.json has it."""

    title: ClassVar[str] = "LoRA"
    use_lora: bool = field(default=False, metadata={"help": "Train a LoRA adapter instead of all weights."})
    lora_r: int | None = field(default=None, metadata={"help": f"Rank; {OF_NEW_ADAPTER} 64."})
    lora_alpha: int | None = field(
        default=None, metadata={"help": f"Scale, the update is multiplied by alpha / r; {OF_NEW_ADAPTER} 16."}
    )
    lora_dropout: float | None = field(
        default=None, metadata={"help": f"Dropout on the adapter's input; {OF_NEW_ADAPTER} 0.05."}
    )
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": "Names looked up in the language model only, a regular expression over all names, or auto: the family's "
            f"language-model targets; {OF_NEW_ADAPTER} auto."
        },
    )
    lora_bias: Literal["none", "all", "lora_only"] | None = field(
        default=None,
        metadata={
            "help": f"Which biases train: none, all, or lora_only (of layers with an adapter); {OF_NEW_ADAPTER} none."
        },
    )
    use_dora: bool | None = field(
        default=None,
        metadata={
            "help": "DoRA (2402.09353): direction by LoRA and a trained length per output; better at small ranks, slower.",
            "nargs": "?",
            "const": True,
        },
    )
    use_rslora: bool | None = field(
        default=None,
        metadata={
            "help": "rsLoRA (2312.03732): the scale is alpha / sqrt(r), which does not fade at large ranks.",
            "nargs": "?",
            "const": True,
        },
    )
    init_lora_weights: str | None = field(
        default=None,
        metadata={
            "help": f"What a new adapter starts with. {'; '.join(f'{name}: {what}' for name, what in LORA_INITS.items())}."
        },
    )
    lora_vision: bool | None = field(
        default=None,
        metadata={
            "help": "Adapters also in the layers of the vision tower (--train_vision_layers: in the last of them), whose "
            "features are then computed in every pass.",
            "nargs": "?",
            "const": True,
        },
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules trained in full and saved beside the adapter, e.g. lm_head."}
    )
    fast_lora: bool = field(
        default=True,
        metadata={
            "help": "Compute LoRA layers with fewer passes over wide tensors (base/fast_lora.py). False keeps peft's own layers."
        },
    )

    def __post_init__(self) -> None:
        for name in ("lora_r", "lora_alpha"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise InputError(f"--{name} is 1 or more, not {value}.")
        if self.lora_dropout is not None and not 0 <= self.lora_dropout < 1:
            raise InputError(f"--lora_dropout is a share from 0 to below 1, not {self.lora_dropout}.")
        init = self.init_lora_weights
        if init is not None and init not in LORA_INITS and not re.fullmatch(r"pissa_niter_\d+", init):
            known = ", ".join(LORA_INITS)
            if init in ("corda", "lora_ga"):
                raise InputError(
                    f"--init_lora_weights {init} takes what it starts with out of the base by gradients or covariances of data, which is "
                    f"not supported: take eva, which reads data and leaves the base alone, or one of {known}."
                )
            raise InputError(f"--init_lora_weights {init} is unknown: one of {known}, pissa_niter_N.")
