"""How long a large set takes to read and check, and how much memory: made here, with tiny pictures.

    python -m benchmarks.data_scale --rows 200000 --pictures 40000 --dataset_num_proc 2 --folder /tmp/scale

Pictures are JPEG files of 32 x 24 pixels, 1,000 to a folder; each is named by several rows in random order. Rows are JSON lines of
pairs with two columns of the user's own. Seconds are of the clock; memory is the largest RssAnon of the main process (mapped
pages of the cache come on top). The second start is another process, as after a crash. Without --keep the folder is emptied.
"""

import argparse
import io
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
from PIL import Image

from args import DataArguments
from common.flags import FlagParser
from data import load_train_eval
from data.stream import Streaming


def main() -> None:
    """Make the set, then read it in processes of their own."""
    parser = FlagParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--pictures", type=int, default=40_000)
    parser.add_argument("--dataset_num_proc", type=int, default=2)
    parser.add_argument("--check_images", default="all", choices=["all", "sample", "none"])
    parser.add_argument(
        "--folder", type=Path, required=True, help="An empty folder, or that of an earlier run with --keep."
    )
    parser.add_argument("--keep", action="store_true", help="Leave the files for another run.")
    parser.add_argument("--part", choices=["load", "stream"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        measure(args)
        return
    with timed(f"{args.rows:,} rows, {args.pictures:,} pictures: written"):
        make(args.folder, args.rows, args.pictures)
    for name, part in (("first start", "load"), ("second start", "load"), ("streamed", "stream")):
        print(f"{name}:", flush=True)
        subprocess.run([sys.executable, "-m", "benchmarks.data_scale", *sys.argv[1:], "--part", part], check=True)
    if not args.keep:
        shutil.rmtree(args.folder)


def make(folder: Path, rows: int, pictures: int) -> None:
    """Write what is not there yet."""
    file = folder / f"pairs_{rows}_{pictures}.jsonl"
    if file.exists():
        return
    rng = random.Random(0)
    for i in range(pictures):
        path = folder / "images" / f"{i // 1000}" / f"{i}.jpg"
        if i % 1000 == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            buffer = io.BytesIO()
            Image.new("RGB", (32, 24), (i % 256, i // 256 % 256, i // 65536)).save(buffer, "JPEG")
            path.write_bytes(buffer.getvalue())
    with open(file, "w", encoding="utf-8") as out:
        for i in range(rows):
            picture = rng.randrange(pictures)
            said = f"Number {i} is shown, " + "with more words " * rng.randrange(1, 12)
            row = {"image": f"{picture // 1000}/{picture}.jpg", "prompt": f"What is shown in {i}?", "chosen": said}
            out.write(json.dumps(row | {"rejected": f"No idea of {i}.", "level": i % 5, "topic": "numbers"}) + "\n")


def measure(args: argparse.Namespace) -> None:
    """Read the set once in this process."""
    datasets.config.HF_DATASETS_CACHE = args.folder / "cache"
    datasets.disable_progress_bars()
    file = args.folder / f"pairs_{args.rows}_{args.pictures}.jsonl"
    flags = DataArguments(
        dataset_name=str(file),
        image_root=str(args.folder / "images"),
        dataset_num_proc=args.dataset_num_proc,
        check_images=args.check_images,
        streaming=args.part == "stream",
    )
    before = anonymous_memory()
    if args.part == "load":
        with timed("  read, checked and counted"):
            found = load_train_eval(flags, "preference", 0)
        print(f"  {len(found.train):,} rows, bad {found.info['sets'][0]['bad']}")  # type: ignore[index]
    else:
        number = min(args.rows, 20_000)
        with timed("  first row"):
            rows = load_train_eval(flags, "preference", 0, streaming=Streaming(number)).train
        with timed(f"  {number:,} rows"):
            for i in range(number):
                rows[i]
    print(f"  peak of the main process: {peak[0]:,} MiB, of which {before:,} MiB before")


peak = [0]  # MiB of RssAnon


def anonymous_memory() -> int:
    """RssAnon of this process in MiB."""
    status = Path(f"/proc/{os.getpid()}/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) >> 10


@contextmanager
def timed(name: str) -> Iterator[None]:
    """Print the seconds, and keep the memory's peak."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            peak[0] = max(peak[0], anonymous_memory())

    watcher, start = threading.Thread(target=watch, daemon=True), time.perf_counter()
    watcher.start()
    try:
        yield
    finally:
        done.set()
        print(f"{name}: {time.perf_counter() - start:.1f} s (load {os.getloadavg()[0]:.1f})", flush=True)


if __name__ == "__main__":
    main()
