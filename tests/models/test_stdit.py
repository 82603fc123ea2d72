"""denoisers/stdit.py against an STDiT written again from the formulas, its kernels against the reference, its text."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE, KERNEL_BACKENDS, Seen
from einops import rearrange

import minisora_kernels as mk
from minisora_kernels.testing import assert_as_accurate
from models.denoisers.dit import DiT, DiTConfig
from models.denoisers.stdit import STDiT, STDiTConfig
from models.denoisers.text import Text
from models.objectives.flow import FlowMatching
from models.sampling.sampler import SampleRequest, sample

TEXT = STDiTConfig(
    input_size=(3, 6, 10), patch=(1, 2, 2), channels=4, width=48, depth=2, heads=3, text_width=20, class_dropout=0.0
)
CONFIGS = {
    "text": TEXT,
    "classes": replace(
        TEXT, input_size=(4, 6, 10), patch=(2, 2, 2), text_width=0, num_classes=5, learn_sigma=True, width=72, heads=1
    ),
    "unconditional": replace(TEXT, text_width=0, width=32, heads=4, qk_norm="rms"),
}
# gate_residual is not among DiT's ops: there every sum is followed by a norm.
OPS = {"adaln", "gate_residual", "gate_residual_adaln", "gelu_mlp", "patch_embed", "unpatchify", "window_attention"}


def randomized(config):
    """In training mode; what is zero at first, or small, is not: what is before it would have no gradient."""
    torch.manual_seed(0)
    model = STDiT(config).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.count_nonzero() == 0 or name.startswith("y_embedder") or name.endswith("scale_shift_table"):
                parameter.normal_(std=0.3 if parameter.dim() > 1 else 0.1)
    return model


def captions(config, batch=3, length=5, dtype=torch.float32):
    """The first has two tokens, the second none, the third all."""
    states = torch.randn(batch, length, config.text_width, generator=torch.Generator().manual_seed(3), dtype=dtype)
    lengths = torch.tensor([2, 0, length])[:batch]
    return Text(states, torch.arange(length) < lengths[:, None])


def inputs(config, dtype=torch.float32, batch=3, per_frame=False):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, config.channels, *config.input_size, generator=generator, dtype=torch.float64).to(dtype)
    t = torch.rand((batch, config.grid[0]) if per_frame else (batch,), generator=generator) * 1000
    y = None
    if config.num_classes:
        y = torch.tensor([0, 3, config.num_classes])[:batch]
    elif config.text_width:
        y = captions(config, batch, dtype=dtype)
    return x, t, y


def run(model, x, t, y):
    x = x.clone().requires_grad_()
    out = model(x, t, y)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(out))
    gradients = {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {"output": out.detach(), "gradient of x": x.grad, **gradients}


def norm(x):
    return (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, correction=0, keepdim=True) + 1e-6)


def rms(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def linear(w, name, x):
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def mlp(w, name, x):
    return linear(w, f"{name}.fc2", F.gelu(linear(w, f"{name}.fc1", x), approximate="tanh"))


def attend(q, k, v):
    return (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1) @ v


def self_attention(w, name, x, heads):
    q, k, v = rearrange(linear(w, f"{name}.qkv", x), "b n (three h d) -> three b h n d", three=3, h=heads)
    if f"{name}.q_norm.weight" in w:
        q, k = rms(q, w[f"{name}.q_norm.weight"]), rms(k, w[f"{name}.k_norm.weight"])
    return linear(w, f"{name}.proj", rearrange(attend(q, k, v), "b h n d -> b n (h d)"))


def cross_attention(w, name, x, tokens, heads):
    """Sample by sample, the tokens that count only: no mask."""
    rows = []
    for row, own in zip(x, tokens, strict=True):
        q = rearrange(linear(w, f"{name}.q_linear", row), "n (h d) -> h n d", h=heads)
        k, v = rearrange(linear(w, f"{name}.kv_linear", own), "l (two h d) -> two h l d", two=2, h=heads)
        rows.append(linear(w, f"{name}.proj", rearrange(attend(q, k, v), "h n d -> n (h d)")))
    return torch.stack(rows)


def literal(model, x, t, y):
    """The formulas of the docstring, on every token, with the state dict of ``model``."""
    w, config = dict(model.named_parameters()), model.config
    frames, rows, columns = config.grid
    convolved = F.conv3d(x, w["x_embedder.proj.weight"], w["x_embedder.proj.bias"], stride=config.patch)
    x = rearrange(convolved, "b d t h w -> b (t h w) d")
    x = x + w["pos_embed"]
    angles = t.float()[..., None] * torch.exp(-math.log(10000) * torch.arange(128).float() / 128)
    sinusoid = torch.cat((angles.cos(), angles.sin()), -1).to(x.dtype)
    c = linear(w, "t_embedder.mlp.2", F.silu(linear(w, "t_embedder.mlp.0", sinusoid)))
    c = c if c.dim() == 3 else c[:, None].expand(-1, frames, -1)
    c = c.repeat_interleave(rows * columns, dim=1)
    t0 = linear(w, "t_block.1", F.silu(c))
    if config.num_classes:
        tokens = [w["y_embedder.embedding_table.weight"][label][None] for label in y]
    elif config.text_width:
        tokens = [
            states[mask] if mask.any() else w["y_embedder.null"][None] for states, mask in zip(*y[:2], strict=True)
        ]
        tokens = [mlp(w, "y_embedder.y_proj", own) for own in tokens]
    for i in range(config.depth):
        name = f"blocks.{i}"
        table = w[f"{name}.scale_shift_table"]
        shift1, scale1, gate1, shift2, scale2, gate2 = (part + table[j] for j, part in enumerate(t0.chunk(6, dim=-1)))
        y1 = rearrange(norm(x) * (1 + scale1) + shift1, "b (t s) d -> (b t) s d", t=frames)
        y1 = self_attention(w, f"{name}.attn", y1, config.heads)
        x = x + gate1 * rearrange(y1, "(b t) s d -> b (t s) d", t=frames)
        y2 = rearrange(x, "b (t s) d -> (b s) t d", t=frames)
        if i == 0:
            y2 = y2 + w["pos_embed_temporal"]
        y2 = self_attention(w, f"{name}.attn_temp", y2, config.heads)
        x = x + gate1 * rearrange(y2, "(b s) t d -> b (t s) d", s=rows * columns)
        if config.num_classes:
            values = torch.stack([linear(w, f"{name}.cross_attn.v_linear", own) for own in tokens])
            x = x + linear(w, f"{name}.cross_attn.proj", values)
        elif y is not None:
            x = x + cross_attention(w, f"{name}.cross_attn", x, tokens, config.heads)
        x = x + gate2 * mlp(w, f"{name}.mlp", norm(x) * (1 + scale2) + shift2)
    shift, scale = (c + row for row in w["final_layer.scale_shift_table"])
    x = linear(w, "final_layer.linear", norm(x) * (1 + scale) + shift)
    pt, ph, pw = config.patch
    return rearrange(
        *(x, "b (t h w) (r p q c) -> b c (t r) (h p) (w q)"), t=frames, h=rows, w=columns, r=pt, p=ph, q=pw
    )


class Literal(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, t, y):
        return literal(self.model, x, t, y)

    def named_parameters(self, *arguments, **options):
        return self.model.named_parameters(*arguments, **options)


@pytest.mark.parametrize("per_frame", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_matches_the_formulas_in_float64(name, per_frame):
    config = CONFIGS[name]
    model = randomized(config).double()
    arguments = inputs(config, torch.float64, per_frame=per_frame)
    expected = run(Literal(copy.deepcopy(model)), *arguments)
    with mk.use_backend("reference"):
        ours = run(model, *arguments)
    assert ours.keys() == expected.keys() and ours["output"].abs().max() > 0.1
    for key, value in expected.items():
        scale = value.abs().max()
        assert scale > 0, key
        assert (ours[key] - value).abs().max() <= 1e-10 * scale, key


@pytest.mark.skipif(not KERNEL_BACKENDS, reason="no kernel backend is available: see the header")
@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("checkpointing", (False, True))
@pytest.mark.parametrize("name", CONFIGS)
def test_kernels_are_as_accurate_as_the_reference(name, checkpointing, dtype, backend, nan_filled):
    config = CONFIGS[name]
    model = randomized(config).to(DEVICE, dtype)
    model.checkpointing = checkpointing
    plain, exact = copy.deepcopy(model), copy.deepcopy(model).double()

    def arguments(wider):
        x, t, y = inputs(config, dtype)
        if isinstance(y, Text):
            y = y._replace(states=y.states.to(wider))
        return x.to(DEVICE, wider), t.to(DEVICE), None if y is None else y.to(DEVICE)

    seen = Seen()
    with seen, mk.use_backend(backend):
        kernel = run(model, *arguments(dtype))
    assert {call.removesuffix("_fwd") for call in seen.names() if call.endswith("_fwd")} == OPS
    assert {call.removesuffix("_bwd") for call in seen.names() if call.endswith("_bwd")} == OPS
    with mk.use_backend("reference"):
        reference = run(plain, *arguments(dtype))
        truth = run(exact, *arguments(torch.float64))
    for result in kernel:
        assert_as_accurate(f"{name} {result}", kernel[result], reference[result], truth[result])


def test_a_class_is_a_text_of_one_token():
    """Attention to one token, with any queries and keys, is what the layer of a model with classes makes at once."""
    config = CONFIGS["classes"]
    short = randomized(config).blocks[0].cross_attn
    full = randomized(replace(config, num_classes=0, text_width=8)).blocks[0].cross_attn
    x, token = torch.randn(3, 7, config.width), torch.randn(3, 1, config.width)
    with torch.no_grad():
        full.proj.load_state_dict(short.proj.state_dict())
        full.kv_linear.weight[config.width :] = short.v_linear.weight
        full.kv_linear.bias[config.width :] = short.v_linear.bias
    torch.testing.assert_close(short(x, token, None), full(x, token, torch.ones(3, 1, dtype=torch.bool)))


def test_padding_does_not_count():
    model = randomized(TEXT).eval()
    x, t, y = inputs(TEXT)
    states = y.states.clone().requires_grad_()
    out = model(x, t, Text(states, y.mask))
    out.square().sum().backward()
    assert (states.grad[y.mask].abs().amax(-1) > 0).all() and states.grad[~y.mask].count_nonzero() == 0
    other = torch.where(y.mask[..., None], y.states, 100 * torch.randn_like(y.states))
    assert torch.equal(model(x, t, Text(other, y.mask)), out)
    longer = Text(F.pad(y.states, (0, 0, 0, 4), value=7.0), F.pad(y.mask, (0, 4)))
    torch.testing.assert_close(model(x, t, longer), out)
    # A token that counts does.
    other[0, 0] += 1
    assert (model(x, t, Text(other, y.mask)) != out).flatten(1).any(1).tolist() == [True, False, False]


def test_the_null_caption_is_learned_and_is_what_training_drops_to():
    model = randomized(replace(TEXT, class_dropout=1.0))
    x, t, y = inputs(TEXT)
    null = y._replace(dropped=torch.tensor([True] * 3))
    dropped = model(x, t, y)
    assert torch.equal(dropped, model(x, t, null))
    kept = model.eval()(x, t, y)
    assert (kept != dropped).flatten(1).any(1).tolist() == [True, False, True]
    with torch.no_grad():
        model.y_embedder.null.add_(1)
    assert (model(x, t, y) != kept).flatten(1).any(1).tolist() == [False, True, False]


def test_captions_are_dropped_by_torchs_generator_at_the_rate_that_was_asked_for():
    embedder = randomized(replace(TEXT, class_dropout=0.3)).y_embedder
    y = Text(torch.ones(4000, 3, 20), torch.tensor([True, True, False]).expand(4000, 3))
    torch.manual_seed(0)
    _, mask = embedder(y)
    dropped = ~mask[:, 1]
    assert dropped.float().mean().item() == pytest.approx(0.3, abs=0.03)
    assert mask[dropped].equal(torch.tensor([True, False, False]).expand(int(dropped.sum()), 3))
    torch.manual_seed(0)
    assert torch.equal(embedder(y)[1], mask)
    assert not torch.equal(embedder(y)[1], mask)


@pytest.mark.parametrize("name", ["text", "classes"])
def test_guidance_moves_away_from_the_null_condition(name):
    """One Euler step of a flow is the guided velocity itself."""
    config = replace(CONFIGS[name], learn_sigma=False)
    model = randomized(config).eval()
    x, _, y = inputs(config)
    t = torch.zeros(3)
    null = y._replace(dropped=torch.tensor([True] * 3)) if name == "text" else torch.full_like(y, 5)
    with torch.no_grad():
        with_y, without = model(x, t, y), model(x, t, null)
    plain, guided = (
        sample(model, FlowMatching(), SampleRequest(noise=x, y=y, solver="euler", steps=1, guidance=guidance))
        for guidance in (1.0, 3.0)
    )
    torch.testing.assert_close(plain, x + with_y)
    torch.testing.assert_close(guided, x + without + 3 * (with_y - without))
    changed = (guided - plain).flatten(1).abs().amax(1) > 1e-3
    # The last sample of the classes and the second of the captions are null themselves.
    assert changed.tolist() == ([True, False, True] if name == "text" else [True, True, False])


def test_initial_weights():
    torch.manual_seed(0)
    model = STDiT(replace(TEXT, width=128, heads=2, text_width=96, depth=1))
    for name, value in model.named_parameters():
        zero = name.endswith("bias") or name in (
            "blocks.0.attn_temp.proj.weight",
            "blocks.0.cross_attn.proj.weight",
            "final_layer.linear.weight",
        )
        assert (value.count_nonzero() == 0) == zero, name
    state = model.state_dict()
    for name in ("t_block.1.weight", "t_embedder.mlp.0.weight", "y_embedder.y_proj.fc1.weight"):
        assert state[name].std().item() == pytest.approx(0.02, rel=0.05)
    assert state["blocks.0.scale_shift_table"].std().item() == pytest.approx(128**-0.5, rel=0.1)
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["pos_embed", "pos_embed_temporal"]


@pytest.mark.parametrize("name", CONFIGS)
def test_checkpointing_gives_the_same_gradients(name):
    model = randomized(replace(CONFIGS[name], class_dropout=0.5))
    torch.manual_seed(0)
    plain = run(model, *inputs(CONFIGS[name]))
    model.zero_grad()
    model.checkpointing = True
    calls = []
    model.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    torch.manual_seed(0)
    again = run(model, *inputs(CONFIGS[name]))
    assert len(calls) == 2
    for result in plain:
        assert torch.equal(plain[result], again[result]), result


@pytest.mark.slow
def test_compiles_without_a_graph_break():
    model = randomized(replace(TEXT, depth=1))
    expected = run(model, *inputs(TEXT))
    model.zero_grad()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    got = run(compiled, *inputs(TEXT))
    for result, value in expected.items():
        name = result.replace("gradient of ", "gradient of _orig_mod.") if "." in result else result
        torch.testing.assert_close(got.get(name, got.get(result)), value, rtol=1e-4, atol=1e-4)
    compiled.train()(*inputs(replace(TEXT, class_dropout=0.5)))


def test_autocast_keeps_an_fp32_residual_stream():
    model = randomized(TEXT)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.dim() > 1:
                parameter.mul_(0.5)
    x, t, y = inputs(TEXT)
    exact = model(x, t, y)
    seen = []
    model.blocks[0].register_forward_hook(lambda _, __, out: seen.extend(part.dtype for part in out))
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x, t, y)
    assert seen == [torch.float32, torch.bfloat16] and out.dtype == torch.bfloat16
    assert (out.float() - exact).abs().max() < 0.05 * exact.abs().max()
    # An encoder's states may be bfloat16 beside a model in float32.
    half = model(x, t, Text(y.states.bfloat16(), y.mask))
    assert half.dtype == torch.float32 and (half - exact).abs().max() < 0.05 * exact.abs().max()


def test_attributes_and_json():
    for config in CONFIGS.values():
        again = STDiTConfig(**json.loads(json.dumps(asdict(config))))
        assert again == config and isinstance(again.patch, tuple)
    model = STDiT(CONFIGS["classes"])
    assert (model.out_channels, model.null_class, model.tokens_per_sample, model.checkpointing) == (8, 5, 30, False)
    assert STDiT(TEXT).null_class is None and STDiT(CONFIGS["unconditional"]).null_class is None


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"input_size": (8, 8)}, "input_size"),
        ({"patch": (1, 4, 2)}, "patch"),
        ({"depth": 0}, "depth"),
        ({"width": 50}, "width"),
        ({"class_dropout": 1.5}, "class_dropout"),
        ({"qk_norm": "batch"}, "qk_norm"),
        ({"text_width": -1}, "text_width"),
        ({"null_tokens": -1}, "null_tokens"),
        ({"null_tokens": 3, "text_width": 0}, "null_tokens"),
        ({"num_classes": 3}, "text_width"),
    ],
)
def test_config_refuses(change, word):
    with pytest.raises(ValueError, match=f"^{word} is"):
        replace(TEXT, **change)


def test_forward_refuses():
    model = STDiT(TEXT)
    x, t, y = inputs(TEXT)
    with pytest.raises(ValueError, match=r"x has shape .* it must be \[B, 4, 3, 6, 10\]"):
        model(x[:, :2], t, y)
    with pytest.raises(ValueError, match=r"t has shape .* it may be \[3\] or, per frame, \[3, 3\]"):
        model(x, t[:2], y)
    for bad in (None, torch.tensor([0, 1, 2])):
        with pytest.raises(ValueError, match="a model with text_width 20 needs a Text"):
            model(x, t, bad)
    for bad in (
        Text(y.states[:2], y.mask[:2]),
        Text(y.states[..., 1:], y.mask),
        Text(y.states[:, :0], y.mask[:, :0]),
        Text(y.states, y.mask[:, 1:]),
        Text(y.states, y.mask.float()),
    ):
        with pytest.raises(ValueError, match=r"must be \[3, L, 20\] with L > 0 and \[3, L\] of torch.bool"):
            model(x, t, bad)
    labelled = STDiT(replace(TEXT, text_width=0, num_classes=5))
    with pytest.raises(ValueError, match=r"y is a Text; a model with 5 classes needs \[3\]"):
        labelled(x, t, y)
    with pytest.raises(ValueError, match=r"y is of shape \(2,\); a model with 5 classes"):
        labelled(x, t, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="unconditional"):
        STDiT(replace(TEXT, text_width=0))(x, t, y)
    # A model that knows no text says what it wants.
    dit = DiT(DiTConfig(input_size=(3, 6, 10), patch=(1, 2, 2), channels=4, width=48, depth=1, heads=3, num_classes=5))
    with pytest.raises(ValueError, match=r"y is of shape \(3, 5, 20\); a model with 5 classes needs \[3\]"):
        sample(dit, FlowMatching(), SampleRequest(noise=x, y=y, solver="euler", steps=1))
