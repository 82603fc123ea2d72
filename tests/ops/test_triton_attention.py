"""What is special to Triton's kernels of attention and norm_rope; the rest is in their own files."""

from __future__ import annotations

import pytest
import torch
from conftest import KERNEL_BACKENDS, on_triton
from test_triton import keys_of

from minisora_kernels import attention, norm_rope, rope_3d

pytestmark = on_triton
if "triton" in KERNEL_BACKENDS:
    from minisora_kernels.triton import _launch as launch
    from minisora_kernels.triton import norm_rope as rows


def call(batch: int, tokens: int, keys: int, heads: int, head_dim: int, order: tuple[int, ...] = (0, 1, 2, 3)) -> None:
    """Forward and backward of attention, with a norm across heads and lengths; ``order`` is that of axes in memory."""

    def random(count: int) -> torch.Tensor:
        shape = (batch, count, heads, head_dim)
        inverse = sorted(range(4), key=order.__getitem__)
        return torch.randn([shape[axis] for axis in order]).permute(inverse).bfloat16().requires_grad_()

    lengths = torch.tensor([keys - b for b in range(batch)])
    weight = torch.ones(heads, head_dim, requires_grad=True)
    attention(
        *(random(count) for count in (tokens, keys, keys)), lengths=lengths, qk_norm="rms", q_weight=weight,
        k_weight=weight, across_heads=True, backend="triton",
    ).sum().backward()  # fmt: skip


@pytest.mark.parametrize(("heads", "head_dim"), [(2, 16), (3, 72), (1, 8)])
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3)], ids=("tokens first", "heads first"))
def test_no_length_and_no_batch_compiles_a_kernel_anew(order, heads, head_dim, launches):
    keys = []
    for batch, tokens, others in ((2, 16, 21), (3, 5, 70), (2, 50, 9)):
        launches.clear()
        call(batch, tokens, others, heads, head_dim, order)
        # The second stage of sums takes as many rows at a time as there are partial sums, up to 128.
        keys.append([key for key in keys_of(launches) if key[0] != "_sum_parts"])
    assert len(keys[0]) == 3 + 2 + 2 + 2  # two norms and the forward; the norms again, the backward, and theirs
    for other in keys[1:]:
        assert other == keys[0]


def test_strides_have_a_unit_that_says_how_rows_are_aligned():
    def like(*shape: int) -> launch.Like:
        return launch.Like._make(launch.signature(torch.empty(*shape)))

    assert launch.strides_of(x=like(2, 5, 3, 72)) == (8, (5 * 27, 27, 9))
    assert launch.strides_of(x=like(2, 5, 3, 64)) == (16, (60, 12, 4))
    assert launch.strides_of(x=like(2, 5, 3, 10)) == (2, (75, 15, 5))
    assert launch.strides_of(q=like(2, 5, 3, 8), k=like(2, 1, 3, 8)).steps == (15, 3, 1, 3, 0, 1)
    assert launch.strides_of(q=like(1, 1, 1, 24)) == (16, (0, 0, 0))
    with pytest.raises(ValueError, match="x must have stride 1 over head_dim"):
        launch.strides_of(x=launch.Like._make(launch.signature(torch.empty(2, 3, 8, 4).mT)))


def test_sums_of_gradients_in_several_runs(monkeypatch):
    """Runs of one tile, which is several tokens, and of several tiles: the same sums, in another order."""
    x = torch.randn(1, 300, 2, 8)
    results = []
    for shortest, longest in ((1, 1), (64, 64), (150, 300)):
        monkeypatch.setattr(rows, "MIN_RUN", shortest)
        monkeypatch.setattr(rows, "MAX_RUN", longest)
        launch.forget_plans()
        weight, bias = torch.ones(2, 8, requires_grad=True), torch.ones(8, requires_grad=True)
        out = norm_rope(x, norm="layer", weight=weight, bias=bias, rope=rope_3d((1, 1, 300), 8), backend="triton")
        out.square().sum().backward()
        results.append((weight.grad, bias.grad))
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-4)


def test_the_raw_ops_take_no_other_layouts():
    forward = torch.ops.minisora_triton.attention_fwd
    q, k = torch.randn(2, 5, 3, 8), torch.randn(2, 4, 3, 8)
    with pytest.raises(ValueError, match="k must have stride 1 over head_dim"):
        forward(q, torch.randn(2, 4, 8, 3).mT, k, None, None, 1.0)
    with pytest.raises(ValueError, match="lengths must be int64"):
        forward(q, k, k, torch.tensor([4, 2], dtype=torch.int32), None, 1.0)
    with pytest.raises(ValueError, match="index must be contiguous"):
        forward(q, k, k, None, torch.arange(4).repeat_interleave(2).view(4, 2).t(), 1.0)
    out, softmax = forward(q, k, k, None, None, 1.0)
    with pytest.raises(ValueError, match="dout must be contiguous"):
        torch.ops.minisora_triton.attention_bwd(
            out.transpose(0, 1).contiguous().transpose(0, 1), q, k, k, out, softmax, None, None, 1.0, *(True,) * 3
        )
