"""Hidden states -> log-probs, logits and divergences, without more than a bounded number of logits in memory."""

from typing import Any

import torch
import torch.utils.checkpoint
from torch import nn
from trl.kernels import ChunkedLogProbFunction
from trl.trainer.utils import maybe_gather_lm_head_ctx

from losses import token_kl

# Above this many logits the vocabulary is walked in chunks, so that no more than a chunk of logits exists at a time. Measured on a CPU, 100 tokens
# of a 152k vocabulary: 26 MiB instead of 174, for half as much time again in float32 (the backward pass computes the chunks anew).
MAX_LOGITS = 1 << 24
VOCAB_CHUNK = 8192
TOKEN_CHUNK = 512  # tokens at a time where all their logits are needed


def softcap(model: nn.Module) -> float | None:
    """The bound of a model's logits (Gemma 2 and later), which transformers' own forward applies behind lm_head."""
    return getattr(model.config.get_text_config(), "final_logit_softcapping", None)


def capped(logits: torch.Tensor, cap: float | None) -> torch.Tensor:
    """Logits of any shape, squeezed into (-cap, cap) if there is a cap."""
    return cap * torch.tanh(logits / cap) if cap else logits


def token_logps(
    model: nn.Module,
    hidden: torch.Tensor,
    token_ids: torch.Tensor,
    temperature: float = 1.0,
    with_entropy: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-probability of each token, float32, without more than MAX_LOGITS logits in memory.

    Args:
        hidden: (N, D) states that predict the tokens.
        token_ids: (N,).

    Returns:
        logps (N,) and, if asked for, the entropy of each next-token distribution (N,), in nats.
    """
    lm_head, cap = model.get_output_embeddings(), softcap(model)
    if type(lm_head) is not nn.Linear or token_ids.numel() * lm_head.out_features <= MAX_LOGITS:
        logits = capped(lm_head(hidden).float(), cap) / temperature  # (N, V)
        logps = -nn.functional.cross_entropy(logits, token_ids, reduction="none")
        return logps, torch.distributions.Categorical(logits=logits).entropy() if with_entropy else None
    outputs = ("entropy",) if with_entropy else ()
    with maybe_gather_lm_head_ctx(lm_head.weight, lm_head.bias):
        logps, entropy, *_ = ChunkedLogProbFunction.apply(
            hidden, lm_head.weight, lm_head.bias, token_ids, temperature, VOCAB_CHUNK, cap, 1.0, outputs
        )
    return logps, entropy


def token_logits(model: nn.Module, hidden: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Logit of each token at temperature 1, (N, D), (N,) -> (N,) float32, from the head's rows of those tokens alone."""
    lm_head = model.get_output_embeddings()
    with maybe_gather_lm_head_ctx(lm_head.weight, lm_head.bias):
        logits = (hidden.float() * lm_head.weight[token_ids].float()).sum(-1)
        logits = (logits if lm_head.bias is None else logits + lm_head.bias[token_ids]).float()
    return capped(logits, softcap(model))


def all_logits(model: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """Logits of the whole vocabulary, (N, D) -> (N, V) float32.

    accelerate makes float32 of what a forward returns, and this runs outside of autocast: lm_head may be of another type.
    """
    lm_head = model.get_output_embeddings()
    hidden = hidden.to(lm_head.weight.dtype)
    if type(lm_head) is not nn.Linear:
        return capped(lm_head(hidden).float(), softcap(model))
    with maybe_gather_lm_head_ctx(lm_head.weight, lm_head.bias):
        return capped(nn.functional.linear(hidden, lm_head.weight, lm_head.bias).float(), softcap(model))


def vocabulary_kl(
    reference: nn.Module, reference_hidden: torch.Tensor, policy: nn.Module, policy_hidden: torch.Tensor
) -> torch.Tensor:
    """KL(reference || policy) of the next token over the whole vocabulary, (N, D), (N, D) -> (N,), with gradient to the policy.

    Never more than TOKEN_CHUNK tokens' logits exist: the backward pass computes each chunk's again.
    """
    lm_head = policy.get_output_embeddings()
    if type(lm_head) is nn.Linear:
        with maybe_gather_lm_head_ctx(lm_head.weight, lm_head.bias):
            return _VocabularyKL.apply(policy_hidden, lm_head.weight, lm_head.bias, policy, reference_hidden, reference)

    def chunk(ref: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        return token_kl(all_logits(reference, ref).detach(), all_logits(policy, own))

    chunks = zip(reference_hidden.split(TOKEN_CHUNK), policy_hidden.split(TOKEN_CHUNK), strict=True)
    return torch.cat([torch.utils.checkpoint.checkpoint(chunk, ref, own, use_reentrant=False) for ref, own in chunks])


class _VocabularyKL(torch.autograd.Function):
    """`vocabulary_kl` of a plain lm_head. PyTorch's checkpointing would find its weights shared out under ZeRO-3."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        policy: nn.Module,
        reference_hidden: torch.Tensor,
        reference: nn.Module,
    ) -> torch.Tensor:
        ctx.save_for_backward(hidden, reference_hidden)
        ctx.policy, ctx.reference = policy, reference
        chunks = zip(reference_hidden.split(TOKEN_CHUNK), hidden.split(TOKEN_CHUNK), strict=True)
        return torch.cat([token_kl(all_logits(reference, ref), all_logits(policy, own)) for ref, own in chunks])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, reference_hidden = ctx.saved_tensors
        lm_head, cap = ctx.policy.get_output_embeddings(), softcap(ctx.policy)
        needed = [place for place in range(3) if ctx.needs_input_grad[place]]
        found: dict[int, list[torch.Tensor]] = {place: [] for place in needed}
        with maybe_gather_lm_head_ctx(lm_head.weight, lm_head.bias):
            weights = [None if w is None else w.detach() for w in (lm_head.weight, lm_head.bias)]
            chunks = (t.split(TOKEN_CHUNK) for t in (reference_hidden, hidden, grad))
            for ref, own, outer in zip(*chunks, strict=True):
                with torch.no_grad():
                    expected = all_logits(ctx.reference, ref)
                inputs = [
                    t if t is None else t.detach().requires_grad_(i in found) for i, t in enumerate((own, *weights))
                ]
                with torch.enable_grad():
                    logits = nn.functional.linear(inputs[0].to(lm_head.weight.dtype), inputs[1], inputs[2])
                    kl = token_kl(expected, capped(logits.float(), cap))
                for place, part in zip(
                    needed, torch.autograd.grad(kl, [inputs[i] for i in needed], outer), strict=True
                ):
                    found[place].append(part)
        grads = [torch.cat(found[0]) if 0 in found else None, *(sum(found[i]) if i in found else None for i in (1, 2))]
        return *grads, None, None, None
