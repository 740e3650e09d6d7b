"""The fewest multiply-adds that a DPO step needs, and how long they take at the machine's matmul rate.

    python -m benchmarks.floor --size 7b            (counts only: no weights are made)

Counted: the tower once per image; every row's prompt once and its responses once, through whole decoder layers, with
causal attention over what each token sees; lm_head at response positions. Backward with a frozen base and LoRA: the
gradients of activations cost a forward pass (nothing below the first layer's adapters), the adapters twice their
forward products; attention needs four products where forward needs two. With all weights training, every decoder product
costs once more for its weight. A reference that runs online costs one more forward pass, and so does checkpointing.
Not counted: norms, softmax, rotary embeddings, optimizer, image processing, and anything that only moves memory.
"""

from dataclasses import dataclass

import torch
import transformers as tf

from benchmarks.models import decoder as shape
from common.flags import FlagParser


@dataclass(frozen=True)
class Row:
    """Tokens of one packed row: those that all responses share, and those of each response alone."""

    shared: int
    own: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Length of the row."""
        return self.shared + sum(self.own)

    @property
    def seen(self) -> float:
        """Pairs of query and key under the packed mask."""
        return self.shared**2 / 2 + sum(n * self.shared + n**2 / 2 for n in self.own)


@dataclass(frozen=True)
class Decoder:
    """Multiply-adds of a decoder, per token."""

    linear: int  # all layers' products with weights
    attention: int  # per pair of query and key: scores and values
    head: int  # lm_head
    first: int  # products of the first layer that read the embeddings: no gradient passes below them
    lora: int  # products with both factors of all adapters


def decoder_of(config: tf.PretrainedConfig, lora_r: int = 16) -> Decoder:
    """Count a Llama-like decoder with adapters on its seven products."""
    D, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    head_dim = getattr(config, "head_dim", None) or D // config.num_attention_heads
    q, kv = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    shapes = [(D, q), (D, kv), (D, kv), (q, D), (D, inner), (D, inner), (inner, D)]
    return Decoder(
        linear=layers * sum(a * b for a, b in shapes),
        attention=layers * 2 * q,
        head=D * config.vocab_size,
        first=D * (q + 2 * kv),
        lora=layers * sum(lora_r * (a + b) for a, b in shapes),
    )


def step_macs(
    decoder: Decoder, rows: list[Row], scored: int, tower: float, *, online: bool, lora: bool, checkpointing: bool
) -> float:
    """Multiply-adds of one step.

    Args:
        scored: response tokens that go through lm_head.
        tower: of all images of the batch, once.
    """
    tokens = sum(row.tokens for row in rows)
    attention = decoder.attention * sum(row.seen for row in rows)
    base = decoder.linear * tokens + attention
    head = decoder.head * scored
    adapters = decoder.lora * tokens if lora else 0
    forward = base + head + adapters
    backward = base - decoder.first * tokens + attention + head  # attention: four products instead of two
    backward += 2 * adapters if lora else (decoder.linear * tokens + head)  # gradients of the weights that train
    return (
        tower
        + forward
        + backward
        + (base + head if online else 0)
        + (base + adapters if checkpointing else 0)
        + (tower if online and not lora else 0)  # the projector trains: the reference encodes the images itself
    )


def tower_macs(model: torch.nn.Module, img_inputs: dict) -> float:
    """Multiply-adds of the vision side on these images, counted while it runs."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.encode_images(img_inputs)
    return counter.get_total_flops() / 2


def main() -> None:
    """Print the floor of plain and shared layouts for LLaVA-1.5's decoder."""
    parser = FlagParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=("cpu", "7b"), default="7b")
    args = parser.parse_args()
    decoder = decoder_of(tf.LlamaConfig(**shape(args.size, 32064, (512, 4, 8), (4096, 11008, 32, 32, 32))))
    prompt = 600
    print("answer | plain, online | shared, online | shared, cached | worth online | worth cached   (decoder alone)")
    for answer in (50, 150, 400):
        common = dict(lora=True, checkpointing=False)
        plain = step_macs(decoder, [Row(prompt + answer, ())] * 2, 2 * answer, 0, online=True, **common)
        shared = [
            step_macs(decoder, [Row(prompt, (answer, answer))], 2 * answer, 0, online=online, **common)
            for online in (True, False)
        ]
        giga = " | ".join(f"{macs / 1e9:,.0f} G" for macs in (plain, *shared))
        print(f"{answer} | {giga} | {plain / shared[0]:.2f} | {plain / shared[1]:.2f}")


if __name__ == "__main__":
    main()
