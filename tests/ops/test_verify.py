"""``python -m minisora_kernels verify``, its record, and the automatic choice that reads it; all without a GPU."""

from __future__ import annotations

import argparse
import errno
import importlib.metadata
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import types
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from conftest import KERNEL_BACKENDS

import minisora_kernels as mk
from minisora_kernels import automatic, backends
from minisora_kernels.verify import command, record, right
from minisora_kernels.verify.cases import MODULATED, checked, regimes
from minisora_kernels.verify.record import Entry, Key, Record

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
QUICK = ("--quick", "--tokens", "32", "--device", "cpu")

needs_cpu = pytest.mark.skipif(KERNEL_BACKENDS != ["cpu"], reason="the cpu kernels are not under test")


def start(*arguments: str, root: Path = ROOT, code: str | None = None, **variables: str) -> subprocess.Popen:
    """The command, or other Python code, on the package under ``root``."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("MINISORA_")}
    command = [sys.executable, "-m", "minisora_kernels", *arguments] if code is None else [sys.executable, "-c", code]
    return subprocess.Popen(
        command,
        cwd=root,
        env={**kept, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process: subprocess.Popen, status: int = 0) -> str:
    output, errors = process.communicate(timeout=300)
    assert process.returncode == status, output + errors
    return output + errors


def entry(
    backend: str = "cpu",
    op: str = "adaln",
    regime: str = "float32 forward",
    ratio: list[float] | None = [0.5, 0.6],  # noqa: B006 - never changed
    compile_ratio: list[float] | None = None,
    wrong: str = "",
) -> Entry:
    times: dict = {"ours": [10.0, None], "eager": [20.0, None]}
    return Entry(backend, op, regime, not wrong, None if wrong else 0.5, wrong, "float32", times, ratio, compile_ratio)


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
        (name,) = automatic.served().values()
    return name


# ---- the command


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """A cache folder after two processes at once have verified an op each."""
    if KERNEL_BACKENDS != ["cpu"]:
        pytest.skip("the cpu kernels are not under test")
    folder = tmp_path_factory.mktemp("cache")
    both = [start("verify", "--op", op, *QUICK, XDG_CACHE_HOME=str(folder)) for op in ("unpatchify", "guided_step")]
    for process in both:
        assert "record:" in end(process)
    return folder


def test_two_processes_at_once_leave_one_whole_record_of_both(cache, monkeypatch):
    (path,) = (cache / "minisora_kernels" / "verified").glob("*.json")
    assert not list(path.parent.glob("*.tmp"))
    found = record.load(path, record.key(CPU))
    assert {item.op for item in found.entries} == {"unpatchify", "guided_step"}
    # float32 and bfloat16, forward and with backward; guided_step has none
    assert len(found.entries) == 4 + 2
    for item in found.entries:
        assert item.right and 0 <= item.error <= 1 and item.ratio is not None, item
        assert item.times.keys() == {"ours", "eager"} and item.status in ("used", "slower here")
        assert item.status_in_compile == "not timed"
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setattr(backends, "VERIFIED", None)
    automatic.forget()
    assert record.find(CPU) == (found, path)
    automatic.forget()


def test_the_table_shows_what_becomes_of_every_kernel(cache, monkeypatch, capsys):
    from minisora_kernels.__main__ import main

    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setattr(backends, "VERIFIED", None)
    automatic.forget()
    assert main([]) == 0
    automatic.forget()
    printed = capsys.readouterr().out
    assert "guided_step          bfloat16 forward " in printed and "us per call" in printed


def test_kill_in_the_middle_leaves_the_old_record_and_no_lock(cache, tmp_path):
    folder = tmp_path / "cache"
    shutil.copytree(cache, folder)
    (path,) = (folder / "minisora_kernels" / "verified").glob("*.json")
    before = path.read_bytes()
    writer = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom minisora_kernels.verify import record\n"
        "path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(os.environ['RECORD'])\n"
        "found = record.load(path)\nos.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)\n"
        "with record.locked(path):\n    record.save(record.Record(found.key, {}, ()), path)\n"
    )
    process = start(code=writer, RECORD=str(path))
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    assert path.read_bytes() == before and len(list(path.parent.glob("*.tmp"))) == 1
    with record.locked(path):  # it was let go
        assert not list(path.parent.glob("*.tmp"))


PLANTED = {
    # a gradient that is wrong by 1%
    "grn.py": ("return *kernels(ctx.backend).grn_bwd(dy, *ctx.saved_tensors, ctx.gelu, ctx.eps), *(None,) * 4",
               "dx, dw, db = kernels(ctx.backend).grn_bwd(dy, *ctx.saved_tensors, ctx.gelu, ctx.eps)\n"
               "        return dx, dw * 1.01, db, *(None,) * 4"),
    # right and slow
    "guided_step.py": ("    return kernels(chosen).guided_step_fwd(",
                       "    __import__('time').sleep(0.02)\n    return kernels(chosen).guided_step_fwd("),
    # a crash
    "unpatchify.py": ("        video = backends.apply(_Unpatchify,",
                      "        __import__('os').kill(__import__('os').getpid(), 11)\n"
                      "        video = backends.apply(_Unpatchify,"),
}  # fmt: skip


@needs_cpu
def test_wrong_slow_and_crashing_kernels_are_named_and_not_used_and_a_home_may_be_read_only(tmp_path):
    root = tmp_path / "tree"
    shutil.copytree(ROOT / "minisora_kernels", root / "minisora_kernels", ignore=shutil.ignore_patterns("__pycache__"))
    for name, (old, new) in PLANTED.items():
        path = root / "minisora_kernels" / "ops" / name
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))
    ops = ("grn", "guided_step", "unpatchify", "gate_residual")
    printed = end(start("verify", "--op", *ops, *QUICK, root=root, XDG_CACHE_HOME="/dev/null"), status=1)
    for op, wanted in (("grn", "wrong here"), ("unpatchify", "wrong here"), ("guided_step", "slower here")):
        rows = [line for line in printed.splitlines() if line.startswith(f"{op} ")]
        assert rows and all(wanted in row for row in rows), printed
    assert "gradient of weight" in printed and "signal 11 in unpatchify-video float32" in printed
    rows = [line for line in printed.splitlines() if line.startswith("gate_residual ")]
    assert rows and not any("wrong here" in row for row in rows)
    assert "the record is not written" in printed


INTERPRETED = """
import warnings, torch, minisora_kernels as mk
from minisora_kernels import automatic
x, gate = torch.randn(1, 4, 8), torch.randn(1, 8)
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    for _ in range(3):
        mk.gate_residual(x, x, gate)
        mk.adaln(x, gate, gate)
