"""plan.py against the memory that real steps take."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from models.parallel.config import ParallelConfig
from models.plan import GPUS, PlanConfig, main, needs, seconds

ROOT = Path(__file__).parent.parent.parent
KEEPS_ATTENTION = {"checkpointing": True, "checkpointing_keeps": "attention"}
KEEPS_PRODUCTS = {"checkpointing": True, "checkpointing_keeps": "products"}
SMALL = PlanConfig("latte-s/1x2x2", "rtx4090-24g", frames=4, size=(256, 256), classes=10)

# In a process of its own: the most memory that a step needs beyond what was there before it, in bytes.
STEP = """
import json, sys
import torch
from minisora_kernels import use_backend
from models import plan
from models.runtime.plain import merge
from models.runtime.recompute import chosen
values = json.loads(sys.argv[1])
config, training = merge(plan.PlanConfig("latte-s/1x2x2", "h200"), values["config"]), values["training"]
torch.manual_seed(0)

def step():
    backend = "cpu" if config.backend == "kernels" else "reference"
    with use_backend(backend):
        return peak_of_a_step()

def peak_of_a_step():
    model, x, t, y = plan._model(config, training=training)
    x.normal_(), t.uniform_(0, 1000)
    model.train(training)
    model.checkpointing = chosen(config.checkpointing, config.checkpointing_keeps)
    if not training:
        x, t, y = torch.cat((x, x)), torch.cat((t, t)), torch.cat((y, y))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
    with torch.profiler.profile(profile_memory=True) as profile, torch.set_grad_enabled(training):
        with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16"):
            loss = model(x, t, y).square().mean()
        if training:
            loss.backward()
    totals = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for size in totals:
        now += size
        peak = max(peak, now)
    return peak

print(step())
"""


def measured(config: PlanConfig, training: bool) -> int:
    values = json.dumps({"config": dataclasses.asdict(config), "training": training})
    done = subprocess.run([sys.executable, "-c", STEP, values], cwd=ROOT, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


@pytest.mark.parametrize(
    ("changes", "training"),
    [
        ({}, True),
        ({"backend": "kernels"}, True),
        pytest.param({"backend": "kernels", "checkpointing": True}, True, marks=pytest.mark.slow),
        pytest.param({"backend": "kernels", **KEEPS_ATTENTION}, True, marks=pytest.mark.slow),
        pytest.param({"backend": "kernels", **KEEPS_PRODUCTS}, True, marks=pytest.mark.slow),
        pytest.param(KEEPS_PRODUCTS, True, marks=pytest.mark.slow),
        pytest.param({"precision": "fp32", "batch_size": 2}, True, marks=pytest.mark.slow),
        pytest.param({"model": "vdit-s/2x2x2", "frames": 8}, True, marks=pytest.mark.slow),
        ({"backend": "kernels"}, False),
    ],
)
def test_activations_are_those_of_a_real_step(changes, training):
    config = dataclasses.replace(SMALL, **changes)
    expected = measured(config, training)
    assert needs(config, training=training).memory["activations"] == pytest.approx(expected, rel=0.1)


@pytest.mark.slow
def test_states_are_shared_as_asked_and_the_work_grows_with_the_clip():
    alone = needs(SMALL, training=True)
    weights = alone.memory["weights"]
    trained = weights - 4 * 4 * 16 * 16 * 384  # all but the positions
    assert alone.memory == alone.memory | {"optimizer": 2 * trained, "ema": trained}
    # The last activations are gone before the first gradients are there; copies have them in buckets all the time.
    assert 0 <= alone.memory["gradients"] < 0.1 * trained
    copies = needs(dataclasses.replace(SMALL, parallel=ParallelConfig(data=4)), training=True).memory
    assert copies == alone.memory | {"gradients": trained}
    shards = needs(dataclasses.replace(SMALL, parallel=ParallelConfig(shard=4)), training=True).memory
    row = 4 * 384  # with which the table of 11 classes is filled up
    states = {"weights": (weights + row) / 4, "optimizer": (trained + row) / 2, "gradients": shards["gradients"]}
    states["ema"] = (weights + row) / 4  # the positions too
    # In bfloat16 the two largest units, attention and MLP of a block; what is outside of the blocks, in float32.
    block, modulation = 12 * 384**2 + 9 * 384, (384 + 1) * 6 * 384
    outside = weights - 4 * 12 * (block + modulation)
    assert shards == alone.memory | states | {"gathered": outside + row + 2 * 2 * block}
    divided = needs(dataclasses.replace(SMALL, parallel=ParallelConfig(sequence=2)), training=True)
    assert divided.memory == copies | {"activations": divided.memory["activations"]}
    assert 0.5 < divided.memory["activations"] / alone.memory["activations"] < 0.65
    assert 0.5 < divided.flops / alone.flops < 0.55
    longer = needs(dataclasses.replace(SMALL, frames=8), training=True)
    assert 1.9 < longer.flops / alone.flops < 2.1 and seconds(longer, SMALL) > seconds(alone, SMALL)
    assert needs(dataclasses.replace(SMALL, checkpointing=True), training=True).flops > 1.2 * alone.flops


@pytest.mark.slow
def test_what_is_offloaded_is_in_the_memory_of_the_cpu():
    for parallel in (ParallelConfig(), ParallelConfig(shard=4)):
        config = dataclasses.replace(SMALL, parallel=parallel)
        kept, moved = (needs(dataclasses.replace(config, offload=on), training=True) for on in (False, True))
        trained = kept.memory["optimizer"] / 2
        host = {"weights": trained, "gradients": trained, "optimizer": 2 * trained}
        gone = {"optimizer"}
        if parallel.shard > 1:
            host |= {"weights": kept.memory["weights"], "ema": kept.memory["ema"]}
            gone = {"optimizer", "weights", "gradients", "ema"}
        assert kept.host == {} and moved.host == host
        assert moved.memory == {name: size for name, size in kept.memory.items() if name not in gone}


def test_the_program_says_whether_it_fits(capsys):
    main(["--model", "latte-s/1x2x2", "--gpu", "rtx4090-24g", "--frames", "2"])
    said = capsys.readouterr().out
    assert "fits in 21.6 GB" in said and "assumed: 50% of the FLOP/s" in said and GPUS["rtx4090-24g"].source in said
    main(["--model", "latte-s/1x2x2", "--gpu", "rtx4090-24g", "--frames", "2", "--optimizer.offload"])
    assert re.search(r"and 0\.\d\d GB of the CPU's memory for each GPU \(weights 0\.\d\d \+ ", capsys.readouterr().out)
    main(["--model", "vdit-xl/1x2x2", "--gpu", "rtx4090-24g", "--frames", "2", "--batch-size", "64"])
    assert "training" in (said := capsys.readouterr().out) and "does NOT fit" in said


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"size": (250, 256)}, "must be a multiple of compression 8"),
        ({"frames": 4, "compression": (4, 8)}, "must be 1 \\+ a multiple"),
        ({"frames": 0}, "frames is 0; it must be at least 1"),
        ({"parallel": ParallelConfig(sequence=5)}, "sequence is 5; each rank needs a part of frames of tokens .4., pl"),
        ({"utilization": 1.5}, "utilization is 1.5"),
        ({"checkpointing_keeps": "attention"}, "checkpointing_keeps is 'attention'; without checkpointing it must be"),
        ({"model": "dit-s/2"}, "that of an image model"),
    ],
)
def test_bad_plans(changes, reason):
    with pytest.raises(ValueError, match=reason):
        needs(dataclasses.replace(SMALL, **changes), training=True)
