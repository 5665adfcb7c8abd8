"""Import before transformers: lets torchvision's wheel load beside a CPU build of torch.

transformers imports torchvision where it is installed, and PyPI's wheel of it fails if torch cannot
load its ops. None of them is called here, so declaring the two that are asked for is enough. Where
torchvision loads, or is not installed, nothing happens.
"""

import torch

try:
    import torchvision  # noqa: F401
except ImportError:
    pass
except RuntimeError:
    for op in ("nms", "qnms"):
        schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        torch.library.define(f"torchvision::{op}", schema)
