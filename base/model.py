"""What every model family inherits: the contract's model methods, vision features computed once, log-probs without prompt logits.

An adapter mixes `VLModelMixin` in front of a transformers class:

    class LlavaForRL(VLModelMixin, LlavaForConditionalGeneration): ...

and overrides the small hooks (`packed_attention_mask`, `packed_position_ids`, `encode_images`, ...) where its family differs.
"""

import functools
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.utils.checkpoint
from torch import nn
from transformers import GenerationMixin
from transformers.utils import ModelOutput

from base import packing
from base.features import has_images, pooled_features, sum_of_tensors
from base.logps import token_logps
from base.packed_attention import REPLACED, attend_by_segments, layout_of, segment_mask, with_layout
from base.segments import Layout
from common.errors import InputError

TEXT_INPUTS = ("input_ids", "attention_mask", "position_ids", "inputs_embeds", "use_cache")
TOKEN_INPUTS = ("input_ids", "position_ids", "token_type_ids", "mm_token_type_ids")  # (B, L), positions also (3, B, L)


@dataclass
class CompletionOutput(ModelOutput):
    """What `forward(completion_index=...)` returns for N positions.

    Attributes:
        hidden: (N, D) last hidden states at the positions.
        logps: (N,) float32 log-probabilities of `completion_ids`, natural logarithm; None without `completion_ids`.
        entropy: (N,) float32 entropies of the next-token distributions in nats, if `with_entropy`.
    """

    hidden: torch.Tensor | None = None
    logps: torch.Tensor | None = None
    entropy: torch.Tensor | None = None


