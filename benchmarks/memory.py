"""GiB per GPU of a training run, before it starts. Computed: no weights are created and no GPU is needed.

    python -m benchmarks.memory --model llava-hf/llava-1.5-7b-hf --gpus 8 --zero 3
    python -m benchmarks.memory --model runs/sft --script dpo --method lora --max_prompt_length 2900
    python -m benchmarks.memory --model Qwen/Qwen2.5-VL-7B-Instruct --script dpo --method qlora --fits 24

Weights, gradients and optimizer states are counted on the model's real modules, parameter by parameter, in the
precision that load_policy and DeepSpeed give them. Activations are the peak of one forward and backward pass of the
real modules, run on tensors without content (torch's FakeTensorMode). What DeepSpeed, DDP and peft add is one formula
each, in `memory`. tests/test_memory.py compares with tensors counted by torch's allocator in real steps.

With --lora_vision, --train_vision_layers or --train_projector one picture for each prompt goes through the vision tower
as well. Some families' towers read numbers of the picture (Qwen-VL, LLaVA-NeXT, Idefics, ...) and cannot run on tensors
without content: for them the table says that the tower's activations are missing. A frozen tower's are gone before
the step's peak.

Not counted: what OVERHEAD and FRAGMENTATION assume.
"""

import copy
import functools
import importlib
import inspect
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any
from unittest import mock

import torch
import transformers as tf
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from args import LoraArguments, run
from args.model import NEW_ADAPTER
from base.adapters import Role
from base.fast_lora import use_fast_lora
from base.features import pooled_features
from base.model import VLModelMixin
from base.packing import last_token_positions, pack_rows
from base.reward import VLRewardModel
from base.value import VLModelWithValueHead
from common.flags import FlagParser
from models import MODEL_NICKNAME_MAP, core_mapper_for
from models.assemble import add_lora

GIB = 1 << 30
OVERHEAD = 1.5 * GIB  # assumed: CUDA context, cuBLAS and NCCL workspaces
FRAGMENTATION = 0.05  # assumed: what the caching allocator holds beyond the tensors
SCRIPTS = ("sft", "dpo", "dpo_cached", "rm", "ppo")  # dpo_cached: --precompute_ref_log_probs True
# Methods, and the ds_configs/zero*.json that are useful with each; 0: one GPU or DDP
METHODS = {"full": ("0", "2", "2_offload", "3", "3_offload"), "lora": ("0", "3"), "qlora": ("0",)}
# DeepSpeed's defaults, in elements
ZERO2_BUCKET, ZERO3_LIVE, ZERO3_SUBGROUP = 5e8, 1e9, 1e9


def _shape(
    kind: str, width: int, inner: int, layers: int, heads: int, kv_heads: int = 0, vocabulary: int = 0, **more: Any
) -> dict[str, Any]:
    text = dict(num_key_value_heads=kv_heads or heads, vocab_size=vocabulary) if vocabulary else {}
    sizes = dict(hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads)
    return {"model_type": kind, **sizes, **text, **more}


def _qwen(tower: int, *text: int, tied: bool = False) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    vision = dict(depth=32, hidden_size=1280, intermediate_size=tower, num_heads=16, out_hidden_size=text[0])
    text_config = _shape("qwen2_5_vl_text", *text, rope_parameters=rope)
    return dict(model_type="qwen2_5_vl", vision_config=vision, text_config=text_config, tie_word_embeddings=tied)


