"""Prints Triton's intermediate code of the kernels that multiply; needs no GPU.

    python tests/ops/triton_ttir.py LENGTH [PRECISION]

window_attention for windows of LENGTH tokens; with a PRECISION, as ``torch.set_float32_matmul_precision`` takes it, in
float32, and patch_embed too.
"""

from __future__ import annotations

import sys

import torch
import triton
from triton.compiler import ASTSource, make_backend
from triton.runtime import driver
from triton.runtime.jit import JITFunction, create_function_from_signature

from bench.aot import set_target
from bench.gpu.architectures import ARCHITECTURES
from minisora_kernels.triton import patch_embed
from minisora_kernels.triton import window_attention as launchers


def compile_only(self, *arguments, grid, warmup, **options):
    """What a launch would run: the kernel is compiled for what it is given, and printed."""
    target = driver.active.get_current_target()
    backend = make_backend(target)
    bound, specialization, _ = create_function_from_signature(self.signature, self.params, backend)(
        *arguments, **options
    )
    parsed, signature, constexprs, attrs = self._pack_args(backend, options, bound, specialization, None)
    kernel = triton.compile(ASTSource(self, signature, constexprs, attrs), target=target, options=parsed.__dict__)
    print(kernel.asm["ttir"])


JITFunction.run = compile_only
set_target(ARCHITECTURES["sm_90"])
length, precision = int(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None
if precision is not None:
    torch.set_float32_matmul_precision(precision)
DTYPE = torch.bfloat16 if precision is None else torch.float32
batch, heads, head_dim = 2, 2, 72 if precision is None else 16


def empty(*shape, dtype=DTYPE):
    return torch.empty(*shape, dtype=dtype, device="meta")


qkv, out = empty(batch, length, 3, heads, head_dim), empty(batch, length, heads * head_dim)
angles = empty(length, head_dim // 2, dtype=torch.float32)
call = (length, 1, 1, length, 1, 1, empty(head_dim), empty(head_dim), 1, angles, angles, True, None, 1.0, 1e-6)
launchers.window_attention_fwd(qkv, *call)
launchers.window_attention_bwd(
    out, qkv, out, empty(batch, length, heads, 2, dtype=torch.float32), *call, True, True, True, False
)
if precision is not None:
    x, weight, y = empty(batch, 4, 2, 8, 8), empty(64, 4, 1, 2, 2), empty(batch, 32, 64)
    patch_embed.patch_embed_fwd(x, weight, None, None)
    patch_embed.patch_embed_bwd(y, x, 1, 2, 2, None, None)
    patch_embed.patch_embed_video(y, weight, 2, 4, 4)
