"""patch_embed in Triton's interpreter: more than one tile in every direction, either kind of tile, any strides."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import on_triton

from bench.harness.shapes import on_device
from bench.ops.bench_patch_embed import SHAPES
from minisora_kernels import patch_embed
from minisora_kernels.testing import assert_as_accurate

pytestmark = on_triton
NAMES = ("x", "weight", "bias", "pos")
# batch, channels, size, patch, width: columns, tokens, elements and samples of one tile and of several
CASES = [
    (1, 1, (1, 1, 1), (1, 1, 1), 1),
    (3, 4, (3, 10, 14), (1, 2, 2), 7),
    (2, 3, (4, 6, 14), (2, 2, 2), 150),
    (2, 3, (1, 16, 48), (1, 8, 16), 33),
]


@pytest.fixture
def launcher():
    return importlib.import_module("minisora_kernels.triton.patch_embed")


@pytest.fixture(params=["tiles of whole patches", "tiles of elements"])
def tiles(request, launcher, monkeypatch):
    """Few programs, each with several samples or tiles of tokens; long and short patches on either forward."""
    monkeypatch.setattr(launcher, "PROGRAMS", 2)
    monkeypatch.setattr(launcher, "LARGE_PROGRAMS", 2)
    monkeypatch.setattr(launcher, "SHORT", 10**6 if request.param == "tiles of whole patches" else 0)


def tensors(case, dtype=torch.float32):
    """x, weight, bias, pos as leaves that need a gradient."""
    batch, channels, size, patch, width = case
    tokens = torch.Size(n // p for n, p in zip(size, patch, strict=True)).numel()
    fan_in = channels * torch.Size(patch).numel()
    values = [torch.randn(batch, channels, *size), torch.randn(width, channels, *patch) * fan_in**-0.5]
    values += [torch.randn(width), torch.randn(tokens, width)]
    return [value.to(dtype).requires_grad_() for value in values]


def incoming(y):
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(1), device="cpu").to(y.device)


def run(arguments, backend):
    """y and the gradients of all given tensors, for a fixed dy."""
    arguments = [None if a is None else a.detach().requires_grad_(a.requires_grad) for a in arguments]
    y = patch_embed(*arguments, backend=backend)
    y.backward(incoming(y).to(y.dtype))
    results = {"y": y.detach()}
    return results | {f"d{name}": a.grad for name, a in zip(NAMES, arguments, strict=True) if a is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(case, dtype, tiles, nan_filled):
    arguments = tensors(case, dtype)
    kernel, reference = run(arguments, "triton"), run(arguments, "reference")
    exact_arguments = [a.detach().double().requires_grad_() for a in arguments]
    exact_y = patch_embed(*exact_arguments, backend="reference")
    gradients = torch.autograd.grad(exact_y, exact_arguments, incoming(exact_y).to(dtype).double())
    exact = {"y": exact_y.detach()} | {f"d{name}": g for name, g in zip(NAMES, gradients, strict=True)}
    for name in exact:
        assert_as_accurate(name, kernel[name], reference[name], exact[name])


def test_is_a_convolution_with_kernel_equal_to_stride(tiles):
    x, weight, bias, pos = (a.detach() for a in tensors(CASES[2]))
    y = patch_embed(x, weight, bias, pos, backend="triton")
    convolved = F.conv3d(x, weight, bias, stride=CASES[2][3]).flatten(2).transpose(1, 2) + pos
    torch.testing.assert_close(y, convolved, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("given", [(), ("bias",), ("pos",)], ids=str)
def test_without_bias_or_position(given, tiles):
    x, weight, bias, pos = tensors(CASES[1])
    arguments = [x, weight, bias if "bias" in given else None, pos if "pos" in given else None]
    ours, theirs = run(arguments, "triton"), run(arguments, "reference")
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("needed", range(4))
def test_gradient_of_one_argument_alone(needed):
    arguments = tensors(CASES[1])
    everything = run(arguments, "triton")
    for i, argument in enumerate(arguments):
        argument.requires_grad_(i == needed)
    alone = run(arguments, "triton")
    for i, name in enumerate(NAMES):
        if i == needed:
            # torch sums the biases and positions alone, in another order
            tolerance = 1e-5 if i > 1 else 0
            torch.testing.assert_close(alone[f"d{name}"], everything[f"d{name}"], rtol=tolerance, atol=tolerance)
        else:
            assert alone[f"d{name}"] is None


@pytest.mark.parametrize(
    ("tokens", "position"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)], ids=str
)
def test_position_in_another_dtype(tokens, position):
    x, weight, bias, pos = tensors(CASES[1], tokens)
    pos = pos.detach().to(position).requires_grad_()
    ours, theirs = run([x, weight, bias, pos], "triton"), run([x, weight, bias, pos], "reference")
    assert ours["y"].dtype == tokens
    assert ours["dpos"].dtype == position
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=2e-2, atol=2e-2)


def test_reads_a_video_with_any_strides(tiles):
    _, weight, bias, pos = tensors((2, 4, (2, 6, 10), (1, 2, 2), 24))
    dense = torch.randn(2, 4, 2, 6, 10)
    views = {
        "channels last": dense.contiguous(memory_format=torch.channels_last_3d),
        "transposed": dense.transpose(3, 4).contiguous().transpose(3, 4),
        "expanded": dense[:1].expand(2, -1, -1, -1, -1),
        "every other frame": torch.randn(2, 4, 4, 6, 10)[:, :, ::2],
        "cropped": torch.randn(2, 4, 3, 9, 14)[:, :, 1:, 2:8, 3:13],
    }
    for name, view in views.items():
        ours = run([view.detach().requires_grad_(), weight, bias, pos], "triton")
        copy = view.clone(memory_format=torch.contiguous_format).requires_grad_()
        theirs = run([copy, weight, bias, pos], "triton")
        for key in ours:
            assert torch.equal(ours[key], theirs[key]), f"{name}: {key}"


@pytest.mark.parametrize("patch", [(1, 2, 2), (1, 16, 16)])
def test_keeps_the_video_and_the_weight_only(patch):
    """Whatever the length of a patch: none is gathered."""
    x, weight, bias, pos = tensors((1, 3, (1, 16, 32), patch, 16))
    saved = set()

    def pack(tensor):
        saved.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = patch_embed(x, weight, bias, pos, backend="triton")
    assert saved == {x.untyped_storage().data_ptr(), weight.untyped_storage().data_ptr()}
    assert type(y.grad_fn).__name__ == "_PatchEmbedBackward"


def test_pixels_are_read_three_times_by_programs_of_one_tile_each(launcher):
    """On a GPU the benches' 16x16 pixels take six waves of one program a multiprocessor, or more."""
    from minisora_kernels.triton._launch import signature
    from minisora_kernels.triton._tiles import PRODUCT

    (shape,) = (shape for shape in SHAPES if shape.patch == (1, 16, 16))
    shape = on_device(shape, torch.device("cuda"))
    x = torch.empty(shape.batch, shape.channels, *shape.size, dtype=torch.bfloat16, device="meta")
    weight = torch.empty(shape.width, shape.channels, *shape.patch, dtype=torch.bfloat16, device="meta")
    assert math.ceil(shape.width / launcher.columns_of(weight)) == 3
    launch, tokens = launcher._forward_plan(signature(x), signature(weight), None, None, "ieee", -1)
    tiles = shape.batch * math.ceil(tokens / PRODUCT[0].tokens) * 3
    assert launch._grid == (tiles,) and tiles >= 6 * 144


def test_launchers_name_what_is_not_contiguous():
    ops = torch.ops.minisora_triton
    x, weight, bias, pos = (a.detach() for a in tensors(CASES[1]))
    with pytest.raises(ValueError, match="pos must be contiguous"):
        ops.patch_embed_fwd(x, weight, bias, pos.t().contiguous().t())
    with pytest.raises(ValueError, match="dy must be contiguous"):
        ops.patch_embed_bwd(torch.randn(3, 7, 105).transpose(1, 2), x, *weight.shape[2:], None, None)
