"""The benches: what they refuse, what they count, what they write, and what is made of it."""

from __future__ import annotations

import copy
import functools
import gc
import json
import re
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode

from bench import bench_model, compare, docs, plots, systems
from bench.harness import record, report, shapes
from bench.harness.clock import Clock
from bench.harness.counters import InductorBytes
from bench.harness.session import BOTH, FWD, Problem, Session, on_backend
from bench.ops import bench_adaln, bench_of, bench_window_attention
from minisora_kernels import backends
from minisora_kernels.__main__ import ops
from minisora_kernels.counters import Counter, saved_bytes
from models.denoisers.dit import DiT
from models.runtime.plain import merge
from models.training.presets import preset
from models.training.run import train

ROOT = Path(__file__).parents[2]
TINY = shapes.Tokens("tiny", 2, 12, 16)
needs_kernels = pytest.mark.skipif(backends.unavailable("cpu") is not None, reason="no CPU kernels")


class Benchmark:
    """As much of pytest-benchmark's fixture as the harness uses."""

    disabled = False

    def __init__(self) -> None:
        self.extra_info: dict = {}

    def pedantic(self, target, args, setup, rounds):
        for _ in range(rounds):
            setup()
            target(*args)


def run(make=bench_adaln.problem, shape=TINY, direction=BOTH, quick=False) -> dict:
    session = Session(torch.device("cpu"), quick=quick)
    session.run(Benchmark(), "adaln", make, shape, "float32", direction)
    (case,) = session.records
    return case


@pytest.fixture(scope="module")
def case() -> dict:
    torch._dynamo.reset()
    return run()


def test_a_case_has_all_columns(case: dict):
    assert list(case["columns"]) == ["eager", "compile", "ours", "ours in compile"]
    assert list(case["ratios"]) == ["eager", "compile", "ours in compile"]
    assert 5 <= case["rounds"] <= 41
    for part in (*case["columns"].values(), *case["ratios"].values()):
        assert 0 < part["q1"] <= part["median"] <= part["q3"]
    x, rows = 4 * 2 * 12 * 16, 4 * 2 * 16
    assert case["bytes"] == (x + 2 * rows + x) + (x + x + 2 * rows + x + 2 * rows)
    assert set(case["saved"]) == set(case["moved"]) == {"eager", "compile", "ours"}


@needs_kernels
def test_ours_runs_the_kernels_and_saves_less(case: dict):
    assert case["kernels"] == ["adaln_bwd", "adaln_fwd"]
    assert case["saved"]["ours"] == 2 * 4 * 2 * 12  # mean and rstd
    assert case["saved"]["ours"] < case["saved"]["eager"]
    assert case["moved"]["ours"] < case["moved"]["compile"] < case["moved"]["eager"]


