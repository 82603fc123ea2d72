"""Fused kernels, with backward, for video diffusion transformers."""

from . import modules as modules
from .backends import use_backend as use_backend
from .fusion import compiler as compiler
from .fusion import fuse as fuse
from .ops.adaln import adaln as adaln
from .ops.attention import attention as attention
from .ops.gate_residual import gate_residual as gate_residual
from .ops.gate_residual_adaln import gate_residual_adaln as gate_residual_adaln
from .ops.gelu_mlp import gelu_mlp as gelu_mlp
from .ops.glu_mlp import glu_mlp as glu_mlp
from .ops.grn import grn as grn
from .ops.guided_step import Coefficients as Coefficients
from .ops.guided_step import guided_step as guided_step
from .ops.norm_rope import Rope as Rope
from .ops.norm_rope import norm_rope as norm_rope
from .ops.norm_rope import rope_3d as rope_3d
from .ops.patch_embed import patch_embed as patch_embed
from .ops.unpatchify import unpatchify as unpatchify
from .ops.window_attention import window_attention as window_attention
from .recompute import recompute_adaln as recompute_adaln

__version__ = "0.2.0"

__all__ = [
    "Coefficients",
    "Rope",
    "adaln",
    "attention",
    "compiler",
    "fuse",
    "gate_residual",
    "gate_residual_adaln",
    "gelu_mlp",
    "glu_mlp",
    "grn",
    "guided_step",
    "modules",
    "norm_rope",
    "patch_embed",
    "recompute_adaln",
    "rope_3d",
    "unpatchify",
    "use_backend",
    "window_attention",
]


def __dir__() -> list[str]:
    return __all__
