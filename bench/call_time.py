"""What a call costs beside its kernel: each op on tiny tensors, without gradients, against plain PyTorch.

    taskset -c 0 python -m bench.call_time

The microseconds are the least of many short rounds, in turns, on one thread: other work on the machine adds to a round,
and takes nothing away.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from time import perf_counter

import torch
import torch.nn.functional as F

import minisora_kernels as mk
from minisora_kernels.commands import command

ROUNDS, CALLS = 500, 20

Call = Callable[[], object]


def calls() -> dict[str, tuple[Call, Call]]:
    """Per op our call, and what a model without this library writes."""
    x, branch = torch.randn(1, 4, 16), torch.randn(1, 4, 16)
    shift, scale, gate = torch.randn(3, 1, 1, 16).unbind(0)
    w1, b1, w2, b2 = torch.randn(32, 16), torch.randn(32), torch.randn(16, 32), torch.randn(16)
    down = torch.randn(16, 16)
    qkv = torch.randn(1, 4, 3, 2, 8)
    q, k, v = qkv.unbind(2)
    video, weight, bias = torch.randn(1, 4, 1, 4, 4), torch.randn(16, 4, 1, 2, 2), torch.randn(16)
    weights, biases = torch.randn(16), torch.randn(16)
    latents, cond, null = torch.randn(3, 1, 4, 1, 4, 4).unbind(0)
    packed = torch.tensor([4.0, 0.9, 0.1, 0.0, 0.0])

    def normed(x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, (16,), None, None, 1e-6) * (1 + scale) + shift

    def attended() -> torch.Tensor:
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def gated() -> torch.Tensor:
        gate, value = F.linear(x, w1, b1).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * value, down, b2)

    def responded() -> torch.Tensor:
        norms = x.norm(dim=1, keepdim=True)
        return weights * (x * (norms / (norms.mean(-1, keepdim=True) + 1e-6))) + biases + x

    return {
        "adaln": (lambda: mk.adaln(x, shift, scale), lambda: normed(x)),
        "attention": (lambda: mk.attention(q, k, v), attended),
        "gate_residual": (lambda: mk.gate_residual(x, branch, gate), lambda: x + gate * branch),
        "gate_residual_adaln": (
            lambda: mk.gate_residual_adaln(x, branch, gate, shift, scale),
            lambda: normed(x + gate * branch),
        ),
        "gelu_mlp": (
            lambda: mk.gelu_mlp(x, w1, b1, w2, b2),
            lambda: F.linear(F.gelu(F.linear(x, w1, b1), approximate="tanh"), w2, b2),
        ),
        "glu_mlp": (
            lambda: mk.glu_mlp(x, w1, b1, down, b2),
            gated,
        ),
        "grn": (lambda: mk.grn(x, weights, biases), responded),
        "guided_step": (
            lambda: mk.guided_step(latents, cond, packed, null=null),
            lambda: 0.9 * latents + 0.1 * (null + 4.0 * (cond - null)),
        ),
        "norm_rope": (
            lambda: mk.norm_rope(q, norm="rms", weight=weights[:8]),
            lambda: F.rms_norm(q, (8,), weights[:8], 1e-6),
        ),
        "patch_embed": (
            lambda: mk.patch_embed(video, weight, bias),
            lambda: F.conv3d(video, weight, bias, stride=(1, 2, 2)).flatten(2).transpose(1, 2),
        ),
        "unpatchify": (
            lambda: mk.unpatchify(x, (1, 2, 2), (1, 2, 2), 4),
            lambda: x.view(1, 1, 2, 2, 1, 2, 2, 4).permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(1, 4, 1, 4, 4),
        ),
        "window_attention": (lambda: mk.window_attention(qkv, (4, 1, 1), (4, 1, 1)), attended),
    }


def least(functions: Sequence[Call], rounds: int = ROUNDS) -> list[float]:
    """Microseconds of a call of each function, the least of the rounds."""
    found = [float("inf")] * len(functions)
    for _ in range(rounds):
        for i, function in enumerate(functions):
            start = perf_counter()
            for _ in range(CALLS):
                function()
            found[i] = min(found[i], (perf_counter() - start) / CALLS * 1e6)
    return found


@command()
def main(arguments: list[str]) -> None:
    argparse.ArgumentParser(prog="python -m bench.call_time", description=__doc__).parse_args(arguments)
    torch.set_num_threads(1)
    print(f"{'op':22}{'ours':>8}{'eager':>8}{'ratio':>8}   microseconds of a call without gradients")
    with torch.no_grad():
        for op, pair in calls().items():
            ours, eager = least(pair)
            print(f"{op:22}{ours:8.1f}{eager:8.1f}{ours / eager:8.2f}")


if __name__ == "__main__":
    main()