print([str(w.message) for w in told if "minisora" in str(w.message)])
print(automatic.served())
"""


def test_with_the_interpreter_in_place_of_a_gpu(tmp_path):
    pytest.importorskip("triton")
    variables = {"TRITON_INTERPRET": "1", "XDG_CACHE_HOME": str(tmp_path)}
    printed = end(start(code=INTERPRETED, **variables))
    command = "run `python -m minisora_kernels verify`"
    assert printed.count(command) == 1 and "plain PyTorch instead of triton kernels: not verified on" in printed
    assert "{'gate_residual float32 forward': 'reference', 'adaln float32 forward': 'reference'}" in printed
    end(start("verify", "--op", "gate_residual", *QUICK, **variables))
    (path,) = (tmp_path / "minisora_kernels" / "verified").glob("interpreted-*.json")
    found = record.load(path)
    assert found.key.kind == "interpreted" and {item.backend for item in found.entries} == {"triton"}
    assert all(item.right for item in found.entries)
    # No interpreter is faster than PyTorch: say it were.
    fast = [replace(item, ratio=[0.5, 0.5]) for item in found.entries]
    record.save(found.merged(fast, {}), path)
    printed = end(start(code=INTERPRETED, **variables))
    assert "{'gate_residual float32 forward': 'triton', 'adaln float32 forward': 'reference'}" in printed
    assert "not verified for float32 forward on" in printed


def test_what_cannot_be_verified_is_an_error(monkeypatch, capsys):
    from minisora_kernels.__main__ import main

    assert main(["verify", "--op", "softmax"]) == 2
    assert "op is 'softmax'; it may be one of adaln," in capsys.readouterr().err
    assert main(["verify", "--device", "cuda:7"]) == 2 and main(["verify", "--device", "tpu"]) == 2
    assert "device is 'cuda:7'; torch finds 0 CUDA devices" in capsys.readouterr().err
    assert main(["verify", "--jobs", "0"]) == 2
    assert "jobs is 0; it must be at least 1" in capsys.readouterr().err
    monkeypatch.setattr(backends, "FORCED", "reference")
    assert main(["verify", "--device", "cpu"]) == 2
    assert "MINISORA_BACKEND is set" in capsys.readouterr().err
    monkeypatch.setattr(backends, "FORCED", None)
    monkeypatch.setattr(backends, "unavailable", lambda name: "it was not built")
    assert main(["verify", "--device", "cpu"]) == 2
    assert "no kernels are here for cpu (" in capsys.readouterr().err


@pytest.fixture
def worker(monkeypatch, tmp_path):
    """``worker(code)``: what runs in place of a worker, after it has begun a case."""

    def write(code: str) -> None:
        (tmp_path / "right.py").write_text('print(\'{"kind": "case", "case": "adaln-x"}\', flush=True)\n' + code)

    monkeypatch.setattr(command, "__package__", "")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(command, "START", command.START.replace("sys.argv.pop(1), run", "sys.argv.pop(1)[1:], run"))
    return write


def test_a_worker_that_hangs_is_ended(worker):
    worker("import time\ntime.sleep(60)\n")
    begun = time.perf_counter()
    done = command.work("right", [], lambda case: None, limit=3)
    assert done.ended == "took longer than 3 s in adaln-x" and time.perf_counter() - begun < 30
    assert done.outside and done.undecided


RESULT = 'print(\'{"kind": "result", "dtype": "float32", "KEY": VALUE}\', flush=True)\n'
DONE = 'print(\'{"kind": "done"}\', flush=True)\n'
LACK = RESULT.replace("KEY", "undecided").replace("VALUE", '"x: CUDA out of memory"')
KILLED = "import os\nos.kill(os.getpid(), 9)\n"


@pytest.mark.parametrize(
    ("first", "second", "status", "said"),
    [
        (LACK + DONE, LACK + DONE, "undecided", "x: CUDA out of memory"),
        (LACK + DONE, RESULT.replace("KEY", "error").replace("VALUE", "0.5") + DONE, "not timed", ""),
        (
            LACK + DONE,
            RESULT.replace("KEY", "wrong").replace("VALUE", '"x: output 0"') + DONE,
            "wrong here",
            "x: outpu",
        ),
        (KILLED, KILLED, "undecided", "ended with signal 9 in adaln-x"),
        (KILLED.replace("9", "11"), "1 / 0", "wrong here", "ended with signal 11 in adaln-x"),
    ],
)
def test_what_lacks_time_or_memory_is_tried_once_more_and_is_not_wrong(first, second, status, said, worker, tmp_path):
    place = tmp_path / "tries"
    worker(
        f"import pathlib\nplace = pathlib.Path({str(place)!r})\n"
        "first = not place.exists()\nwith place.open('a') as file:\n    file.write('x')\n"
        f"exec({first!r} if first else {second!r})\n"
    )
    options = argparse.Namespace(quick=True, jobs=2, device=CPU, precision="highest", tokens=None)
    found = command.Found()
    command.phase_right("cpu", ["adaln"], options, found)
    assert place.read_text() == ("x" if "11" in first else "xx")
    item = next(item for item in found.entries("cpu", ["adaln"], "float32") if item.regime == "float32 forward")
    assert item.status == item.status_in_compile == status and item.wrong.startswith(said)
    assert item.right is {"undecided": None, "wrong here": False}.get(status, True)
    record.save(Record(KEY, {}, (item,)), tmp_path / "record.json")
    assert record.load(tmp_path / "record.json").entries == (item,)


def test_an_undecided_kernel_serves_on_a_cpu_and_not_on_a_gpu(monkeypatch):
    for backend, wanted in (("cpu", None), ("triton", ("undecided", "undecided: took longer than 300 s"))):
        item = replace(entry(backend, wrong="took longer than 300 s", ratio=None), right=None)
        found = Record(KEY, {}, (item,)), Path("record.json")
        monkeypatch.setattr(record, "find", lambda device, found=found: found)
        for compiling in (False, True):
            assert record.refusal(backend, "adaln", CPU, "float32 forward", compiling) == wanted


@pytest.mark.parametrize(
    ("error", "lacking"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (AssertionError("output 0: error 3"), False),
    ],
)
def test_a_lack_of_memory_is_told_from_a_fault(error, lacking, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["right", "--op", "adaln", "--device", "cpu", "--backend", "cpu", "--quick"])
    monkeypatch.setattr(right, "selected", lambda *_: [(checked()[0], torch.float32)])

    def check(*_):
        raise error

    monkeypatch.setattr(right, "check", check)
    for name in ("set_float32_matmul_precision", "set_num_threads", "use_deterministic_algorithms"):
        monkeypatch.setattr(torch, name, lambda *_, **__: None)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    right.main()
    result = json.loads(capsys.readouterr().out.splitlines()[1])
    assert ("undecided" in result, "wrong" in result) == (lacking, not lacking)


# ---- right


@needs_cpu
def test_a_write_beyond_a_result_or_an_input_is_found():
    guarded = right.Guarded()
    x = guarded.empty("x", (2, 3), torch.float32, CPU)
    with guarded.allocations(CPU):
        y = torch.ones(4, 4).new_empty(2, 2)
        z = torch.empty_like(torch.ones(2, 3, dtype=torch.bfloat16))
    assert y.isnan().all() and z.isnan().all() and z.dtype == torch.bfloat16
    guarded.check()
    assert not torch.ones(2).new_empty(2).storage_offset()  # no longer in force
    y.as_strided((1,), (1,), y.storage_offset() + 4).fill_(0)
    with pytest.raises(AssertionError, match="wrote past the end of a result or a buffer"):
        guarded.check()
    x.as_strided((1,), (1,), x.storage_offset() - 1).fill_(0)
    with pytest.raises(AssertionError, match="wrote before the start of x"):
        guarded.check()


@needs_cpu
@pytest.mark.parametrize("memory_format", [torch.preserve_format, torch.contiguous_format])
@pytest.mark.parametrize(
    "like",
    [torch.ones(4, 6).t(), torch.ones(3, 8).chunk(2, -1)[1], torch.ones(3, 1, 4).expand(3, 5, 4), torch.ones(0, 3)],
)
def test_guarded_results_have_the_strides_that_torch_gives_them(like, memory_format):
    guarded = right.Guarded()
    wanted = torch.empty_like(like, memory_format=memory_format)
    with guarded.allocations(CPU):
        found = torch.empty_like(like, memory_format=memory_format)
    assert found.stride() == wanted.stride() and found.shape == like.shape and found.isnan().all()
    assert found.storage_offset() == right.MARGIN
    guarded.check()
    found.fill_(1)
    guarded.check()


@needs_cpu
def test_a_write_between_the_rows_of_an_input_is_found():
    guarded = right.Guarded()
    x = guarded.empty("shift", (2, 3), torch.float32, CPU, (12, 1), 1)
    assert x.data_ptr() % 16 == 4 and x.stride() == (12, 1)
    x.fill_(1)
    guarded.check()
    x.as_strided((1,), (1,), x.storage_offset() + 3).fill_(0)
    with pytest.raises(AssertionError, match="wrote between the rows of shift"):
        guarded.check()


@needs_cpu
def test_kernels_get_the_layouts_that_models_give(monkeypatch):
    laid = [case for case in checked() if case.layout]
    ops = {op for op, _, _ in regimes()}
    assert {case.op for case in laid if case.layout == "offset"} == ops
    assert {case.op for case in laid if case.layout == "chunked"} == set(MODULATED)
    for case in laid:
        given = []

        def call(t, backend, call=case.call, given=given):
            given.append((backend, t))
            return call(t, backend=backend)

        assert right.check(replace(case, call=call), torch.float32, "cpu") <= 1
        for backend, tensors in given:
            if backend != "cpu":
                continue
            for name, tensor in tensors.items():
                if case.layout == "offset":
                    assert tensor.data_ptr() % 16 and tensor.is_contiguous(), f"{case} {name}"
                elif name in ("shift", "scale", "gate"):
                    assert not tensor.is_contiguous() and tensor.stride(-1) == 1, f"{case} {name}"


@needs_cpu
@pytest.mark.parametrize("fault", ["value", "gradient", "input", "bits", "nan"])
def test_every_kind_of_fault_is_found(fault, monkeypatch):
    case = next(case for case in checked() if case.op == "gate_residual")
    call, count = case.call, [0]

    def broken(t, backend):
        y = call(t, backend=backend)
        if backend == "reference":
            return y
        count[0] += 1
        if fault == "value":
            return y * 1.01
        if fault == "gradient":
            return y + 0.01 * (t["gate"] - t["gate"].detach()).sum()
        if fault == "input":
            with torch.no_grad():
                t["x"].mul_(2)
        if fault == "bits" and count[0] == 3:
            return y * (1 + 1e-6)
        if fault == "nan":
            return torch.where(torch.arange(y.shape[-1]) == 0, y.new_empty(y.shape), y)
        return y

    said = {
        "value": "output 0",
        "gradient": "gradient of gate",
        "input": "x: the kernel changed its input",
        "bits": "output 0: other bits beside other work",
        "nan": "not finite",
    }
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    right.check(case, torch.float32, "cpu")
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(AssertionError, match=said[fault]):
            right.check(replace(case, call=broken), torch.float32, "cpu")
    finally:
        torch.use_deterministic_algorithms(False)


# ---- the record


KEY = Key("cuda", "NVIDIA H200", "cc9.0", "2.11.0+cu130", "3.6.0", "none", "ab" * 32)


def damaged(change) -> bytes:
    raw = {"format": 1, "key": asdict(KEY), "made": {}}
    item = entry(backend="triton")
    raw["entries"] = [asdict(item) | {name: getattr(item, name) for name in record.DERIVED}]
    change(raw)
    return json.dumps(raw).encode()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is not JSON"),
        (b'{"format": 1, "key"', "it is not JSON"),
        (b"\xff\xfe\x00", "it is not JSON"),
        (b"[" * 100_000, "it is not JSON"),
        (b" " * (5 << 20), "it is larger than"),
        (b"[]", "the fields of a record"),
        (damaged(lambda raw: raw.update(format=2)), "its format is 2"),
        (damaged(lambda raw: raw.update(format=True)), "its format is True"),
        (damaged(lambda raw: raw.update(more=1)), "the fields of a record"),
        (
            damaged(lambda raw: raw["key"].update(device="NVIDIA A100")),
            "made on device 'NVIDIA A100'; this is device 'NVIDIA H200'",
        ),
        (damaged(lambda raw: raw["key"].update(digest="cd" * 32)), "digest"),
        (damaged(lambda raw: raw["key"].update(triton=None)), "its key is not whole"),
        (damaged(lambda raw: raw.update(entries={})), "its entries are not whole"),
        (damaged(lambda raw: raw["entries"].append(raw["entries"][0])), "two entries of one regime"),
        (damaged(lambda raw: raw["entries"].append(3)), "lacks a field"),
        (damaged(lambda raw: raw["entries"][0].pop("error")), "lacks a field"),
        (damaged(lambda raw: raw["entries"][0].update(right=1)), "of another type"),
        (damaged(lambda raw: raw["entries"][0].update(op=7)), "of another type"),
        (damaged(lambda raw: raw["entries"][0].update(backend="reference")), "backend is 'reference'"),
        (damaged(lambda raw: raw["entries"][0].update(regime="float8 forward")), "regime is 'float8 forward'"),
        (damaged(lambda raw: raw["entries"][0].update(error=1.5)), "error is 1.5, right is True"),
        (damaged(lambda raw: raw["entries"][0].update(error=None)), "error is None, right is True"),
        (damaged(lambda raw: raw["entries"][0].update(error=float("nan"))), "error is nan"),
        (damaged(lambda raw: raw["entries"][0].update(right=False)), "use is True, which its figures do not say"),
        (damaged(lambda raw: raw["entries"][0].update(use=False)), "use is False, which its figures do not say"),
        (damaged(lambda raw: raw["entries"][0].update(ratio=[0.99, 1.0])), "use is True, which its figures do not say"),
        (damaged(lambda raw: raw["entries"][0].update(ratio=[0.5])), r"ratio is \[0.5\]"),
        (damaged(lambda raw: raw["entries"][0].update(ratio=[-1, 0.5])), "ratio is"),
        (damaged(lambda raw: raw["entries"][0].update(ratio=[0.6, 0.5])), "ratio is"),
        (damaged(lambda raw: raw["entries"][0].update(compile_ratio=["a", "b"])), "compile_ratio is"),
        (damaged(lambda raw: raw["entries"][0].update(times={"ours": [1e400, None]})), "times are"),
        (damaged(lambda raw: raw["entries"][0].update(times={"theirs": [1, None]})), "times are"),
        (damaged(lambda raw: raw["entries"][0].update(times=[])), "times are"),
        (damaged(lambda raw: raw["entries"][0].update(why="it is good")), "why is 'it is good'"),
    ],
)
def test_a_damaged_or_foreign_record_is_warned_of_and_not_trusted(content, reason, tmp_path, monkeypatch):
    path = tmp_path / "record.json"
    path.write_bytes(content)
    with pytest.raises(record.NotARecord, match=reason):
        record.load(path, KEY)
    monkeypatch.setattr(backends, "VERIFIED", str(path))
    monkeypatch.setattr(record, "key", lambda device: KEY)
    record.find.cache_clear()
    with pytest.warns(UserWarning, match=f"the record {path} is not used: .*{reason}"):
        assert record.find(CPU) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert record.find(CPU) is None  # once
    assert record.refusal("triton", "adaln", CPU, "float32 forward", False)[0] == "not verified"
    record.find.cache_clear()


def test_a_record_comes_back_as_it_was(tmp_path):
    path = tmp_path / "deep" / KEY.file_name
    whole = Record(
        KEY,
        {"threads": 2},
        (entry(), entry(op="grn", wrong="odd: gradient of x"), entry(regime="float16 forward", ratio=None)),
    )
    record.save(whole, path)
    assert record.load(path, KEY) == whole and path.stat().st_mode & 0o777 == 0o644
    assert path.name.startswith("cuda-nvidia_h200-cc9.0-torch2.11.0+cu130-triton3.6.0-flash_none-abab")
    assert str(KEY) == "NVIDIA H200 with torch 2.11.0, Triton 3.6.0"


def test_a_record_that_cannot_be_read_or_written_is_no_crash(tmp_path, monkeypatch):
    with pytest.raises(OSError):
        record.save(Record(KEY, {}, ()), Path("/dev/null/record.json"))
    with record.locked(Path("/dev/null/record.json")):
        pass
    monkeypatch.setattr(backends, "VERIFIED", str(tmp_path))  # a folder
    record.find.cache_clear()
    with pytest.warns(UserWarning, match="is not used"):
        assert record.find(CPU) is None
    record.find.cache_clear()


UNREADABLE = """
import ctypes, os, warnings
from pathlib import Path
home = Path(os.environ["XDG_CACHE_HOME"])
if os.getuid() == 0:  # root may search every folder, until it gives its capabilities away
    ctypes.CDLL(None).capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())
