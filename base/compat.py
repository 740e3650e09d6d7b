"""Environment fixes, each with its reason. Import this before transformers.

1. PyPI's torchvision wheel is linked against CUDA. Beside a CPU-only torch its C library does not load, the operator `torchvision::nms` is
   never defined, `import torchvision` fails, and with it every processor of transformers. Declaring the two operators is enough: nothing here
   calls them.
"""

import torch

if torch.version.cuda is None and torch.version.hip is None:
    # The library object must stay alive for as long as the declarations do.
    _TORCHVISION_OPS = torch.library.Library("torchvision", "DEF")
    for _name in ("nms", "qnms"):
        _TORCHVISION_OPS.define(_name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
