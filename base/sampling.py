"""Answers sampled from a policy: reproducible token by token, up to and with the end token."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, TopPLogitsWarper
from transformers.integrations import is_deepspeed_zero3_enabled

from args import PPOConfig
from base.batch import ImageInputs
from base.collator import VLPPODataCollator
from base.features import join_image_inputs
from base.processor import VLProcessor
from base.rollout import Answers, Prompts
from base.rollout_cache import rollout_cache
from base.shared_prefill import answers_of_one_prefill
from common.seeds import stable_seed
from common.tensors import to_device


class SeededSampling(LogitsProcessor):
    """Sample by inverting the cumulative distribution at given uniform numbers; greedy decoding takes what was sampled.

    One number per row and step, so that neither batch size, device count nor global random state changes what is
    sampled.
    """

    def __init__(self, uniforms: Tensor, temperature: float, top_p: float = 1.0) -> None:
        """
        Args:
            uniforms: (B, T) in [0, 1), for T steps.
        """
        self.uniforms, self.temperature = uniforms, temperature
        self.top_p = TopPLogitsWarper(top_p) if top_p < 1 else None
        self.first_length: int | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Logits (B, V) after ids (B, L) -> the sampled token at 0, all others at -inf."""
        if self.first_length is None:
            self.first_length = input_ids.shape[1]
        scores = scores.float() / self.temperature
        if self.top_p is not None:
            scores = self.top_p(input_ids, scores)
        cumulative = scores.softmax(-1).double().cumsum(-1)  # (B, V)
        target = self.uniforms[:, input_ids.shape[1] - self.first_length, None] * cumulative[:, -1:]
        token = (cumulative <= target).sum(-1, keepdim=True)  # a token of probability 0 is never hit
        return torch.full_like(scores, -math.inf).scatter(-1, token, 0.0)


def cut_after_end(ids: Sequence[int], end_ids: Sequence[int]) -> list[int]:
    """Tokens up to and with the first end token."""
    for n, token in enumerate(ids):
        if token in end_ids:
            return list(ids[: n + 1])
    return list(ids)


def end_token_ids(processor: VLProcessor, core: nn.Module) -> list[int]:
    """Tokens that end an answer: the last one that training puts behind it, and the checkpoint's own end tokens."""
    of_template = processor.encode_response("")[-1]
    of_checkpoint = core.generation_config.eos_token_id if core.generation_config is not None else None
    if not isinstance(of_checkpoint, list):
        of_checkpoint = [of_checkpoint] if of_checkpoint is not None else []
    return sorted({of_template, *of_checkpoint})


@contextmanager
def plain_generation_config(core: nn.Module) -> Iterator[None]:
    """Without the checkpoint's sampling settings (repetition penalty, top-k, ...), which log-probs do not contain."""
    owners = [m for m in core.modules() if isinstance(getattr(m, "generation_config", None), GenerationConfig)]
    before = [m.generation_config for m in owners]
    try:
        for m in owners:
            m.generation_config = GenerationConfig()
        yield
    finally:
        for m, config in zip(owners, before, strict=True):
            m.generation_config = config


@dataclass(frozen=True)
class Sampler:
    """Samples --rollouts_per_prompt answers to each prompt; --temperature, --top_p and --response_length say how."""

    args: PPOConfig
    collator: VLPPODataCollator
    end_ids: list[int]  # of `end_token_ids`

    @torch.no_grad()
    def sample(
        self, core: nn.Module, group: Sequence[Prompts], images: Sequence[ImageInputs], seed: int
    ) -> list[Answers]:
        """Answers to several micro batches by one call of generate, in which every prompt is prefilled once for all its answers.

        Args:
            core: the adapter's model, under `plain_generation_config`.
            images: what generate reads of the images of each micro batch.
            seed: with a prompt's place and an answer's number it decides the answer, whatever else is sampled at once.
        """
        args = self.args
        K = args.rollouts_per_prompt
        packed = core.decodes_packed and K > 1
        inputs = to_device(self._padded_prompts(group), args.device) | join_image_inputs(images)
        uniforms = torch.cat([self._uniforms(place, seed) for p in group for place in p.places])  # (all R, T)
        sequences = core.generate(
            **inputs,
            custom_generate=answers_of_one_prefill,
            num_answers=K,
            packed=packed,
            do_sample=False,  # the processor samples
            max_new_tokens=args.response_length,
            eos_token_id=self.end_ids,
            pad_token_id=self.collator.processor.tokenizer.pad_token_id,
            use_cache=True,
            logits_processor=LogitsProcessorList(
                [SeededSampling(uniforms.to(args.device), args.temperature, args.top_p)]
            ),
            past_key_values=rollout_cache(core, inputs["input_ids"].shape[1], args.response_length, K if packed else 1),
            disable_compile=True,
            # Weights that are shared out need all ranks at every token, until the longest answer of all ranks has
            # ended.
            until_all_ranks_end=is_deepspeed_zero3_enabled()
            and args.world_size > 1
            and not args.ds3_gather_for_generation,
        )
        prompts = inputs["input_ids"].repeat_interleave(K, 0)
        length = prompts.shape[1]
        if sequences.shape[1] > length and torch.equal(sequences[:, :length], prompts):
            sequences = sequences[:, length:]  # given embeddings, generate returns new tokens only
        generated = iter(cut_after_end(row, self.end_ids) for row in sequences.tolist())
        return [[[next(generated) for _ in range(K)] for _ in p.tokens] for p in group]

    def _padded_prompts(self, group: Sequence[Prompts]) -> dict[str, Any]:
        """The prompts of every micro batch, padded on the left."""
        per_token = [self.collator.per_token(p.img_inputs) for p in group]
        return self.collator.pad_for_generation(
            [tokens for p in group for tokens in p.tokens],
            {k: [v for t in per_token for v in t[k]] for k in per_token[0]},
        )

    def _uniforms(self, place: int, seed: int) -> Tensor:
        """(K, response_length) in [0, 1): one number for every token of every answer to the prompt at this place."""
        shape = self.args.rollouts_per_prompt, self.args.response_length
        return torch.rand(shape, generator=torch.Generator().manual_seed(stable_seed(seed, place)))
