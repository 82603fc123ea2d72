"""What is special to window_attention's Triton kernels, in Triton's interpreter; its cases are run by test_ops.py."""

from __future__ import annotations

import importlib
import math
import os
import re
import subprocess
import sys
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch
from conftest import KERNEL_BACKENDS, on_triton
from test_window_attention import DTYPES, assert_kernel, gradients, leaves
from torch import Tensor
from window_library import on_the_library

from minisora_kernels import rope_3d, window_attention

pytestmark = on_triton
if "triton" in KERNEL_BACKENDS:
    from minisora_kernels.triton import _window_library as library
    from minisora_kernels.triton import _window_rows as rows
    from minisora_kernels.triton import window_attention as launchers

# every norm, weights of both shapes, both rotations
STYLES = (
    (None, 0, None),
    ("rms", 1, "interleaved"),
    ("layer", 2, "interleaved"),
    ("rms", 2, "half"),
    ("layer", 1, "half"),
    (None, 0, "half"),
)


def check(dtype, batch, grid, window, heads, head_dim, style=STYLES[0], biased=False):
    """Values and gradients by the tolerance rule."""
    norm, weights, convention = style
    rope = None if convention is None else rope_3d(grid, head_dim, interleaved=convention == "interleaved")

    def call(t, backend):
        names = {name: value for name, value in t.items() if name != "qkv"}
        return window_attention(t["qkv"], grid, window, qk_norm=norm, rope=rope, backend=backend, **names)

    assert_kernel(
        dtype, "triton", call, lambda dtype: leaves(dtype, batch, grid, window, heads, head_dim, weights, biased)
    )


# ---- the launcher's arithmetic


