"""Environment fixes, each with its reason. Import this before transformers.

1. PyPI's torchvision wheel is linked against CUDA. Beside a CPU-only torch its C library does not load, the operator `torchvision::nms` is
   never defined, `import torchvision` fails, and with it every processor of transformers. Declaring the two operators is enough: nothing here
   calls them.
"""

import itertools
import os
from datetime import timedelta

import torch

if torch.version.cuda is None and torch.version.hip is None:
    # The library object must stay alive for as long as the declarations do.
    _TORCHVISION_OPS = torch.library.Library("torchvision", "DEF")
    for _name in ("nms", "qnms"):
        _TORCHVISION_OPS.define(_name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def init_deepspeed_on_cpu(argv: list[str]) -> None:
    """Start DeepSpeed's process group before TrainingArguments exist, if `--deepspeed` runs on a machine without an accelerator.

    transformers skips DeepSpeed's own start when it trains on the CPU; ZeRO-3 then believes that there is one process and refuses the
    batch sizes. Also maps the launcher's environment to the CPU backend.
    """
    if not any(a == "--deepspeed" or a.startswith("--deepspeed=") for a in argv) or torch.cuda.is_available():
        return
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if "--use_cpu" not in argv:
        argv += ["--use_cpu", "True"]
    if not torch.distributed.is_initialized():
        import deepspeed  # slow to import, needed by nobody else

        seconds = next((b for a, b in itertools.pairwise(argv) if a == "--ddp_timeout"), 1800)
        deepspeed.init_distributed("gloo", timeout=timedelta(seconds=float(seconds)), verbose=False)


def keep_quantised_linears_trainable(model: torch.nn.Module) -> None:
    """Keep bitsandbytes' 4-bit layers differentiable on CPUs with AVX512-BF16. Call right after loading.

    The first forward in eval mode repacks each layer for inference, for good, and the repacked operator has no backward: training would go
    on with a gradient of zero after any evaluation or rollout.
    """
    import bitsandbytes  # slow to import, only needed with --q_lora

    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
