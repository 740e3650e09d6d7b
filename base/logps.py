"""Hidden states -> log-probs, logits and divergences, without more than a bounded number of logits in memory."""

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
    return capped(lm_head(hidden.to(lm_head.weight.dtype)).float(), softcap(model))


def vocabulary_kl(
    reference: nn.Module, reference_hidden: torch.Tensor, policy: nn.Module, policy_hidden: torch.Tensor
) -> torch.Tensor:
    """KL(reference || policy) of the next token over the whole vocabulary, (N, D), (N, D) -> (N,), with gradient to the policy.

    Never more than TOKEN_CHUNK tokens' logits exist: the backward pass computes each chunk's again.
    """

    def chunk(ref: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        return token_kl(all_logits(reference, ref).detach(), all_logits(policy, own))

    chunks = zip(reference_hidden.split(TOKEN_CHUNK), policy_hidden.split(TOKEN_CHUNK), strict=True)
    return torch.cat([torch.utils.checkpoint.checkpoint(chunk, ref, own, use_reentrant=False) for ref, own in chunks])
