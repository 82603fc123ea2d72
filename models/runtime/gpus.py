"""What the vendors say of GPUs."""

from __future__ import annotations

from typing import NamedTuple

import torch


class GPU(NamedTuple):
    """Peaks of a GPU: bytes of memory, FLOP/s of dense bfloat16 products summed in fp32, bytes/s of memory.

    ``names`` are those that CUDA gives to GPUs with these peaks.
    """

    memory: float
    flops: float
    bandwidth: float
    source: str
    names: tuple[str, ...]


GPUS = {
    "a100-80g": GPU(80e9, 312e12, 2039e9, "NVIDIA A100 80GB SXM datasheet", ("NVIDIA A100-SXM4-80GB",)),
    "h100-80g": GPU(80e9, 989e12, 3350e9, "NVIDIA H100 SXM datasheet", ("NVIDIA H100 80GB HBM3",)),
    "h200": GPU(141e9, 989e12, 4800e9, "NVIDIA H200 datasheet", ("NVIDIA H200",)),
    "a6000-48g": GPU(48e9, 154.8e12, 768e9, "NVIDIA RTX A6000 datasheet", ("NVIDIA RTX A6000",)),
    "rtx4090-24g": GPU(24e9, 165.2e12, 1008e9, "NVIDIA Ada GPU architecture whitepaper", ("NVIDIA GeForce RTX 4090",)),
}


def peak_of(device: torch.device) -> float | None:
    """FLOP/s of dense bfloat16 products at the peak of a device; None where that is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((gpu.flops for gpu in GPUS.values() if name in gpu.names), None)
