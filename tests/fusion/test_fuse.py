"""What a user relies on: one reversible call that changes nothing else, its report, its options and its errors."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from fusion_parts import check, counts, randomise, reasons, run
from originals import DiT
from torch import nn
from torch.utils.checkpoint import checkpoint

import minisora_kernels as mk
from minisora_kernels import backends

pytestmark = pytest.mark.usefixtures("nothing_compiled")

T, Y = torch.tensor([0.3, 0.8]), torch.tensor([1, 10])


def made(**options: int) -> DiT:
    model = DiT(**options)
    randomise(model)
    return model


def images(batch: int = 2, size: int = 8, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 4, size, size, generator=generator)
    return dict(x=x, t=torch.rand(batch, generator=generator), y=torch.arange(batch) % 11)


def call(model: nn.Module, **inputs: torch.Tensor) -> torch.Tensor:
    return model(**inputs)


def raw_ops(function: Callable[[], object]) -> list[str]:
    """The raw ops of ours that a call runs. A dispatch mode would see them too, but Dynamo reads no code under one."""
    with torch.profiler.profile() as profile:
        function()
    return [event.name for event in profile.events() if event.name.startswith("minisora::")]


def test_kernels_run_where_the_report_says_so_and_undo_ends_it():
    model, inputs = made(), images()
    fused = mk.fuse(model, backend="cpu")
    model(**inputs)
    assert len(raw_ops(lambda: model(**inputs))) == sum(counts(fused.sites).values()) == 10  # one per site
    fused.undo()
    assert raw_ops(lambda: model(**inputs)) == []


def test_the_model_keeps_its_objects_classes_names_and_hooks():
    model, inputs = made(), images()
    calls: list[str] = []
    model.blocks[0].register_forward_hook(lambda *_: calls.append("block"))
    model.register_forward_pre_hook(lambda *_: calls.append("model"))
    before = {name: (id(module), type(module), dict(module.__dict__)) for name, module in model.named_modules()}
    parameters = {name: id(each) for name, each in model.named_parameters()}
    state, printed = list(model.state_dict()), repr(model)
    with mk.fuse(model, backend="cpu") as fused:
        model(**inputs)
        model(**inputs)
        assert calls == ["model", "block"] * 2
        assert list(model.state_dict()) == state and repr(model) == printed
        assert {name: id(each) for name, each in model.named_parameters()} == parameters
    assert counts(fused.sites)
    assert before == {name: (id(module), type(module), dict(module.__dict__)) for name, module in model.named_modules()}


def test_a_second_fuse_finds_nothing_and_undoes_nothing():
    model = made()
    first = mk.fuse(model, backend="cpu")
    second = mk.fuse(model)
    model(**images())
    assert second.sites == [] and "before" in second.report()
    second.undo()
    assert mk.fuse(model).sites == []  # still fused
    first.undo()
    first.undo()
    assert "_compiled_call_impl" not in model.__dict__


def test_two_models_of_a_class_have_their_own_reports():
    wide, narrow = made(dim=64), made()
    with mk.fuse(wide, backend="cpu") as one, mk.fuse(narrow, backend="cpu", ops=["gelu_mlp"]) as two:
        wide(**images())
        narrow(**images())
    assert counts(one.sites)["window_attention"] == 2
    assert counts(two.sites) == {"gelu_mlp": 2}


def test_a_copy_and_a_pickle_are_not_fused_and_share_nothing():
    model, inputs = made(), images()
    with mk.fuse(model, backend="cpu") as fused:
        y = model(**inputs)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert other._compiled_call_impl is None
            torch.testing.assert_close(other(**inputs), y, rtol=1e-4, atol=1e-5)
            assert raw_ops(lambda other=other: other(**inputs)) == []
            assert other.blocks[0].mlp.fc1.weight.data_ptr() != model.blocks[0].mlp.fc1.weight.data_ptr()
    assert fused.sites


def test_an_ema_follows_and_a_new_state_is_read():
    model, inputs = made(), images()
    ema = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    with mk.fuse(model, backend="cpu"):
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        ema.update_parameters(model)  # the first copies
        model(**inputs).square().mean().backward()
        optimizer.step()
        ema.update_parameters(model)
        trained = model(**inputs).detach()
        model.load_state_dict(ema.module.state_dict())
        averaged = model(**inputs)
    assert not torch.allclose(trained, averaged, rtol=1e-3)
    torch.testing.assert_close(averaged, ema(**inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_shapes_change_without_a_graph_for_each():
    model = made()
    sizes = [(2, 8), (3, 8), (2, 12), (5, 16), (4, 20)]
    with mk.fuse(model, backend="cpu") as fused:
        got = [model(**images(*each)) for each in sizes]
        graphs = fused._call.sites.graphs
    assert graphs <= 3
    assert len(fused.sites) == 10  # a place that is traced again counts once
    for each, y in zip(sizes, got, strict=True):
        torch.testing.assert_close(y, model(**images(*each)), rtol=1e-4, atol=1e-5)


class Breaks(nn.Module):
    def forward(self, x):
        x = x.sin()
        torch._dynamo.graph_break()
        return x.cos()


class Broken(DiT):
    """Its blocks stand on both sides of a break of the graph."""

    def forward(self, x, t, y):
        x = self.x_embedder(x).flatten(2).transpose(1, 2)
        c = self.t_embedder(t) + self.y_embedder(y)
        for block in self.blocks:
            torch._dynamo.graph_break()
            x = block(x, c)
        return self.unpatchify(self.final_layer(x, c))


@pytest.mark.slow
def test_breaks_of_the_graph_are_survived():
    model = Broken(depth=12)  # more blocks than Dynamo traces one code object by itself
    randomise(model)
    fused = check(model, images())
    assert counts(fused.sites)["window_attention"] >= 1
    with mk.fuse(model, backend="cpu"):
        model(**images())
        ran = raw_ops(lambda: model(**images()))
    assert ran.count("minisora::gelu_mlp_fwd") == 12


def test_a_container_of_torch_is_read_too():
    fused = check(nn.Sequential(nn.Linear(32, 64), nn.GELU("tanh"), nn.Linear(64, 32)), dict(x=torch.randn(2, 12, 32)))
    assert counts(fused.sites) == {"gelu_mlp": 1}


def test_a_break_is_reported():
    model = nn.Sequential(nn.LayerNorm(8), Breaks(), nn.Linear(8, 8))
    with mk.fuse(model, backend="cpu") as fused:
        model(torch.randn(2, 3, 8))
    assert "the graph breaks: Call to `torch._dynamo.graph_break()`" in fused.report()


class Checkpointed(DiT):
    def forward(self, x, t, y):
        x = self.x_embedder(x).flatten(2).transpose(1, 2)
        c = self.t_embedder(t) + self.y_embedder(y)
        for block in self.blocks:
            x = checkpoint(block, x, c, use_reentrant=False)
        return self.unpatchify(self.final_layer(x, c))


@pytest.mark.slow
def test_checkpointing_is_right_and_keeps_less():
    model = Checkpointed()
    randomise(model)
    plain = DiT()
    plain.load_state_dict(model.state_dict())
    fused = check(model, images())
    assert counts(fused.sites)["gelu_mlp"] == 2

    def kept(model: nn.Module) -> int:
        total: dict[int, int] = {}

        def pack(tensor):
            total[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with mk.fuse(model, backend="cpu"), hooks:
            model(**images(4, 16))
        return sum(total.values())

    assert kept(model) < 0.6 * kept(plain)


def test_autocast_around_the_call_is_kept():
    model, inputs = made(), images()

    def autocast(model: nn.Module, **inputs: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(**inputs)

    eager = autocast(model, **inputs)
    with mk.fuse(model, backend="cpu"):
        assert autocast(model, **inputs).dtype == eager.dtype
        assert model(**inputs).dtype == torch.float32  # and no graph of one is taken for the other


def test_no_grad_and_inference_mode():
    model, inputs = made(), images()
    eager = model(**inputs)
    with mk.fuse(model, backend="cpu"):
        for mode in (torch.no_grad(), torch.inference_mode()):
            with mode:
                y = model(**inputs)
            assert not y.requires_grad
            torch.testing.assert_close(y, eager, rtol=1e-4, atol=1e-5)


def test_train_and_eval():
    model = made()
    for block in model.blocks:
        block.mlp.drop.p = 0.2
    with mk.fuse(model, backend="cpu") as fused:
        model(**images())
        assert "gelu_mlp" not in counts(fused.sites)
        assert reasons(fused.sites) == {"dropout stands between, in training"}
        model.eval()
        model(**images())
        assert counts(fused.sites)["gelu_mlp"] == 2


def test_ops_limits_what_is_put_in():
    fused = check(made(), images(), ops=["adaln", "gate_residual"])
    assert counts(fused.sites) == {"adaln": 5, "gate_residual": 4}


def test_auto_follows_the_record(monkeypatch: pytest.MonkeyPatch):
    """What the automatic choice would not run on a kernel is left, with the reason."""
    model, inputs = made(), images()
    monkeypatch.setattr(backends, "VERIFIED", "0")
    with mk.fuse(model) as fused:
        model(**inputs)
    names = {site.backend for site in fused.sites}
    assert names == {"cpu"} and "cpu" in fused.report()
    monkeypatch.setattr(backends, "PREFERENCE", {"cpu": ("reference",)})
    with mk.fuse(model) as fused:
        y = model(**inputs)
    assert counts(fused.sites) == {} and reasons(fused.sites) == {"there is no kernel here"}
    assert torch.equal(y, model(**inputs))


def test_a_backend_of_the_block_is_followed():
    model, inputs = made(), images()
    with mk.use_backend("reference"), mk.fuse(model) as fused:
        model(**inputs)
    assert {site.backend for site in fused.sites} == {"reference"}


def test_on_raises_where_no_kernel_serves():
    model, inputs = made(heads=8), images()  # heads of 4 channels
    with (
        mk.fuse(model, mode="on"),
        pytest.raises(ValueError, match="window_attention: cpu: head_dim is 4; the kernels"),
    ):
        model(**inputs)
    with mk.fuse(model) as fused:
        model(**inputs)
    assert "cpu: head_dim is 4; the kernels take multiples of 8" in reasons(fused.sites)
    with mk.fuse(model, mode="on", ops=["adaln", "gelu_mlp"]) as fused:
        model(**inputs)
    assert counts(fused.sites) == {"adaln": 5, "gelu_mlp": 2}


@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_a_site_is_left_where_the_backend_refuses_an_option(approximate: str, monkeypatch: pytest.MonkeyPatch):
    """cuBLASLt has one form of GELU. The refused call is never made."""
    monkeypatch.setattr(backends, "unavailable", lambda name: None)
    monkeypatch.setattr(backends, "DEVICES", {"cpu": "cpu", "cuda": "cpu"})
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(approximate=approximate), nn.Linear(32, 16)).bfloat16()
    served: list[str] = []
    monkeypatch.setattr(
        "minisora_kernels.fusion.calls.gelu_mlp",
        lambda x, *_, options: served.append(options["backend"]) or torch.zeros_like(x),
    )
    with mk.fuse(model, backend="cuda") as fused:
        model(torch.randn(2, 16, dtype=torch.bfloat16))
    if approximate == "tanh":
        assert counts(fused.sites) == {"gelu_mlp": 1} and set(served) == {"cuda"}
    else:
        assert counts(fused.sites) == {} and not served
        assert any("approximate is 'none'" in reason for reason in reasons(fused.sites))


def test_the_report():
    model = made()
    with mk.fuse(model, backend="cpu") as fused:
        assert "when it is first called" in fused.report()
        model(**images())
    lines = fused.report().splitlines()
    assert lines[0] == "1 graphs, 10 sites served, 0 left"
    assert "DiTBlock (2)" in lines and "  window_attention        2  cpu" in lines
    assert "DiT (1)" in lines  # the final layer and the patches are in no block


def test_compile_with_the_pass_in_front():
    model, inputs = made(), images()
    inputs["x"].requires_grad_()
    reference = run(model, inputs, call)
    compiler = mk.compiler("aot_eager", backend="cpu")
    compiled = torch.compile(model, backend=compiler, fullgraph=True)
    got = run(model, inputs, lambda _, **inputs: compiled(**inputs))
    ran = raw_ops(lambda: run(model, inputs, lambda _, **inputs: compiled(**inputs)))
    assert len([name for name in ran if name.endswith("_fwd")]) == 10
    assert len([name for name in ran if name.endswith("_bwd")]) == 10
    assert counts(compiler.sites)["gate_residual_adaln"] == 4 and "DiTBlock (2)" in compiler.report()
    for name, each in got.items():
        torch.testing.assert_close(each, reference[name], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_inductor_behind_the_pass():
    model, inputs = made(), images()
    reference = run(model, inputs, call)
    compiler = mk.compiler(backend="cpu")
    compiled = torch.compile(model, backend=compiler)
    got = run(model, inputs, lambda _, **inputs: compiled(**inputs))
    assert len(compiler.sites) == 10
    for name, each in got.items():
        torch.testing.assert_close(each, reference[name], rtol=1e-3, atol=1e-4)


class LoRA(nn.Module):
    """As peft's layer: it shows the weight of its base."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.lora_A, self.lora_B = (
            nn.Linear(*each, bias=False) for each in ((base.in_features, 4), (4, base.out_features))
        )
        randomise(self.lora_B)

    @property
    def weight(self) -> torch.Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> torch.Tensor:
        return self.base_layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + self.lora_B(self.lora_A(x)) * 2.0


