"""Add a LoRA adapter to its base: the result is one plain checkpoint that loads without peft and without this project.

    python merge_lora.py llava-hf/llava-1.5-7b-hf runs/dpo runs/dpo_merged

An adapter that QLoRA trained is merged into the quantised weights that it was trained on, dequantised (run.json tells; --bits overrides it). Of a
run of train_ppo.py the policy is merged; of a reward model also the head is copied.
"""

from collections.abc import Sequence

import torch

from args import run
from common.flags import FlagParser
from models.merging import bits_of, merge_to


def main(argv: Sequence[str] | None = None) -> None:
    """Merge as the command line says, and print what was merged."""
    parser = FlagParser(description=__doc__)
    parser.add_argument("base", help="checkpoint folder or hub id that the adapter was trained on")
    parser.add_argument("adapter", help="output folder of a run with --use_lora True, or one of its checkpoints")
    parser.add_argument("out", help="folder to write; must not hold files")
    parser.add_argument(
        "--bits", choices=["4", "8", "none"], help="quantisation of the base in training; by default as run.json says"
    )
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto")
    arguments = parser.parse_args(argv)
    if arguments.bits is None:
        bits = bits_of(arguments.adapter)
    else:
        bits = None if arguments.bits == "none" else int(arguments.bits)
    dtype = arguments.dtype if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
    merge_to(arguments.base, arguments.adapter, arguments.out, bits, dtype)
    print(f"{arguments.out}: {arguments.base} with {arguments.adapter}" + (f", {bits} bits" if bits else ""))


if __name__ == "__main__":
    run(main)
