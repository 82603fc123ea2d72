"""The GPUs that the Triton kernels are compiled for without a GPU, and what a multiprocessor of each has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

REGISTERS = 65536  # of a multiprocessor of NVIDIA's, all of these


@dataclass(frozen=True)
class Architecture:
    """Limits of a multiprocessor: warps and blocks at once; bytes of shared memory, and of those what a block may have.

    NVIDIA's are from the CUDA C++ Programming Guide, "Compute Capabilities"; AMD's from the CDNA 3 ISA.
    """

    name: str
    shared_per_block: int
    shared: int
    warps: int
    blocks: int

    @property
    def nvidia(self) -> bool:
        return self.name.startswith("sm_")

    @property
    def target(self) -> Any:
        """What Triton calls it."""
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", int(self.name[3:]), 32) if self.nvidia else GPUTarget("hip", self.name, 64)

    def occupancy(self, warps: int, registers: int, shared: int) -> float:
        """NVIDIA: the share of the warps that can be there at once, as far as registers and shared memory tell."""
        per_warp = -(-registers * 32 // 256) * 256
        by_registers = REGISTERS // per_warp // warps
        by_shared = self.shared // (shared + 1024)  # the system keeps 1 KiB a block
        return min(self.blocks, self.warps // warps, by_registers, by_shared) * warps / self.warps


def _nvidia(number: int, shared_per_block: int, shared: int, warps: int, blocks: int) -> Architecture:
    return Architecture(f"sm_{number}", shared_per_block * 1024, shared * 1024, warps, blocks)


NVIDIA = (
    _nvidia(80, shared_per_block=163, shared=164, warps=64, blocks=32),
    _nvidia(86, shared_per_block=99, shared=100, warps=48, blocks=16),
    _nvidia(89, shared_per_block=99, shared=100, warps=48, blocks=24),
    _nvidia(90, shared_per_block=227, shared=228, warps=64, blocks=32),
    _nvidia(100, shared_per_block=227, shared=228, warps=64, blocks=32),
    _nvidia(120, shared_per_block=99, shared=100, warps=48, blocks=24),
)
AMD = (Architecture("gfx942", shared_per_block=64 * 1024, shared=64 * 1024, warps=32, blocks=32),)
ARCHITECTURES = {architecture.name: architecture for architecture in NVIDIA + AMD}
