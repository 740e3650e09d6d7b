"""Environment fixes, each with its reason. Import this before transformers.

1. PyPI's torchvision wheel is linked against CUDA. With a CPU-only torch its C library does not load, the operator
   `torchvision::nms` is never defined, `import torchvision` fails, and with it every processor of transformers.
   Declaring the two operators is enough: nothing here calls them.
2. bitsandbytes and DeepSpeed tell every command that there is no GPU, and transformers tells its callers in peft and trl that a name
   will change: lines that no user can act on stand before those that he must read.
"""

import logging
import os
import types
import warnings
from datetime import timedelta

import torch

if torch.version.cuda is None and torch.version.hip is None:
    # The library object must stay alive for as long as the declarations do.
    _TORCHVISION_OPS = torch.library.Library("torchvision", "DEF")
    for _name in ("nms", "qnms"):
        _TORCHVISION_OPS.define(_name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

_NOISE = ("Failed to load CPU gemm_4bit_forward", "Setting accelerator to CPU")
for _logger in ("bitsandbytes.backends.cpu.ops", "DeepSpeed"):
    logging.getLogger(_logger).addFilter(lambda record: not str(record.msg).startswith(_NOISE))
warnings.filterwarnings("ignore", r".*`is_gradient_checkpointing` is deprecated", FutureWarning)


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
    """Let bitsandbytes' layers on a CPU be differentiable and compute the same in training and evaluation. Call right after loading.

    4 bits, on CPUs with AVX512-BF16: the first forward in eval mode repacks each layer for inference and never undoes it.
    The repacked operator has no backward, so after any evaluation or rollout training would go on with a gradient of zero.
    8 bits: in training mode a CPU multiplies by the weights made float again, in eval mode it rounds the inputs to 8 bits, too (a GPU
    always does). PPO's first ratio was .007 off 1: scoring evaluates, the optimiser trains. The layers stay in training mode.
    """
    import bitsandbytes  # slow to import, only needed with --q_lora

    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
        elif isinstance(module, bitsandbytes.nn.Linear8bitLt):
            module.train(True)
            module.train = types.MethodType(lambda self, mode=True: self, module)