_CLIP = _shape("clip_vision_model", 1024, 4096, 24, 16, image_size=336, patch_size=14, projection_dim=768)
_INTERN = _shape("internvl_vision", 1024, 4096, 24, 16, image_size=[448] * 2, patch_size=[14] * 2, attention_bias=True)
_SIGLIP = _shape("smolvlm_vision", 1152, 4304, 27, 16, image_size=384, patch_size=14)
# What matters in the published config.json files, and the tokens of a usual prompt: one picture and 64 of text
# fmt: off
PUBLISHED: dict[str, tuple[int, dict[str, Any]]] = {
    "HuggingFaceTB/SmolVLM2-2.2B-Instruct": (17 * 81 + 64, dict(model_type="smolvlm", vision_config=_SIGLIP, scale_factor=3,
        text_config=_shape("llama", 2048, 8192, 24, 32, 32, 49280), tie_word_embeddings=False)),
    "Qwen/Qwen2.5-VL-3B-Instruct": (1280 + 64, _qwen(3420, 2048, 11008, 36, 16, 2, 151936, tied=True)),
    "llava-hf/llava-1.5-7b-hf": (576 + 64, dict(model_type="llava", vision_config=_CLIP,
        text_config=_shape("llama", 4096, 11008, 32, 32, 32, 32064))),
    "llava-hf/llava-v1.6-mistral-7b-hf": (2880 + 64, dict(model_type="llava_next", vision_config=_CLIP,
        text_config=_shape("mistral", 4096, 14336, 32, 32, 8, 32064, sliding_window=None))),
    "OpenGVLab/InternVL3-8B-hf": (7 * 256 + 64, dict(model_type="internvl", vision_config=_INTERN,
        text_config=_shape("qwen2", 3584, 18944, 28, 28, 4, 151674), tie_word_embeddings=False)),
    "Qwen/Qwen2.5-VL-7B-Instruct": (1280 + 64, _qwen(3420, 3584, 18944, 28, 28, 4, 152064)),
    "llava-hf/llava-1.5-13b-hf": (576 + 64, dict(model_type="llava", vision_config=_CLIP,
        text_config=_shape("llama", 5120, 13824, 40, 40, 40, 32064))),
    "Qwen/Qwen2.5-VL-72B-Instruct": (1280 + 64, _qwen(3456, 8192, 29568, 80, 64, 8, 152064)),
}
# fmt: on


@dataclass(frozen=True)
class Setup:
    """One run, with the names of args where they exist."""

    script: str = "dpo"
    method: str = "lora"
    zero: str = "0"
    gpus: int = 1
    gpus_per_node: int = 8
    per_device_train_batch_size: int = 1
    max_prompt_length: int = 640
    max_target_length: int = 150
    gradient_checkpointing: bool = True
    local_rollout_forward_batch_size: int = 16
    rollouts_per_prompt: int = 1
    lora_r: int = 64
    bf16: bool = True
    use_dora: bool = False
    lora_vision: bool = False
    train_projector: bool = False  # beside LoRA; without LoRA it trains anyway, but for towers that hold it
    train_vision_layers: int = 0

    @property
    def alike(self) -> "Setup":
        """What determines the size of one micro batch on one GPU."""
        zero = {"0": "0", "2": "2"}.get(self.zero[0], "3" if self.method == "lora" else "2")
        return replace(self, zero=zero, gpus=1, script=self.script.removesuffix("_cached"))

    @property
    def rollout_prompts(self) -> int:
        """Prompts whose answers are sampled at once."""
        return max(1, self.local_rollout_forward_batch_size // self.rollouts_per_prompt)


# ---------------------------------------------------------------------------------------------------------------------
# The model as a script trains it
# ---------------------------------------------------------------------------------------------------------------------


@functools.cache
def class_and_config(model: str, layers: int | None = None) -> tuple[type, tf.PreTrainedConfig]:
    """Adapter class and configuration of a name in PUBLISHED, a folder or a hub id; `layers` shortens the decoder."""
    if model in PUBLISHED:
        config = tf.AutoConfig.for_model(**copy.deepcopy(PUBLISHED[model][1]))
        native = tf.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)].__name__
        cls = importlib.import_module(f"models.{MODEL_NICKNAME_MAP[native]}").core_mapper.model
    else:
        cls, config = core_mapper_for(model).model, tf.AutoConfig.from_pretrained(model)
    if layers is not None:
        text = config.get_text_config()
        text.num_hidden_layers = layers
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:layers]
    return cls, config


