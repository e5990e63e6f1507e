"""Whether there is a GPU for TensorRT on this machine."""

from __future__ import annotations

import torch

__all__ = ["no_gpu"]


def no_gpu(device: torch.device) -> str | None:
    """Why torch cannot use a CUDA device here; None if it can."""
    if torch.version.cuda is None:
        return f"it runs on an NVIDIA GPU, and this torch ({torch.__version__}) was built without CUDA"
    if not torch.cuda.is_available():
        return "it runs on an NVIDIA GPU, and torch finds none with a driver on this machine"
    count = torch.cuda.device_count()
    return f"it runs on {device}, and this machine has {count} CUDA devices" if (device.index or 0) >= count else None