@needs_kernels
def test_the_backend_of_a_compiled_column_is_its_own():
    """One compiled function serves two columns: the choice of the backend is among its guards."""
    problem = bench_adaln.problem(TINY, torch.float32, torch.device("cpu"))
    torch._dynamo.reset()
    compiled = torch.compile(problem.call, dynamic=False, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        for backend, kernels in (("reference", set()), (None, {"adaln_fwd"})):
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile, torch.no_grad():
                on_backend(backend, compiled)(problem.inputs)
            names = {event.key for event in profile.key_averages()}
            assert {name.removeprefix("minisora::") for name in names if "minisora" in name} == kernels


@pytest.mark.parametrize("where", ("value", "gradient"))
def test_wrong_results_are_refused(where: str, monkeypatch):
    def wrong(shape, dtype, device) -> Problem:
        problem = bench_adaln.problem(shape, dtype, device)
        call = problem.call

        def broken(tensors):
            y = call(tensors)
            if backends.forced(None) == "reference":
                return y
            nothing = (tensors["shift"] - tensors["shift"].detach()).sum()  # but for its gradient
            return y * (1 + 1e-4) if where == "value" else y + 1e-4 * nothing

        problem.call = broken
        return problem

    monkeypatch.setattr(Session, "sample", lambda *_: pytest.fail("it was timed"))
    with pytest.raises(AssertionError, match=rf"ours: {'output 0' if where == 'value' else 'gradient of shift'}"):
        run(wrong, quick=True)


def test_a_wrong_competitor_is_refused():
    def wrong(shape, dtype, device) -> Problem:
        problem = bench_adaln.problem(shape, dtype, device)
        problem.written = "slow", lambda tensors: problem.call(tensors) + 0.01
        return problem

    with pytest.raises(AssertionError, match="slow: output 0"):
        run(wrong, direction=FWD, quick=True)


def test_saved_bytes_of_a_known_function():
    x = torch.randn(8, 4, requires_grad=True)

    def function():
        y = x.exp()  # keeps its result
        return (y * y[:1]).t() @ x  # keeps y twice, a view of it, their product, and x, which is an input

    assert saved_bytes(function, [x]) == 2 * x.nbytes
    assert saved_bytes(function, []) == 3 * x.nbytes


def test_counting_what_is_saved_leaves_nothing():
    made = []

    def forward():
        made.append(torch.randn(3, 5, requires_grad=True).softmax(-1))
        made[:] = [weakref.ref(made[0])]

    saved_bytes(forward, [])
    gc.collect()
    assert made[0]() is None


def test_moved_bytes_and_flops_of_a_known_function():
    a, b = torch.randn(8, 4, requires_grad=True), torch.randn(4, 6)
    with Counter() as counter:
        (a @ b).t()[1:].unflatten(1, (2, 4))  # views move nothing
    assert counter.moved == 4 * (8 * 4 + 4 * 6 + 8 * 6) and counter.flops == 2 * 8 * 4 * 6
    with Counter() as counter:
        torch.empty_like(a).copy_(a[:1])  # an expanded row is read once
    assert counter.moved == 4 * (8 * 4 + 4 + 8 * 4)
    with Counter() as counter:
        torch.autograd.grad((a @ b).sum(), a)
    assert counter.flops == 2 * 2 * 8 * 4 * 6 and not counter.kernels


def test_inductors_bytes_are_those_of_the_fused_kernel():
    x = torch.randn(64, 64)
    for _ in range(2):  # a graph that is in its cache counts too
        torch._dynamo.reset()
        with InductorBytes() as counter:
            torch.compile(lambda x: (x.sin() + 1) * x, dynamic=False)(x)
        assert counter.moved == 2 * x.nbytes


def test_the_clock_gives_seconds_of_one_call():
    calls = []
    seconds = Clock(torch.device("cpu"))(lambda: calls.append(torch.randn(1000).sum()), 5)
    assert len(calls) == 5 and 0 < seconds < 0.1


def all_cases() -> list[tuple]:
    found = []
    for module in (bench_model, *map(bench_of, ops())):
        for name, function in vars(module).items():
            if name.startswith("test_"):
                (mark,) = function.pytestmark
                found += [(module, name, *parameter.values) for parameter in mark.args[1]]
    return found


def test_names_are_unique_and_every_op_is_there():
    cases = [(name, shape.name, dtype, direction) for _, name, shape, dtype, direction in all_cases()]
    assert len(cases) == len(set(cases)) and len(cases) > 150
    quick = [shape for *_, shape, dtype, _ in all_cases() if shape.quick and dtype == "bfloat16"]
    assert len(quick) <= 30


def test_every_shape_fits_its_op():
    """With fake tensors: shapes and checks, without memory and time."""
    for module, shape in {(module, shape): None for module, _, shape, *_ in all_cases() if hasattr(module, "problem")}:
        with FakeTensorMode(), torch.no_grad():
            problem = module.problem(shape, torch.bfloat16, torch.device("cpu"))
            out = on_backend("reference", problem.call)(problem.inputs)
            if problem.written is not None:
                assert problem.written[1](problem.inputs).shape == out.shape


def test_the_issues_shapes_are_there():
    modulated = {(s.batch, s.count, s.width, s.rows) for s in shapes.MODULATED}
    assert {(2, 4096, 1152, 1), (2, 1024, 384, 1), (1, 16384, 1152, 1), (2, 4096, 1152, 16)} <= modulated
    temporal = {(s.grid[0], s.grid[1] * s.grid[2], s.head_dim, s.norm_and_rope) for s in bench_window_attention.SHAPES}
    wanted = {(t, s, d, n) for t in (16, 32) for s in (256, 1024) for d in (72, 64) for n in (False, True)}
    assert wanted <= temporal
    assert (1, 19200, 1152) in {(s.batch, s.count, s.width) for s in shapes.MODULATED}  # 480p


def tiny_model() -> shapes.Model:
    model = bench_model.model_shape("S", (2, 64, 64), depth=2)
    config = dict(vars(model.config), width=32, heads=2)
    return shapes.Model("tiny", type(model.config)(**config))


@pytest.mark.parametrize(
    "make", (bench_model.block, bench_model.training_step, bench_model.sampling_step, bench_model.sampling_run)
)
def test_the_model_as_written_computes_the_same(make):
    problem = make(tiny_model(), torch.float64, torch.device("cpu"))
    assert problem.written is not None
    results = []
    for call in (problem.call, problem.written[1]):
        out = call(problem.inputs)
        out = out if isinstance(out, tuple) else (out,)
        generator = torch.Generator().manual_seed(0)
        upstream = [torch.randn(o.shape, generator=generator, dtype=o.dtype) for o in out]
        wanted = [problem.inputs[name] for name in problem.gradient_names]
        results.append((*out, *(torch.autograd.grad(out, wanted, upstream) if wanted else ())))
    for ours, written in zip(*results, strict=True):
        torch.testing.assert_close(written, ours)
        assert ours.abs().max() > 0


def synthetic(ratio: float = 2.0, spread: float = 0.02, **changes) -> dict:
    """A record with two cases, whose columns take what ``ratio`` says."""
    around = lambda x: {"median": x, "q1": x * (1 - spread), "q3": x * (1 + spread)}  # noqa: E731
    columns = {"eager": around(ratio * 1e-3), "compile": around(1.5e-3), "ours": around(1e-3)}
    cases = [
        {
            **{"op": op, "shape": "a shape", "dtype": dtype, "direction": "fwd+bwd", "rounds": 9, "kernels": ["k"]},
            **{"columns": columns, "ratios": {"eager": around(ratio), "compile": around(1.5)}},
            **{"bytes": 1_000_000, "flops": 10_000_000},
            **{name: {"eager": 300, "compile": 200, "ours": 100} for name in ("saved", "moved")},
        }
        for op, dtype in (("adaln", "float32"), ("training step", "bfloat16"))
    ]
    part = {"copy": {"1": 100.0, "38": 20.0}, "matmul": {"float32": 300.0, "bfloat16": 600.0}}
    ceilings = {"start": part, "end": copy.deepcopy(part)}
    made = record.make(torch.device("cpu"), cases, ceilings, allocator="default", quick=False)
    made["machine"]["slug"] = "a-machine"
    return made | changes


def write(folder: Path, name: str, made: dict) -> Path:
    path = folder / "a-machine" / f"{name}.json"
    record.save(made, path, over=True)
    return path


@pytest.mark.parametrize(
    ("ratio", "spread", "expected"),
    [(1.5, 0.02, "slower"), (3.0, 0.02, "faster"), (2.1, 0.001, "same"), (1.5, 0.4, "same"), (2.0, 0.02, "same")],
)
def test_compare_needs_a_change_beyond_the_noise(ratio, spread, expected, tmp_path, capsys):
    old, new = write(tmp_path, "old", synthetic()), write(tmp_path, "new", synthetic(ratio, spread))
    assert compare.main([str(old), str(new)]) == int(expected == "slower")
    assert f"2 {expected}" in capsys.readouterr().out


def test_compare_refuses_another_machine(tmp_path, capsys):
    other = synthetic()
    other["machine"]["slug"] = "another"
    paths = [str(write(tmp_path, "old", synthetic())), str(write(tmp_path, "new", other))]
    assert compare.main(paths) == 2 and "machine differs" in capsys.readouterr().err
    assert compare.main([*paths, "--any-machine"]) == 0
    paths[1] = str(write(tmp_path, "new", synthetic(allocator="reuse")))
    assert compare.main(paths) == 2 and "allocator differs" in capsys.readouterr().err


def test_a_record_survives_its_file_and_is_not_replaced(tmp_path):
    made = synthetic()
    path = write(tmp_path, "default", made)
    assert record.load(path) == record.round_floats(made)
    with pytest.raises(FileExistsError, match="--save-over"):
        record.save(made, path)
    for broken in ("{", "[]", '{"format": 1}', json.dumps(made | {"format": 99})):
        path.write_text(broken)
        with pytest.raises(ValueError, match=r"default\.json"):
            record.load(path)


def test_the_report_and_the_plots_of_a_record(tmp_path):
    made = synthetic()
    text = "\n".join(report.report(made))
    assert "2.00 [1.96, 2.04]" in text and "1.50 [1.47, 1.53]" in text and "0.33" in text
    assert "WARNING" not in text
    made["ceilings"]["end"]["copy"]["1"] /= 3
    assert "up to 3.0x" in "\n".join(report.report(made))
    for path in plots.draw(made, tmp_path / "default.json"):
        assert path.exists() and path.read_bytes()[:4] == b"\x89PNG"
    for case in made["cases"]:
        case["direction"] = "fwd"
    assert [path.name for path in plots.draw(made, tmp_path / "forward.json")] == ["forward-roofline.png"]


def test_a_roofline_is_the_slower_of_copy_and_product():
    made = synthetic()
    case = made["cases"][0]
    assert record.roofline(case, made["ceilings"]) == (pytest.approx(1e7 / 300e9), "matmul")
    assert record.roofline(case | {"flops": 0}, made["ceilings"]) == (pytest.approx(1e6 / 100e9), "copy")
    assert record.roofline(case | {"bytes": 10**9}, made["ceilings"]) == (pytest.approx(1e9 / 20e9), "copy")


def page(root, *tables):
    """A checkout with a README that shows tables, and nothing else."""
    (root / "docs" / "images").mkdir(parents=True, exist_ok=True)
    markers = "".join(f"<!-- table: {table} -->\n<!-- /table -->\n" for table in tables)
    (root / "README.md").write_text(f"before\n{markers}after\n")
    return root / "README.md"


def test_the_pages_are_checked_against_the_records(tmp_path, capsys):
    results = tmp_path / "bench" / "results"
    write(results, "default", synthetic())
    write(results, "reuse", synthetic(ratio=2.5, allocator="reuse"))
    readme = page(tmp_path, "ops a-machine", "models a-machine", "plots a-machine")
    (results / "a-machine" / "default-ratios.png").touch()
    assert docs.main(["--check"], root=tmp_path) == 1 and "README.md" in capsys.readouterr().err
    assert docs.main([], root=tmp_path) == 0 and docs.main(["--check"], root=tmp_path) == 0
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "2.00 / 2.50" in text
    assert "](bench/results/a-machine/default-ratios.png)" in text
    readme.write_text(text.replace("2.00 / 2.50", "2.01 / 2.50"))
    assert docs.main(["--check"], root=tmp_path) == 1
    write(results, "default", synthetic(ratio=3.0))
    assert docs.main([], root=tmp_path) == 0 and "3.00 / 2.50" in readme.read_text()


def test_a_picture_of_other_records_is_named_and_drawn(tmp_path, capsys):
    results = tmp_path / "bench" / "results"
    write(results, "default", synthetic())
    page(tmp_path, "models a-machine")
    assert docs.main([], root=tmp_path) == 0 and docs.main(["--check"], root=tmp_path) == 0
    picture = (tmp_path / docs.PICTURE).read_bytes()
    write(results, "default", synthetic(ratio=3.0))
    assert docs.main(["--check"], root=tmp_path) == 1 and docs.PICTURE in capsys.readouterr().err
    assert docs.main([], root=tmp_path) == 0 and (tmp_path / docs.PICTURE).read_bytes() != picture


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- table: opps m -->\n<!-- /table -->\n", "there is no table 'opps'; it may be one of .*ops"),
        ("<!-- table: ops elsewhere -->\n<!-- /table -->\n", "table 'ops elsewhere' cannot be written"),
        ("<!-- table: ops -->\n<!-- /table -->\n", "table 'ops' cannot be written"),
        ("<!-- table: ops m -->\n", "needs one `<!-- /table -->` after it"),
        ("nothing\n", "no page has the marker <!-- table: models .* -->"),
    ],
)
def test_a_page_that_cannot_be_written_is_left_as_it_is(text, message, tmp_path, capsys):
    write(tmp_path / "bench" / "results", "default", synthetic())
    readme = page(tmp_path)
    readme.write_text(text)
    assert docs.main([], root=tmp_path) == 2 and re.search(message, capsys.readouterr().err)
    assert readme.read_text() == text


