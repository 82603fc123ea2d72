"""``import minisora_kernels`` needs only torch, is quick and starts no CUDA; a broken library is an error."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from minisora_kernels import backends

ROOT = Path(__file__).parents[2]


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )


def test_import_needs_only_torch_and_starts_no_cuda():
    done = python(
        "import sys\n"
        "class Refuse:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in {'triton', 'einops', 'flash_attn', 'av', 'tyro', 'setuptools', 'models'}:\n"
        "            raise ImportError('refused: ' + name)\n"
        "import torch\n"
        "before = set(sys.modules)\n"
        "sys.meta_path.insert(0, Refuse())\n"
        "import minisora_kernels\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)\n"
        "print(sorted(new), torch.cuda.is_initialized())\n"
    )
    assert done.stdout.strip() == "['minisora_kernels'] False", done.stdout + done.stderr


def test_import_adds_little_to_torch():
    done = python(
        "import torch, time\nstart = time.perf_counter()\nimport minisora_kernels\nprint(time.perf_counter() - start)"
    )
    assert float(done.stdout) < 1.0, done.stderr  # a tenth of this on an idle machine


def test_the_reference_can_be_forced_from_the_environment():
    done = python(
        "import torch, minisora_kernels as mk\n"
        "x = torch.randn(2, 3, 8)\n"
        "mk.gate_residual(x, x, x)\n"
        "try:\n    mk.gate_residual(x, x, x, backend='cpu')\n"
        "except RuntimeError as error:\n    print(error)\n",
        MINISORA_BACKEND="reference",
    )
    assert "MINISORA_BACKEND=reference: the libraries were not loaded" in done.stdout, done.stderr


UNKNOWN = "MINISORA_BACKEND is 'gpu'; it may be one of reference, cpu, cuda, triton"


def test_an_unknown_backend_in_the_environment_is_an_error_of_the_first_call():
    call = "import torch, minisora_kernels as mk\nx = torch.ones(1, 1, 1)\nmk.gate_residual(x, x, x)"
    done = python(call, MINISORA_BACKEND="gpu")
    assert done.returncode == 1 and UNKNOWN in done.stderr


@pytest.mark.parametrize("command", ["minisora_kernels", "models.train"])
def test_a_command_says_so_in_one_line(command):
    done = python(f"import runpy; runpy.run_module({command!r}, run_name='__main__')", MINISORA_BACKEND="gpu")
    assert done.returncode and done.stderr == f"error: the environment variable {UNKNOWN}\n", done.stderr


def test_a_cpu_without_avx2_gets_the_reference_and_is_told_why():
    done = python(
        "import torch, minisora_kernels as mk\n"
        "from minisora_kernels import backends\n"
        "print(backends.unavailable('cpu'))\n"
        "x = torch.randn(2, 3, 8)\n"
        "print(torch.equal(mk.gate_residual(x, x, x), x + x * x))\n",
        ATEN_CPU_CAPABILITY="default",
    )
    assert "the kernels need AVX2 or AVX-512; this CPU offers" in done.stdout, done.stderr
    assert done.stdout.strip().endswith("True")


def test_a_library_that_does_not_load_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "_cpu_avx2.so").write_bytes(b"not a library")
    monkeypatch.setattr(backends, "_package", tmp_path)
    with pytest.raises(ImportError, match=r"is built but does not load.*Rebuild it"):
        backends._load("cpu", "cpu_avx2", "no library for AVX2")


def test_a_library_of_another_torch_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "_cpu_avx2.so").write_bytes(b"never read")
    (tmp_path / "build_record.json").write_text('{"torch": {"version": "1.13.1"}}')
    monkeypatch.setattr(backends, "_package", tmp_path)
    with pytest.raises(ImportError, match=r"was built against torch 1.13.1.*Rebuild it"):
        backends._load("cpu", "cpu_avx2", "no library for AVX2")


def test_a_library_of_other_sources_is_an_error(tmp_path, monkeypatch):
    """A segmentation fault otherwise: after a pull the ops may call it with other arguments than it takes."""
    package, sources = tmp_path / "minisora_kernels", tmp_path / "csrc" / "cpu"
    package.mkdir()
    sources.mkdir(parents=True)
    (sources / "adaln.cpp").write_text("// one")
    (package / "_cpu_avx2.so").write_bytes(b"not a library")
    monkeypatch.setattr(backends, "_package", package)
    (package / "build_record.json").write_text(json.dumps({"cpu": {"sources": backends._digest(sources)}}))
    with pytest.raises(ImportError, match="does not load"):
        backends._load("cpu", "cpu_avx2", "no library for AVX2")
    (sources / ".adaln.cpp.swp").write_text("of an editor")
    with pytest.raises(ImportError, match="does not load"):
        backends._load("cpu", "cpu_avx2", "no library for AVX2")
    (sources / "adaln.cpp").write_text("// another")
    with pytest.raises(ImportError, match=r"was built from other sources than those of .*cpu\. Rebuild it"):
        backends._load("cpu", "cpu_avx2", "no library for AVX2")
    shutil.rmtree(tmp_path / "csrc")  # as where a wheel was installed
    with pytest.raises(ImportError, match="does not load"):
        backends._load("cpu", "cpu_avx2", "no library for AVX2")


def test_the_build_records_the_sources():
    for name in ("cpu", "cuda"):
        record = backends.build_record().get(name, {})
        if "not_built" not in record and backends._package.parent == ROOT:
            assert record["sources"] == backends._digest(ROOT / "csrc" / name)


def test_a_tree_without_libraries_tells_why(tmp_path, monkeypatch):
    monkeypatch.setattr(backends, "_package", tmp_path)
    assert backends._load("cpu", "cpu_avx2", "no library for AVX2") == (
        "no library for AVX2: the package was not built: run `pip install -e .`"
    )
    (tmp_path / "build_record.json").write_text('{"cpu": {"not_built": "no C++ compiler was found"}}')
    assert backends._load("cpu", "cpu_avx2", "no library for AVX2") == "no library for AVX2: no C++ compiler was found"
    (tmp_path / "build_record.json").write_text('{"cpu": {"left_out": {"cpu_avx2": "no -mavx2"}}}')
    assert backends._load("cpu", "cpu_avx2", "no library for AVX2") == "no library for AVX2: no -mavx2"
