"""Command line of the converters: IN OUT [--reverse]."""

import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from common.flags import FlagParser


def main(
    description: str,
    module: str,
    convert: Callable[[Path, Path, int], None],
    revert: Callable[[Path, Path, int], None],
    tokenizer_files: Sequence[str],
    arguments: Sequence[str] | None = None,
) -> None:
    """Parse the command line and convert; wrong input becomes one sentence and exit status 2.

    If the conversion fails, the output folder is removed, so that half a checkpoint never stays behind.
    """
    parser = FlagParser(prog=f"python -m {module}", description=description)
    parser.add_argument("source", metavar="IN", help="checkpoint folder, or a name on the hub")
    parser.add_argument("target", metavar="OUT", type=Path, help="folder to write; it must not exist")
    parser.add_argument("--reverse", action="store_true", help="from the native layout to the original one")
    parser.add_argument(
        "--max_shard_gb", type=float, default=4.0, help="size of an output file, and so about the memory used"
    )
    args = parser.parse_args(arguments)
    try:
        if args.target.exists():
            raise FileExistsError(f"{args.target} exists: give a new folder.")
        source = Path(args.source)
        if not source.is_dir():
            source = _download(args.source, tokenizer_files)
        args.target.mkdir(parents=True)
        try:
            (revert if args.reverse else convert)(source, args.target, int(args.max_shard_gb * 2**30))
        except BaseException:
            shutil.rmtree(args.target)
            raise
    except (OSError, ValueError, KeyError) as error:
        message = f"config.json has no entry {error}" if isinstance(error, KeyError) else str(error)
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(2) from None
    print(f"{args.target}: written")


def _download(name: str, tokenizer_files: Sequence[str]) -> Path:
    """Weights, configuration and tokenizer of a hub repository; never its code."""
    from huggingface_hub import snapshot_download

    if name.startswith((".", "/")) or name.count("/") != 1:
        raise FileNotFoundError(f"{name} is neither a folder nor a name on the hub.")
    patterns = ["*.json", "*.safetensors", "pytorch_model*.bin", *tokenizer_files]
    return Path(snapshot_download(name, allow_patterns=patterns))
