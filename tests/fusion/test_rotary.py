"""Rotary embedding before attention: each way to write it goes into the op, and nothing else does."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fusion_parts import Function, check, counts
from torch import Tensor, nn

import minisora_kernels as mk

pytestmark = pytest.mark.usefixtures("nothing_compiled")

B, HEADS, N, WIDTH, TEXT = 2, 3, 20, 16, 5

Turn = Callable[..., Tensor]


def made(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 31 * sum(shape))
    return torch.randn(shape, generator=generator).to(dtype).requires_grad_()


def angles(rows: int = N, columns: int = WIDTH // 2) -> Tensor:
    return torch.linspace(-3, 3, rows * columns).reshape(rows, columns)


def repeated(rows: int = N) -> tuple[Tensor, Tensor]:
    both = angles(rows).repeat_interleave(2, dim=-1)
    return both.cos(), both.sin()


def apart(*sizes: int, rows: int = N, halves: bool = False) -> tuple[Tensor, Tensor]:
    """Tables that differ along more axes."""
    table = torch.linspace(-3, 3, math.prod(sizes) * rows * WIDTH // 2).view(*sizes, rows, WIDTH // 2)
    table = torch.cat([table] * 2, dim=-1) if halves else table.repeat_interleave(2, dim=-1)
    return table.cos(), table.sin()


def twice(rows: int = N) -> tuple[Tensor, Tensor]:
    both = torch.cat([angles(rows)] * 2, dim=-1)
    return both.cos(), both.sin()


def stacked_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    real, imaginary = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    turned = torch.stack([-imaginary, real], dim=-1).flatten(-2)
    return (x.float() * cos + turned.float() * sin).to(x.dtype)


def swapped_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


def sliced_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    cos, sin = cos[..., :half], sin[..., :half]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


def written_slices(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    out = torch.empty_like(x)
    out[..., 0::2] = even * cos - odd * sin
    out[..., 1::2] = even * sin + odd * cos
    return out.type_as(x)


def matrices(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = cos[..., ::2], sin[..., ::2]
    rotation = torch.stack([cos, -sin, sin, cos], dim=-1)
    rotation = rotation.view(*rotation.shape[:-1], 2, 2)
    pairs = x.reshape(*x.shape[:-1], -1, 1, 2)
    return (rotation * pairs).sum(dim=-1).reshape(x.shape).to(x.dtype)


def some_channels(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned, rest = x.split([8, WIDTH - 8], dim=-1)
    return torch.cat([stacked_pairs(turned, cos[..., :8], sin[..., :8]), rest], dim=-1)


def backwards(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return stacked_pairs(x, cos, -sin)


def in_place_after_text(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x = x * 1.5
    x[:, :, TEXT:] = stacked_pairs(x[:, :, TEXT:], cos[TEXT:], sin[TEXT:])
    return x


def before_text(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    video = stacked_pairs(x[:, :, :-TEXT], cos[TEXT:], sin[TEXT:])
    return torch.cat([video, x[:, :, -TEXT:]], dim=2)


def twice_turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return stacked_pairs(stacked_pairs(x, cos, sin), cos, sin)


def repeated_tables(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = (table[None].repeat(x.shape[0], 1, 1).unsqueeze(1) for table in (cos, sin))
    return stacked_pairs(x, cos, sin)


WRITTEN = {
    "stacked pairs": (stacked_pairs, repeated),
    "swapped halves": (swapped_halves, twice),
    "sliced halves": (sliced_halves, twice),
    "written slices": (written_slices, repeated),
    "matrices": (matrices, repeated),
    "some channels": (some_channels, repeated),
    "backwards": (backwards, repeated),
    "in place after text": (in_place_after_text, repeated),
    "before text": (before_text, repeated),
    "twice, of which the first stays": (twice_turned, repeated),
    "a table repeated for each sample": (repeated_tables, repeated),
    "one row for all tokens": (stacked_pairs, lambda: repeated(1)),
    "a table per sample": (stacked_pairs, lambda: apart(B, 1)),
    "a table per head": (stacked_pairs, lambda: apart(HEADS)),
    "a table per sample and head": (swapped_halves, lambda: apart(B, HEADS, halves=True)),
    "a row per head for all tokens": (stacked_pairs, lambda: apart(HEADS, rows=1)),
}


def qkv(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {name: made(B, HEADS, N, WIDTH, dtype=dtype, seed=i) for i, name in enumerate("qkv")}


def attend(turn: Turn, norm: Callable[[Tensor], Tensor] = lambda x: x) -> nn.Module:
    def forward(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(turn(norm(q), cos, sin), turn(norm(k), cos, sin), v)

    return Function(forward)


def rms(x: Tensor) -> Tensor:
    return F.rms_norm(x, (WIDTH,), None, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", WRITTEN)
def test_rotations_go_into_attention(name: str, dtype: torch.dtype, ropes: list[Any]) -> None:
    turn, tables = WRITTEN[name]
    cos, sin = tables()
    fused = check(attend(turn), qkv(dtype) | dict(cos=cos, sin=sin), draws=2)
    assert counts(fused.sites) == {"attention": 1}
    assert ropes and all(rope is not None for rope, _ in ropes)


@pytest.mark.parametrize("name", ["stacked pairs", "swapped halves", "written slices", "matrices"])
def test_norms_before_a_rotation_go_along(name: str, ropes: list[Any]) -> None:
    turn, tables = WRITTEN[name]
    cos, sin = tables()
    check(attend(turn, rms), qkv() | dict(cos=cos, sin=sin))
    assert ropes and all(rope is not None and norm == "rms" for rope, norm in ropes)


def test_a_rotation_before_the_heads_move_reads_one_linear(ropes: list[Any]) -> None:
    cos, sin = (table[:, None] for table in repeated())

    def forward(x: Tensor, w: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = F.linear(x, w).view(B, N, 3, HEADS, WIDTH).unbind(2)
        q, k = (stacked_pairs(rms(part), cos, sin) for part in (q, k))
        return F.scaled_dot_product_attention(*(part.transpose(1, 2) for part in (q, k, v)))

    inputs = dict(x=made(B, N, 24), w=made(3 * HEADS * WIDTH, 24), cos=cos, sin=sin)
    check(Function(forward), inputs)
    assert ropes and all(rope is not None and norm == "rms" for rope, norm in ropes)
    with mk.fuse(model := Function(forward), backend="cpu"):
        model(*inputs.values())
        with torch.profiler.profile() as profile:
            model(*inputs.values())
    names = [event.name for event in profile.events()]
    assert "aten::stack" not in names and "aten::neg" not in names


@pytest.mark.parametrize("samples", [1, B])
@pytest.mark.parametrize("normed", [False, True])
def test_a_rotation_of_all_heads_together(samples: int, normed: bool, ropes: list[Any]) -> None:
    """As LTX has it: pairs are neighbours, so none is of two heads."""
    width = HEADS * WIDTH
    table = torch.linspace(-3, 3, samples * N * width // 2).view(samples, N, width // 2).repeat_interleave(2, dim=-1)

    def forward(q: Tensor, k: Tensor, v: Tensor, w: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if normed:
            q, k = (F.rms_norm(x, (width,), w, 1e-6) for x in (q, k))
        q, k = stacked_pairs(q, cos, sin), stacked_pairs(k, cos, sin)
        return F.scaled_dot_product_attention(*(x.unflatten(-1, (HEADS, WIDTH)).transpose(1, 2) for x in (q, k, v)))

    given = {name: made(B, N, width, seed=i) for i, name in enumerate("qkv")} | dict(w=made(width))
    if not normed:
        given["w"].requires_grad_(False)
    check(Function(forward), given | dict(cos=table.cos(), sin=table.sin()))
    assert ropes and all(rope is not None and norm == ("rms" if normed else None) for rope, norm in ropes)


def test_halves_of_all_heads_together_stay(ropes: list[Any]) -> None:
    width = HEADS * WIDTH
    table = torch.cat([torch.linspace(-3, 3, N * width // 2).view(N, width // 2)] * 2, dim=-1)

    def forward(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k = swapped_halves(q, cos, sin), swapped_halves(k, cos, sin)
        return F.scaled_dot_product_attention(*(x.unflatten(-1, (HEADS, WIDTH)).transpose(1, 2) for x in (q, k, v)))

    given = {name: made(B, N, width, seed=i) for i, name in enumerate("qkv")}
    check(Function(forward), given | dict(cos=table.cos(), sin=table.sin()))
    assert ropes and all(rope is None for rope, _ in ropes)


def test_tables_made_in_the_model_are_known_to_be_pairs() -> None:
    def forward(q: Tensor, k: Tensor, v: Tensor, turns: Tensor) -> Tensor:
        both = torch.cat([turns, turns], dim=-1).float()
        cos, sin = both.cos()[None, None], both.sin()[None, None]
        return F.scaled_dot_product_attention(swapped_halves(q, cos, sin), swapped_halves(k, cos, sin), v)

    inputs = qkv() | dict(turns=angles())
    exact = Function(forward)(*inputs.values())
    compiled = torch.compile(model := Function(forward), backend=(compiler := mk.compiler("aot_eager", backend="cpu")))
    torch.testing.assert_close(compiled(*inputs.values()), exact, rtol=1e-4, atol=1e-5)
    assert counts(compiler.sites) == {"attention": 1} and model is not compiled


def test_pairs_that_turn_by_tables_of_their_own_are_computed_so(ropes: list[Any]) -> None:
    cos, sin = repeated()
    cos[3, 4] = 2.0  # its partner, 5, has another factor
    check(attend(stacked_pairs, rms), qkv() | dict(cos=cos, sin=sin))
    assert ropes and all(rope is None for rope, _ in ropes)


def test_each_call_looks_at_its_tables(ropes: list[Any]) -> None:
    model, inputs, (cos, sin) = attend(stacked_pairs), qkv(), repeated()
    other = torch.rand(N, WIDTH)
    with mk.fuse(model, backend="cpu"):
        for tables in ((cos, sin), (other, sin), (cos, sin)):
            found = model(*inputs.values(), *tables)
            with mk.use_backend("reference"):
                exact = model.function(*inputs.values(), *tables)
            torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-5)
    assert [rope is not None for rope, _ in ropes] == [True, False, True]


def thirds(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    parts = [swapped_halves(part, cos[..., :4], sin[..., :4]) for part in x.split(4, dim=-1)]
    return torch.cat(parts, dim=-1)


def mirrored(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    real, imaginary = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    return x * cos + torch.stack([imaginary, real], dim=-1).flatten(-2) * sin  # no rotation: one sign is another


def swapped(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.cat(x.chunk(2, dim=-1)[::-1], dim=-1)  # a turn, without a table


def squared(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return stacked_pairs(x, cos, sin) * x


def read_again(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x = x * 1.5
    part = x[:, :, TEXT:]
    x[:, :, TEXT:] = stacked_pairs(part, cos[TEXT:], sin[TEXT:])
    return x + 0 * part.sum()


LEFT = {
    "parts of a head": (thirds, repeated),
    "swapped": (swapped, repeated),
    "squared": (squared, repeated),
    "a view read after the write": (read_again, repeated),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_no_rotation_stays(name: str, ropes: list[Any]) -> None:
    turn, tables = LEFT[name]
    cos, sin = tables()
    check(attend(turn), qkv() | dict(cos=cos, sin=sin))
    assert all(rope is None for rope, _ in ropes)


def test_other_signs_are_computed_as_they_are(ropes: list[Any]) -> None:
    check(attend(mirrored), qkv() | dict(zip(("cos", "sin"), repeated(), strict=True)))
    assert all(rope is None for rope, _ in ropes)


def test_tables_that_learn_stay(ropes: list[Any]) -> None:
    cos, sin = (table.requires_grad_() for table in repeated())
    check(attend(stacked_pairs), qkv() | dict(cos=cos, sin=sin))
    assert ropes and all(rope is None for rope, _ in ropes)


def test_queries_and_keys_that_turn_apart_stay(ropes: list[Any]) -> None:
    def forward(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(stacked_pairs(q, cos, sin), backwards(k, cos, sin), v)

    check(Function(forward), qkv() | dict(zip(("cos", "sin"), repeated(), strict=True)))
    assert ropes and all(rope is None for rope, _ in ropes)


def test_what_was_written_in_place_and_is_read_elsewhere_stays(ropes: list[Any]) -> None:
    def forward(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k = in_place_after_text(q, cos, sin), in_place_after_text(k, cos, sin)
        return F.scaled_dot_product_attention(q, k, v) + q

    check(Function(forward), qkv() | dict(zip(("cos", "sin"), repeated(), strict=True)))
    assert all(rope is None for rope, _ in ropes)


def test_other_sizes_need_no_other_graph_for_tables(ropes: list[Any]) -> None:
    model = attend(swapped_halves, rms)
    with mk.fuse(model, backend="cpu") as fused:
        for tokens in (7, 12, 30):
            inputs = [made(B, HEADS, tokens, WIDTH, seed=i) for i in range(3)]
            tables = twice(tokens)
            torch.testing.assert_close(model(*inputs, *tables), model.function(*inputs, *tables), rtol=1e-4, atol=1e-5)
    assert all(rope is not None for rope, _ in ropes)
    assert "2 graphs" in fused.report()


def test_tables_that_change_between_are_two(ropes: list[Any]) -> None:
    def forward(q: Tensor, k: Tensor, v: Tensor, turns: Tensor) -> Tensor:
        turns = turns * 1.0
        first = turns.repeat_interleave(2, dim=-1)
        cos, sin = first.cos(), first.sin()
        turns.view(-1).mul_(2.0)
        second = turns.repeat_interleave(2, dim=-1)
        q, k = stacked_pairs(q, cos, sin), stacked_pairs(k, second.cos(), second.sin())
        return F.scaled_dot_product_attention(q, k, v)

    check(Function(forward), qkv() | dict(turns=angles()))
    assert ropes and all(rope is None for rope, _ in ropes)


def test_a_rotation_under_another_autocast_stays_and_attention_is_found(ropes: list[Any]) -> None:
    def forward(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            q, k = stacked_pairs(rms(q), cos, sin), stacked_pairs(rms(k), cos, sin)
        return F.scaled_dot_product_attention(q, k, v)

    fused = check(Function(forward), qkv() | dict(zip(("cos", "sin"), repeated(), strict=True)))
    assert counts(fused.sites) == {"attention": 1} and ropes == [(None, None)] * len(ropes)


def test_some_of_the_turned_tokens_are_some_of_them(ropes: list[Any]) -> None:
    def forward(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k = (stacked_pairs(x, cos, sin)[:, :, TEXT:] for x in (q, k))
        return F.scaled_dot_product_attention(q, k, v[:, :, TEXT:])

    check(Function(forward), qkv() | dict(zip(("cos", "sin"), repeated(), strict=True)))
    assert ropes and all(rope is None for rope, _ in ropes)


def halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def into_empty(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x[..., 0::2], x[..., 1::2]
    out = torch.empty_like(x)
    out[..., 0::2], out[..., 1::2] = even * cos - odd * sin, even * sin + odd * cos
    return out


def sign_written_into_a_table(q: Tensor, k: Tensor, v: Tensor, turns: Tensor) -> Tensor:
    both = torch.cat([turns, turns], dim=-1)
    cos, sin = both.cos(), both.sin()
    sin[..., : WIDTH // 2] *= -1
    q, k = (x * cos + torch.cat(x.chunk(2, dim=-1)[::-1], dim=-1) * sin for x in (q, k))
    return F.scaled_dot_product_attention(q, k, v)


def rest_of_a_table_overwritten(q: Tensor, k: Tensor, v: Tensor, turns: Tensor) -> Tensor:
    both = torch.cat([turns, turns], dim=-1)
    cos, sin = both.cos(), both.sin()
    cos[..., 5:], sin[..., 5:] = 1, 0
    return F.scaled_dot_product_attention(swapped_halves(q, cos, sin), swapped_halves(k, cos, sin), v)


def table_scaled_for_keys(q: Tensor, k: Tensor, v: Tensor, turns: Tensor) -> Tensor:
    cos, sin = turns.cos().repeat_interleave(2, -1), turns.sin().repeat_interleave(2, -1)
    other = turns.cos().repeat_interleave(2, -1)
    other.mul_(2)
    return F.scaled_dot_product_attention(stacked_pairs(q, cos, sin), stacked_pairs(k, other, sin), v)


def parts_written_after_a_cat(q: Tensor, k: Tensor, v: Tensor, turns: Tensor) -> Tensor:
    cos, sin = turns.cos(), torch.cat([turns.sin()] * 2, dim=-1)
    first = torch.cat([cos, cos], dim=-1)
    q = swapped_halves(q, first, sin)
    cos.mul_(0.5)
    return F.scaled_dot_product_attention(q, swapped_halves(k, torch.cat([cos, cos], dim=-1), sin), v)


def one_sample_written(q: Tensor, k: Tensor, v: Tensor, turns: Tensor) -> Tensor:
    each = turns[None, None].expand(B, 1, -1, -1)
    both = torch.cat([each, each], dim=-1)
    both[1] *= 2
    cos, sin = both.cos(), both.sin()
    return F.scaled_dot_product_attention(swapped_halves(q, cos, sin), swapped_halves(k, cos, sin), v)


def first_row_and_all_rows(q: Tensor, k: Tensor, v: Tensor, turns: Tensor) -> Tensor:
    cos, sin = turns.cos(), turns.sin()
    q = halves(q, cos[None][:, 0], sin[None][:, 0])
    return F.scaled_dot_product_attention(q, halves(k, cos.view(N, 1, -1)[:, 0], sin.view(N, 1, -1)[:, 0]), v)


def cosines_of_two_dtypes(q: Tensor, k: Tensor, v: Tensor, turns: Tensor) -> Tensor:
    turns = turns.double() * 1e8
    q = halves(q, turns.cos().float(), turns.sin().float())
    return F.scaled_dot_product_attention(q, halves(k, turns.float().cos(), turns.float().sin()), v)


def one_row_expanded_for_parts(q: Tensor, k: Tensor, v: Tensor, turns: Tensor) -> Tensor:
    cos, sin = (table.repeat_interleave(2, -1)[1:2] for table in (turns.cos(), turns.sin()))
    q, k = (
        torch.cat(
            [stacked_pairs(part, cos.expand(part.shape[2], -1), sin.expand(part.shape[2], -1)) for part in parts], dim=2
        )
        for parts in ((x[:, :, :TEXT], x[:, :, TEXT:]) for x in (q, k))
    )
    return F.scaled_dot_product_attention(q, k, v)


def scores_read_elsewhere(q: Tensor, k: Tensor, v: Tensor, turns: Tensor) -> Tensor:
    q, k = into_empty(q, turns.cos(), turns.sin()), into_empty(k, turns.cos(), turns.sin())
    scores = q @ k.transpose(-1, -2) * WIDTH**-0.5
    return scores.softmax(-1) @ v + scores.sum()


def transposed_keys_read_elsewhere(q: Tensor, k: Tensor, v: Tensor, turns: Tensor) -> Tensor:
    q, k = into_empty(q, turns.cos(), turns.sin()), into_empty(k, turns.cos(), turns.sin())
    transposed = k.transpose(-1, -2)
    return (q @ transposed * 0.3).softmax(-1) @ v + transposed.sum()


def keys_of_one_head_written_to_all(q: Tensor, k: Tensor, v: Tensor, turns: Tensor) -> Tensor:
    out, even, odd = torch.empty_like(v), k[:, :1, :, 0::2], k[:, :1, :, 1::2]
    out[..., 0::2] = even * turns.cos() - odd * turns.sin()
    out[..., 1::2] = even * turns.sin() + odd * turns.cos()
    return F.scaled_dot_product_attention(into_empty(q, turns.cos(), turns.sin()), out, v)


TRICKY = [
    sign_written_into_a_table,
    rest_of_a_table_overwritten,
    table_scaled_for_keys,
    parts_written_after_a_cat,
    one_sample_written,
    first_row_and_all_rows,
    cosines_of_two_dtypes,
    one_row_expanded_for_parts,
    scores_read_elsewhere,
    transposed_keys_read_elsewhere,
    keys_of_one_head_written_to_all,
]


@pytest.mark.parametrize("forward", TRICKY, ids=lambda function: function.__name__)
def test_what_looks_like_a_rotation_is_computed_as_it_is(forward: Callable[..., Tensor]) -> None:
    model, inputs = Function(forward), [*qkv().values(), angles()]
    runs = []
    for fused in (False, True):
        fresh = [each.detach().clone().requires_grad_(each.requires_grad) for each in inputs]
        handle = mk.fuse(model, backend="cpu") if fused else None
        out = model(*fresh)
        out.square().mean().backward()
        runs.append([out.detach(), *(each.grad for each in fresh[:3])])
        if handle is not None:
            handle.undo()
    for found, exact in zip(*reversed(runs), strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-3, atol=1e-5)


def truncated(x: Tensor) -> Tensor:
    return (x * 3).to(torch.int32).float()


def bits(x: Tensor) -> Tensor:
    return x.view(torch.int32).float() * 1e-9


@pytest.mark.parametrize("change", [truncated, bits], ids=["truncated", "bits"])
def test_casts_that_change_numbers_stay(change: Callable[[Tensor], Tensor], ropes: list[Any]) -> None:
    cos, sin = repeated()
    model = Function(
        lambda q, k, v: F.scaled_dot_product_attention(*(stacked_pairs(change(x), cos, sin) for x in (q, k)), v)
    )
    inputs = [each.detach() for each in qkv().values()]
    exact = model(*inputs)
    with mk.fuse(model, backend="cpu"):
        torch.testing.assert_close(model(*inputs), exact, rtol=1e-4, atol=1e-5)


def test_tables_in_float64_stay_so() -> None:
    cos, sin = (table.double() for table in repeated())
    inputs = [each.detach().double() for each in qkv().values()]
    model = attend(stacked_pairs)
    exact = model(*inputs, cos, sin)
    with mk.fuse(model, backend="reference"):
        torch.testing.assert_close(model(*inputs, cos, sin), exact, rtol=1e-12, atol=1e-12)
