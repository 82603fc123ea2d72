"""``python -m minisora_kernels verify`` as a command, without a GPU."""

from __future__ import annotations

import argparse
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import KERNEL_BACKENDS
from verify_parts import CPU, KEY, QUICK, ROOT, end, needs_cpu, start

from minisora_kernels import automatic, backends
from minisora_kernels.__main__ import main
from minisora_kernels.verify import command, record
from minisora_kernels.verify.record import Record


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


@pytest.mark.slow
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
    holds, place = record.find(CPU)
    assert place == path
    for item in found.entries:  # of torch.compile, which a quick run leaves out, the record of the package speaks
        assert (
            replace(holds.by_regime[item.backend, item.op, item.regime], compile_ratio=None, times=item.times) == item
        )
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


@pytest.mark.slow
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
    "grn.py": {"        return *asked_for(needs, found), *(None,) * 4":
               "        return *asked_for(needs, (found[0], found[1] * 1.01, found[2])), *(None,) * 4"},
    # right and slow, in every call
    "guided_step.py": {"    return kernels(chosen).guided_step_fwd(":
                       "    __import__('time').sleep(0.02)\n    return kernels(chosen).guided_step_fwd(",
                       "@shortcut\n": ""},
    # a crash
    "unpatchify.py": {"        video = backends.apply(_Unpatchify,":
                      "        __import__('os').kill(__import__('os').getpid(), 11)\n"
                      "        video = backends.apply(_Unpatchify,"},
}  # fmt: skip


@needs_cpu
@pytest.mark.slow
def test_wrong_slow_and_crashing_kernels_are_named_and_not_used_and_a_home_may_be_read_only(tmp_path):
    root = tmp_path / "tree"
    shutil.copytree(ROOT / "minisora_kernels", root / "minisora_kernels", ignore=shutil.ignore_patterns("__pycache__"))
    for name, changes in PLANTED.items():
        path = root / "minisora_kernels" / "ops" / name
        text = path.read_text()
        for old, new in changes.items():
            assert old in text
            text = text.replace(old, new)
        path.write_text(text)
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
print(automatic.current_choices())
"""


@pytest.mark.slow
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


@pytest.mark.parametrize(
    ("changes", "out", "message"),
    [
        ({"VERIFIED": "0"}, None, "MINISORA_VERIFIED is 0: no record is ever read"),
        ({}, "", "which is a folder; it must be a file"),
        ({}, "file/x.json", "which cannot be written: "),
    ],
)
def test_what_cannot_be_written_is_refused_before_the_work(changes, out, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    for name, value in changes.items():
        monkeypatch.setattr(backends, name, value)
    monkeypatch.setattr(command, "phase_right", lambda *_: pytest.fail("it works"))
    options = [] if out is None else ["--out", str(tmp_path / out)]
    assert main(["verify", *options]) == 2
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]
