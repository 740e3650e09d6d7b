"""Environment fixes, each with its reason. Import this before transformers.

1. PyPI's torchvision wheel is linked against CUDA. With a CPU-only torch its C library does not load, the operator
   `torchvision::nms` is never defined, `import torchvision` fails, and with it every processor of transformers.
   Declaring the two operators is enough: nothing here calls them.
2. torch compiles extensions (DeepSpeed's) under a lock file that a killed process leaves behind, and then waits for it
   for ever, without a word: `wait_for_compilation` names the file, and ends where nobody compiles.
"""

import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
from torch.utils.file_baton import FileBaton

from common.errors import InputError

if torch.version.cuda is None and torch.version.hip is None:
    # The library object must stay alive for as long as the declarations do.
    _TORCHVISION_OPS = torch.library.Library("torchvision", "DEF")
    for _name in ("nms", "qnms"):
        _TORCHVISION_OPS.define(_name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

SAY_AFTER, STALE_AFTER = 60, 600  # seconds


def wait_for_compilation(baton: FileBaton) -> None:
    """In place of FileBaton.wait, which says nothing and never ends.

    Raises:
        InputError: after SAY_AFTER seconds, if the lock is older than STALE_AFTER and no process here works in its folder. A younger lock, which a
            process of another machine may hold, is named and waited for until it is as old.
    """
    lock, start, said = Path(baton.lock_file_path), time.monotonic(), False
    while lock.exists():
        time.sleep(baton.wait_seconds)
        if time.monotonic() - start < SAY_AFTER:
            continue
        try:
            age = time.time() - lock.stat().st_mtime
        except FileNotFoundError:
            return
        if not _works_in(lock.parent) and age > STALE_AFTER:
            raise InputError(
                f"{lock} is {age / 60:.0f} minutes old and no process compiles there: a killed run has left it. Delete that file and "
                "start again."
            )
        if not said:
            print(
                f"Waiting for another process to compile in {lock.parent}. If none does, delete {lock}.",
                file=sys.stderr,
                flush=True,
            )
            said = True


def _works_in(folder: Path) -> bool:
    """Whether a process of this machine, a compiler for one, has its working folder there."""
    for link in Path("/proc").glob("[0-9]*/cwd"):
        try:
            if link.resolve() == folder.resolve():
                return True
        except OSError:
            continue
    return False


FileBaton.wait = wait_for_compilation


def write_hub_names(model: torch.nn.Module) -> None:
    """Let `save_pretrained` of a model that was never loaded use the names of the hub.

    transformers 5 dropped the level `vision_model` of CLIP's and SigLIP's towers. It writes it for models that were loaded
    with it; without it inference servers do not find the tower's weights.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping  # this module comes before transformers

    model._weight_conversions = get_model_conversion_mapping(model, add_legacy=False)


def join_processes_on_cpu(with_deepspeed: bool, timeout: float) -> None:
    """Start the process group of a run on the CPU, before transformers does.

    On the CPU transformers ignores `--ddp_timeout` and does not start DeepSpeed's process group; ZeRO-3 then believes
    that there is a single process and refuses the batch sizes.

    Args:
        timeout: seconds to wait for the other processes.
    """
    if torch.distributed.is_initialized():
        return
    if with_deepspeed:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        import deepspeed  # slow to import, and needed only here

        deepspeed.init_distributed("gloo", timeout=timedelta(seconds=timeout), verbose=False)
    elif int(os.environ.get("WORLD_SIZE", 1)) > 1 and "LOCAL_RANK" in os.environ:  # torchrun
        torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=timeout))


def keep_quantised_linears_trainable(model: torch.nn.Module) -> None:
    """Keep bitsandbytes' 4-bit layers differentiable on CPUs with AVX512-BF16. Call right after loading.

    The first forward in eval mode repacks each layer for inference and never undoes it. The repacked operator has no
    backward, so after any evaluation or rollout training would go on with a gradient of zero.
    """
    import bitsandbytes  # slow to import, only needed with --q_lora

    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
