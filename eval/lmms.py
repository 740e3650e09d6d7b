"""Everything else: lmms-eval's tasks with our models and adapters. Optional; `make lmms` installs it.

    .venv-lmms/bin/python -m eval.lmms --model_name_or_path llava-hf/llava-1.5-7b-hf --adapter runs/dpo --bf16 True \
        --tasks mmstar,ai2d,realworldqa --output_path logs/
    .venv-lmms/bin/python -m torch.distributed.run --nproc_per_node 8 -m eval.lmms --model_name_or_path runs/dpo --tasks mmstar

Flags other than --model_name_or_path, --adapter, --bf16 and --batch_size are lmms-eval's own (see `python -m lmms_eval --help`). For POPE, MME, SEED
and AMBER its numbers are not the official ones (docs/evaluation.md): use the scorers here for those.
"""

import argparse
import sys

from args import run
from common.errors import InputError
from common.flags import FlagParser, refuse_unknown
from eval.flags import add_model_flags, add_switch, add_thinking_flag

NAME = "vl_rlhf"


def register() -> None:
    """Make lmms-eval know the wrapper. Raises InputError when lmms-eval is not installed."""
    try:
        from lmms_eval.models import MODEL_REGISTRY_V2
        from lmms_eval.models.registry_v2 import ModelManifest
    except ModuleNotFoundError as e:
        raise InputError(
            f"lmms-eval is not installed ({e.name} is missing): `make lmms`, then .venv-lmms/bin/python -m eval.lmms"
        ) from None
    manifest = ModelManifest(model_id=NAME, simple_class_path="eval.lmms_model.LmmsModel")
    MODEL_REGISTRY_V2.register_manifest(manifest, overwrite=True)


def forwarded(argv: list[str] | None = None) -> list[str]:
    """lmms-eval's command line for ours."""
    parser = FlagParser(description=__doc__)
    add_model_flags(parser)
    add_switch(parser, "--bf16", help="weights and activations in bfloat16 (default float32)")
    add_thinking_flag(parser)
    parser.add_argument("--batch_size", type=int, default=8)
    refuse_unknown(parser, sys.argv[1:] if argv is None else argv, others=True)
    args, rest = parser.parse_known_args(argv)
    for value in filter(None, (args.model_name_or_path, args.adapter)):
        if "," in value or "=" in value:
            raise InputError(f"lmms-eval cannot take a path with ',' or '=': rename {value}")
    model_args = f"pretrained={args.model_name_or_path}" + (f",adapter={args.adapter}" if args.adapter else "")
    model_args += f",bf16={args.bf16},enable_thinking={args.enable_thinking}"
    return ["--model", NAME, "--model_args", model_args, "--batch_size", str(args.batch_size), *rest]


def main(argv: list[str] | None = None) -> None:
    """Run the command line (`argv` in its place).

    Raises:
        InputError: an evaluation ended in an error, which lmms-eval prints and then passes over.
    """
    rest = forwarded(argv)
    register()
    from lmms_eval import __main__ as lmms_eval

    evaluate, errors = lmms_eval.cli_evaluate_single, []

    def remembering(args: argparse.Namespace) -> tuple[dict, dict]:
        try:
            return evaluate(args)
        except Exception as error:
            errors.append(error)
            raise

    lmms_eval.cli_evaluate_single = remembering
    sys.argv = ["lmms_eval", *rest]
    try:
        lmms_eval.cli_evaluate()
    finally:
        lmms_eval.cli_evaluate_single = evaluate
    if errors:
        raise InputError(f"lmms-eval ended in an error, see above: {errors[0]}") from errors[0]


if __name__ == "__main__":
    run(main)