def trained_model(model: str, setup: Setup, layers: int | None = None) -> tuple[nn.Module, nn.Module]:
    """What a script trains, and the adapter's model in it, on the meta device.

    In the script's precision, with what it freezes, its heads and its adapters.
    """
    cls, config = class_and_config(model, layers)
    low = torch.bfloat16 if setup.bf16 and (setup.method != "full" or setup.zero != "0") else torch.float32
    with torch.device("meta"):
        core = cls._from_config(config, dtype=low)
        _choose_what_trains(core, setup)
        if setup.method == "qlora":  # peft's prepare_model_for_kbit_training
            linears = {id(p) for p in quantised(core)}
            for p in core.parameters():
                p.requires_grad_(False)
                p.data = p.data if id(p) in linears else p.data.float()
        whole = core
        if setup.method != "full":
            dropout = NEW_ADAPTER["lora_dropout"] if setup.script == "sft" else 0.0  # the other scripts turn it off
            flags = {"lora_r": setup.lora_r, "use_dora": setup.use_dora, "lora_vision": setup.lora_vision}
            whole = add_lora(
                core,
                LoraArguments(use_lora=True, lora_dropout=dropout, **flags),
                vision_layers=setup.train_vision_layers or None,
                with_projector=setup.train_projector,
            )
            if setup.method == "lora" and setup.zero != "3" and not setup.use_dora:
                use_fast_lora(whole)
            for p in whole.parameters():  # of the projector; adapters are float32 already
                p.data = p.data.float() if p.requires_grad else p.data
        if setup.script == "rm":
            whole = VLRewardModel(whole)
        elif setup.script == "ppo":
            whole = VLModelWithValueHead(whole)
            if setup.method == "full":
                whole.value_backbone = VLRewardModel(cls._from_config(config, dtype=low)).backbone  # lm_head frozen
            else:
                whole.add_value_function()
                config = copy.copy(whole.backbone.peft_config[Role.POLICY.adapter])
                whole.backbone.add_adapter(Role.reward(0).adapter, config)
                trained = (Role.POLICY, Role.VALUE)
                for name, p in whole.backbone.named_parameters():
                    p.requires_grad_(any(f".{role.adapter}." in name for role in trained))
            whole.freeze_vision_side()
        return (whole.to(low) if setup.zero != "0" else whole), core


def _choose_what_trains(core: VLModelMixin, setup: Setup) -> None:
    """As models.assemble.choose_what_trains; LoRA freezes all of it later."""
    core.freeze_vision_tower()
    if setup.method == "full":
        for layer in core.vision_layers()[-setup.train_vision_layers :] if setup.train_vision_layers else ():
            layer.requires_grad_(True)
        for parameter in core.projector_parameters() if setup.train_projector else ():
            parameter.requires_grad_(True)


def quantised(core: nn.Module) -> list[nn.Parameter]:
    """Weights that --q_lora loads in 4 bits: those of the language model's products, not of their adapters."""
    linear = [(name, m) for name, m in core.get_decoder().named_modules() if isinstance(m, nn.Linear)]
    return [m.weight for name, m in linear if "lora_" not in name]