def test_the_record_of_the_systems_becomes_a_table(tmp_path):
    share = {"median": 1.25, "q1": 1.2, "q3": 1.5}
    judged = {
        "commit": "abc",
        "generated_recognised": 0.9,
        "generated_recognised_by_class": [0.8, 1.0],
        "generated_moves": 0.5,
    }
    made = synthetic() | {
        "systems": {
            "DiT": {
                "commit": "abc",
                "presets": ["a", "b"],
                "objective": "ddpm",
                "sampler": "ddim",
                "real_recognised": 0.975,
            }
            | {"real_moves": 1.0, **judged}
        },
        "presets": {
            "a": {
                "commit": "def",
                "steps": 30,
                "loss": {"ours": 0.12345, "reference": 0.12345, "largest_difference": 2.4e-7},
                "columns": {"ours": {"median": 0.25}, "eager": {}, "compile": {}},
                "ratios": {"eager": share, "compile": share},
                "tokens_per_s": 1234.5,
                "kernels": ["adaln_bwd", "adaln_fwd"],
                "encoding": 0.05,
            }
        },
    }
    path = tmp_path / "bench" / "results" / "m" / "systems.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(made))
    results = tmp_path / "bench" / "results"
    text = "\n".join((*docs.systems(results, "m"), *docs.steps(results, "m")))
    assert "| DiT | `a`, `b` | DDPM | `ddim` | 90.0% | 80.0% | 50.0% |" in text
    ratio = "1.25 [1.20, 1.50]"
    assert f"| `a` | 30 | 0.1235 / 0.1235 | 2e-07 | 4.00 | {ratio} | {ratio} | 1,234 | `adaln` |" in text
    assert "commits abc, def" in text
    assert "takes 0.20 to 0.20 of the time of a step" in text and "97.5% are recognised and 100% move so" in text
    path.write_text(json.dumps({"systems": {}}))
    with pytest.raises(ValueError, match=r"systems\.json is not a record of bench\.systems"):
        docs.systems(results, "m")


