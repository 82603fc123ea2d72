"""patch_embed: against Conv3d and Conv2d, both routes of the cpu backend, odd sizes, layouts and threads."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

from minisora_kernels import backends, patch_embed
from minisora_kernels.ops import patch_embed as op
from minisora_kernels.testing import assert_as_accurate

UNAVAILABLE = backends.unavailable("cpu")
KERNELS = [pytest.param("cpu", marks=pytest.mark.skipif(UNAVAILABLE is not None, reason=str(UNAVAILABLE)))]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ("x", "weight", "bias", "pos")
# batch, channels, size, patch, width
CASES = [
    (1, 1, (1, 1, 1), (1, 1, 1), 1),
    (2, 4, (3, 10, 14), (1, 2, 2), 7),
    (3, 3, (4, 6, 14), (2, 2, 2), 100),
    (1, 8, (5, 4, 28), (1, 4, 4), 48),
    (2, 8, (3, 2, 7), (3, 2, 1), 1152),
    (2, 3, (1, 16, 64), (1, 8, 16), 33),
    (1, 3, (2, 12, 20), (2, 4, 5), 1),
]
# Enough work for several threads.
LARGER = [
    (2, 4, (5, 20, 28), (1, 2, 2), 100),
    (1, 4, (24, 32, 32), (1, 2, 2), 24),
    (2, 3, (2, 96, 96), (1, 16, 16), 48),
]


@pytest.fixture(params=["own products", "torch's products"])
def route(request, monkeypatch):
    """Every case on both routes of the cpu backend, whatever its length would choose."""
    chosen = op._PatchEmbed if request.param == "own products" else op._LongPatchEmbed
    monkeypatch.setattr(op, "_PatchEmbed", chosen)
    monkeypatch.setattr(op, "_LongPatchEmbed", chosen)


def tensors(case, dtype=torch.float32):
    """x, weight, bias, pos as leaves that need a gradient."""
    batch, channels, size, patch, width = case
    tokens = 1
    for n, p in zip(size, patch, strict=True):
        tokens *= n // p
    fan_in = channels * torch.Size(patch).numel()
    values = [torch.randn(batch, channels, *size), torch.randn(width, channels, *patch) * fan_in**-0.5]
    values += [torch.randn(width), torch.randn(tokens, width)]
    return [value.to(dtype).requires_grad_() for value in values]


def incoming(y):
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(1))


def run(arguments, backend):
    """y and the gradients of all given tensors, for a fixed dy."""
    arguments = [None if a is None else a.detach().requires_grad_(a.requires_grad) for a in arguments]
    y = patch_embed(*arguments, backend=backend)
    y.backward(incoming(y).to(y.dtype))
    results = {"y": y.detach()}
    return results | {f"d{name}": a.grad for name, a in zip(NAMES, arguments, strict=True) if a is not None}


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(case, dtype, backend, route, nan_filled):
    arguments = tensors(case, dtype)
    kernel, reference = run(arguments, backend), run(arguments, "reference")
    exact_arguments = [a.detach().double().requires_grad_() for a in arguments]
    exact_y = patch_embed(*exact_arguments, backend="reference")
    exact_gradients = torch.autograd.grad(exact_y, exact_arguments, incoming(exact_y).to(dtype).double())
    exact = {f"d{name}": gradient for name, gradient in zip(NAMES, exact_gradients, strict=True)}
    exact["y"] = exact_y.detach()
    for name in exact:
        assert_as_accurate(name, kernel[name], reference[name], exact[name])


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_is_a_convolution_with_kernel_equal_to_stride(case, backend, route):
    x, weight, bias, pos = tensors(case)
    y = patch_embed(x, weight, bias, pos, backend=backend)
    convolved = F.conv3d(x, weight, bias, stride=case[3]).flatten(2).transpose(1, 2) + pos
    torch.testing.assert_close(y, convolved, rtol=1e-5, atol=1e-5)
    assert y.is_contiguous()
    dy = torch.randn_like(y)
    ours, theirs = (torch.autograd.grad(out, (x, weight, bias, pos), dy) for out in (y, convolved))
    for name, a, b in zip(NAMES, ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_images_and_frames_with_a_conv2d_weight(backend, route):
    x, weight, bias = torch.randn(2, 3, 8, 12), torch.randn(24, 3, 2, 4), torch.randn(24)
    y = patch_embed(x, weight, bias, backend=backend)
    convolved = F.conv2d(x, weight, bias, stride=(2, 4)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(y, convolved, rtol=1e-5, atol=1e-5)
    video = torch.stack([x, 2 * x], dim=2)
    frames = patch_embed(video, weight, bias, torch.ones(1, 24, 24), backend=backend)
    expected = torch.cat([y, patch_embed(2 * x, weight, bias, backend=backend)], dim=1) + 1
    torch.testing.assert_close(frames, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("given", [(), ("bias",), ("pos",)], ids=str)
def test_without_bias_or_position(given, backend, route):
    x, weight, bias, pos = tensors(CASES[2])
    arguments = [x, weight, bias if "bias" in given else None, pos if "pos" in given else None]
    ours, theirs = run(arguments, backend), run(arguments, "reference")
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("needed", range(4))
def test_gradient_of_one_argument_alone(needed, backend, route):
    arguments = tensors(CASES[2])
    everything = run(arguments, backend)
    for i, argument in enumerate(arguments):
        argument.requires_grad_(i == needed)
    alone = run(arguments, backend)
    for i, name in enumerate(NAMES):
        if i == needed:
            # torch sums the biases and positions alone, in another order
            tolerance = 1e-5 if i > 1 else 0
            torch.testing.assert_close(alone[f"d{name}"], everything[f"d{name}"], rtol=tolerance, atol=tolerance)
        else:
            assert alone[f"d{name}"] is None


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize(
    ("tokens", "position"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)], ids=str
)
def test_position_in_another_dtype(tokens, position, backend, route):
    x, weight, bias, pos = tensors(CASES[3], tokens)
    pos = pos.detach().to(position).requires_grad_()
    ours, theirs = run([x, weight, bias, pos], backend), run([x, weight, bias, pos], "reference")
    assert ours["y"].dtype == tokens
    assert ours["dpos"].dtype == position
    for name in ours:
        tolerance = 2e-2 if torch.bfloat16 in (tokens, position) else 1e-5
        torch.testing.assert_close(ours[name], theirs[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", KERNELS)
def test_reads_a_video_with_any_strides(backend, route):
    _, weight, bias, pos = tensors((2, 4, (2, 6, 10), (1, 2, 2), 24))
    dense = torch.randn(2, 4, 2, 6, 10)
    views = {
        "channels last": dense.contiguous(memory_format=torch.channels_last_3d),
        "transposed": dense.transpose(3, 4).contiguous().transpose(3, 4),
        "expanded": dense[:1].expand(2, -1, -1, -1, -1),
        "every other frame": torch.randn(2, 4, 4, 6, 10)[:, :, ::2],
        "cropped": torch.randn(2, 4, 3, 9, 14)[:, :, 1:, 2:8, 3:13],
        "channels last weight": dense,
    }
    for name, view in views.items():
        kernel = weight.detach()
        if "weight" in name:
            kernel = kernel.contiguous(memory_format=torch.channels_last_3d)
        kernel.requires_grad_()
        ours = run([view.detach().requires_grad_(), kernel, bias, pos], backend)
        theirs = run([view.clone(memory_format=torch.contiguous_format).requires_grad_(), weight, bias, pos], backend)
        for key in ours:
            if ours[key] is not None:
                assert torch.equal(ours[key], theirs[key]), f"{name}: {key}"


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", LARGER, ids=str)
def test_own_products_have_the_same_bits_for_any_number_of_threads(case, dtype, backend, threads, monkeypatch):
    monkeypatch.setattr(op, "_LongPatchEmbed", op._PatchEmbed)
    arguments = tensors(case, dtype)
    results = []
    for count in (1, 2, 3, 1):
        torch.set_num_threads(count)
        results.append(run(arguments, backend))
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", LARGER, ids=str)
def test_torchs_products_have_the_same_bits_with_as_many_threads(case, dtype, backend, threads, monkeypatch):
    """What is the kernel's on that route, the gather and the scatter, has the same bits for any number of threads."""
    monkeypatch.setattr(op, "_PatchEmbed", op._LongPatchEmbed)
    arguments = tensors(case, dtype)
    x, patch = arguments[0].detach(), case[3]
    grid = [n // p for n, p in zip(case[2], patch, strict=True)]
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        first, again = run(arguments, backend), run(arguments, backend)
        for name, value in first.items():
            assert torch.equal(value, again[name]), f"{name}, {count} threads"
        gathered = torch.ops.minisora.patch_embed_gather(x, *patch)
        assert torch.equal(gathered.view(case[0], -1, gathered.shape[1]), op.patches(x, patch))
        assert torch.equal(torch.ops.minisora.patch_embed_scatter(gathered, *grid, *patch, case[1]), x)


@pytest.mark.parametrize("backend", KERNELS)
def test_an_empty_batch_has_zero_gradients(backend, route):
    arguments = tensors((0, 4, (2, 4, 4), (2, 2, 2), 8))
    results = run(arguments, backend)
    assert results["y"].shape == (0, 4, 8)
    assert results["dx"].shape == (0, 4, 2, 4, 4)
    for name in ("dweight", "dbias", "dpos"):
        assert torch.equal(results[name], torch.zeros_like(results[name]))


@pytest.mark.parametrize("backend", KERNELS)
def test_keeps_the_video_and_the_weight_only(backend, route):
    x, weight, bias, pos = tensors(CASES[2])
    saved = []

    def pack(tensor):
        saved.append(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        patch_embed(x, weight, bias, pos, backend=backend)
    assert set(saved) == {x.untyped_storage().data_ptr(), weight.untyped_storage().data_ptr()}


@pytest.mark.parametrize("backend", KERNELS)
def test_second_derivatives_are_refused(backend, route):
    x, *rest = tensors(CASES[2])
    (dx,) = torch.autograd.grad(patch_embed(x, *rest, backend=backend).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.skipif(UNAVAILABLE is not None, reason=str(UNAVAILABLE))
def test_a_long_patch_is_torchs_in_float32_and_where_torch_is_fast(monkeypatch):
    def node(dtype, width=48, patch=16):
        return type(
            patch_embed(torch.zeros(1, 3, 1, 32, 32, dtype=dtype), weight(dtype, width, patch)).grad_fn
        ).__name__

    def weight(dtype, width, patch):
        return torch.zeros(width, 3, 1, patch, patch, dtype=dtype, requires_grad=True)

    assert node(torch.float32) == "_LongPatchEmbedBackward"
    assert node(torch.float32, width=50) == "_PatchEmbedBackward"
    assert node(torch.float32, patch=2) == "_PatchEmbedBackward"
    for slow, name in ((True, "_PatchEmbedBackward"), (False, "_LongPatchEmbedBackward")):
        monkeypatch.setattr(op, "TORCH_IS_SLOW_IN_16_BIT", slow)
        assert node(torch.bfloat16) == name


@pytest.mark.parametrize("backend", KERNELS)
def test_raw_ops_pass_opcheck(backend):
    ops = torch.ops.minisora
    x, weight, bias, pos = (t.detach() for t in tensors(CASES[1]))
    dy = torch.randn(2, 3 * 5 * 7, 7)
    torch.library.opcheck(ops.patch_embed_fwd, (x, weight, bias, pos))
    torch.library.opcheck(ops.patch_embed_fwd, (x, weight, None, None))
    torch.library.opcheck(ops.patch_embed_bwd, (dy, x, *weight.shape[2:], torch.float32, torch.bfloat16))
    torch.library.opcheck(ops.patch_embed_bwd, (dy, x, *weight.shape[2:], None, None))
    torch.library.opcheck(ops.patch_embed_video, (dy, weight, 3, 5, 7))
    torch.library.opcheck(ops.patch_embed_gather, (x, 1, 2, 2))
    torch.library.opcheck(ops.patch_embed_scatter, (torch.randn(2 * 105, 16), 3, 5, 7, 1, 2, 2, 4))


@pytest.mark.parametrize("backend", KERNELS)
def test_scatter_undoes_gather(backend):
    x = torch.randn(2, 3, 4, 6, 10)
    gathered = torch.ops.minisora.patch_embed_gather(x, 2, 3, 5)
    assert torch.equal(gathered.view(2, 8, -1), op.patches(x, (2, 3, 5)))
    assert torch.equal(torch.ops.minisora.patch_embed_scatter(gathered, 2, 2, 2, 2, 3, 5, 3), x)


@pytest.mark.parametrize("backend", KERNELS)
def test_raw_ops_refuse_what_they_cannot_index(backend):
    ops = torch.ops.minisora
    x, weight, bias, pos = (t.detach() for t in tensors(CASES[1]))
    dy = torch.randn(2, 105, 7)
    for bad, message in [
        ((x[:, :3], weight, bias, pos), "weight must have size 3"),
        ((x[..., 1:], weight, bias, pos), "x must have size"),
        ((x.double(), weight, bias, pos), "x must be"),
        ((x, weight.transpose(3, 4), bias, pos), "weight must be contiguous"),
        ((x, weight, bias[1:], pos), "bias must have size 7"),
        ((x, weight, bias, pos[1:]), "pos must have size 105"),
        ((x, weight, bias, pos.t().contiguous().t()), "pos must be contiguous"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            ops.patch_embed_fwd(*bad)
    with pytest.raises(RuntimeError, match="dy must have size 105"):
        ops.patch_embed_bwd(dy[:, 1:].contiguous(), x, *weight.shape[2:], None, None)
    with pytest.raises(RuntimeError, match="dy must have size 105"):
        ops.patch_embed_video(dy[:, 1:].contiguous(), weight, 3, 5, 7)
    with pytest.raises(RuntimeError, match="positive"):
        ops.patch_embed_gather(x, 0, 2, 2)
    with pytest.raises(RuntimeError, match="patches must have size"):
        ops.patch_embed_scatter(torch.randn(211, 16), 3, 5, 7, 1, 2, 2, 4)


@pytest.mark.parametrize("backend", KERNELS)
def test_compiles_whole_and_once_for_all_lengths(backend, route):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def compiled(*arguments):
        return patch_embed(*arguments, backend=backend).square().sum()

    for frames in (2, 3, 5, 8):
        arguments = tensors((2, 4, (frames, 6, 10), (1, 2, 2), 16))
        ours = torch.autograd.grad(compiled(*arguments), arguments)
        theirs = torch.autograd.grad(patch_embed(*arguments, backend="reference").square().sum(), arguments)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)
    assert counter.frame_count == 2


@pytest.mark.parametrize(
    ("position", "value", "error", "message"),
    [
        (
            0,
            torch.zeros(2, 4, 3, 10, 13),
            ValueError,
            r"size of x \(3, 10, 13\).*not a multiple of the patch \(1, 2, 2\)",
        ),
        (0, torch.zeros(2, 4, 3, 0, 14), ValueError, "not a multiple"),
        (0, torch.zeros(2, 3, 3, 10, 14), ValueError, "x has 3 channels, weight takes 4"),
        (0, torch.zeros(2, 4, 10, 14), ValueError, r"x must be \[B, C, T, H, W\]"),
        (0, torch.zeros(2, 4, 3, 10, 14, dtype=torch.int64), TypeError, r"x has dtype torch\.int64"),
        (1, torch.zeros(7, 4, 2), ValueError, "weight must be Conv3d's"),
        (1, None, TypeError, "weight must be a tensor"),
        (2, torch.zeros(8), ValueError, r"bias has shape \(8,\).*D = 7"),
        (3, torch.zeros(104, 7), ValueError, r"pos has shape \(104, 7\).*N = 105"),
        (3, torch.zeros(2, 105, 7), ValueError, r"pos has shape \(2, 105, 7\)"),
        (3, torch.zeros(105, 7, dtype=torch.bool), TypeError, r"pos has dtype torch\.bool"),
    ],
)
def test_arguments_that_do_not_fit_are_named(position, value, error, message):
    arguments = tensors(CASES[1])
    arguments[position] = value
    with pytest.raises(error, match=message):
        patch_embed(*arguments)
