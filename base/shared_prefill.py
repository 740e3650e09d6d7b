"""Several answers to each prompt from one prefill: prompts go through the model once, then their keys and values stand for all K answers.

    core.generate(**inputs, custom_generate=answers_of_one_prefill, num_answers=K)
    core.generate(**inputs, custom_generate=beams_of_one_prefill, beams=K)              the best of K beams

Works for every cache that beam search can reorder, static or not, with linear states or keys of images. With
`packed=True` the prompt's keys and values are not even repeated: the K answers are K queries of one row, which attend
to it together and to themselves apart (`VLModelMixin.decodes_packed` says for which families). This file alone touches the private parts of
transformers' generation loop.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.utils import ModelOutput

from base.packed_attention import apart_mask, attend_by_segments

# Read in the prefill alone; what is there per image cannot be repeated by row.
PREFILL_ONLY = ("inputs_embeds", "mm_encoder_outputs")


def answers_of_one_prefill(
    model: nn.Module,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    num_answers: int = 1,
    packed: bool = False,
    until_all_ranks_end: bool = False,
    **kwargs: Any,
) -> Tensor:
    """For `custom_generate`: greedy search or sampling, (B, L) -> (B * num_answers, L + T), prompt by prompt.

    Args:
        num_answers: K. Greedy answers differ only if a logits processor makes them: it sees B * K rows from the first token on.
        packed: decode with one row per prompt; needs a PackedRolloutCache and `position_ids` among kwargs.
        until_all_ranks_end: generate's `synced_gpus`, which it does not hand on to functions.
        kwargs: what generate prepared for B prompts.
    """
    if packed and num_answers > 1 and kwargs.get("position_ids") is not None:
        step: Step = _PackedStep(model, input_ids, kwargs, num_answers)
    else:
        step = _RepeatedStep(model, kwargs, num_answers)
    out = model._prefill(input_ids, generation_config, kwargs)
    logits = out.logits[:, -1].float().repeat_interleave(num_answers, 0)  # (R, V)
    input_ids = step.begin(input_ids, out)
    del out

    ends = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
    padding = generation_config._pad_token_tensor
    going_on = torch.ones(len(logits), dtype=torch.bool, device=logits.device)  # (R,)
    with model._optimize_model_for_decode():
        while True:
            tokens = _chosen(logits_processor(input_ids, logits), generation_config.do_sample)
            if ends:
                tokens = torch.where(going_on, tokens, padding)
            input_ids = torch.cat([input_ids, tokens.to(input_ids.device)[:, None]], dim=1)
            going_on = going_on & ~stopping_criteria(input_ids, None)
            if not model._has_unfinished_sequences(not going_on.any(), until_all_ranks_end, device=input_ids.device):
                return input_ids
            logits = step.logits_after(input_ids)


def beams_of_one_prefill(
    model: nn.Module,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    beams: int = 1,
    **kwargs: Any,
) -> Tensor:
    """For `custom_generate`, with num_beams=1: transformers' beam search after a prefill of B prompts, (B, L) -> (B, L + T).

    Args:
        beams: per prompt.
        kwargs: what generate prepared for B prompts.
    """
    out = model._prefill(input_ids, generation_config, kwargs)
    input_ids, kwargs = _repeated(model, input_ids, kwargs, len(out.logits), beams)
    out.logits = out.logits[:, -1:].repeat_interleave(beams, 0)
    generation_config = copy.copy(generation_config)
    generation_config.num_beams = beams
    model._prefill = lambda *_, **__: out  # what beam search begins with
    try:
        return model._beam_search(input_ids, logits_processor, stopping_criteria, generation_config, **kwargs)
    finally:
        del model._prefill


def _chosen(scores: Tensor, do_sample: bool) -> Tensor:
    return torch.multinomial(scores.softmax(-1), 1)[:, 0] if do_sample else scores.argmax(-1)


def _repeated(
    model: nn.Module, input_ids: Tensor, kwargs: dict[str, Any], B: int, K: int
) -> tuple[Tensor, dict[str, Any]]:
    """Everything that has a row for each of the B prompts with K rows for each, the cache in place."""
    rows = torch.arange(B, device=input_ids.device).repeat_interleave(K)
    cache = kwargs["past_key_values"]
    cache.reorder_cache(rows)
    for name, value in vars(cache).items():  # Qwen-VL keeps the scale of its rotary embedding there
        if isinstance(value, Tensor) and value.ndim and len(value) == B:
            setattr(cache, name, value[rows])
    of_rows = {
        name: value
        for name, value in kwargs.items()
        if name not in PREFILL_ONLY and (not isinstance(value, Tensor) or name == "position_ids" or len(value) == B)
    }
    return model._expand_inputs_for_generation(expand_size=K, input_ids=input_ids, **of_rows)


class Step:
    """The model after the prefill, one token of every answer at a time."""

    def begin(self, input_ids: Tensor, out: ModelOutput) -> Tensor:
        """After the prefill (B, L); returns the ids of all answers so far, (R, L)."""
        raise NotImplementedError

    def logits_after(self, input_ids: Tensor) -> Tensor:
        """Logits (R, V) behind the last of the ids (R, L)."""
        raise NotImplementedError


class _RepeatedStep(Step):
    """Every answer is a row, with the prompt's keys and values repeated."""

    def __init__(self, model: nn.Module, kwargs: dict[str, Any], num_answers: int) -> None:
        self.model, self.kwargs, self.K = model, kwargs, num_answers

    def begin(self, input_ids: Tensor, out: ModelOutput) -> Tensor:
        self._update(out)
        input_ids, self.kwargs = _repeated(self.model, input_ids, self.kwargs, len(out.logits), self.K)
        return input_ids

    def logits_after(self, input_ids: Tensor) -> Tensor:
        inputs = self.model.prepare_inputs_for_generation(input_ids, next_sequence_length=1, **self.kwargs)
        out = self.model(**inputs, return_dict=True)
        self._update(out)
        return out.logits[:, -1].float()

    def _update(self, out: ModelOutput) -> None:
        self.kwargs = self.model._update_model_kwargs_for_generation(out, self.kwargs, is_encoder_decoder=False)


class _PackedStep(Step):
    """The K answers are K queries of their prompt's row, whose keys and values the cache holds once."""

    def __init__(self, model: nn.Module, input_ids: Tensor, kwargs: dict[str, Any], num_answers: int) -> None:
        attend_by_segments()
        self.model, self.B, self.K = model, len(input_ids), num_answers
        mask = kwargs.get("attention_mask")  # None where nothing is padded
        self.hidden = None if mask is None or mask.all() else ~mask.bool()[:, None, None, :]  # (B, 1, 1, L)
        self.position = kwargs["position_ids"][..., -1:]  # (B, 1), with M-RoPE (3 or 4, B, 1)

    def begin(self, input_ids: Tensor, out: ModelOutput) -> Tensor:
        self.cache = out.past_key_values
        self.mask = apart_mask(self.cache, self.hidden, out.logits.device)
        return input_ids.repeat_interleave(self.K, 0)

    def logits_after(self, input_ids: Tensor) -> Tensor:
        self.position = self.position + 1
        out = self.model(
            input_ids=input_ids[:, -1].view(self.B, self.K),
            position_ids=self.position.expand(*self.position.shape[:-2], self.B, self.K),
            attention_mask=self.mask,
            past_key_values=self.cache,
            use_cache=True,
            return_dict=True,
        )
        return out.logits.float().flatten(0, 1)