try:
    (home / "minisora_kernels").exists()
    raise SystemExit("the folder may be searched")
except PermissionError:
    pass
import torch, minisora_kernels as mk
from minisora_kernels import automatic
from minisora_kernels.__main__ import main
x, gate = torch.randn(1, 4, 8), torch.randn(1, 8)
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    mk.gate_residual(x, x, gate)
    mk.adaln(x, gate, gate)
print([str(w.message) for w in told if "minisora" in str(w.message)])
print(automatic.served())
raise SystemExit(main(["verify", "--op", "unpatchify", "--quick", "--tokens", "32", "--device", "cpu", *OPTIONS]))
"""


@needs_cpu
@pytest.mark.parametrize("options", [[], ["--missing-only"]])
def test_a_home_that_may_not_be_searched_is_no_crash(options, tmp_path):
    """As HOME=/root under another user's id, which is common in containers."""
    home = tmp_path / "home"
    home.mkdir(0)
    code = UNREADABLE.replace("*OPTIONS", ", ".join(map(repr, options)))
    try:
        printed = end(start(code=code, XDG_CACHE_HOME=str(home)))
    finally:
        home.chmod(0o700)
    assert printed.count("is not used: [Errno 13] Permission denied") == 1, printed
    assert "'gate_residual float32 forward': 'cpu', 'adaln float32 forward': 'cpu'" in printed
    assert "the record is not written: [Errno 13] Permission denied" in printed


