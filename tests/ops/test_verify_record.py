"""The record of ``verify`` as a file: what is read, written and not trusted."""

from __future__ import annotations

import errno
import itertools
import json
import shutil
import warnings
from dataclasses import asdict
from pathlib import Path

import pytest
from verify_parts import CPU, KEY, ROOT, end, entry, needs_cpu, start

from minisora_kernels import automatic, backends
from minisora_kernels.verify import record
from minisora_kernels.verify.record import Record


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
    assert path.name.startswith("cuda-nvidia_h200-cc9.0-torch2.11.0+cu130-triton3.6.0-abab")
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
print(automatic.current_choices())
raise SystemExit(main(["verify", "--op", "unpatchify", "--quick", "--tokens", "32", "--device", "cpu", *OPTIONS]))
"""


@needs_cpu
@pytest.mark.parametrize("options", [[], ["--missing-only"]])
@pytest.mark.slow
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
