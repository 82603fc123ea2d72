"""attention: the reference against the equation written out, and what is special to its kernels."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from conftest import DEVICE, KERNEL_BACKENDS, Seen
from test_norm_rope import gradients, kernels, random
from test_norm_rope import literal as turned
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from minisora_kernels import Rope, attention, rope_3d, window_attention
from minisora_kernels.testing import assert_as_accurate

F32 = torch.float32


def leaves(dtype, batch, tokens, keys, heads, head_dim) -> dict[str, Tensor]:
    counts = {"q": tokens, "k": keys, "v": keys}
    made = {
        name: random(batch, count, heads, head_dim, seed=i, dtype=dtype)
        for i, (name, count) in enumerate(counts.items())
    }
    return {name: tensor.requires_grad_() for name, tensor in made.items()}


def assert_kernel(dtype, backend, call, *shape) -> None:
    """``call(leaves, backend)`` by the tolerance rule."""
    tensors = leaves(dtype, *shape)
    exact = {name: value.detach().double().requires_grad_() for name, value in tensors.items()}
    kernel, reference = (gradients(call(tensors, name), tensors) for name in (backend, "reference"))
    truth = gradients(call(exact, "reference"), exact)
    for name, value in kernel.items():
        assert_as_accurate(name, value, reference[name], truth[name])


# ---- the equation, token by token


def literal(q, k, v, counting, scale):
    """Loops over samples, heads and pairs of tokens; ``counting [B, M]`` says which keys count."""
    rows = []
    for b, n, head in product(range(q.shape[0]), range(q.shape[1]), range(q.shape[2])):
        keys = counting[b].nonzero().flatten().tolist()
        if not keys:
            rows.append(0 * q[b, n, head])
            continue
        weights = torch.stack([scale * (q[b, n, head] @ k[b, m, head]) for m in keys]).softmax(0)
        rows.append(sum(p * v[b, m, head] for p, m in zip(weights, keys, strict=True)))
    return torch.stack(rows).reshape(*q.shape[:2], -1)


@pytest.mark.parametrize(
    ("keys", "lengths", "masked", "norm", "across", "biased", "rotary"),
    [
        (4, None, False, None, False, False, False),
        (5, [5, 0, 2], False, "rms", True, False, False),
        (5, [3, 0, 1], True, None, False, False, False),
        (3, [2, 3, 1], False, "layer", True, True, True),
        (3, None, False, "layer", False, True, True),
        (3, [2, 3, 1], True, "rms", False, False, True),
    ],
)
def test_the_reference_is_the_equation(keys, lengths, masked, norm, across, biased, rotary):
    tensors = leaves(torch.float64, 3, 3, keys, 2, 6)
    names = (("q_weight", "k_weight") if norm else ()) + (("q_bias", "k_bias") if biased else ())
    tensors |= {name: (1 + random(2, 6, seed=5 + i)).requires_grad_() for i, name in enumerate(names)}
    options = {"lengths": None if lengths is None or masked else torch.tensor(lengths)}
    counting = torch.ones(3, keys, dtype=torch.bool)
    if lengths is not None:
        counting = torch.arange(keys).expand(3, -1) < torch.tensor(lengths)[:, None]
    if masked:
        options["mask"] = counting = counting.flip(1)
    turns = random(1, 3, 2, 3, seed=9) if rotary else None
    rope = None if turns is None else Rope(turns.cos(), turns.sin(), interleaved=False)
    angle = None if turns is None else turns.expand(3, -1, -1, -1)
    q, k = (
        turned(tensors[side], norm, across, tensors.get(f"{side}_weight"), tensors.get(f"{side}_bias"), angle, False)
        for side in "qk"
    )
    exact = literal(q, k, tensors["v"], counting, 0.7)
    ours = attention(**tensors, **options, qk_norm=norm, across_heads=across, rope=rope, scale=0.7, backend="reference")
    expected, got = gradients(exact, tensors), gradients(ours, tensors)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-8, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")


# ---- which keys count


@kernels
@pytest.mark.parametrize("dtype", (F32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("masked", (False, True))
def test_padding_is_never_read(masked, dtype, backend, nan_filled):
    """What stands there changes no bit, and has no gradient; a sample without keys gives zeros."""
    counts = torch.tensor([70, 0, 33], device=DEVICE)
    place = torch.arange(70, device=DEVICE).expand(3, -1)
    counting = place < counts[:, None]
    if masked:
        counting = counting.flip(1) ^ (place % 7 == 3)
        counting[1] = False
    clean = leaves(dtype, 3, 37, 70, 2, 24)
    results = []
    for filling in (0.0, float("nan"), float("inf")):
        tensors = {
            name: tensor.detach() if name == "q" else tensor.detach().masked_fill(~counting[..., None, None], filling)
            for name, tensor in clean.items()
        }
        tensors = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
        options = {"mask": counting} if masked else {"lengths": counts}
        results.append(gradients(attention(**tensors, **options, backend=backend), tensors))
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(value, other[name]), name
    for name in ("k", "v"):
        assert not results[0][name][~counting].any() and results[0][name][counting].any()
    assert not results[0]["output"][1].any() and not results[0]["q"][1].any()


@kernels
def test_a_mask_of_the_first_keys_is_their_number(backend):
    """Bit for bit; lengths may be of 32 bits, and strided."""
    tensors = leaves(F32, 3, 9, 70, 2, 16)
    counts = torch.tensor([70, 1, 34], device=DEVICE)
    mask = torch.arange(70, device=DEVICE) < counts[:, None]
    ways = (
        {"lengths": counts},
        {"lengths": counts.int()},
        {"mask": mask},
        {"lengths": counts.repeat_interleave(2)[::2]},
    )
    results = [gradients(attention(**tensors, **way, backend=backend), tensors) for way in ways]
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(value, other[name]), name


@kernels
def test_the_order_of_keys_is_that_of_the_mask(backend):
    """As if the keys that count were all there is."""
    tensors = leaves(F32, 1, 20, 75, 2, 16)
    mask = random(1, 75, seed=8) > 0
    some = {name: tensors[name] if name == "q" else tensors[name][mask][None] for name in "qkv"}
    one = gradients(attention(**tensors, mask=mask, backend=backend), tensors)
    other = gradients(attention(**some, backend=backend), tensors)
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@kernels
def test_what_is_kept_of_a_query_without_keys(backend):
    """The pair (0, 1): no backward divides by nothing."""
    tensors = {name: tensor.detach() for name, tensor in leaves(F32, 2, 5, 3, 2, 8).items()}
    with Seen() as seen:
        attention(**tensors, lengths=torch.tensor([0, 3], device=DEVICE), backend=backend)
    ((func, args, _),) = seen.calls
    out, softmax = func(*args)
    assert not out[0].any() and softmax[0].unique(dim=-2).tolist() == [[[0.0, 1.0]]] * 5
    scores = torch.einsum("nhd,mhd->nhm", tensors["q"][1], tensors["k"][1]) * args[-1]
    torch.testing.assert_close(softmax[1, ..., 0], scores.amax(-1))
    torch.testing.assert_close(softmax[1, ..., 1], (scores - scores.amax(-1, keepdim=True)).exp().sum(-1))


@kernels
def test_one_key_is_passed_on(backend):
    tensors = leaves(F32, 2, 40, 1, 2, 16)
    out = attention(**tensors, backend=backend)
    torch.testing.assert_close(out, tensors["v"].expand(-1, 40, -1, -1).flatten(2), rtol=1e-6, atol=1e-6)
    found = gradients(out, tensors)
    for name in "qk":  # of a softmax that is 1 whatever the score
        torch.testing.assert_close(found[name], torch.zeros_like(found[name]), rtol=0, atol=1e-4)


@kernels
@pytest.mark.parametrize("asked", ["q", "k", "v", "q_weight", "k_bias"])
def test_the_norm_of_what_is_frozen_is_not_taken_back(asked, backend):
    tensors = {name: tensor.detach() for name, tensor in leaves(F32, 2, 7, 7, 2, 8).items()}
    tensors |= {f"{side}_{part}": torch.ones(2, 8, device=DEVICE) for side in "qk" for part in ("weight", "bias")}
    tensors[asked].requires_grad_()
    with Returned() as returned:
        attention(**tensors, qk_norm="layer", rope=rope_3d((1, 1, 7), 8), backend=backend).sum().backward()
    side = asked[0]
    assert [name for name, _ in returned.results] == ["attention_bwd", "norm_rope_bwd"][: 1 + (side != "v")]
    assert [part.numel() > 0 for part in returned.results[0][1]] == [side == name for name in "qkv"]
    if side != "v":
        part = asked[2:] or "x"
        assert [result.numel() > 0 for result in returned.results[1][1]] == [part == n for n in ("x", "weight", "bias")]


class Returned(TorchDispatchMode):
    """What the backwards of raw ops returned, in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.results: list[tuple[str, tuple[Tensor, ...]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        if func.namespace.startswith("minisora") and name.endswith("_bwd"):
            self.results.append((name, result))
        return result


# ---- where tensors lie


@kernels
def test_parts_of_a_projection_are_read_where_they_lie(backend):
    """Keys and values of one Linear, and heads before tokens: the bits of dense tensors, without a copy."""
    packed = random(2, 70, 3, 2, 16, dtype=F32)
    turned = {
        name: random(2, 2, count, 16, seed=i, dtype=F32).transpose(1, 2)
        for i, (name, count) in enumerate((("q", 33), ("k", 70), ("v", 70)))
    }
    ways = (
        dict(zip("qkv", packed.unbind(2), strict=True)),
        turned,
        turned | {"v": packed[:1, :, 1].expand(2, -1, -1, -1)},
    )
    lengths = torch.tensor([70, 41], device=DEVICE)
    for way in ways:
        results = []
        for dense in (False, True):
            tensors = {name: (t.contiguous() if dense else t.detach()).requires_grad_() for name, t in way.items()}
            seen = Seen()
            with seen:
                results.append(gradients(attention(**tensors, lengths=lengths, backend=backend), tensors))
            forward, backward = (args for _, args, _ in seen.calls)
            for given in (forward[:3], backward[1:4]):
                assert [t.data_ptr() for t in given] == [t.data_ptr() for t in tensors.values()]
        for name, value in results[1].items():
            assert torch.equal(results[0][name], value), name


@kernels
def test_channels_that_are_apart_are_copied(backend):
    tensors = leaves(F32, 2, 9, 5, 2, 16)
    apart = {name: t.detach().permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0) for name, t in tensors.items()}
    assert torch.equal(attention(**apart, backend=backend), attention(**tensors, backend=backend))


# ---- beside window_attention, and options


@kernels
@pytest.mark.parametrize("length", (6, 150))
@pytest.mark.parametrize("turn", (False, True))
def test_a_whole_window_is_the_same_attention(turn, length, backend):
    qkv = random(1, length, 3, 2, 16, dtype=F32).requires_grad_()
    weight = random(16, seed=3, dtype=F32) + 1
    options = {"qk_norm": "rms", "q_weight": weight, "rope": rope_3d((1, 1, length), 16)} if turn else {}
    one = window_attention(qkv, (1, 1, length), (1, 1, length), backend=backend, **options)
    other = attention(*qkv.unbind(2), backend=backend, **options)
    expected, got = gradients(one, {"qkv": qkv}), gradients(other, {"qkv": qkv})
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@kernels
@pytest.mark.parametrize("dtype", (F32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("head_dim", (8, 40, 64, 72, 80, 96, 128))
def test_head_dims(head_dim, dtype, backend, nan_filled):
    lengths = torch.tensor([67], device=DEVICE)
    assert_kernel(
        dtype,
        backend,
        lambda t, b: attention(**t, lengths=lengths.to(t["q"].device), backend=b),
        1,
        33,
        70,
        2,
        head_dim,
    )


@kernels
@pytest.mark.parametrize("keys", (12, 150))
def test_scores_far_from_zero(keys, backend):
    """Scores of several thousand neither overflow nor lose their gradients."""
    assert_kernel(F32, backend, lambda t, b: attention(**t, scale=500.0, backend=b), 1, 20, keys, 2, 8)


@kernels
def test_tables_of_every_shape(backend):
    tensors = leaves(F32, 2, 5, 5, 2, 8)
    for shape in ((5,), (5, 2), (1, 5, 1), (2, 5, 1), (2, 5, 2)):
        turns = random(*shape, 4, seed=3, dtype=F32)
        full = turns[None, :, None] if turns.dim() == 2 else turns[None] if turns.dim() == 3 else turns
        whole = full.expand(2, 5, 2, 4).contiguous()
        one, other = (
            gradients(attention(**tensors, rope=Rope(angle.cos(), angle.sin()), backend=backend), tensors)
            for angle in (turns, whole)
        )
        for name, value in one.items():
            assert torch.equal(value, other[name]), (shape, name)


@kernels
def test_a_nan_is_not_lost(backend):
    for part, reached in (("q", [7]), ("k", list(range(40))), ("v", list(range(40)))):
        tensors = {name: tensor.detach() for name, tensor in leaves(F32, 2, 40, 70, 2, 8).items()}
        tensors[part][1, 7, 1, 3] = float("nan")
        out = attention(**tensors, backend=backend)
        assert out[1, :, 8:].isnan().any(-1).nonzero().flatten().tolist() == reached
        assert out[0].isfinite().all() and out[1, :, :8].isfinite().all()


@kernels
def test_autocast(backend):
    """Parts of several dtypes are read as autocast's."""
    tensors = {name: t.detach() for name, t in leaves(F32, 2, 9, 5, 2, 16).items()}
    half = {name: t.bfloat16() for name, t in tensors.items()}
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        out = attention(tensors["q"], half["k"], tensors["v"], backend=backend)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, attention(**half, backend=backend))


@kernels
def test_one_graph_for_all_lengths(backend, nothing_compiled):
    counter = CompileCounterWithBackend("aot_eager")

    def attend(q, k, v, lengths):
        return attention(q, k, v, lengths=lengths, qk_norm="rms", backend=backend)

    compiled = torch.compile(attend, fullgraph=True, backend=counter)
    counts = []
    for tokens, keys in ((7, 5), (9, 11), (12, 8), (5, 31)):
        tensors = leaves(F32, 2, tokens, keys, 2, 16)
        lengths = torch.tensor([keys, keys // 2], device=DEVICE)
        traced, plain = (gradients(call(*tensors.values(), lengths), tensors) for call in (compiled, attend))
        for name, value in plain.items():
            assert torch.equal(traced[name], value), name
        counts.append(counter.frame_count)
    assert counts[1:] == [counts[1]] * 3 and counts[1] <= 2, counts


# ---- which backend runs, and errors


@kernels
@pytest.mark.parametrize(("head_dim", "dtype", "reason"), [(12, F32, "head_dim is 12"), (8, torch.float64, "float64")])
def test_what_the_kernels_refuse_goes_to_the_reference(head_dim, dtype, reason, backend):
    tensors = leaves(dtype, 1, 4, 3, 2, head_dim)
    with Seen() as seen:
        attention(**tensors)
    assert not seen.calls
    with pytest.raises(ValueError, match=reason):
        attention(**tensors, backend=backend)


def test_the_raw_ops_check_what_they_get():
    if "cpu" not in KERNEL_BACKENDS:
        pytest.skip("the cpu kernels are not under test")
    forward, backward = torch.ops.minisora.attention_fwd, torch.ops.minisora.attention_bwd
    q, k = torch.randn(2, 5, 3, 8), torch.randn(2, 4, 3, 8)
    order = torch.arange(4).repeat(2, 1)

    def call(q=q, k=k, v=None, lengths=None, index=None):
        return forward(q, k, k if v is None else v, lengths, index, 1.0)

    out, softmax = call(index=order)
    for message, options in {
        "q must be float32": {"q": q.double()},
        "q and k must be .B, N, heads, head_dim.": {"k": k[0]},
        "v must have 4 dimensions": {"v": k[0]},
        "k must have size 2 in dimension 0": {"k": k[:1]},
        "k must have size 3 in dimension 2": {"k": k[:, :, :2]},
        "v must have size 4 in dimension 1": {"v": q},
        "v must have the dtype of q": {"v": k.bfloat16()},
        "k must have stride 1": {"k": torch.randn(2, 4, 8, 3).transpose(2, 3)},
        "multiple of 8, got 4": {"q": q[..., :4], "k": k[..., :4]},
        "lengths must be contiguous int64": {"lengths": torch.tensor([1, 2], dtype=torch.int32)},
        "lengths must have size 2": {"lengths": torch.tensor([1, 2, 3])},
        "index must be contiguous int64": {"index": order.t().contiguous().t()},
        "index must have size 4": {"index": order[:, :3]},
        "index has 4, which is no key": {"index": order + 1},
        "index has -1, which is no key": {"index": order - 1},
        "index has 1 twice in a sample": {"index": order.clamp(min=1)},
    }.items():
        with pytest.raises(RuntimeError, match=message):
            call(**options)
    # What is out of range counts as the nearest.
    for lengths, nearest in (([-3, 9], [0, 4]), ([2**40, -(2**40)], [4, 0])):
        one, other = (call(lengths=torch.tensor(given)) for given in (lengths, nearest))
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
    for message, given in {
        "dout and out must have the dtype of q": (out.bfloat16(), out, softmax),
        "out must have size 24": (out, out[..., :8].contiguous(), softmax),
        "dout must be contiguous": (out.transpose(0, 1).contiguous().transpose(0, 1), out, softmax),
        "softmax must be float32": (out, out, softmax.bfloat16()),
    }.items():
        dout, saved, pairs = given
        with pytest.raises(RuntimeError, match=message):
            backward(dout, q, k, k, saved, pairs, None, None, 1.0, True, True, True)


Q, K, TABLE = torch.zeros(2, 5, 3, 8), torch.zeros(2, 4, 3, 8), torch.zeros(5, 4)
LENGTHS = torch.tensor([4, 2])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": "x"}, TypeError, "q must be a tensor, got str"),
        ({"q": Q.int()}, TypeError, "q has dtype torch.int32"),
        ({"q": Q[0]}, ValueError, r"q must be \[B, N, heads, head_dim\]"),
        (
            {"k": K[:1]},
            ValueError,
            r"k has shape \(1, 4, 3, 8\); it must be \[B, M, heads, head_dim\] = \[2, M, 3, 8\]",
        ),
        ({"k": K[:, :0], "v": K[:, :0]}, ValueError, "k has shape .* with M at least 1"),
        ({"v": K[:, :, :2]}, ValueError, r"v has shape \(2, 4, 2, 8\)"),
        ({"v": K[:, :3]}, ValueError, r"v has shape \(2, 3, 3, 8\); it must be that of k, \(2, 4, 3, 8\)"),
        ({"v": K.bfloat16()}, TypeError, "v has dtype torch.bfloat16, q has torch.float32; they must be the same"),
        ({"k": torch.zeros(2, 4, 3, 8, device="meta")}, ValueError, "k is on meta, q is on cpu"),
        ({"lengths": [4, 2]}, TypeError, "lengths must be a tensor, got list"),
        ({"lengths": LENGTHS.float()}, TypeError, "lengths has dtype torch.float32; it must be torch.int64 or"),
        ({"lengths": LENGTHS[:1]}, ValueError, r"lengths has shape \(1,\); it must be \[B\] = \[2\]"),
        ({"lengths": LENGTHS + 1}, ValueError, r"lengths is \[5, 3\]; each must be from 0 to the 4 tokens of k"),
        ({"lengths": LENGTHS - 3}, ValueError, r"lengths is \[1, -1\]; each must be from 0"),
        ({"lengths": torch.zeros(2, dtype=torch.int64, device="meta")}, ValueError, "lengths is on meta, q is on cpu"),
        ({"mask": torch.ones(2, 4)}, TypeError, "mask has dtype torch.float32; it must be torch.bool"),
        ({"mask": torch.ones(2, 5).bool()}, ValueError, r"mask has shape \(2, 5\); it must be \[B, M\] = \[2, 4\]"),
        ({"mask": torch.ones(2, 4).bool(), "lengths": LENGTHS}, ValueError, "lengths and mask are both given"),
        ({"qk_norm": "l2"}, ValueError, "qk_norm is 'l2'; it may be None, 'rms' or 'layer'"),
        ({"q_weight": torch.ones(8)}, ValueError, "q_weight needs qk_norm, which is None"),
        ({"qk_norm": "rms", "k_bias": torch.ones(8)}, ValueError, "k_bias must be None with qk_norm='rms'"),
        ({"qk_norm": "rms", "k_weight": torch.ones(4)}, ValueError, "k_weight has shape"),
        ({"across_heads": None}, TypeError, "across_heads is None; it must be True or False"),
        ({"scale": "x"}, TypeError, "scale is 'x'; it must be a number"),
        ({"eps": -1.0}, ValueError, "eps is -1.0"),
        ({"rope": Rope(TABLE, TABLE)}, ValueError, "q has 5 tokens and k has 4; norm_rope turns one of them"),
        ({"k": Q, "v": Q, "rope": (TABLE, TABLE)}, TypeError, "rope must be a Rope"),
        ({"k": Q, "v": Q, "rope": Rope(TABLE, TABLE[:4])}, ValueError, "rope.sin has shape"),
        ({"backend": "mps"}, ValueError, "backend is 'mps'"),
    ],
)
def test_errors_name_the_argument(changes, error, message):
    with pytest.raises(error, match=message):
        attention(**{"q": Q, "k": K, "v": K} | changes)
