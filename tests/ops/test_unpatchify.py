"""unpatchify: an exact copy, so every comparison is bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from minisora_kernels import backends, unpatchify
from minisora_kernels.ops.patch_embed import patches

UNAVAILABLE = backends.unavailable("cpu")
KERNELS = [pytest.param("cpu", marks=pytest.mark.skipif(UNAVAILABLE is not None, reason=str(UNAVAILABLE)))]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CASES = [
    ((1, 1, 1), (1, 1, 1), 1),
    ((3, 5, 7), (1, 2, 2), 4),
    ((2, 3, 17), (2, 2, 2), 8),
    ((5, 2, 3), (1, 4, 4), 3),
    ((1, 7, 5), (2, 3, 5), 2),
    ((5, 6, 7), (1, 1, 1), 8),
]


def tokens_for(grid, patch, channels, dtype=torch.float32, batch=2):
    torch.manual_seed(0)
    count, width = torch.Size(grid).numel(), torch.Size(patch).numel() * channels
    return torch.randn(batch, count, width).to(dtype)


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
@pytest.mark.parametrize(("grid", "patch", "channels"), CASES)
def test_every_element_lands_where_the_equation_says(grid, patch, channels, backend):
    tokens = tokens_for(grid, patch, channels)
    video = unpatchify(tokens, grid, patch, channels, backend=backend)
    expected = torch.empty_like(video)
    (_, height, width), (pt, ph, pw) = grid, patch
    for b, c, t, h, w in torch.cartesian_prod(*(torch.arange(n) for n in video.shape)).tolist():
        n = (t // pt * height + h // ph) * width + w // pw
        expected[b, c, t, h, w] = tokens[b, n, ((t % pt * ph + h % ph) * pw + w % pw) * channels + c]
    assert torch.equal(video, expected)
    assert video.is_contiguous()


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize(("grid", "patch", "channels"), CASES)
def test_kernel_copies_the_same_bits_as_the_reference(grid, patch, channels, batch, dtype, backend):
    results = []
    for chosen in ("reference", backend):
        tokens = tokens_for(grid, patch, channels, dtype, batch).requires_grad_()
        video = unpatchify(tokens, grid, patch, channels, backend=chosen)
        video.backward(torch.arange(video.numel()).reshape(video.shape).to(dtype))
        assert video.dtype == tokens.grad.dtype == dtype
        results.append((video.detach(), tokens.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_image_mode_is_one_frame(backend):
    tokens = tokens_for((5, 7), (2, 4), 3)
    image = unpatchify(tokens, (5, 7), (2, 4), 3, backend=backend)
    assert image.shape == (2, 3, 10, 28)
    assert torch.equal(image, unpatchify(tokens, (1, 5, 7), (1, 2, 4), 3, backend=backend)[:, :, 0])


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
@pytest.mark.parametrize(("grid", "patch", "channels"), CASES)
def test_inverts_the_gather_of_patch_embedding(grid, patch, channels, backend):
    torch.manual_seed(0)
    video = torch.randn(2, channels, *(n * p for n, p in zip(grid, patch, strict=True)))
    channels_last = patches(video, patch).unflatten(2, (channels, -1)).transpose(2, 3).flatten(2)
    assert torch.equal(unpatchify(channels_last, grid, patch, channels, backend=backend), video)


@pytest.mark.parametrize("backend", KERNELS)
def test_strided_and_expanded_tokens_and_gradients(backend):
    grid, patch, channels = (2, 3, 5), (1, 2, 2), 4
    whole = tokens_for(grid, patch, 2 * channels)
    for view in (whole[..., ::2], whole[:1, :, : 4 * channels].expand(3, -1, -1), whole[..., 1 : 1 + 4 * channels]):
        view = view.detach().requires_grad_()
        video = unpatchify(view, grid, patch, channels, backend=backend)
        assert torch.equal(video, unpatchify(view.detach().clone(), grid, patch, channels, backend="reference"))
        for gradient in (torch.ones(()).expand_as(video), torch.randn(*video.shape[::-1]).permute(4, 3, 2, 1, 0)):
            (ours,) = torch.autograd.grad(video, view, gradient, retain_graph=True)
            dense = gradient.contiguous()
            (theirs,) = torch.autograd.grad(unpatchify(view, grid, patch, channels, backend="reference"), view, dense)
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("backend", KERNELS)
def test_every_output_element_is_written(backend, nan_filled):
    grid, patch, channels = (3, 5, 7), (1, 2, 2), 3
    tokens = tokens_for(grid, patch, channels).requires_grad_()
    video = unpatchify(tokens, grid, patch, channels, backend=backend)
    video.backward(torch.ones_like(video))
    assert video.isfinite().all()
    assert torch.equal(tokens.grad, torch.ones_like(tokens))


@pytest.mark.parametrize("backend", KERNELS)
def test_float64_is_served_by_the_reference(backend):
    tokens = tokens_for((1, 2, 3), (1, 2, 2), 4, torch.float64)
    assert torch.autograd.gradcheck(lambda x: unpatchify(x, (1, 2, 3), (1, 2, 2), 4), tokens.requires_grad_())
    with pytest.raises(ValueError, match=r"unpatchify.*tokens has dtype torch.float64"):
        unpatchify(tokens, (1, 2, 3), (1, 2, 2), 4, backend=backend)


@pytest.mark.parametrize("backend", KERNELS)
def test_raw_ops_pass_opcheck(backend):
    tokens = tokens_for((2, 3, 5), (1, 2, 2), 4)
    torch.library.opcheck(torch.ops.minisora.unpatchify_fwd, (tokens, 2, 3, 5, 1, 2, 2, 4, False))
    torch.library.opcheck(torch.ops.minisora.unpatchify_bwd, (torch.randn(2, 4, 2, 6, 10), 1, 2, 2, True))


@pytest.mark.parametrize("backend", KERNELS)
def test_raw_ops_refuse_what_they_cannot_index(backend):
    fwd, bwd = torch.ops.minisora.unpatchify_fwd, torch.ops.minisora.unpatchify_bwd
    tokens = tokens_for((2, 3, 5), (1, 2, 2), 4)
    strided = torch.empty(2, 16, 30).transpose(1, 2)
    for bad in (tokens[:, 1:], tokens[..., 1:], tokens[0], tokens.double(), strided):
        with pytest.raises(RuntimeError, match="tokens"):
            fwd(bad, 2, 3, 5, 1, 2, 2, 4, False)
    with pytest.raises(RuntimeError, match="positive"):
        fwd(tokens, -2, -3, 5, 1, 2, 2, 4, False)
    with pytest.raises(RuntimeError, match="dvideo"):
        bwd(torch.randn(2, 4, 2, 7, 10), 1, 2, 2, False)
    with pytest.raises(RuntimeError, match="patch"):
        bwd(torch.randn(2, 4, 2, 6, 10), 1, 0, 2, False)


@pytest.mark.parametrize("backend", KERNELS)
def test_compiles_whole_and_once_for_all_lengths(backend):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def run(tokens, frames):
        return unpatchify(tokens, (frames, 3, 5), (1, 2, 2), 4, backend=backend).square().sum()

    for frames in (2, 3, 4, 7):
        tokens = tokens_for((frames, 3, 5), (1, 2, 2), 4).requires_grad_()
        run(tokens, frames).backward()
        torch.testing.assert_close(tokens.grad, 2 * tokens.detach())
    assert counter.frame_count == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 30, 16), (2, 3, 6), (1, 2, 2), 4), r"need \[B, 36, 16\]"),
        ((torch.zeros(2, 30, 16), (2, 3, 5), (1, 2, 2), 3), r"need \[B, 30, 12\]"),
        ((torch.zeros(30, 16), (2, 3, 5), (1, 2, 2), 4), r"tokens must be \[B, N, D\]"),
        ((torch.zeros(2, 30, 16), (2, 15), (1, 2, 2), 4), r"both must be \(T, H, W\)"),
        ((torch.zeros(2, 30, 16), (2, 3, 5), (1, -2, -2), 4), "positive"),
        ((torch.zeros(2, 30, 16), (2, 3, 5), (1, 2, 2), 0), "channels is 0"),
    ],
)
def test_arguments_that_do_not_fit_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        unpatchify(*arguments)


def test_tokens_of_integers_are_a_type_error():
    with pytest.raises(TypeError, match=r"tokens has dtype torch\.int64"):
        unpatchify(torch.zeros(2, 30, 16, dtype=torch.int64), (2, 3, 5), (1, 2, 2), 4)
