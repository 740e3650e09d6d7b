"""Seconds and GiB of a DPO step, and seconds of a rollout, for 1 to 64 GPUs. Computed on paper: nothing here was measured on a GPU.

    python -m benchmarks.scaling --model Qwen/Qwen2.5-VL-7B-Instruct
    python -m benchmarks.scaling --model Qwen/Qwen2.5-VL-72B-Instruct --gpus 8 64 --rollouts True

Multiply-adds are those of benchmarks/floor.py, GiB those of benchmarks/memory.py, bytes between GPUs those that each engine's algorithm moves
(`traffic`). What turns them into seconds is ASSUMED, in `Rates`: give your own with the flags of the same names.
"""

from dataclasses import dataclass, fields
from itertools import product

from benchmarks.floor import Row, decoder_of, step_macs
from benchmarks.memory import GIB, PUBLISHED, Setup, cache_bytes, class_and_config, count, memory
from benchmarks.steps import markdown
from common.flags import FlagParser


@dataclass(frozen=True)
class Rates:
    """What is assumed of the hardware: H100s, eight to a node."""

    tflops: float = 400  # bf16 operations per second in a training step, of 989 that a data sheet names
    node_gb_s: float = 300  # each way and GPU within a node, of 450
    network_gb_s: float = 40  # each way and GPU between nodes, of 50 (400 Gbit/s)
    hbm_gb_s: float = 2000  # a GPU's own memory, of 3,350
    layer_ms: float = 0.4  # Python and launches of one decoder layer for one token step without CUDA graphs
    server_layer_ms: float = 0.03  # the same in an inference server with them


@dataclass(frozen=True)
class Engine:
    """How weights and gradients lie on the GPUs, under the names of benchmarks/memory.py."""

    name: str
    method: str
    zero: str
    in_node: bool = False  # partitioned within every node alone, copied between them


ENGINES = [
    Engine("LoRA, DDP", "lora", "0"),
    Engine("LoRA, zero3.json", "lora", "3"),
    Engine("LoRA, FSDP2 within nodes (not here)", "lora", "3", in_node=True),
    Engine("all weights, zero2.json", "full", "2"),
    Engine("all weights, zero3.json", "full", "3"),
    Engine("all weights, FSDP2 within nodes (not here)", "full", "3", in_node=True),
]


def traffic(engine: Engine, weights: float, trained: float, passes: int) -> dict[str, float]:
    """Bytes that every GPU sends in a step, were there infinitely many GPUs: `hidden` behind products, and `after` the backward pass.

    Args:
        weights: bytes of all weights in 16 bits.
        trained: number of weights that train.
        passes: forward and backward passes that gather partitioned weights.
    """
    if (
        engine.zero == "0"
    ):  # all-reduce of float32 gradients in buckets, while the backward pass goes on: two times their bytes
        return {"hidden": 2 * 4 * trained, "after": 0.0}
    if engine.zero == "2":  # reduce-scatter of 16 bits; what was updated is gathered when the optimizer has stepped
        return {"hidden": 2 * trained, "after": 2 * trained}
    return {"hidden": passes * weights + 2 * trained, "after": 0.0}  # ZeRO-3, FSDP2: the next layers are fetched ahead


def seconds_between(
    engine: Engine, gpus: int, per_node: int, weights: float, trained: float, passes: int, rates: Rates
) -> tuple[float, float]:
    """Seconds of a step's traffic, (hidden, after). A ring's GPU sends (n - 1) / n of the bytes, at its slowest link's rate."""
    if gpus == 1:
        return 0.0, 0.0
    several = gpus > per_node
    moved = traffic(engine, weights, trained, passes)
    if not engine.in_node:
        rate = (rates.network_gb_s if several else rates.node_gb_s) * 1e9
        return tuple(bytes_ * (gpus - 1) / gpus / rate for bytes_ in moved.values())  # type: ignore[return-value]
    n = min(gpus, per_node)
    hidden = moved["hidden"] * (n - 1) / n / (rates.node_gb_s * 1e9)
    if several:  # each GPU's part of the gradients, summed over the nodes
        nodes = gpus / per_node
        hidden += 2 * 4 * trained / n * (nodes - 1) / nodes / (rates.network_gb_s * 1e9)
    return hidden, 0.0