def test_curves_that_part_at_once_are_refused():
    ours = [1.0 + 1e-5 * (i > 50) * i for i in range(100)]
    found = systems.compare_losses(ours, [1.0] * 100)
    assert found["largest_difference"] == pytest.approx(99e-5) and found["ours"] == pytest.approx(1 + 94.5e-5)
    with pytest.raises(ValueError, match=r"the losses of the first 20 steps differ by up to 3\.0e-03"):
        systems.compare_losses([1.0] * 19 + [1.003] * 81, [1.0] * 100)


@pytest.mark.slow
def test_steps_of_the_trainer_take_turns(tmp_path, monkeypatch):
    """Compiled by aot_eager, for Inductor takes a minute; what would stop a wrong kernel stops one."""
    monkeypatch.setattr(systems, "ROUNDS", 3)
    monkeypatch.setattr(systems, "SAMPLE_SECONDS", 0.0)
    monkeypatch.setattr(DiT, "compile", functools.partialmethod(DiT.compile, backend="aot_eager"))
    config = merge(preset("digits"), {"run": str(tmp_path), "model": {"width": 16, "depth": 1}, "batch_size": 2})
    found = systems.time_steps(config)
    assert found["rounds"] == 3 and found["columns"].keys() == {"eager", "compile", "ours"}
    # 4 x 3 x 3 tokens a clip
    assert found["tokens_per_s"] == pytest.approx(2 * 36 / found["columns"]["ours"]["median"])
    forward = DiT.forward

    def wrong(self, *arguments, **given):
        factor = 1.0 if backends.forced(None) == "reference" else 1.001
        return factor * forward(self, *arguments, **given)

    monkeypatch.setattr(DiT, "forward", wrong)
    with pytest.raises(ValueError, match="ours: first loss and norm of the gradient are"):
        systems.time_steps(config)