def nf4_bytes(weight: torch.Tensor) -> int:
    """Bytes of NF4 weights (arXiv:2305.14314 §3) as bitsandbytes stores them.

    4 bits per weight, a uint8 scale per 64 weights, a float32 scale per 256 of those, three small tables.
    """
    blocks = -(-weight.numel() // 64)
    return weight.numel() // 2 + blocks + 4 * -(-blocks // 256) + 4 * (16 + 256 + 1)


@functools.cache
def count(model: str, setup: Setup) -> tuple[int, int, int, int]:
    """Bytes of weights and of gradients; parameters that train; bytes of a reference."""
    whole, core = trained_model(model, setup)
    small = {id(p) for p in quantised(core)} if setup.method == "qlora" else set()
    weights = sum(nf4_bytes(p) if id(p) in small else p.nbytes for p in whole.parameters())
    trained = [p for p in whole.parameters() if p.requires_grad]
    reference = sum(p.nbytes for p in core.parameters()) if setup.method == "full" else 0
    return weights, sum(p.nbytes for p in trained), sum(p.numel() for p in trained), reference


# ---------------------------------------------------------------------------------------------------------------------
# What a step holds besides weights, gradients and optimizer
# ---------------------------------------------------------------------------------------------------------------------


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors that were created while it is on and still exist: `now`, and `most` at any time."""

    def __init__(self, before: list[torch.Tensor]) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known = {tensor.untyped_storage()._cdata for tensor in before}

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        result = func(*args, **(kwargs or {}))
        for storage in (leaf.untyped_storage() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)):
            key, size = storage._cdata, storage.nbytes()
            if key not in self.known:
                self.known.add(key)
                self.now += size
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._forget, key, size)
        return result

    def _forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def _fill_with_fakes(model: nn.Module) -> list[torch.Tensor]:
    """Replace meta tensors by fake CPU tensors, which autocast and attention kernels support.

    Gradients exist already, as during accumulation.
    """
    made: dict[int, torch.Tensor] = {}  # tied weights stay tied
    for slots in (s for module in model.modules() for s in (module._parameters, module._buffers)):
        for name, tensor in slots.items():
            if tensor is not None and id(tensor) not in made:
                fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                is_weight = isinstance(tensor, nn.Parameter)
                made[id(tensor)] = nn.Parameter(fake, requires_grad=tensor.requires_grad) if is_weight else fake
            slots[name] = made[id(tensor)] if tensor is not None else None
    for tensor in made.values():
        tensor.grad = torch.empty_like(tensor) if tensor.requires_grad else None
    return [t for tensor in made.values() for t in (tensor, tensor.grad) if t is not None]


@functools.cache
def step_bytes(model: str, setup: Setup, train: bool = True) -> int:
    """Most bytes that forward and backward of a micro batch hold besides weights and gradients.

    `train=False`: those of the forward pass over a rollout's prompts. Equal layers do not all run: two short stacks
    give the numbers of the whole one.
    """
    text = class_and_config(model)[1].get_text_config()
    depth = text.num_hidden_layers
    if depth <= 8 or len(set(getattr(text, "layer_types", None) or [0])) > 1:
        return max(_peaks(model, setup, train, None))
    few, more = (_peaks(model, setup, train, layers) for layers in (4, 6))
    return max(a + (b - a) * (depth - 4) // 2 for a, b in zip(few, more, strict=True))


def _vision_trains(core: nn.Module) -> bool:
    return any(p.requires_grad for p in core.vision_parameters().values())


def picture_inputs(model: str) -> dict[str, torch.Tensor] | None:
    """What stands for one picture in the forward of the families whose towers run without content; None for the others."""
    if model in PUBLISHED:
        vision, tokens = PUBLISHED[model][1]["vision_config"], PUBLISHED[model][0] - 64
        tiles = {"clip_vision_model": tokens // 576, "internvl_vision": tokens // 256}.get(vision.get("model_type"), 0)
        size = vision["image_size"][0] if tiles == 7 else vision.get("image_size")
        found = {"pixel_values": torch.empty(tiles, 3, size, size)} if tiles in (1, 7) else None
    else:
        checkpoint = core_mapper_for(model)
        found = checkpoint.processor(model).dummy_images()
    if found is None:
        return None
    with torch.device("meta"):
        core = class_and_config(model)[0]._from_config(class_and_config(model)[1])
    with FakeTensorMode(allow_non_fake_inputs=True):
        _fill_with_fakes(core)
        try:
            return found if _features(core, found, 1) is not None else None
        except (DataDependentOutputException, DynamicOutputShapeException):
            return None


def _features(core: nn.Module, images: dict[str, torch.Tensor], batch: int) -> torch.Tensor | None:
    """What tower and projector make of one picture for each of `batch` prompts, (tokens, D); None if it is not put among embeddings."""
    of_batch = {
        n: torch.empty((batch * len(value), *value.shape[1:]), dtype=value.dtype) for n, value in images.items()
    }
    outputs = pooled_features(core.encode_images(of_batch)).get("mm_encoder_outputs")
    if outputs is None:
        return None
    tensors = [t for t in tree_leaves([dict(o) for o in outputs.values()]) if isinstance(t, torch.Tensor)]
    return torch.cat([t.flatten(0, -2) for t in tensors])


def _put_into_embeddings(core: nn.Module, features: torch.Tensor) -> None:
    """Where pictures stand, the decoder reads features."""

    def scatter(_module: nn.Module, _inputs: object, embedded: torch.Tensor) -> torch.Tensor:
        place = torch.zeros((*embedded.shape[:2], 1), dtype=torch.bool).expand_as(embedded)
        return embedded.masked_scatter(place, features.to(embedded.dtype))

    core.get_input_embeddings().register_forward_hook(scatter)


def _peaks(model: str, setup: Setup, train: bool, layers: int | None) -> tuple[int, int]:
    """Most bytes at any time of the forward pass, and of the backward pass."""
    whole, core = trained_model(model, setup, layers)
    if setup.gradient_checkpointing:
        owner = whole if isinstance(whole, VLRewardModel | VLModelWithValueHead) else core
        owner.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    images = picture_inputs(model) if train and _vision_trains(core) else None
    batch, T, K = setup.per_device_train_batch_size, setup.max_target_length, 1 if setup.script in ("sft", "ppo") else 2
    if not train:
        whole, batch, T = whole.backbone, setup.rollout_prompts, 1
    rows = pack_rows([[1] * setup.max_prompt_length] * batch, [[[1] * T] * K] * batch, 0)
    text_only = {}  # the rows are as long as with images; their features come from outside
    if "mm_token_type_ids" in inspect.signature(core.forward).parameters:
        text_only = {"mm_token_type_ids": torch.zeros_like(rows["input_ids"]), "image_grid_thw": None}
    inputs = core.packed_inputs(rows["input_ids"], rows["segment_ids"], text_only, packed=K > 1)
    if K == 1:
        del inputs["attention_mask"]  # rows of one length: the mask hides only the future
    mask = rows["completion_mask"]
    scored = {"completion_index": rows["completion_index"][mask], "completion_ids": rows["completion_ids"][mask]}
    if setup.script == "rm":
        scored = {"completion_index": last_token_positions(rows["segment_ids"])}
    elif setup.script == "ppo" and train:
        scored["with_entropy"] = True
    whole.train(train)
    # transformers builds a mask for tensors without content; in a real step the kernel does causal masking
    untraced = mock.patch.multiple(
        "transformers.masking_utils", is_tracing=lambda *_: False, find_packed_sequence_indices=lambda *_: None
    )
    with (
        untraced,
        FakeTensorMode(allow_non_fake_inputs=True),
        torch.set_grad_enabled(train),
        LiveBytes(_fill_with_fakes(whole)) as live,
    ):
        with torch.autocast("cpu", torch.bfloat16, enabled=setup.bf16 and setup.zero == "0"):
            if images is not None:
                _put_into_embeddings(core, _features(core, images, batch))
            out = whole(**inputs, **scored)
        values = [out] if setup.script == "rm" else [out.logps, out.get("state_values")]
        loss = sum(value.sum() for value in values if value is not None)
        forward, live.most = live.most, live.now
        if train:
            loss.backward()
    return forward, live.most


def cache_bytes(model: str, setup: Setup) -> int:
    """Keys and values of a whole rollout, in 2 bytes each; 4 without --bf16. Not those of images, nor states that do not grow.

    Where the K answers to a prompt are queries of one row (`decodes_packed`) the prompt's stand there once, behind them K for every token but
    the last, which nothing reads. Else every answer is a row with a copy of its prompt, and layers with a window hold no more than that.
    """
    text = class_and_config(model)[1].get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = heads * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    B, K, P, T = setup.rollout_prompts, setup.rollouts_per_prompt, setup.max_prompt_length, setup.max_target_length
    if K > 1 and trained_model(model, setup)[1].decodes_packed:
        tokens = B * (P + K * (T - 1)) * text.num_hidden_layers
    else:
        window = getattr(text, "sliding_window", None) or P + T
        length = {"full_attention": P + T, "sliding_attention": min(P + T, window)}
        kinds = getattr(text, "layer_types", None) or ["sliding_attention"] * text.num_hidden_layers
        tokens = B * K * sum(length.get(kind, 0) for kind in kinds)
    return tokens * 2 * width * (2 if setup.bf16 else 4)


# ---------------------------------------------------------------------------------------------------------------------
# The sum
# ---------------------------------------------------------------------------------------------------------------------


def memory(model: str, setup: Setup) -> dict[str, float]:
    """Peak bytes of every part on one GPU; `host`: of one node's memory."""
    weights, gradients, t, reference = count(model, setup.alike)
    n, stage, offload = setup.gpus, int(setup.zero[0]), setup.zero.endswith("offload")
    found = {"weights": weights, "gradients": gradients, "optimizer": 8 * t}
    # A separate reward model is bf16; the reference has the policy's precision.
    reward = reference // 2 if setup.bf16 and stage == 0 else reference
    found["other models"] = {"dpo": reference, "ppo": reference + reward}.get(setup.script, 0)
    activations, rollout, host = step_bytes(model, setup.alike), 0.0, 0.0
    if setup.method == "qlora":  # the weight in use, in bf16
        decoder = class_and_config(model)[1].get_text_config()
        activations += 2 * decoder.hidden_size * decoder.intermediate_size
    if setup.script == "ppo":
        rollout = step_bytes(model, setup.alike, train=False) + cache_bytes(model, setup)
    update = 0.0  # float32 gradients while DeepSpeed's optimizer steps: nothing else of a step exists then
    if stage == 0:
        buffers = gradients if n > 1 else 0  # DDP's buckets
    else:
        found |= {"optimizer": 12 * t / n, "gradients": gradients / n}  # float32 weights and two moments
        if stage == 2:
            buffers, update = 2 * 2 * ZERO2_BUCKET, 4 * t / n  # two, because of overlap_comm
        else:
            buffers, update = min(weights, 2 * ZERO3_LIVE), 4 * min(t / n, ZERO3_SUBGROUP)  # gathered layers
            rollout += weights if rollout else 0  # a rollout gathers the whole model
            found |= {"weights": weights / n, "other models": found["other models"] / n}
        if offload:
            moved = ["optimizer", "gradients"] + (["weights", "other models"] if stage == 3 else [])
            host, update = sum(found[part] for part in moved) + 4 * t / n, 0.0
            found |= dict.fromkeys(moved, 0.0)
    found["step"] = max(activations + buffers, rollout, update)
    found["assumed"] = OVERHEAD + FRAGMENTATION * sum(found.values())
    return found | {"total": sum(found.values()), "host": host * min(n, setup.gpus_per_node)}


def longest_prompt(model: str, setup: Setup, gib: float, most: int = 32768, step: int = 64) -> int:
    """The longest prompt, image tokens included, of which a step fits; in steps of `step`, 0 if none fits."""
    low, high = 0, most // step + 1  # low fits, or is 0; high does not, or is not asked for
    while high - low > 1:
        middle = (low + high) // 2
        fits = memory(model, replace(setup, max_prompt_length=middle * step))["total"] <= gib * GIB
        low, high = (middle, high) if fits else (low, middle)
    return low * step


def main(argv: Sequence[str] | None = None) -> None:
    """Print one table: the scripts side by side, or the parts of one; with --fits, the longest prompts."""
    parser = FlagParser(description=__doc__)
    parser.add_argument("--model", required=True, help=f"checkpoint folder, hub id, or offline: {', '.join(PUBLISHED)}")
    parser.add_argument("--script", choices=SCRIPTS, help="show the parts of this one")
    parser.add_argument("--method", choices=METHODS, nargs="+", default=list(METHODS))
    parser.add_argument(
        "--zero", choices=METHODS["full"], nargs="+", help="0 is one GPU or DDP, 3_offload zero3_offload.json"
    )
    parser.add_argument(
        "--fits", type=float, metavar="GIB", help="print the longest prompt that fits this much memory instead; slow"
    )
    for field in fields(Setup)[3:]:
        kind = (lambda text: text == "True") if isinstance(field.default, bool) else int
        parser.add_argument(f"--{field.name}", type=kind, default=field.default)
    flags = vars(parser.parse_args(argv))
    model, script, methods, zeros, fits = (flags.pop(name) for name in ("model", "script", "method", "zero", "fits"))
    if model in PUBLISHED and flags["max_prompt_length"] == Setup.max_prompt_length:
        flags["max_prompt_length"] = PUBLISHED[model][0]
    unit = f"longest prompt in {fits:g} GiB, in tokens" if fits else "GiB per GPU, of host memory per node"
    said = [f"{name} {value}" for name, value in flags.items() if not (fits and name == "max_prompt_length")]
    print(f"{model}, {', '.join(said)}; {unit}\n")
    of_vision = ("lora_vision", "train_vision_layers", "train_projector")
    if any(flags[name] for name in of_vision) and picture_inputs(model) is None:
        print("The vision tower's activations are not among them: it cannot run on tensors without content.\n")
    rows: list[list[str]] = []
    for method in methods:
        for zero in zeros or METHODS[method]:
            if (method == "qlora" and zero[0] == "3") or (flags["gpus"] == 1 and zero in ("2", "3")):
                continue  # quantised weights are not partitioned, and with one GPU nothing is
            config = f"zero{zero}.json" if zero != "0" else "DDP" if flags["gpus"] > 1 else "one GPU"
            if fits:
                asked = [script] if script else list(SCRIPTS)
                rows = rows or [["method", "config", *asked], ["---"] * (2 + len(asked))]
                longest = [longest_prompt(model, Setup(name, method, zero, **flags), fits) for name in asked]
                rows.append([method, config, *map(str, longest)])
                continue
            found = {
                name: memory(model, Setup(name, method, zero, **flags)) for name in ([script] if script else SCRIPTS)
            }
            totals = {name: parts["total"] for name, parts in found.items()}
            cells = found[script] if script else totals | {"host": max(parts["host"] for parts in found.values())}
            rows = rows or [["method", "config", *cells], ["---"] * (2 + len(cells))]
            rows.append([method, config, *(f"{value / GIB:.1f}" for value in cells.values())])
    print("\n".join(f"| {' | '.join(row)} |" for row in rows))


if __name__ == "__main__":
    run(main)
