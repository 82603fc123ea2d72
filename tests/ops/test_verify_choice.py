"""The automatic choice, which reads the record of ``verify``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from verify_parts import CPU, KEY, entry, needs_cpu

import minisora_kernels as mk
from minisora_kernels import automatic, backends
from minisora_kernels.verify import record
from minisora_kernels.verify.cases import regimes
from minisora_kernels.verify.record import Entry, Record


@pytest.fixture
def holds(monkeypatch, tmp_path):
    """``holds(entries)``: a record of this device with them is the one that is read."""
    monkeypatch.setattr(automatic, "_warned", set())
    monkeypatch.setattr(automatic, "_logged", set())

    def write(*entries: Entry) -> Path:
        path = tmp_path / "record.json"
        record.save(Record(record.key(CPU), {}, entries), path)
        monkeypatch.setattr(backends, "VERIFIED", str(path))
        automatic.forget()
        return path

    yield write
    monkeypatch.undo()
    automatic.forget()


def served(call, *tensors, **options) -> str:
    """The backend that an automatic choice takes for a call."""
    with automatic.keep({}):
        call(*tensors, **options)
        (name,) = automatic.current_choices().values()
    return name


X, GATE = torch.randn(1, 4, 8), torch.randn(1, 8)


@needs_cpu
def test_on_a_cpu_a_kernel_serves_unless_a_record_speaks_against_it(holds, monkeypatch, caplog):
    caplog.set_level("INFO", logger="minisora_kernels")
    holds(
        entry(op="adaln", ratio=[1.05, 1.1]),
        entry(op="gate_residual", wrong="odd: gradient of x"),
        entry(op="gate_residual", regime="float32 forward+backward", ratio=[0.94, 0.99]),
        entry(op="gate_residual", regime="bfloat16 forward", ratio=[0.94, 1.0]),
    )
    assert served(mk.adaln, X, GATE, GATE) == "reference"
    assert served(mk.gate_residual, X, X, GATE) == "reference"
    assert served(mk.gate_residual, X.clone().requires_grad_(), X, GATE) == "cpu"
    assert served(mk.gate_residual, X.bfloat16(), X.bfloat16(), GATE.bfloat16()) == "reference"
    assert served(mk.gate_residual, X.half(), X.half(), GATE.half()) == "cpu"  # not in the record
    assert served(mk.adaln, X.clone().requires_grad_(), GATE, GATE) == "cpu"
    with torch.no_grad():
        assert served(mk.adaln, X.clone().requires_grad_(), GATE, GATE) == "reference"
    mk.adaln(X, GATE, GATE, backend="cpu")  # by name it runs
    assert "adaln: not the cpu backend: slower here: 1.05 of plain PyTorch's time (float32 forward)" in caplog.messages
    assert "gate_residual: not the cpu backend: wrong here: odd: gradient of x" in caplog.messages
    monkeypatch.setattr(backends, "VERIFIED", "0")
    automatic.forget()
    assert served(mk.adaln, X, GATE, GATE) == "cpu"


@needs_cpu
def test_within_compile_the_choice_is_by_the_time_of_compile(holds):
    holds(
        entry(op="adaln", compile_ratio=[1.2, 1.3]),
        entry(op="gate_residual", ratio=[1.2, 1.3], compile_ratio=[0.8, 0.9]),
        entry(op="grn", ratio=[1.2, 1.3]),
    )

    def calls(x):
        return (
            mk.adaln(x, GATE, GATE),
            mk.gate_residual(x, x, GATE),
            mk.grn(x, GATE[0], GATE[0]),
            mk.unpatchify(x, (2, 2), (2, 1), 4),
        )

    torch._dynamo.reset()
    with automatic.keep({}):
        torch.compile(calls, fullgraph=True, backend="eager")(X)
        found = automatic.current_choices()
    assert found == {
        "adaln float32 forward compiled": "reference",
        "gate_residual float32 forward compiled": "cpu",
        "grn float32 forward compiled": "reference",
        "unpatchify float32 forward compiled": "cpu",
    }


@needs_cpu
def test_within_compile_what_refuses_a_call_has_not_served_it(holds):
    holds()
    torch._dynamo.reset()
    for head_dim, backend in ((20, "reference"), (16, "cpu")):  # the kernels take multiples of 8
        qkv = torch.randn(1, 4, 3, 1, head_dim)
        with automatic.keep({}):
            call = torch.compile(
                lambda qkv: mk.window_attention(qkv, (4, 1, 1), (4, 1, 1)), fullgraph=True, backend="eager"
            )
            expected = mk.window_attention(qkv, (4, 1, 1), (4, 1, 1), backend="reference")
            torch.testing.assert_close(call(qkv), expected)
            (within,) = (name for label, name in automatic.current_choices().items() if label.endswith("compiled"))
            assert within == backend


def test_of_two_kernels_the_faster_one_goes_first(holds, monkeypatch):
    monkeypatch.setattr(backends, "PREFERENCE", {"cpu": ("triton", "cpu", "reference")})
    monkeypatch.setattr(backends, "unavailable", lambda name: None)
    holds(
        entry("triton", ratio=[0.8, 0.9], compile_ratio=[0.6, 0.7]),
        entry("cpu", ratio=[0.7, 0.8], compile_ratio=[0.65, 0.7]),
        entry("triton", "grn", ratio=[0.8, 0.9]),
        entry("cpu", "grn", wrong="odd: y"),
        entry("triton", "unpatchify", ratio=[0.9, 0.95]),
    )

    def order(op: str, compiling: bool = False) -> tuple[str, ...]:
        return automatic._order(op, ("reference", "cpu", "triton"), CPU, "float32 forward", compiling=compiling)

    assert order("adaln") == ("cpu", "triton", "reference")
    assert order("adaln", compiling=True) == ("triton", "cpu", "reference")
    assert order("grn") == ("triton", "reference")
    assert order("unpatchify") == ("triton", "cpu", "reference")  # nobody timed the other one
    with automatic.keep({"adaln float32 forward": "triton"}):
        assert order("adaln") == ("triton", "cpu", "reference")


def test_a_record_covers_a_precision_once_it_has_every_op_in_it():
    ops = sorted({op for op, _, _ in regimes()})
    whole = Record(KEY, {}, tuple(entry("triton", op, "tf32 forward") for op in ops))
    assert whole.covers("tf32") and not whole.covers("float32")
    for op in ops:
        part = replace(whole, entries=tuple(item for item in whole.entries if item.op != op))
        assert not part.covers("tf32")
    half = Record(KEY, {}, tuple(entry("triton", op, "bfloat16 forward") for op in ops))
    assert not half.covers("tf32") and not half.covers("float32")
    assert whole.merged([entry("triton", op, "float32 forward") for op in ops], {}).covers("float32")


@needs_cpu
def test_windows_patches_and_heads_have_regimes_of_their_own(holds):
    holds()
    qkv = torch.randn(1, 72, 3, 1, 8)
    q, k, v = qkv.unbind(2)
    bias = torch.randn(1, 72, 72)
    names = {
        "short plain": lambda: mk.window_attention(qkv, (2, 6, 6), (2, 1, 1)),
        "short norm": lambda: mk.window_attention(qkv, (2, 6, 6), (2, 1, 1), qk_norm="rms"),
        "long plain": lambda: mk.window_attention(qkv, (2, 6, 6), (2, 6, 6)),
        "long norm": lambda: mk.window_attention(qkv, (2, 6, 6), (2, 6, 6), rope=mk.rope_3d((2, 6, 6), 8)),
        "long bias": lambda: mk.window_attention(qkv, (2, 6, 6), (2, 6, 6), bias=bias),
        "short": lambda: mk.patch_embed(torch.randn(1, 4, 4, 4), torch.randn(8, 4, 2, 2)),
        "long": lambda: mk.patch_embed(torch.randn(1, 4, 16, 16), torch.randn(8, 4, 16, 16)),
        "plain": lambda: mk.attention(q, k, v),
        "padded": lambda: mk.attention(q, k, v, lengths=torch.tensor([5])),
        "norm": lambda: mk.attention(q, k, v, lengths=torch.tensor([5]), qk_norm="rms"),
        "per head": lambda: mk.norm_rope(q, norm="rms"),
        "across": lambda: mk.norm_rope(q, norm="rms", across_heads=True),
    }
    with automatic.keep({}):
        for call in names.values():
            call()
        found = [label.split(" ", 3)[3] for label in automatic.current_choices()]
    assert found == list(names)
    known = {(op, rest) for op, _, rest in regimes()}
    assert all(
        (label.split(" ")[0], "forward " + detail) in known
        for label, detail in zip(automatic.current_choices(), found, strict=False)
    )


@pytest.mark.parametrize(
    ("status", "item", "said"),
    [
        ("not verified", None, "not verified on NVIDIA H200 with torch 2.11.0, Triton 3.6.0: run `python -m minisora"),
        ("not verified", entry("triton", regime="float16 forward"), "not verified for float32 forward on NVIDIA H200"),
        ("not verified", entry("triton", ratio=None), "not timed: run `python -m"),
        ("slower here", entry("triton", ratio=[1.2, 1.4]), "slower here: 1.20 of plain PyTorch's time"),
        ("wrong here", entry("triton", wrong="odd: gradient of x"), "wrong here: odd: gradient of x"),
    ],
)
def test_on_a_gpu_a_kernel_serves_only_by_a_record(status, item, said, monkeypatch):
    found = None if item is None else (Record(KEY, {}, (item,)), Path("record.json"))
    monkeypatch.setattr(record, "find", lambda device: found)
    monkeypatch.setattr(record, "key", lambda device: KEY)
    verdict = record.refusal("triton", "adaln", torch.device("cuda", 0), "float32 forward", False)
    assert verdict[0] == status and verdict[1].startswith(said)
    good = Record(KEY, {}, (entry("triton"),)), Path("record.json")
    monkeypatch.setattr(record, "find", lambda device: good)
    assert record.refusal("triton", "adaln", torch.device("cuda", 0), "float32 forward", False) is None
    within = record.refusal("triton", "adaln", torch.device("cuda", 0), "float32 forward", True)
    assert within[0] == "not verified" and "without --quick" in within[1]


@needs_cpu
def test_the_record_that_comes_with_the_package_holds_for_every_cpu(monkeypatch, tmp_path):
    monkeypatch.setattr(record, "SHIPPED", tmp_path / "records")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(backends, "VERIFIED", None)
    elsewhere = replace(record.key(CPU), device="Another CPU", torch="2.10.0", digest="00")
    slow, fast = entry(ratio=[1.2, 1.3]), entry(ratio=[0.5, 0.6])
    further = entry(op="gate_residual", ratio=[1.2, 1.3])
    record.save(Record(replace(elsewhere, capability="AVX2"), {}, (fast, further)), record.SHIPPED / "cpu-AVX2.json")
    record.save(
        Record(replace(elsewhere, capability="AVX512_BF16"), {}, (slow,)), record.SHIPPED / "cpu-AVX512_BF16.json"
    )
    for capability, name in (("AMX", "AVX512_BF16"), ("AVX512_BF16", "AVX512_BF16"), ("AVX2", "AVX2")):
        monkeypatch.setattr(
            record, "key", lambda device, capability=capability: replace(elsewhere, capability=capability)
        )
        automatic.forget()
        assert record.find(CPU)[1].name == f"cpu-{name}.json"
        assert record.find(CPU)[0].key.capability == name
        assert served(mk.adaln, X, GATE, GATE) == ("cpu" if name == "AVX2" else "reference")
        assert served(mk.gate_residual, X, X, GATE) == "reference"  # which the other record says
    own = record.own_path(CPU)
    record.save(Record(record.key(CPU), {}, (slow,)), own)
    automatic.forget()
    assert record.find(CPU)[1] == own
    own.write_bytes(b"damaged")
    automatic.forget()
    with pytest.warns(UserWarning, match="is not used"):
        assert record.find(CPU)[1].name == "cpu-AVX2.json"
    monkeypatch.undo()
    automatic.forget()


@needs_cpu
def test_what_ones_own_record_leaves_out_the_one_of_the_package_says(monkeypatch, tmp_path):
    monkeypatch.setattr(record, "SHIPPED", tmp_path / "records")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(backends, "VERIFIED", None)
    here = record.key(CPU)
    slow, fast = {"ratio": [1.2, 1.3], "compile_ratio": [0.5, 0.6]}, {"ratio": [0.5, 0.6], "compile_ratio": None}
    shipped = (entry(op="adaln", **slow), entry(op="gate_residual", **slow))
    record.save(Record(here, {}, shipped), record.SHIPPED / f"cpu-{here.capability}.json")
    record.save(Record(here, {}, (entry(op="adaln", **fast),)), record.own_path(CPU))
    automatic.forget()
    assert served(mk.adaln, X, GATE, GATE) == "cpu" and served(mk.gate_residual, X, X, GATE) == "reference"
    # A quick run says nothing of torch.compile, so what was said of it stays.
    assert all(item.compile_ratio == [0.5, 0.6] for item in record.find(CPU)[0].entries)
    monkeypatch.undo()
    automatic.forget()


def test_the_records_of_the_package_are_whole():
    for path in record.SHIPPED.glob("*.json"):
        found = record.load(path)
        assert path.name in (found.key.file_name, f"cpu-{found.key.capability}.json")
        assert all(item.right for item in found.entries), path


@needs_cpu
def test_a_run_keeps_to_what_served_it_where_it_can(holds):
    holds(entry(op="adaln", ratio=[1.2, 1.3]), entry(op="grn", wrong="odd"))
    stored = {
        "adaln float32 forward": "cpu",
        "grn float32 forward": "cpu",
        "gate_residual float32 forward": "reference",
    }
    weight = GATE[0]
    with automatic.keep(stored):
        mk.adaln(X, GATE, GATE)
        mk.grn(X, weight, weight)
        mk.gate_residual(X, X, GATE)
        assert automatic.current_choices() == stored | {"grn float32 forward": "reference"}
    assert served(mk.adaln, X, GATE, GATE) == "reference"
    assert served(mk.gate_residual, X, X, GATE) == "cpu"


def test_an_undecided_kernel_serves_on_a_cpu_and_not_on_a_gpu(monkeypatch):
    for backend, wanted in (("cpu", None), ("triton", ("undecided", "undecided: took longer than 300 s"))):
        item = replace(entry(backend, wrong="took longer than 300 s", ratio=None), right=None)
        found = Record(KEY, {}, (item,)), Path("record.json")
        monkeypatch.setattr(record, "find", lambda device, found=found: found)
        for compiling in (False, True):
            assert record.refusal(backend, "adaln", CPU, "float32 forward", compiling) == wanted