def step_seconds(model: str, engine: Engine, gpus: int, rows: int, answer: int, rates: Rates) -> dict[str, float]:
    """A DPO step of `rows` rows per GPU, two answers each, reference online, checkpointing: seconds, and GiB per GPU."""
    lora = engine.method == "lora"
    prompt = PUBLISHED[model][0]
    setup = Setup(
        method=engine.method,
        zero=engine.zero,
        gpus=min(gpus, 8) if engine.in_node else gpus,
        per_device_train_batch_size=rows,
        max_prompt_length=prompt,
        max_target_length=answer,
    )
    config = class_and_config(model)[1].get_text_config()
    macs = step_macs(
        decoder_of(config, setup.lora_r),
        [Row(prompt, (answer, answer))] * rows,
        2 * rows * answer,
        tower=0,
        online=True,
        lora=lora,
        checkpointing=True,
    )
    bytes_of_weights, _, trained, _ = count(model, Setup(method=engine.method, zero="3"))
    compute = 2 * macs / (rates.tflops * 1e12)
    hidden, after = seconds_between(engine, gpus, 8, bytes_of_weights, trained, passes=3, rates=rates)
    found = memory(model, setup)
    return {
        "gib": found["total"] / GIB,
        "compute": compute,
        "between": hidden + after,
        "step": max(compute, hidden) + after,
    }


def rollout_seconds(model: str, prompts: int, answers: int, tokens: int, rates: Rates) -> dict[str, float]:
    """Answers of one GPU that holds the whole model: token steps in place, and in an inference server.

    A token step reads all weights and the keys and values of all answers; products are few beside that.
    """
    setup = Setup(
        script="ppo",
        local_rollout_forward_batch_size=prompts * answers,
        rollouts_per_prompt=answers,
        max_prompt_length=PUBLISHED[model][0],
        max_target_length=tokens,
    )
    config = class_and_config(model)[1].get_text_config()
    weights = count(model, Setup(method="lora", zero="3"))[0]
    reads = (weights + cache_bytes(model, setup)) / (rates.hbm_gb_s * 1e9)
    layers = config.num_hidden_layers
    return {
        "in place": tokens * max(reads, layers * rates.layer_ms / 1e3),
        "server": tokens * max(reads, layers * rates.server_layer_ms / 1e3),
    }


def main(argv: list[str] | None = None) -> None:
    """Print the table of steps, or that of rollouts."""
    parser = FlagParser(description=__doc__)
    parser.add_argument("--model", required=True, choices=PUBLISHED)
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--rows", type=int, default=4, help="rows of a GPU's step, each a prompt with two answers")
    parser.add_argument("--answer", type=int, default=150, help="tokens of an answer")
    parser.add_argument("--gib", type=float, default=80, help="memory of a GPU")
    parser.add_argument(
        "--rollouts", type=lambda text: text == "True", default=False, help="True: the table of rollouts"
    )
    for rate in fields(Rates):
        parser.add_argument(f"--{rate.name}", type=float, default=rate.default, help="assumed")
    flags = vars(parser.parse_args(argv))
    rates = Rates(**{rate.name: flags[rate.name] for rate in fields(Rates)})
    model = flags["model"]
    if flags["rollouts"]:
        lines = []
        for prompts, tokens in product((2, 16), (50, 400)):
            found = rollout_seconds(model, prompts, 8, tokens, rates)
            cells = {name: f"{seconds:.1f}" for name, seconds in found.items()}
            lines.append({"prompts x answers": f"{prompts} x 8", "tokens": tokens, **cells})
    else:
        lines = []
        for engine, gpus in product(ENGINES, flags["gpus"]):
            if (gpus == 1 and (engine.zero != "0" or engine.in_node)) or (engine.in_node and gpus <= 8):
                continue  # nothing to partition, or what stands in the line above
            found = step_seconds(model, engine, gpus, flags["rows"], flags["answer"], rates)
            fits = found["gib"] <= flags["gib"]
            lines.append(
                {
                    "engine": engine.name,
                    "GPUs": gpus,
                    "GiB": f"{found['gib']:.1f}" + ("" if fits else " (too much)"),
                    "compute, s": f"{found['compute']:.2f}",
                    "between GPUs, s": f"{found['between']:.2f}",
                    "step, s": f"{found['step']:.2f}" if fits else "–",
                    "rows/s": f"{gpus * flags['rows'] / found['step']:.0f}" if fits else "–",
                }
            )
    print(markdown(lines))


if __name__ == "__main__":
    main()