def windows_of(grid, window) -> set:
    """Every window as the set of its (place, token)."""
    found: dict = {}
    for n, at in enumerate(product(*map(range, grid))):
        place = 0
        for x, size in zip(at, window, strict=True):
            place = place * size + x % size
        found.setdefault(tuple(x // size for x, size in zip(at, window, strict=True)), set()).add((place, n))
    return set(map(frozenset, found.values()))


def test_windows_are_the_same_on_fewer_axes():
    for grid in product((1, 2, 3, 4), repeat=3):
        for window in product(*(range(1, size + 1) for size in grid)):
            box = rows.boxes(grid, window)
            found = [set() for _ in range(box.windows)]
            for at in product(*(range(size) for size, _, _ in reversed(box.axes))):
                index = place = token = 0
                for x, (size, stride, width) in zip(at, reversed(box.axes), strict=True):
                    index = index * -(-size // width) + x // width
                    place = place * width + x % width
                    token += x * stride
                found[index].add((place, token))
            assert set(map(frozenset, found)) == windows_of(grid, window), (grid, window)
            assert box.length == math.prod(window)


@pytest.mark.parametrize(
    ("grid", "window", "inner"),
    [
        ((16, 30, 53), (16, 1, 1), (1,)),
        ((16, 30, 53), (1, 30, 53), ()),
        ((16, 30, 53), (16, 30, 53), ()),
        ((16, 30, 53), (4, 30, 53), ()),
        ((16, 30, 53), (1, 1, 53), ()),
        ((16, 32, 32), (1, 16, 16), (16,)),
        ((17, 30, 53), (1, 16, 16), (1, 16)),
        ((5, 30, 53), (5, 8, 8), (8, 8)),
        ((5, 6, 7), (1, 1, 1), ()),
    ],
)
def test_what_is_compiled_anew_does_not_depend_on_lengths(grid, window, inner):
    assert rows.boxes(grid, window).inner == inner


def test_pieces_hold_every_channel_once():
    for cut, (first, end) in product(
        (partial(rows.narrow_pieces, width=16), partial(rows.narrow_pieces, width=32), rows.wide_pieces),
        product(range(0, 72, 4), range(4, 264, 4)),
    ):
        if first < end:
            parts = cut(first, end)
            held = [c for start, width, last in parts for c in range(start, min(start + width, last))]
            assert held == list(range(first, end))
            assert all(width >= 16 and width & (width - 1) == 0 for _, width, _ in parts)
    assert rows.wide_pieces(0, 72) == ((0, 64, 64), (64, 16, 72))
    assert [sum(width for _, width, _ in rows.wide_pieces(0, n)) for n in (64, 80, 96, 128)] == [64, 80, 96, 128]


# ---- values


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", (5, 16, 17, 32, 33, 64, 65))
def test_lengths_and_counts_that_fill_no_tile(length, dtype, nan_filled):
    check(dtype, 1, (length, 1, 5), (length, 1, 1), 2, 8, STYLES[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", (6, 66))
@pytest.mark.parametrize("head_dim", (64, 72, 80, 96, 128))
def test_head_dims(head_dim, length, dtype, nan_filled):
    check(dtype, 1, (length, 1, 2), (length, 1, 1), 1, head_dim, STYLES[1 if head_dim % 16 else 3])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grid", ((6, 1, 3), (66, 1, 1)), ids=("short", "long"))
@pytest.mark.parametrize("style", STYLES, ids=str)
def test_norms_weights_and_rotations(style, grid, dtype, nan_filled):
    check(dtype, 1, grid, (grid[0], 1, 1), 2, 24, style)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("style", STYLES[1:], ids=str)
def test_a_pass_of_its_own_for_norm_and_rotation(style, dtype, nan_filled, monkeypatch):
    monkeypatch.setattr(launchers, "PREPARE_FROM", 65)
    check(dtype, 2, (3, 8, 9), (1, 8, 9), 2, 24, style)


@pytest.mark.parametrize("style", STYLES, ids=str)
def test_flash_attention_takes_long_windows_without_a_bias(style, nan_filled, monkeypatch):
    calls = on_the_library(library, monkeypatch)
    monkeypatch.setattr(launchers, "PREPARE_FROM", 65)
    check(torch.bfloat16, 2, (3, 8, 9), (1, 8, 9), 2, 24, style)
    assert calls == ["forward", "backward"]
    check(torch.bfloat16, 1, (2, 8, 9), (1, 8, 9), 1, 8, biased=True)
    check(torch.bfloat16, 1, (1, 10, 9), (1, 8, 9), 1, 8)
    check(torch.float32, 1, (2, 8, 9), (1, 8, 9), 1, 8)
    monkeypatch.setattr(launchers, "PREPARE_FROM", 72)
    check(torch.bfloat16, 1, (1, 8, 9), (1, 8, 9), 1, 8, STYLES[1])
    monkeypatch.setattr(library, "MOST_WINDOWS", 1)
    check(torch.bfloat16, 1, (2, 8, 9), (1, 8, 9), 1, 8)
    assert len(calls) == 2


@pytest.mark.parametrize("mode", (0, 1, 2))
def test_flash_attention_leaves_torch_as_it_was(mode, monkeypatch):
    """Its backward asks for the same bits on every run, which is a mode of all of torch."""
    calls = on_the_library(library, monkeypatch)
    saved = [torch.randn(1, 65, 1, 8, dtype=torch.bfloat16) for _ in range(5)]
    seen = []
    monkeypatch.setattr(library, "_backward", lambda *call: seen.append(torch.get_deterministic_debug_mode()) or 1 / 0)
    before = torch.get_deterministic_debug_mode()
    try:
        torch.set_deterministic_debug_mode(mode)
        with pytest.raises(ZeroDivisionError):
            library.backward(*saved, torch.ones(1, 65, 1, 2), 1.0)
        assert (seen, torch.get_deterministic_debug_mode()) == ([2], mode) and calls == []
        assert torch.utils.deterministic.fill_uninitialized_memory
    finally:
        torch.set_deterministic_debug_mode(before)


def test_flash_attention_has_the_signature_that_is_called():
    """On tensors without memory: torch's own shapes of its GPU kernels."""
    q, k, v = torch.empty(2, 65, 3, 4, 72, dtype=torch.bfloat16, device="meta").unbind(2)
    out, softmax = library.forward(q, k, v, 0.1)
    assert (out.shape, softmax.shape) == (q.shape, (2, 65, 4, 2))
    for grad in library.backward(out, q, k, v, out, softmax, 0.1):
        assert grad.shape == q.shape and grad.is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("grid", "window"),
    [((3, 5, 4), (2, 3, 3)), ((1, 13, 14), (1, 9, 10)), ((3, 5, 9), (2, 5, 7))],
    ids=("short", "long", "of-two-axes"),
)
def test_windows_cut_off_at_the_edge_with_a_bias(grid, window, dtype, nan_filled):
    check(dtype, 2, grid, window, 2, 8, STYLES[4], biased=True)


@pytest.mark.parametrize("grid", ((4, 1, 9), (66, 1, 3)), ids=("short", "long"))
def test_sums_of_gradients_in_several_parts(grid, monkeypatch, nan_filled):
    """Chunks of tiles and windows, several to a program; heads of 24, for the error of 8 numbers is luck."""
    for name in ("BIAS_PROGRAMS", "LONG_BIAS_PROGRAMS", "WEIGHT_PROGRAMS"):
        monkeypatch.setattr(launchers, name, 18)
    for style, biased in ((STYLES[1], False), (STYLES[2], False), (STYLES[1], True)):
        check(torch.float32, 1, grid, (grid[0], 1, 1), 1, 24, style, biased)


@pytest.mark.parametrize("device", ("cpu", "meta"))
def test_heads_too_wide_for_shared_memory_are_refused_by_their_shape(device):
    table = importlib.import_module("minisora_kernels.ops.window_attention").BACKENDS
    for head_dim, refused in ((128, False), (136, True), (256, True)):
        qkv = torch.empty(1, 2, 3, 1, head_dim, device=device)
        reason = table["triton"](qkv, None, None, None)
        assert (reason is not None) == refused
        assert not refused or f"head_dim is {head_dim}" in reason
        assert table["cpu"](qkv, None, None, None) is None
    if device == "cpu":
        for function in (window_attention, torch.compile(window_attention, backend="eager")):
            with pytest.raises(Exception, match="head_dim is 256; Triton's kernels take heads of up to 128"):
                function(torch.empty(1, 2, 3, 1, 256), (2, 1, 1), (2, 1, 1), backend="triton")


# ---- windows do not see each other


@pytest.mark.parametrize("bad", (math.nan, math.inf))
@pytest.mark.parametrize("part", ("q", "k", "v", "dout"))
@pytest.mark.parametrize("length", (5, 16, 66))
def test_what_is_not_finite_stays_in_its_window(length, part, bad):
    grid, window = (length, 1, 4), (length, 1, 1)
    clean = leaves(torch.bfloat16, 1, grid, window, 2, 24)["qkv"].detach()
    dout = torch.randn(1, 4 * length, 48).bfloat16()
    dirty, dirty_dout = clean.clone(), dout.clone()
    if part == "dout":
        dirty_dout[0, 4 * 3 + 1, 30] = bad  # token 3 of window 1, head 1
    else:
        dirty[0, 4 * 3 + 1, "qkv".index(part), 1, 6] = bad

    def run(qkv: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
        qkv = qkv.clone().requires_grad_()
        out = window_attention(qkv, grid, window, qk_norm="rms" if part == "k" else None, backend="triton")
        out.backward(dout)
        assert qkv.grad is not None
        return out.detach().view(1, length, 4, 2, 24), qkv.grad.view(1, length, 4, 3, 2, 24)

    (out, dqkv), (dirty_out, dirty_dqkv) = run(clean, dout), run(dirty, dirty_dout)
    others = [0, 2, 3]
    assert torch.equal(dirty_out[:, :, others], out[:, :, others])
    assert torch.equal(dirty_dqkv[:, :, others], dqkv[:, :, others])
    assert torch.equal(dirty_out[:, :, 1, 0], out[:, :, 1, 0]) and torch.equal(
        dirty_dqkv[:, :, 1, :, 0], dqkv[:, :, 1, :, 0]
    )
    assert not dirty_dqkv[:, :, 1, :, 1].isfinite().all()
    assert part == "dout" or not dirty_out[:, :, 1, 1].isfinite().all()


@pytest.mark.parametrize(("grid", "window"), [((1, 5, 5), (1, 4, 4)), ((1, 9, 15), (1, 8, 14))], ids=("short", "long"))
def test_a_nan_stays_in_a_window_at_the_edge(grid, window):
    """Empty places of a window that is cut off are zeros to the others, and get nothing."""
    tensors = leaves(torch.float32, 1, grid, window, 1, 8, biased=True)
    qkv = tensors["qkv"].detach().clone()
    qkv[0, -1] = math.nan
    qkv.requires_grad_()
    out = window_attention(qkv, grid, window, bias=tensors["bias"].detach(), backend="triton")
    out.sum().backward()
    assert qkv.grad is not None
    last = qkv.grad[0].isnan().flatten(1).any(1)
    assert (
        out[0].isnan().any(1).nonzero().flatten().tolist() == [math.prod(grid) - 1] == last.nonzero().flatten().tolist()
    )


@pytest.mark.parametrize("grid", ((5, 1, 7), (66, 1, 3)), ids=("short", "long"))
def test_same_bits_when_repeated(grid):
    tensors = leaves(torch.bfloat16, 2, grid, (grid[0], 1, 1), 2, 24, weights=2, biased=True)
    results = [
        gradients(
            window_attention(**tensors, grid=grid, window=(grid[0], 1, 1), qk_norm="layer", backend="triton"), tensors
        )
        for _ in range(2)
    ]
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name


# ---- what the compiler is given


@pytest.mark.parametrize("length", (16, 600))
def test_offsets_of_rows_are_64_bit(length, tmp_path):
    """In the intermediate code, a tensor of 32-bit offsets is added to a pointer only where it is made of constants."""
    script = Path(__file__).parent / "triton_ttir.py"
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    environment["PYTHONPATH"] = str(script.parents[2])
    done = subprocess.run(
        [sys.executable, str(script), str(length)], env=environment, capture_output=True, text=True, check=True
    )
    functions = done.stdout.split("tt.func")[1:]
    assert len(functions) >= 2
    checked = 0
    for text in functions:
        made: dict[str, str] = {}  # a name may come again in a region beside, so the last one above a line counts
        for line in text.splitlines():
            if offset := re.search(r"tt\.addptr %[\w.#]+, (%[\w.#]+) : tensor<.*>, tensor<[\dx]*i32>", line):
                queue = [offset[1]]
                while queue:
                    name = queue.pop()
                    assert name in made and "tt.get_program_id" not in made[name], f"{offset[1]} follows from {name}"
                    queue += re.findall(r"%[\w.#]+", made[name])
                checked += 1
            made.update(re.findall(r"(%[\w.#]+)(?::\d+)? = (.*)", line))
    assert checked