def test_a_file_system_without_locks_is_no_crash(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    asked = []

    def no_locks(*arguments):
        asked.append(arguments)
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with record.locked(tmp_path / "record.json"):
        pass
    assert asked
    with pytest.raises(OSError, match="of the block"), record.locked(tmp_path / "record.json"):
        raise OSError("of the block")


def test_a_named_record_that_is_not_there_is_warned_of(tmp_path, monkeypatch):
    monkeypatch.setattr(backends, "VERIFIED", str(tmp_path / "none.json"))
    automatic.forget()
    with pytest.warns(UserWarning, match="none.json is not used"):
        assert record.find(CPU) is None
    automatic.forget()


def test_a_record_is_of_what_serves_long_windows(monkeypatch, tmp_path):
    installed = {"triton": "3.6.0"}

    def version(name):
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    properties = types.SimpleNamespace(name="NVIDIA H200", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(importlib.metadata, "version", version)
    keys = [record.key(torch.device("cuda", 0))]
    for name, number in (("flash-attn", "2.8.3"), ("flash-attn", "2.9.0"), ("flash-attn-4", "4.0.0")):
        installed[name] = number
        keys.append(record.key(torch.device("cuda", 0)))
    assert [found.flash_attn for found in keys] == [
        "none",
        "flash-attn 2.8.3",
        "flash-attn 2.9.0",
        "flash-attn 2.9.0, flash-attn-4 4.0.0",
    ]
    assert len({found.file_name for found in keys}) == 4 and str(keys[1]).endswith("Triton 3.6.0, flash-attn 2.8.3")
    record.save(Record(keys[0], {}, ()), tmp_path / "record.json")
    with pytest.raises(record.NotARecord, match=r"on flash_attn 'none'; this is flash_attn 'flash-attn 2"):
        record.load(tmp_path / "record.json", keys[1])


def test_the_digest_changes_with_the_sources(tmp_path, monkeypatch):
    shutil.copytree(
        ROOT / "minisora_kernels", tmp_path / "package", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    monkeypatch.setattr(record, "PACKAGE", tmp_path / "package")
    digests = []
    for name in ("ops/grn.py", "triton/_rows.py", "README", "modulation.py", "backends.py"):
        record.digest.cache_clear()
        digests.append(record.digest("cuda"))
        with open(tmp_path / "package" / name, "a") as file:
            file.write("\n")
    record.digest.cache_clear()
    digests.append(record.digest("cuda"))
    record.digest.cache_clear()
    changed = [one != other for one, other in itertools.pairwise(digests)]
    assert changed == [True, True, False, True, True]


# ---- the choice


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
        found = automatic.served()
    assert found == {
        "adaln float32 forward compiled": "reference",
        "gate_residual float32 forward compiled": "cpu",
        "grn float32 forward compiled": "reference",
        "unpatchify float32 forward compiled": "cpu",
    }


@needs_cpu
def test_within_compile_what_refuses_a_call_has_not_served_it(holds):
    holds()
    x, weight = torch.randn(1, 4, 8), torch.randn(8, 8)
    torch._dynamo.reset()
    with automatic.keep({}):
        for approximate in ("none", "tanh"):
            call = torch.compile(
                lambda x, approximate=approximate: mk.gelu_mlp(x, weight, None, weight, None, approximate=approximate),
                fullgraph=True,
                backend="eager",
            )
            torch.testing.assert_close(
                call(x), mk.gelu_mlp(x, weight, None, weight, None, approximate=approximate, backend="reference")
            )
            within = automatic.served()["gelu_mlp float32 forward compiled"]
            assert within == ("reference" if approximate == "none" else "cpu")


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
def test_windows_and_patches_have_regimes_of_their_own(holds):
    holds()
    qkv = torch.randn(1, 72, 3, 1, 8)
    bias = torch.randn(1, 72, 72)
    names = {
        "short plain": lambda: mk.window_attention(qkv, (2, 6, 6), (2, 1, 1)),
        "short norm": lambda: mk.window_attention(qkv, (2, 6, 6), (2, 1, 1), qk_norm="rms"),
        "long plain": lambda: mk.window_attention(qkv, (2, 6, 6), (2, 6, 6)),
        "long norm": lambda: mk.window_attention(qkv, (2, 6, 6), (2, 6, 6), rope=mk.rope_3d((2, 6, 6), 8)),
        "long bias": lambda: mk.window_attention(qkv, (2, 6, 6), (2, 6, 6), bias=bias),
        "short": lambda: mk.patch_embed(torch.randn(1, 4, 4, 4), torch.randn(8, 4, 2, 2)),
        "long": lambda: mk.patch_embed(torch.randn(1, 4, 16, 16), torch.randn(8, 4, 16, 16)),
    }
    with automatic.keep({}):
        for call in names.values():
            call()
        found = [label.split(" ", 3)[3] for label in automatic.served()]
    assert found == list(names)
    known = {(op, rest) for op, _, rest in regimes()}
    assert all(
        (label.split(" ")[0], "forward " + detail) in known
        for label, detail in zip(automatic.served(), found, strict=False)
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
    record.save(Record(replace(elsewhere, capability="AVX2"), {}, (fast,)), record.SHIPPED / "cpu-AVX2.json")
    record.save(
        Record(replace(elsewhere, capability="AVX512_BF16"), {}, (slow,)), record.SHIPPED / "cpu-AVX512_BF16.json"
    )
    for capability, name in (("AMX", "AVX512_BF16"), ("AVX512_BF16", "AVX512_BF16"), ("AVX2", "AVX2")):
        monkeypatch.setattr(
            record, "key", lambda device, capability=capability: replace(elsewhere, capability=capability)
        )
        automatic.forget()
        assert record.find(CPU)[1].name == f"cpu-{name}.json"
        assert served(mk.adaln, X, GATE, GATE) == ("cpu" if name == "AVX2" else "reference")
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
        assert automatic.served() == stored | {"grn float32 forward": "reference"}
    assert served(mk.adaln, X, GATE, GATE) == "reference"
    assert served(mk.gate_residual, X, X, GATE) == "cpu"