def add_lora(model: DiT) -> None:
    model.requires_grad_(False)
    for block in model.blocks:
        block.attn.qkv, block.attn.proj, block.mlp.fc1 = (
            LoRA(each) for each in (block.attn.qkv, block.attn.proj, block.mlp.fc1)
        )


def test_lora_before():
    model = made()
    add_lora(model)
    fused = check(model, images())
    # The MLP is no Linear, GELU, Linear any more; attention still reads one tensor of q, k and v.
    assert counts(fused.sites) == {"adaln": 1, "gate_residual_adaln": 4, "window_attention": 2, "patch_embed": 1}


def test_lora_after_and_off_again():
    model, inputs = made(), images()
    plain = copy.deepcopy(model)
    with mk.fuse(model, backend="cpu") as fused:
        base = model(**inputs)
        assert counts(fused.sites)["gelu_mlp"] == 2
        add_lora(model)
        with_lora = model(**inputs)
        with_lora.square().mean().backward()
    gradients = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    assert len(gradients) == 12 and all("lora" in name for name in gradients)
    model.zero_grad()
    eager = model(**inputs)
    eager.square().mean().backward()
    assert (with_lora - base).abs().max() > 0.01
    torch.testing.assert_close(with_lora, eager, rtol=1e-4, atol=1e-5)
    for name, each in model.named_parameters():
        if each.grad is not None:
            torch.testing.assert_close(gradients[name], each.grad, rtol=1e-3, atol=1e-5)
    with mk.fuse(plain, backend="cpu"):
        torch.testing.assert_close(plain(**inputs), base)


