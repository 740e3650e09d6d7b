"""Several answers to each prompt from one prefill: prompts go through the model once, then their keys and values stand for all K answers.

    core.generate(**inputs, custom_generate=answers_of_one_prefill, num_answers=K)

Works for every cache that beam search can reorder, static or not, with linear states or keys of images. This file alone touches the private parts of
transformers' generation loop.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

# Read in the prefill alone; what is there per image cannot be repeated by row.
PREFILL_ONLY = ("inputs_embeds", "mm_encoder_outputs")


def answers_of_one_prefill(
    model: nn.Module,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    synced_gpus: bool = False,
    num_answers: int = 1,
    **kwargs: Any,
) -> Tensor:
    """For `custom_generate`: greedy search or sampling, (B, L) -> (B * num_answers, L + T), prompt by prompt.

    Args:
        num_answers: K. Greedy answers differ only if a logits processor makes them: it sees B * K rows from the first token on.
        kwargs: what generate prepared for B prompts.
    """
    B = len(input_ids) if input_ids.shape[1] else len(kwargs["inputs_embeds"])
    out = model._prefill(input_ids, generation_config, kwargs)
    kwargs = model._update_model_kwargs_for_generation(out, kwargs, is_encoder_decoder=False)
    logits = out.logits[:, -1].float().repeat_interleave(num_answers, 0)  # (R, V)
    del out
    input_ids, kwargs = _repeated(model, input_ids, kwargs, B, num_answers)

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
            if not model._has_unfinished_sequences(not going_on.any(), synced_gpus, device=input_ids.device):
                return input_ids
            inputs = model.prepare_inputs_for_generation(input_ids, next_sequence_length=1, **kwargs)
            out = model(**inputs, return_dict=True)
            kwargs = model._update_model_kwargs_for_generation(out, kwargs, is_encoder_decoder=False)
            logits = out.logits[:, -1].float()
            del out


def _chosen(scores: Tensor, do_sample: bool) -> Tensor:
    return torch.multinomial(scores.softmax(-1), 1)[:, 0] if do_sample else scores.argmax(-1)


def _repeated(
    model: nn.Module, input_ids: Tensor, kwargs: dict[str, Any], B: int, K: int
) -> tuple[Tensor, dict[str, Any]]:
    """Everything that has a row per prompt, K times: row after row."""
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