def test_a_run_of_another_configuration_is_refused(tmp_path):
    config = merge(
        preset("digits"), {"run": str(tmp_path / "run"), "steps": 1, "batch_size": 1, "preview": {"count": 1}}
    )
    train(config)
    systems.refuse_another(merge(config, {"run": "elsewhere", "backend": "reference"}), tmp_path / "run")
    for change in ({"seed": 1}, {"steps": 2}, {"data": {"frames": 4}}, {"objective": {"prediction": "velocity"}}):
        with pytest.raises(ValueError, match=f"was trained with another {next(iter(change))}; use another --runs"):
            systems.refuse_another(merge(config, change), tmp_path / "run")


def test_the_pages_show_the_committed_records():
    assert docs.main(["--check"]) == 0


@pytest.mark.slow
def test_one_case_from_the_command_line():
    """Built, verified and run once, as ``--benchmark-disable`` has it."""
    options = ["--benchmark-disable", "--quick", "-q", "-p", "no:cacheprovider", "-k", "unpatchify and not bwd"]
    command = [sys.executable, "-m", "pytest", "bench", *options]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0 and "1 passed" in run.stdout, run.stdout + run.stderr


def test_a_part_that_is_run_again_replaces_its_cases_only(case: dict):
    device = torch.device("cpu")
    other = {**case, "op": "other", "shape": "of before"}
    old = record.make(device, [dict(case), other], {}, allocator="default", quick=False) | {"commit": "before"}
    new = record.make(device, [{**case, "rounds": -1}], {}, allocator="default", quick=False) | {"commit": "now"}
    merged = record.merged(new, old)
    assert merged["commit"] == "now"
    assert [(c["op"], c["rounds"], c.get("commit")) for c in merged["cases"]] == [
        ("adaln", -1, None),
        ("other", case["rounds"], "before"),
    ]
    assert "commit now" in report.about(merged) and "(1 cases of before)" in report.about(merged)
    again = record.merged({**new, "commit": "later"}, merged)
    assert [c.get("commit") for c in again["cases"]] == [None, "before"]
    with pytest.raises(ValueError, match="has allocator default, this run reuse"):
        record.merged({**new, "allocator": "reuse"}, old)