class Scaled(torch.Tensor):
    """A weight that holds other numbers than it shows, as those of quantised Linears do."""

    @staticmethod
    def __new__(cls, data):
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=data.dtype, device=data.device)

    def __init__(self, data):
        self.data_inside = data

    def __tensor_flatten__(self):
        return ["data_inside"], None

    @staticmethod
    def __tensor_unflatten__(inner, meta, size, stride):
        return Scaled(inner["data_inside"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        def plain(each):
            return each.data_inside * 2 if isinstance(each, Scaled) else each

        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return Scaled(func(args[0].data_inside))
        if func is torch.ops.aten.t.default:
            return Scaled(func(args[0].data_inside))
        return torch.utils._pytree.tree_map(plain, func(*torch.utils._pytree.tree_map(plain, args), **(kwargs or {})))


def test_a_weight_of_another_class_is_left():
    model = made()
    model.requires_grad_(False)
    for block in model.blocks:
        block.mlp.fc1.weight = nn.Parameter(Scaled(block.mlp.fc1.weight.detach() / 2), requires_grad=False)
    inputs = images()
    eager = model(**inputs)
    with mk.fuse(model, backend="cpu") as fused:
        y = model(**inputs)
    torch.testing.assert_close(y, eager, rtol=1e-4, atol=1e-5)
    assert "gelu_mlp" not in counts(fused.sites)
    assert any("Scaled" in each for each in reasons(fused.sites)), fused.report()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(ops=["adalm"]), ValueError, "ops has adalm; it may have adaln, attention, gate_residual"),
        (dict(ops="adaln"), TypeError, "ops is 'adaln'; it must be a collection of names"),
        (dict(ops=3), TypeError, "ops is 3"),
        (dict(mode="off"), ValueError, "mode is 'off'; it may be 'auto' or 'on'"),
        (dict(backend="gpu"), ValueError, "backend is 'gpu'; it may be one of reference, cpu, cuda, triton"),
        (dict(backend="cuda"), RuntimeError, "backend 'cuda' is not available"),
    ],
)
def test_errors_name_the_argument(options, error, message):
    with pytest.raises(error, match=message):
        mk.fuse(made(), **options)
    with pytest.raises(error, match=message):
        mk.compiler(**options)


def test_what_cannot_be_fused_is_refused():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got function"):
        mk.fuse(made)  # type: ignore[arg-type]
    model = made()
    model.compile()
    with pytest.raises(ValueError, match="compiled already"):
        mk.fuse(model)
    with pytest.raises(ValueError, match="compiled already"):
        mk.fuse(torch.compile(made()))
    with pytest.raises(TypeError, match="inner must be"):
        mk.compiler(3)  # type: ignore[arg-type]
