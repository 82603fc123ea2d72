"""Pattern by pattern: what is found and equal to rounding, and what is left, with the reason."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fusion_parts import Function, check, counts, reasons
from torch import Tensor

import minisora_kernels as mk

pytestmark = pytest.mark.usefixtures("nothing_compiled")

B, N, D, H = 2, 12, 32, 64


def made(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed + 31 * sum(shape)))
    return values.to(dtype).requires_grad_()


def inputs(dtype: torch.dtype = torch.float32, **shapes: tuple[int, ...]) -> dict[str, Any]:
    return {name: made(*shape, dtype=dtype, seed=i) for i, (name, shape) in enumerate(shapes.items())}


def rms(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def layer(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    return F.layer_norm(x, (x.shape[-1],), weight, bias, 1e-6)


def normed_attention(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(F.rms_norm(q, (8,), a, 1e-6), F.rms_norm(k, (8,), b, 1e-6), v)


def detached_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k.detach(), v)


def keys_without_gradients(qkv: Tensor) -> Tensor:
    with torch.no_grad():
        k = qkv[1]
    return F.scaled_dot_product_attention(qkv[0], k, qkv[2])


ROWS = dict(x=(B, N, D), a=(B, D), b=(B, D))
ONE = dict(x=(B, N, D), a=(B, 1, D), b=(B, 1, D))
CROSS = dict(q=(B, 4, N, 8), k=(B, 4, 5, 8), v=(B, 4, 5, 8))
KEYS = torch.tensor([[True] * 5, [True, False, True, True, False]])  # of two samples
MLP = dict(x=(B, N, D), w1=(H, D), w2=(D, H))
GATE = dict(x=(B, N, D), y=(B, N, D), g=(B, 1, D))
GLU = dict(x=(B, N, D), w1=(2 * H, D), b1=(2 * H,), w2=(D, H), b2=(D,))
HALVES = dict(x=(B, N, D), w1=(H, D), w2=(D, H), w3=(H, D))


def glu(halves: Callable[[Tensor], tuple[Tensor, Tensor]], act: Callable[[Tensor], Tensor] = F.silu) -> Callable:
    """Linear, a gated linear unit, Linear; ``halves`` splits into the gate and the other half."""

    def mlp(x, w1, b1, w2, b2):
        gate, value = halves(F.linear(x, w1, b1))
        return F.linear(act(gate) * value, w2, b2)

    return mlp


FOUND = {
    "layer": (ONE, lambda x, a, b: layer(x) * (1 + a) + b, {"adaln": 1}),
    "plus one behind": (ONE, lambda x, a, b: b + (a + 1) * layer(x), {"adaln": 1}),
    "unsqueezed": (ROWS, lambda x, a, b: layer(x) * (1 + a.unsqueeze(1)) + b.unsqueeze(1), {"adaln": 1}),
    "unsqueezed outside": (ROWS, lambda x, a, b: layer(x) * (1 + a).unsqueeze(1) + b[:, None], {"adaln": 1}),
    "indexed outside": (ROWS, lambda x, a, b: layer(x) * (1 + a)[:, None] + b[:, None], {"adaln": 1}),
    "addcmul": (ONE, lambda x, a, b: torch.addcmul(b, layer(x), 1 + a), {"adaln": 1}),
    "methods": (ONE, lambda x, a, b: layer(x).mul(a.add(1)).add(b), {"adaln": 1}),
    "one condition": (
        dict(x=(B, N, D), a=(1, D), b=(D,)),
        lambda x, a, b: layer(x) * (1 + a) + b,
        {"adaln": 1},
    ),
    "a row per token": (
        dict(x=(B, N, D), a=(B, N, D), b=(1, N, D)),
        lambda x, a, b: layer(x) * (1 + a) + b,
        {"adaln": 1},
    ),
    "a row per frame": (
        dict(x=(B, 3, 4, D), a=(B, 3, 1, D), b=(B, 1, 1, D)),
        lambda x, a, b: layer(x) * (1 + a) + b,
        {"adaln": 1},
    ),
    "affine": (
        ONE | dict(w=(D,), c=(D,)),
        lambda x, a, b, w, c: layer(x, w, c) * (1 + a) + b,
        {"adaln": 1},
    ),
    "affine written out": (
        ONE | dict(w=(D,), c=(D,)),
        lambda x, a, b, w, c: (layer(x) * w + c) * (1 + a) + b,
        {"adaln": 1},
    ),
    "rms": (ONE, lambda x, a, b: F.rms_norm(x, (D,)) * (1 + a) + b, {"adaln": 1}),
    "rms with weight": (
        ONE | dict(w=(D,)),
        lambda x, a, b, w: F.rms_norm(x, (D,), w, 1e-5) * (1 + a) + b,
        {"adaln": 1},
    ),
    "rms written out": (ONE | dict(w=(D,)), lambda x, a, b, w: rms(x) * w * (1 + a) + b, {"adaln": 1}),
    "rms by a quotient": (
        ONE,
        lambda x, a, b: x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + 1e-6) * (1 + a) + b,
        {"adaln": 1},
    ),
    "layer written out": (
        ONE,
        lambda x, a, b: (
            (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + 1e-6) * (1 + a) + b
        ),
        {"adaln": 1},
    ),
    "no shift": (dict(x=(B, N, D), a=(B, 1, D)), lambda x, a: layer(x) * (1 + a), {"adaln": 1}),
    "gate": (GATE, lambda x, y, g: x + g * y, {"gate_residual": 1}),
    "gate behind": (GATE, lambda x, y, g: y * g.tanh() + x, {"gate_residual": 1}),
    "gate of all": (dict(x=(B, N, D), y=(B, N, D), g=(D,)), lambda x, y, g: x + g * y, {"gate_residual": 1}),
    "gate per token": (
        dict(x=(B, N, D), y=(B, N, D), g=(B, N, 2, D)),
        lambda x, y, g: x + y * g.unbind(2)[1],
        {"gate_residual": 1},
    ),
    "gate in place of a new tensor": (GATE, lambda x, y, g: operator.iadd(x.sin(), g * y), {"gate_residual": 1}),
    "both": (
        GATE | dict(a=(B, 1, D), b=(B, 1, D)),
        lambda x, y, g, a, b: torch.cat([x2 := x + g * y, layer(x2) * (1 + a) + b]),
        {"gate_residual_adaln": 1},
    ),
    "mlp": (
        dict(x=(B, N, D), w1=(H, D), b1=(H,), w2=(D, H)),
        lambda x, w1, b1, w2: F.linear(F.gelu(F.linear(x, w1, b1), approximate="tanh"), w2),
        {"gelu_mlp": 1},
    ),
    "mlp with exact gelu": (MLP, lambda x, w1, w2: F.linear(F.gelu(F.linear(x, w1)), w2), {"gelu_mlp": 1}),
    "mlp with dropout that is off": (
        dict(x=(B, N, D), w1=(H, D), w2=(D, H)),
        lambda x, w1, w2: F.linear(F.dropout(F.gelu(F.linear(x, w1), approximate="tanh"), 0.3, False), w2),
        {"gelu_mlp": 1},
    ),
    "mlp by keywords": (
        dict(x=(B, N, D), w1=(H, D), b1=(H,), w2=(D, H)),
        lambda x, w1, b1, w2: F.linear(
            input=F.gelu(input=F.linear(input=x, weight=w1, bias=b1), approximate="tanh"), weight=w2
        ),
        {"gelu_mlp": 1},
    ),
    "glu": (GLU, glu(lambda h: h.chunk(2, dim=-1)), {"glu_mlp": 1}),
    "glu, gate last": (GLU, glu(lambda h: h.chunk(2, dim=-1)[::-1], F.gelu), {"glu_mlp": 1}),
    "glu by split": (GLU, glu(lambda h: torch.split(h, H, -1)), {"glu_mlp": 1}),
    "glu by sizes": (GLU, glu(lambda h: h.split([H, H], dim=2)), {"glu_mlp": 1}),
    "glu by slices": (GLU, glu(lambda h: (h[..., :H], h[..., H:])), {"glu_mlp": 1}),
    "glu by narrow": (GLU, glu(lambda h: (h.narrow(-1, H, H), torch.narrow(h, 2, 0, H))), {"glu_mlp": 1}),
    "glu by an axis": (GLU, glu(lambda h: h.unflatten(-1, (2, H)).unbind(-2)), {"glu_mlp": 1}),
    "glu by a view": (GLU, glu(lambda h: (h.view(B, N, 2, H)[:, :, 1], h.view(B, N, 2, H)[..., 0, :])), {"glu_mlp": 1}),
    "glu of copies": (GLU, glu(lambda h: tuple(p.contiguous() for p in h.chunk(2, -1))), {"glu_mlp": 1}),
    "glu, tanh": (GLU, glu(lambda h: h.chunk(2, -1), lambda g: F.gelu(g, approximate="tanh")), {"glu_mlp": 1}),
    "glu, silu written out": (GLU, glu(lambda h: h.chunk(2, -1), lambda g: g * torch.sigmoid(g)), {"glu_mlp": 1}),
    "glu, silu in float32": (
        GLU,
        glu(lambda h: h.chunk(2, -1), lambda g: F.silu(g.float()).to(g.dtype)),
        {"glu_mlp": 1},
    ),
    "glu, sigmoid in float32": (
        GLU,
        glu(lambda h: h.chunk(2, -1), lambda g: g.float().sigmoid().to(g.dtype).mul(g)),
        {"glu_mlp": 1},
    ),
    "glu with dropout that is off": (
        dict(x=(B, N, D), w1=(2 * H, D), w2=(D, H)),
        lambda x, w1, w2: F.linear(F.dropout((h := F.linear(x, w1).chunk(2, -1))[0] * F.silu(h[1]), 0.0, True), w2),
        {"glu_mlp": 1},
    ),
    "glu of two weights": (
        HALVES,
        lambda x, w1, w2, w3: F.linear(F.silu(F.linear(x, w1)) * F.linear(x, w3), w2),
        {"glu_mlp": 1},
    ),
    "glu of two weights, the value first": (
        HALVES | dict(b1=(H,), b3=(H,)),
        lambda x, w1, w2, w3, b1, b3: F.linear(F.linear(x, w3, b3) * F.gelu(F.linear(x, w1, b1)), w2),
        {"glu_mlp": 1},
    ),
    "patches": (
        dict(x=(B, 3, 4, 8, 8), w=(D, 3, 2, 4, 4), b=(D,)),
        lambda x, w, b: F.conv3d(x, w, b, stride=(2, 4, 4)).flatten(2).transpose(1, 2),
        {"patch_embed": 1},
    ),
    "patches that leave a rest": (
        dict(x=(B, 3, 9, 8), w=(D, 3, 2, 2), b=(D,)),
        lambda x, w, b: F.conv2d(x, w, b, stride=2).view(B, D, -1),
        {"patch_embed": 1},
    ),
    "sdpa": (
        dict(q=(B, 4, N, 8), k=(B, 4, N, 8), v=(B, 4, N, 8)),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2),
        {"attention": 1},
    ),
    "sdpa with a scale": (
        dict(q=(B, 4, N, 8), k=(B, 4, N, 8), v=(B, 4, N, 8)),
        lambda q, k, v: F.scaled_dot_product_attention(query=q, key=k, value=v, scale=0.2, dropout_p=0.0),
        {"attention": 1},
    ),
    "packed": (
        dict(x=(B, N, D), w=(3 * D, D)),
        lambda x, w: F.scaled_dot_product_attention(
            *F.linear(x, w).reshape(B, N, 3, 4, 8).permute(2, 0, 3, 1, 4).unbind(0)
        ),
        {"window_attention": 1},
    ),
    "packed by chunks": (
        dict(x=(B, N, D), w=(3 * D, D)),
        lambda x, w: F.scaled_dot_product_attention(
            *(each.unflatten(-1, (4, 8)).transpose(1, 2) for each in F.linear(x, w).chunk(3, dim=-1))
        ),
        {"window_attention": 1},
    ),
    "packed, with a norm of q and k": (
        dict(x=(B, N, D), w=(3 * D, D), a=(8,), b=(8,)),
        lambda x, w, a, b: normed_attention(
            *F.linear(x, w).reshape(B, N, 3, 4, 8).permute(2, 0, 3, 1, 4).unbind(0), a, b
        ),
        {"window_attention": 1},
    ),
    "a norm before the heads come first": (
        dict(x=(B, N, 4, 8), y=(B, N, 4, 8), z=(B, N, 4, 8)),
        lambda x, y, z: F.scaled_dot_product_attention(
            layer(x).transpose(1, 2), layer(y).permute(0, 2, 1, 3), z.transpose(1, 2)
        ),
        {"attention": 1},
    ),
    "a norm of q alone": (
        dict(q=(B, 4, N, 8), k=(B, 4, N, 8), v=(B, 4, N, 8)),
        lambda q, k, v: F.scaled_dot_product_attention(layer(q), k, v),
        {"attention": 1},
    ),
    "norms of two kinds": (
        dict(q=(B, 4, N, 8), k=(B, 4, N, 8), v=(B, 4, N, 8)),
        lambda q, k, v: F.scaled_dot_product_attention(layer(q), rms(k), v),
        {"attention": 1},
    ),
    "norms with a bias": (
        dict(q=(B, 4, N, 8), k=(B, 4, N, 8), v=(B, 4, N, 8), a=(8,), b=(8,)),
        lambda q, k, v, a, b: F.scaled_dot_product_attention(layer(q, a, b), layer(k, a, b), v),
        {"attention": 1},
    ),
    "norms over other axes": (
        dict(q=(B, N, D), k=(B, N, D), v=(B, N, D)),
        lambda q, k, v: F.scaled_dot_product_attention(
            *(each.unflatten(-1, (4, 8)).transpose(1, 2) for each in (rms(q), rms(k), v))
        ),
        {"attention": 1},
    ),
    "packed, but keys are detached": (  # which have no gradient, so they must not be read with the others
        dict(x=(B, N, D), w=(3 * D, D)),
        lambda x, w: detached_keys(*F.linear(x, w).reshape(B, N, 3, 4, 8).permute(2, 0, 3, 1, 4).unbind(0)),
        {"attention": 1},
    ),
    "packed, keys taken without gradients": (
        dict(x=(B, N, D), w=(3 * D, D)),
        lambda x, w: keys_without_gradients(F.linear(x, w).reshape(B, N, 3, 4, 8).permute(2, 0, 3, 1, 4)),
        {},
    ),
    "heads behind q, k, v": (  # another order in memory, which must not be taken for the packed one
        dict(x=(B, N, D), w=(3 * D, D)),
        lambda x, w: F.scaled_dot_product_attention(
            *F.linear(x, w).reshape(B, N, 4, 3, 8).permute(3, 0, 2, 1, 4).unbind(0)
        ),
        {"attention": 1},
    ),
    "k before q": (
        dict(x=(B, N, D), w=(3 * D, D)),
        lambda x, w: F.scaled_dot_product_attention(
            *(F.linear(x, w).reshape(B, N, 3, 4, 8).permute(2, 0, 3, 1, 4)[i] for i in (1, 0, 2))
        ),
        {"attention": 1},
    ),
    "matmul, softmax, matmul": (
        dict(q=(B, 4, N, 8), k=(B, 4, N, 8), v=(B, 4, N, 8)),
        lambda q, k, v: (q @ k.transpose(-2, -1) * 0.3).softmax(dim=-1) @ v,
        {"attention": 1},
    ),
    "scaled before": (
        dict(q=(B, 4, N, 8), k=(B, 4, N, 8), v=(B, 4, N, 8)),
        lambda q, k, v: torch.matmul(F.softmax(torch.matmul(q * 0.3, k.permute(0, 1, 3, 2)) / 2, dim=-1), v),
        {"attention": 1},
    ),
    "batched products": (
        dict(q=(B, N, 8), k=(B, N, 8), v=(B, N, 8)),
        lambda q, k, v: torch.bmm((torch.bmm(q, k.transpose(1, 2)) / math.sqrt(8)).softmax(-1), v),
        {"attention": 1},
    ),
    "cross-attention": (
        CROSS,
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v),
        {"attention": 1},
    ),
    "cross-attention written out": (
        CROSS,
        lambda q, k, v: (q @ k.transpose(-1, -2) * 0.3).softmax(-1) @ v,
        {"attention": 1},
    ),
    "cross-attention with norms across heads": (
        dict(q=(B, N, D), k=(B, 5, D), v=(B, 5, D), a=(D,), b=(D,)),
        lambda q, k, v, a, b: F.scaled_dot_product_attention(
            *(each.unflatten(-1, (4, 8)).transpose(1, 2) for each in (rms(q) * a, rms(k) * b, v))
        ),
        {"attention": 1},
    ),
    "norms across heads, with a bias": (
        dict(q=(B, N, D), k=(B, N, D), v=(B, N, D), a=(D,), b=(D,)),
        lambda q, k, v, a, b: F.scaled_dot_product_attention(
            *(each.view(B, N, 4, 8).transpose(1, 2) for each in (layer(q, a, b), layer(k, a, b), v))
        ),
        {"attention": 1},
    ),
    "a norm of one head, another across heads": (
        dict(q=(B, N, D), k=(B, N, D), v=(B, N, D)),
        lambda q, k, v: F.scaled_dot_product_attention(
            F.rms_norm(q.view(B, N, 4, 8), (8,)).transpose(1, 2),
            rms(k).view(B, N, 4, 8).transpose(1, 2),
            v.view(B, N, 4, 8).transpose(1, 2),
        ),
        {"attention": 1},
    ),
    "a mask of keys": (
        CROSS,
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, KEYS[:, None, None]),
        {"attention": 1},
    ),
    "a mask of keys for all samples": (
        CROSS,
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=KEYS[1:, None, None]),
        {"attention": 1},
    ),
    "a mask of keys in numbers": (
        CROSS,
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, (KEYS[:, None, None].to(q.dtype) - 1) * 10000.0),
        {"attention": 1},
    ),
    "a mask of keys in numbers, a head each": (
        CROSS,
        lambda q, k, v: F.scaled_dot_product_attention(
            q, k, v, ((KEYS[:, None].to(q.dtype) - 1) * 10000.0).repeat_interleave(4, dim=0).view(B, 4, 1, 5)
        ),
        {"attention": 1},
    ),
    "a mask that learns": (
        CROSS | dict(m=(B, 1, 1, 5)),
        lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m),
        {},
    ),
    "numbers that are no mask": (  # each call looks, and takes SDPA
        CROSS,
        lambda q, k, v: F.scaled_dot_product_attention(
            q, k, v, q.new_tensor([0.0, -1.0, 0.5, -10000.0, 2.0]).expand(B, 1, 1, 5)
        ),
        {"attention": 1},
    ),
    "numbers that mask every key": (  # all alike: they change nothing
        CROSS,
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, q.new_full((B, 1, 1, 5), -10000.0)),
        {"attention": 1},
    ),
    "numbers that are a mask for some heads": (
        CROSS,
        lambda q, k, v: F.scaled_dot_product_attention(
            q, k, v, torch.where(torch.arange(20).view(1, 4, 1, 5) % 3 > 0, q.new_zeros(()), -math.inf)
        ),
        {"attention": 1},
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FOUND)
def test_a_pattern_is_found_and_right(name: str, dtype: torch.dtype):
    shapes, function, expected = FOUND[name]
    fused = check(Function(function), inputs(dtype, **shapes), draws=8)  # some have a gradient of 8 numbers
    assert counts(fused.sites) == expected, fused.report()


def in_place_between(x, a, b):
    h = layer(x)
    scaled = h * (1 + a)
    b.mul_(2)  # after the product, before the sum: read where it is
    return scaled + b


def scale_written(x, a, b):
    scaled = layer(x) * (1 + a)
    a.zero_()
    return scaled + b


def scale_written_by_its_method(x, a, b):
    scaled = layer(x) * (1 + a)
    b.__imul__(3.0)
    a.__setitem__(0, 3.0)
    return scaled + b


def shift_written_among_others(x, a, b):
    scaled = layer(x) * (1 + a)
    torch._foreach_mul_([b], 3.0)
    return scaled + b


def shift_written_by_out(x, a, b):
    scaled = layer(x) * (1 + a)
    torch.exp(a, out=b)
    return scaled + b


def shift_written_by_an_activation(x, a, b):
    scaled = layer(x) * (1 + a)
    F.relu(b, inplace=True)
    return scaled + b


def norm_written(x, a, b):
    h = layer(x)
    h.mul_(2)
    return h * (1 + a) + b


def x_written(x, a, b):
    h = layer(x)
    x.zero_()
    return h * (1 + a) + b


def view_written(x, a, b):
    h = layer(x)
    x[:, 0].fill_(3.0)
    return h * (1 + a) + b


def gradients_off(x, a, b):
    with torch.no_grad():
        h = layer(x)
    return h * (1 + a) + b


def autocast_between(x, a, b):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h = layer(x)
    return h * (1 + a) + b


def rounded_between(x, a, b):
    return layer(x).bfloat16() * (1 + a) + b


def half_written(x, w1, b1, w2, b2):
    gate, value = F.linear(x, w1, b1).chunk(2, dim=-1)
    gate = F.silu(gate)
    value.mul_(2)
    return F.linear(gate * value, w2, b2)


def tokens_written(x, w1, b1, w2, b2):
    gate, value = F.linear(x, w1, b1).chunk(2, dim=-1)
    x.zero_()
    return F.linear(F.silu(gate) * value, w2, b2)


def gate_without_gradients(x, w1, b1, w2, b2):
    gate, value = F.linear(x, w1, b1).chunk(2, dim=-1)
    with torch.no_grad():
        gate = F.silu(gate)
    return F.linear(gate * value, w2, b2)


WRITTEN, SWITCHED = "written in place", "switched between"
QKV = dict(q=(B, 4, N, 8), k=(B, 4, N, 8), v=(B, 4, N, 8))
LEFT = {
    "scale written": (ONE, scale_written, WRITTEN),
    "scale written by its method": (ONE, scale_written_by_its_method, WRITTEN),
    "x written": (ONE, x_written, WRITTEN),
    "a view of x written": (ONE, view_written, WRITTEN),
    "gradients off": (ONE, gradients_off, SWITCHED),
    "autocast": (ONE, autocast_between, SWITCHED),
    "rounded": (ONE, rounded_between, "rounds to torch.bfloat16"),
    "a sum into an input": (GATE, lambda x, y, g: operator.iadd(x, g * y), WRITTEN),
    "an activation read twice": (
        MLP,
        lambda x, w1, w2: F.linear(a := F.gelu(F.linear(x, w1), approximate="tanh"), w2) + a.mean(),
        "something else reads",
    ),
    "a gate read twice": (
        GLU,
        lambda x, w1, b1, w2, b2: (
            F.linear((g := F.silu((h := F.linear(x, w1, b1).chunk(2, -1))[0])) * h[1], w2, b2) + g.mean()
        ),
        "something else reads",
    ),
    "both halves read": (
        GLU,
        lambda x, w1, b1, w2, b2: (
            F.linear(F.silu((h := F.linear(x, w1, b1)).chunk(2, -1)[0]) * h.chunk(2, -1)[1], w2, b2) + h.mean()
        ),
        "something else reads",
    ),
    "a half written": (GLU, half_written, "something else reads"),
    "tokens written": (GLU, tokens_written, WRITTEN),
    "a gate without gradients": (GLU, gate_without_gradients, SWITCHED),
    "a gate that is rounded": (
        GLU,
        glu(lambda h: h.chunk(2, -1), lambda g: F.silu(g.bfloat16()).float()),
        "rounds to torch.bfloat16",
    ),
    "a mask": (
        QKV,
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, torch.ones(N, N, dtype=torch.bool).tril()),
        "mask",
    ),
    "causal": (QKV, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), "causal"),
    "grouped heads": (
        QKV | dict(k=(B, 2, N, 8), v=(B, 2, N, 8)),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
        "different heads",
    ),
    "a mask of pairs": (
        QKV,
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, torch.ones(N, N, dtype=torch.bool).tril()[None, None]),
        "a mask of more than keys",
    ),
    "narrow heads": (
        dict(q=(B, 4, N, 6), k=(B, 4, N, 6), v=(B, 4, N, 6)),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v),
        "head_dim is 6",
    ),
    "padding": (
        dict(x=(B, 3, 8, 8), w=(D, 3, 2, 2)),
        lambda x, w: F.conv2d(x, w, stride=2, padding=2),
        "padding",
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_a_trap_is_left_with_the_reason(name: str):
    shapes, function, reason = LEFT[name]
    given = {key: each.detach() for key, each in inputs(**shapes).items()}
    eager = function(*(each.clone() for each in given.values()))
    model = Function(function)
    with mk.fuse(model, backend="cpu") as fused:
        y = model(*(each.clone() for each in given.values()))
    assert any(reason in each for each in reasons(fused.sites)), fused.report()
    torch.testing.assert_close(y, eager, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "function",
    [shift_written_among_others, shift_written_by_out, shift_written_by_an_activation, norm_written, in_place_between],
)
def test_writes_of_all_kinds_are_right(function):
    given = {key: each.detach() for key, each in inputs(**ONE).items()}
    eager = function(*(each.clone() for each in given.values()))
    model = Function(function)
    with mk.fuse(model, backend="cpu"):
        y = model(*(each.clone() for each in given.values()))
    torch.testing.assert_close(y, eager, rtol=1e-5, atol=1e-5)


def test_what_is_written_before_the_call_reads_it_is_right():
    given = {key: each.detach() for key, each in inputs(**ONE).items()}
    model, kept = Function(in_place_between), given["b"].clone()
    eager = in_place_between(*(each.clone() for each in given.values()))
    with mk.fuse(model, backend="cpu"):
        y = model(*given.values())
    torch.testing.assert_close(y, eager, rtol=1e-5, atol=1e-5)
    assert torch.equal(given["b"], 2 * kept)  # and the write is still done


OTHERS = {
    "two": (ONE, lambda x, a, b: layer(x) * (2 + a) + b),
    "norm over two axes": (ONE, lambda x, a, b: F.layer_norm(x, (N, D)) * (1 + a) + b),
    "norm over tokens": (
        dict(x=(B, D, D), a=(B, 1, D), b=(B, 1, D)),
        lambda x, a, b: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6) * (1 + a) + b,
    ),
    "cubes": (ONE, lambda x, a, b: x * torch.rsqrt(x.pow(3).abs().mean(-1, keepdim=True) + 1e-6) * (1 + a) + b),
    "unbiased variance": (
        ONE,
        lambda x, a, b: (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True) + 1e-6) * (1 + a) + b,
    ),
    "rms of another tensor": (
        ONE,
        lambda x, a, b: x * torch.rsqrt((x * b).pow(2).mean(-1, keepdim=True) + 1e-6) * (1 + a) + b,
    ),
    "a factor per channel of heads": (dict(x=(B, 4, N, 8), a=(B, 1, N, 8)), lambda x, a: layer(x) * (1 + a)),
    "a rotation": (
        dict(x=(B, N, D), y=(B, N, D), c=(N, D), s=(1, 1, D)),
        lambda x, y, c, s: x * c + y * s,
    ),
    "whole tensors": (dict(x=(B, N, D), y=(B, N, D), g=(B, N, D)), lambda x, y, g: x + g * y),
    "a number": (dict(x=(B, N, D), y=(B, N, D)), lambda x, y: x + 0.5 * y),
    "alpha": (GATE, lambda x, y, g: torch.add(x, g * y, alpha=2)),
    "a factor per token": (dict(x=(B, N, D), y=(B, N, D), g=(B, N, 1)), lambda x, y, g: x + g * y),
    "softmax over queries": (
        QKV,
        lambda q, k, v: (q @ k.transpose(-2, -1)).softmax(dim=-2) @ v,
    ),
    "a bias of the scores": (
        QKV | dict(s=(N, N)),
        lambda q, k, v, s: (q @ k.transpose(-2, -1) + s).softmax(dim=-1) @ v,
    ),
    "overlapping patches": (dict(x=(B, 3, 8, 8), w=(D, 3, 3, 3)), lambda x, w: F.conv2d(x, w, stride=2)),
    "relu": (MLP, lambda x, w1, w2: F.linear(F.relu(F.linear(x, w1)), w2)),
    "a sigmoid alone": (GLU, glu(lambda h: h.chunk(2, -1), torch.sigmoid)),
    "every other channel": (GLU, glu(lambda h: h.unflatten(-1, (H, 2)).unbind(-1))),
    "one half twice": (GLU, glu(lambda h: (h[..., :H], h[..., :H]))),
    "halves that overlap": (GLU, glu(lambda h: (h[..., :H], h[..., H // 2 : H + H // 2]))),
    "a gate that is detached": (GLU, glu(lambda h: (h[..., :H].detach(), h[..., H:]))),
    "a gate of other tokens": (
        HALVES,
        lambda x, w1, w2, w3: F.linear(F.silu(F.linear(x, w1)) * F.linear(x.flip(1), w3), w2),
    ),
    "one Linear twice": (MLP, lambda x, w1, w2: F.linear(F.silu(h := F.linear(x, w1)) * h, w2)),
    "the sigmoid of the other half": (
        GLU,
        lambda x, w1, b1, w2, b2: F.linear(
            (h := F.linear(x, w1, b1).chunk(2, -1))[0] * torch.sigmoid(h[1]) * h[1].tanh(), w2, b2
        ),
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_only_looks_alike_is_not_found(name: str):
    shapes, function = OTHERS[name]
    given = [each.detach() for each in inputs(**shapes).values()]
    model = Function(function)
    with mk.fuse(model, backend="cpu") as fused:
        y = model(*given)
    assert counts(fused.sites) == {}, fused.report()
    assert torch.equal(y, function(*given))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_numbers_that_no_op_takes_are_left(backend: str):
    def gate(x, y, g):
        return x + g * y

    model, given = Function(gate), [torch.arange(N * D).reshape(1, N, D), torch.ones(1, N, D).long(), torch.arange(D)]
    with mk.fuse(model, backend=backend) as fused:
        assert torch.equal(model(*given), gate(*given))
        given = [each.to(torch.complex64) for each in given]
        assert torch.equal(model(*given), gate(*given))
    assert counts(fused.sites) == {} and any("complex64" in each for each in reasons(fused.sites))


def test_a_linear_to_one_number_and_no_tokens_are_left():
    def mlp(x, w1, w2):
        return F.linear(F.gelu(F.linear(x, w1), approximate="tanh"), w2)

    model, given = Function(mlp), (torch.randn(B, N, D), torch.randn(H, D), torch.randn(H))
    with mk.fuse(model, backend="cpu"):
        assert torch.equal(model(*given), mlp(*given))
    model, q = Function(F.scaled_dot_product_attention), torch.randn(B, 4, 0, 8)
    with mk.fuse(model, backend="cpu"):
        assert model(q, q, q).shape == q.shape


@pytest.mark.parametrize("gated", [False, True])
def test_dropout_in_training_is_left(gated: bool):
    def mlp(x, w1, w2):
        h = F.linear(x, w1)
        h = F.silu(h[..., : H // 2]) * h[..., H // 2 :] if gated else F.gelu(h, approximate="tanh")
        return F.linear(F.dropout(h, 0.3, True), w2[:, : h.shape[-1]])

    given, model = [each.detach() for each in inputs(**MLP).values()], Function(mlp)
    torch.manual_seed(0)
    eager = mlp(*given)
    with mk.fuse(model, backend="cpu") as fused:
        torch.manual_seed(0)
        assert torch.equal(model(*given), eager)
    assert reasons(fused.sites) == {"dropout stands between, in training"}


def test_float64_is_left():
    given = inputs(torch.float64, **ONE)
    model = Function(FOUND["layer"][1])
    with mk.fuse(model, backend="cpu") as fused:
        y = model(*given.values())
    assert any("float64" in each for each in reasons(fused.sites))
    assert torch.equal(y, FOUND["layer"][1](*given.values()))


@pytest.mark.parametrize(
    ("name", "norms"),
    [
        ("packed, with a norm of q and k", 0),
        ("a norm before the heads come first", 0),
        ("a norm of q alone", 1),
        ("norms of two kinds", 2),
        ("norms with a bias", 0),
        ("norms over other axes", 0),
        ("cross-attention with norms across heads", 0),
        ("norms across heads, with a bias", 0),
        ("a norm of one head, another across heads", 2),
    ],
)
def test_norms_of_q_and_k_go_into_the_op_where_it_has_them(name: str, norms: int):
    """What is left of them in the graph runs beside the op."""
    shapes, function, _ = FOUND[name]
    model, given = Function(function), [each.detach() for each in inputs(**shapes).values()]
    with mk.fuse(model, backend="cpu"):
        model(*given)
        with torch.profiler.profile() as profile:
            model(*given)
    names = [event.name for event in profile.events()]
    packed = name.startswith("packed")
    assert names.count("minisora::window_attention_fwd") == packed
    assert names.count("minisora::attention_fwd") == (not packed)
    assert sum(name in ("aten::native_layer_norm", "aten::rsqrt") for name in names) == norms
    assert "aten::stack" not in names
