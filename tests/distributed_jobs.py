"""What test_distributed.py launches on every rank: several runs of the scripts, because imports cost more than runs.

    torchrun --nproc_per_node 2 -m tests.distributed_jobs jobs.json

jobs.json: [{"name", "script", "argv"}, ...], maybe with "pause", seconds that every
step from then on waits, or "break", the arguments of `break_step`. Writes jobs.times,
one line with the seconds of each. A job with "refused": true must end in a sentence,
which is written to jobs.said-RANK, and is the last.
"""

import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import tests.conftest  # noqa: F401  isort: skip  (one thread, no hub)
import torch
from accelerate.state import AcceleratorState, GradientState

import train_dpo
import train_ppo
import train_rm
import train_sft
from common.errors import InputError
from tests.processes import break_step, pause_before_steps

SCRIPTS = {"sft": train_sft, "dpo": train_dpo, "rm": train_rm, "ppo": train_ppo}


def main() -> None:
    path = Path(next(a for a in sys.argv[1:] if a.endswith(".json")))  # DeepSpeed adds --local_rank
    for job in json.loads(path.read_text()):
        start = time.monotonic()
        argv = job["argv"]
        if "pause" in job:
            pause_before_steps(job["pause"])
        if "break" in job:
            break_step(*job["break"])
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        if job.get("refused"):
            try:
                SCRIPTS[job["script"]].main(argv)
            except InputError as error:
                path.with_suffix(f".said-{os.environ.get('RANK', '0')}").write_text(str(error))
            return
        SCRIPTS[job["script"]].main(argv)
        # State that one run would pass on to the next, above all the DeepSpeed plugin.
        AcceleratorState._reset_state()
        GradientState._reset_state()
        if os.environ.get("RANK", "0") == "0":
            seconds = time.monotonic() - start
            with open(path.with_suffix(".times"), "a") as file:
                print(json.dumps({"name": job["name"], "seconds": round(seconds, 2)}), file=file)


if __name__ == "__main__":
    main()