class VLModelMixin:
    """The contract's model methods, for any transformers vision-language model."""

    default_lora_target: ClassVar[list[str]] = [
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    ]

    # Names of linear layers in released recipes -> ours, where a port has split or renamed them.
    renamed_lora_targets: ClassVar[dict[str, list[str]]] = {}

    # Beginnings of module names in adapters saved with transformers up to 4.51, and what the class calls them now
    adapter_renames: ClassVar[dict[str, str]] = {
        "language_model.model.": "model.language_model.",
        "language_model.lm_head": "lm_head",
        "vision_tower.": "model.vision_tower.",
        "multi_modal_projector.": "model.multi_modal_projector.",
    }

    # Parts of the vision tower that are the projector, where it has none of its own: names below the tower
    projector_in_tower: ClassVar[list[str]] = []

    # Whether responses can share a row. Not if layers mix a row's tokens whatever the mask says (convolutions, linear attention).
    packs: ClassVar[bool] = True

    # Whether rows of a batch can lie end to end in one row, each with positions and attention of its own. Not if layers read something else by
    # row (states of images, a rotary base that depends on the row's length).
    end_to_end: ClassVar[bool] = True

    # Whether rollouts, whose length is bounded, can use a static cache (base/rollout_cache.py).
    static_rollout_cache: ClassVar[bool] = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        native = next(c for c in cls.__mro__[1:] if issubclass(c, GenerationMixin) and not issubclass(c, VLModelMixin))
        # `architectures` in a saved config.json is the class name: it must be the one that transformers knows.
        cls.__name__ = native.__name__
        cls.forward = _with_completions(cls.forward)

    @classmethod
    def is_custom_code(cls) -> bool:
        """transformers skips its checkpoint-key conversion for classes outside `transformers.*` unless this says False.

        Without it a checkpoint loads with a random lm_head and only a warning.
        """
        return False

    # -- the contract -------------------------------------------------------------------------------------------------

    def get_vision_tower(self) -> nn.Module:
        """The vision encoder."""
        return self.get_encoder(modality="image")

    def freeze_vision_tower(self) -> None:
        """Stop gradients into the vision encoder; projector and language model keep theirs."""
        self.get_vision_tower().requires_grad_(False)

    def vision_layers(self) -> list[nn.Module]:
        """The blocks of the vision tower whose output is used, first to last."""
        stacks = [m for m in self.get_vision_tower().modules() if isinstance(m, nn.ModuleList)]
        blocks = [*max(stacks, key=len)]
        read = getattr(self.config, "vision_feature_layer", None)  # numbers of hidden states, the first is the input
        if read is None:
            return blocks
        numbers = [n % (len(blocks) + 1) for n in ([read] if isinstance(read, int) else read)]
        return blocks[: max(numbers)]

    def projector(self) -> list[nn.Module]:
        """What lies between vision tower and language model: the outermost modules, no lists of them."""
        tower = self.get_vision_tower()
        inside = {id(m) for m in tower.modules()}
        outside = [m for m in self.vision_modules() if not any(id(part) in inside for part in m.modules())]
        names = {id(m): name for name, m in self.named_modules()}
        outside = [m for m in outside if "audio" not in names[id(m)] and any(True for _ in m.parameters())]
        found = _without_lists([*outside, *(tower.get_submodule(name) for name in self.projector_in_tower)])
        within = {id(inner) for m in found for inner in m.modules() if inner is not m}
        return [m for m in dict.fromkeys(found) if id(m) not in within]

    def projector_parameters(self) -> list[nn.Parameter]:
        """The weights of `projector`, and single ones that lie beside it (`image_newline`)."""
        tower = {id(p) for p in self.get_vision_tower().parameters()}
        own = {id(p) for part in self.projector() for p in part.parameters()}
        return [
            p
            for name, p in self.vision_parameters().items()
            if id(p) in own or (id(p) not in tower and "audio" not in name)
        ]

    def freeze_language_model(self) -> None:
        """Stop gradients into decoder and head."""
        for part in (self.get_decoder(), self.get_output_embeddings()):
            part.requires_grad_(False)

    @classmethod
    def prepare_default_generation_kwargs(cls) -> dict[str, Any]:
        """Generation settings of an evaluation: greedy, up to 1024 new tokens."""
        return {"max_new_tokens": 1024, "do_sample": False, "num_beams": 1, "use_cache": True}

    def lora_target_regex(self, targets: list[str] | None = None) -> str:
        """Regular expression over full module names that matches `targets` inside the language model and nothing else.

        Bare suffixes such as q_proj would also put adapters into the vision tower. `all-linear` (or `all`) stands for all
        linear layers of the language model.

        Raises:
            ValueError: a target names no linear layer of the language model.
        """
        decoder = self.get_decoder()
        prefix = next(name for name, module in self.named_modules() if module is decoder)
        linear = [name for name, module in decoder.named_modules() if isinstance(module, nn.Linear)]
        linear = [name.removesuffix(".base_layer") for name in linear if ".lora_" not in name]  # of an adapted model
        targets = [
            new for old in targets or self.default_lora_target for new in self.renamed_lora_targets.get(old, [old])
        ]
        if targets in (["all-linear"], ["all"]):
            targets = sorted({name.rsplit(".", 1)[-1] for name in linear})
        for target in targets:
            if not any(name == target or name.endswith("." + target) for name in linear):
                known = sorted({name.rsplit(".", 1)[-1] for name in linear})
                raise ValueError(
                    f"LoRA target {target} is not a linear layer of the language model: choose from {', '.join(known)}."
                )
        return rf"{re.escape(prefix)}\.(.*\.)?({'|'.join(map(re.escape, targets))})"

    def vision_lora_regex(self, last: int | None = None) -> str:
        """Regular expression over full module names that matches the linear layers of `vision_layers`, or of the last ones of them.

        Raises:
            ValueError: there are not so many.
        """
        blocks = self.vision_layers()
        if last is not None and last > len(blocks):
            raise ValueError(
                f"--train_vision_layers {last} is more than the {len(blocks)} layers whose output is used."
            )
        names = {id(module): name for name, module in self.named_modules()}
        blocks = blocks[-last:] if last else blocks
        inside = {names[id(m)] for block in blocks for m in block.modules() if isinstance(m, nn.Linear)}
        places = [names[id(block)] for block in blocks]
        # The name of the group says in adapter_config.json which part is the tower's.
        leaves = sorted({name.rpartition(".")[2] for name in inside})
        return rf"(?P<vision>{'|'.join(map(re.escape, places))})\.(?:.*\.)?(?:{'|'.join(map(re.escape, leaves))})"

    # -- vision -------------------------------------------------------------------------------------------------------

    def vision_parameters(self) -> dict[str, nn.Parameter]:
        """Everything outside the language model (vision tower, projector, ...), by name."""
        text = {id(p) for m in (self.get_decoder(), self.get_output_embeddings()) for p in m.parameters()}
        return {name: p for name, p in self.named_parameters() if id(p) not in text}

    def vision_modules(self) -> list[nn.Module]:
        """Every module outside the language model, but not those that contain it."""
        text = {id(m) for part in (self.get_decoder(), self.get_output_embeddings()) for m in part.modules()}
        return [m for m in self.modules() if not any(id(inner) in text for inner in m.modules())]

    def freeze_unused(self) -> None:
        """Stop gradients into audio towers, which neither text nor images reach: they would take optimizer states."""
        for name, parameter in self.vision_parameters().items():
            if any("audio" in part for part in name.split(".")):
                parameter.requires_grad_(False)

    def vision_trains(self) -> bool:
        """Whether any of `vision_parameters` receives gradients."""
        return any(p.requires_grad for p in self.vision_parameters().values())

    def encode_images(self, img_inputs: dict[str, Any]) -> dict[str, Any]:
        """Run the vision tower once; return the keyword arguments that stand for `img_inputs` in forward and generate.

        Args:
            img_inputs: the collator's `img_input_dict`. Without images it is returned as it is.
        """
        if not has_images(img_inputs):
            return dict(img_inputs)
        read: set[str] = set()
        features = {}
        for modality, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
            if img_inputs.get(pixels) is not None:
                extract = getattr(self.base_model, f"get_{modality}_features")
                names = set(inspect.signature(extract).parameters)
                features[modality] = extract(**{k: v for k, v in img_inputs.items() if k in names}, return_dict=True)
                read |= names
        # The grids are still needed for M-RoPE positions, everything else that the tower read is not.
        rest = {k: v for k, v in img_inputs.items() if k not in read or k in ("image_grid_thw", "video_grid_thw")}
        return {**rest, "mm_encoder_outputs": features}

    @property
    def image_placeholder_ids(self) -> list[int]:
        """Token ids that stand for features of images, videos or sound and must never be generated."""
        names = [f"{kind}_token_{what}" for kind in ("image", "video", "audio") for what in ("id", "index")]
        ids = {getattr(self.config, name, None) for name in [*names, "boi_token_index"]}
        return sorted(i for i in ids if isinstance(i, int) and 0 <= i < self.config.get_text_config().vocab_size)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' generate; placeholder tokens are suppressed, because a generated one has no features."""
        kwargs.pop("dummy_images", None)  # for training on several ranks only
        kwargs["suppress_tokens"] = (
            sorted({*(kwargs.get("suppress_tokens") or []), *self.image_placeholder_ids}) or None
        )
        return super().generate(*args, **kwargs)

    @property
    def decodes_packed(self) -> bool:
        """Whether the answers to a prompt can be queries of one row in generation, too: full attention, an ordinary mask and cache."""
        text = self.config.get_text_config()
        kinds = set(getattr(text, "layer_types", None) or ())
        windows = kinds - {"full_attention"} if kinds else getattr(text, "sliding_window", None)
        ordinary = type(self).packed_attention_mask is VLModelMixin.packed_attention_mask
        sdpa = self.get_decoder().config._attn_implementation == "sdpa"  # FlashAttention takes no 4-D mask
        return self.packs and ordinary and not windows and self.static_rollout_cache and sdpa

    # -- packed rows ---------------------------------------------------------------------------------------------------

    def packed_inputs(
        self,
        input_ids: torch.Tensor,
        segment_ids: torch.Tensor,
        img_inputs: dict[str, Any],
        packed: bool = True,
        layout: Layout | None = None,
    ) -> dict[str, Any]:
        """Keyword arguments of forward for rows of `packing.pack_rows`.

        Args:
            input_ids, segment_ids: (B, L).
            img_inputs: the collator's `img_input_dict`.
            packed: False when no row has more than one response; then an ordinary (B, L) mask serves, and flash attention can be used.
                Rows of packed batches, and of padded ones, lie end to end in the forward, which switches attention by segments on for the
                process, see base/packed_attention.py; `completion_index` keeps counting padded rows.
            layout: the batch's; made from `segment_ids`, which waits for the device, if it is not given.
        """
        layout = layout or Layout(segment_ids)
        inputs = {"input_ids": input_ids, "use_cache": False, **img_inputs}
        if packed and not self.packs:
            raise InputError(f"Layers of {type(self).__name__} would mix a row's responses: add --share_prefix False.")
        # Padded rows of one response each are ordinary rows, which gain by leaving the padding out, and by that alone.
        if packed or (self.lays_end_to_end and layout.padded and not layout.several):
            attend_by_segments()
            inputs["attention_mask"] = self._masks(input_ids, segment_ids, img_inputs, layout)
            inputs["position_ids"] = self._positions(input_ids, segment_ids, img_inputs, layout)
            inputs.pop("token_type_ids", None)  # the mask says already which token sees which
            return inputs
        inputs["attention_mask"] = (segment_ids >= 0).long()
        if type(self).packed_position_ids is not VLModelMixin.packed_position_ids:
            # The class would count them in every pass, and wait for the device at every image.
            inputs["position_ids"] = self._positions(input_ids, segment_ids, img_inputs, layout)
        return inputs

    def _masks(
        self, input_ids: torch.Tensor, segment_ids: torch.Tensor, img_inputs: dict[str, Any], layout: Layout
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        """`packed_attention_mask` with the layout; an empty one where the layout alone says which token sees which."""
        ordinary = type(self).packed_attention_mask is VLModelMixin.packed_attention_mask
        hides_nothing = self._window is None or layout.shape[1] <= self._window
        if ordinary and hides_nothing and self._replaced_attention:
            return self._by_kind(segment_mask(layout, input_ids.device))
        masks = self.packed_attention_mask(input_ids, segment_ids, img_inputs)
        for mask in masks.values() if isinstance(masks, dict) else [masks]:
            with_layout(mask, layout)
        return masks

    def _positions(
        self, input_ids: torch.Tensor, segment_ids: torch.Tensor, img_inputs: dict[str, Any], layout: Layout
    ) -> torch.Tensor:
        """`packed_position_ids`, once for all passes over a batch."""
        return layout.keep(
            ("positions", type(self)), lambda: self.packed_position_ids(input_ids, segment_ids, img_inputs)
        )

    def packed_attention_mask(
        self, input_ids: torch.Tensor, segment_ids: torch.Tensor, img_inputs: dict[str, Any]
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        """Hook: the mask of packed rows, (B, 1, L, L) bool, or one per kind of layer. Families with bidirectional spans override it.

        A sliding window is measured in positions: in a packed row they differ from the columns.
        """
        mask, window = packing.packed_mask(segment_ids), self._window
        if window is None or segment_ids.shape[1] <= window:  # it hides nothing
            return self._by_kind(mask)
        position = packing.packed_positions(segment_ids)
        near = mask & (position[:, :, None] - position[:, None, :] < window)[:, None]
        return self._by_kind(mask, near)

    @property
    def _window(self) -> int | None:
        """Tokens of the sliding window of some layers, or of all; None without one."""
        text = self.config.get_text_config()
        kinds = getattr(text, "layer_types", None)
        return None if kinds and "sliding_attention" not in kinds else getattr(text, "sliding_window", None)

    def _by_kind(self, mask: torch.Tensor, near: torch.Tensor | None = None) -> torch.Tensor | dict[str, torch.Tensor]:
        """The masks of full and of sliding attention, as the class takes them; both are the same without `near`."""
        near = mask if near is None else near
        if self._window is None or not getattr(self.config.get_text_config(), "layer_types", None):
            return near
        return {"full_attention": mask, "sliding_attention": near}

    @property
    def _replaced_attention(self) -> bool:
        return self.get_decoder().config._attn_implementation in REPLACED

    @property
    def lays_end_to_end(self) -> bool:
        """Whether `forward` leaves the padding between rows out."""
        return self.packs and self.end_to_end and self._replaced_attention

    def _end_to_end(self, inputs: dict[str, Any], layout: Layout) -> dict[str, Any]:
        """What `packed_inputs` returned, with entries per token (..., B, L) as (..., 1, N)."""
        of_tokens = {k: inputs[k] for k in TOKEN_INPUTS if inputs.get(k) is not None}
        return inputs | {k: layout.end_to_end(v, 1 if v.ndim == 3 else 0) for k, v in of_tokens.items()}

    def packed_position_ids(
        self, input_ids: torch.Tensor, segment_ids: torch.Tensor, img_inputs: dict[str, Any]
    ) -> torch.Tensor:
        """Hook: the positions of packed rows, (B, L) long. Families with M-RoPE override it."""
        return packing.packed_positions(segment_ids)

    # -- hidden states and log-probs at response positions ---------------------------------------------------------------

    def last_hidden_state(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Hook: hidden states (B, L, D) that lm_head reads."""
        return self.base_model(*args, **kwargs).last_hidden_state


def _without_lists(modules: list[nn.Module]) -> list[nn.Module]:
    """Lists of modules replaced by what they hold: they have no forward of their own."""
    found: list[nn.Module] = []
    for module in modules:
        found += _without_lists([*module.children()]) if isinstance(module, nn.ModuleList | nn.ModuleDict) else [module]
    return found


def _with_completions(native_forward: Callable[..., Any]) -> Callable[..., Any]:
    """Give a forward the arguments `completion_index`, `completion_ids`, `temperature`, `with_entropy` and `dummy_images`.

    It has to be the forward itself: DDP, DeepSpeed and peft only see what passes through it. functools.wraps keeps the native signature
    visible, which generate validates its arguments against.
    """

    @functools.wraps(native_forward)
    def forward(
        self: VLModelMixin,
        *args: Any,
        completion_index: torch.Tensor | None = None,
        completion_ids: torch.Tensor | None = None,
        temperature: float = 1.0,
        with_entropy: bool = False,
        dummy_images: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        if completion_index is None:
            return native_forward(self, *args, **kwargs)
        kwargs = {k: v for k, v in kwargs.items() if v is not None or k == "pixel_values"}
        nothing = 0.0
        if dummy_images is not None:
            # ZeRO-3 gathers weights as modules run: on every rank the tower runs first. The dummy gives the weights that images reach, and only
            # those, a gradient of 0: ranks with and without images then hold gradients of the same parameters.
            text = {k: kwargs.pop(k) for k in TEXT_INPUTS if k in kwargs}
            kwargs = text | self.encode_images(kwargs)
            nothing = 0.0 * sum_of_tensors(pooled_features(self.encode_images(dummy_images)))
        layout = layout_of(kwargs.get("attention_mask"))
        if layout is not None and self.lays_end_to_end:
            kwargs, completion_index = self._end_to_end(kwargs, layout), layout.places(completion_index)
        hidden = self.last_hidden_state(*args, **kwargs).flatten(0, 1)[completion_index]  # (N, D)
        if dummy_images:
            hidden = hidden + nothing.to(hidden.dtype)
        if completion_ids is None:
            return CompletionOutput(hidden=hidden)
        logps, entropy = token_logps(self, hidden, completion_ids, temperature, with_entropy)
        return CompletionOutput(hidden=hidden, logps=logps, entropy=entropy)

    return forward
