"""Gradients of every family that the trainer has: of several ranks, against one process."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ranks import on_ranks
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from models.autoencoders.tokenizer import CausalTokenizer, TokenizerConfig
from models.autoencoders.vqgan import VQGAN, VQGANConfig
from models.denoisers.cascade import Cascade, CascadeConfig
from models.denoisers.dit import DiT, DiTConfig
from models.denoisers.stdit import STDiT, STDiTConfig
from models.denoisers.text import Text, rows
from models.denoisers.walt import WALT, WALTConfig
from models.objectives.ddpm import DDPM
from models.objectives.reconstruction import Reconstruction
from models.parallel import draws
from models.parallel.config import ParallelConfig
from models.parallel.draws import sharing
from models.parallel.ranks import Ranks, open_ranks
from models.parallel.replicas import Loss, replicas
from models.parallel.sequence import check_divisible, dividing, own
from models.parallel.shards import local, shard
from models.parallel.traffic import collectives, parameters_of
from models.runtime.recompute import Checkpointing

BATCH = 4
SHAPE: dict[str, Any] = {"width": 32, "depth": 2, "heads": 2, "channels": 3, "patch": (1, 4, 4)}
# Two ranks divide neither the 5 frames nor the 5 heads, and four ranks not the 6 places of a frame either.
UNEVEN = {**SHAPE, "width": 40, "heads": 5, "input_size": (5, 8, 12)}
VIDEO = {**SHAPE, "heads": 4, "input_size": (4, 8, 8)}
WALT_SHAPE = {**SHAPE, "heads": 4, "input_size": (5, 8, 8)}
STAGE = {
    "widths": (16, 32),
    "heads": (2, 2),
    "levels": ("CTA", "CTAV"),
    "down": (1, 1),
    "up": (1, 1),
    "repeats": (1, 1),
}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "dit": lambda: DiT(DiTConfig(**VIDEO, num_classes=3, class_dropout=0.5, learn_sigma=True)),
    "latte": lambda: DiT(DiTConfig(**VIDEO, num_classes=3, attention="factorized", qk_norm="rms", late_frames=True)),
    "stdit": lambda: STDiT(STDiTConfig(**VIDEO, num_classes=3)),
    "stdit, text": lambda: STDiT(STDiTConfig(**VIDEO, text_width=8, class_dropout=0.5)),
    "walt": lambda: WALT(WALTConfig(**WALT_SHAPE, num_classes=3, past=0.5, self_conditioning=0.5)),
    "walt, text": lambda: WALT(WALTConfig(**WALT_SHAPE, text_width=8, low_resolution=True)),
    "cascade": lambda: Cascade(
        CascadeConfig(input_size=(4, 8, 8), channels=3, num_classes=3, patch=(1, 1, 1), **STAGE)
    ),
    "vqgan": lambda: VQGAN(
        VQGANConfig(input_size=(2, 16, 16), channels=3, width=8, blocks=1, codes=64, discriminator=4)
    ),
    "uneven dit": lambda: DiT(DiTConfig(**UNEVEN, num_classes=3, class_dropout=0.5, learn_sigma=True)),
    "uneven dit of a place": lambda: DiT(DiTConfig(**UNEVEN | {"input_size": (5, 4, 4)}, num_classes=3)),
    "uneven latte": lambda: DiT(DiTConfig(**UNEVEN, num_classes=3, attention="factorized", late_frames=True)),
    "uneven stdit": lambda: STDiT(STDiTConfig(**UNEVEN, num_classes=3)),
    "uneven stdit, text": lambda: STDiT(STDiTConfig(**UNEVEN, text_width=8, class_dropout=0.5)),
    "uneven walt": lambda: WALT(WALTConfig(**UNEVEN, num_classes=3, past=0.5, self_conditioning=0.5)),
    "uneven walt, images": lambda: WALT(WALTConfig(**UNEVEN, num_classes=3)),
    "uneven walt, text": lambda: WALT(WALTConfig(**UNEVEN, text_width=8, low_resolution=True)),
    "uneven cascade": lambda: Cascade(
        CascadeConfig(
            input_size=(5, 5, 7),
            channels=3,
            num_classes=3,
            patch=(1, 1, 1),
            temporal_convolution=True,
            **STAGE | {"dropout": (0.1, 0.1)},
        )
    ),
    "tokenizer": lambda: CausalTokenizer(
        TokenizerConfig(
            input_size=(5, 16, 16), channels=3, width=8, multipliers=(1, 2), temporal_strides=(2,), groups=4
        )
    ),
}


class PerFrame:
    """Squares of what a model predicts, with a timestep for each frame."""

    def loss(self, model: Any, x: torch.Tensor, y: Any, *_: Any) -> torch.Tensor:
        return model(x, draws.rand((len(x), x.shape[2])) * 1000, y).square().mean()


OBJECTIVES = {
    "vqgan": Reconstruction(adversarial_weight=0.1),
    "tokenizer": Reconstruction(),
    "frames": PerFrame(),
}


def made(name: str) -> tuple[nn.Module, Any, torch.Tensor, Any]:
    """The model with weights that leave no gradient out, its objective, and a batch."""
    torch.manual_seed(0)
    model = MODELS[name.removesuffix(", frames")]()
    images = 2 if "images" in name else 0
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.1)
    frames, height, width = model.config.input_size
    x = torch.randn(BATCH, 3, frames + images, height, width)
    y: Any = torch.randint(3, (BATCH, 1 + images) if images else (BATCH,))
    if "text" in name:
        y = Text(torch.randn(BATCH, 5, 8), torch.arange(5) < torch.tensor([[5], [2], [0], [1]]))
    return model, OBJECTIVES.get(name.rpartition(", ")[2], DDPM(prediction="velocity")), x, y


def gradients(loss: nn.Module, ranks: Ranks, x: torch.Tensor, y: Any, *, bf16: bool) -> tuple[float, list[Any]]:
    """The loss of the batch and its gradients, of which this rank computes its samples."""
    torch.manual_seed(3)
    own = torch.tensor(ranks.share.rows(BATCH, 1))
    with sharing(ranks.share), dividing(ranks.line):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            value = loss(x[own], rows(y, own), torch.Generator().manual_seed(1), {})
        (value * ranks.line.ranks).backward()
    found = [None if p.grad is None else p.grad.clone() for p in loss.parameters()]
    return ranks.mean(value.detach()).item(), found


def worst(
    *names: str,
    config: ParallelConfig,
    checkpointing: Checkpointing = False,
    bf16: bool = False,
    offload: bool = False,
) -> dict[str, tuple[float, float]]:
    """Of each model the relative error of the loss, and the largest one of a gradient, on several processes."""

    def compare(name: str, ranks: Ranks) -> tuple[float, float]:
        model, objective, x, y = made(name)
        expected, exact = gradients(Loss(copy.deepcopy(model), objective), Ranks(), x, y, bf16=bf16)
        model.checkpointing = checkpointing
        if ranks.sharded:
            shard(model, ranks, bf16=bf16, offload=offload)
            assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
            kept = sum(local(parameter).numel() for parameter in model.parameters())
            assert kept < 0.6 * sum(parameter.numel() for parameter in model.parameters())
        got, parts = gradients(replicas(Loss(model, objective), ranks), ranks, x, y, bf16=bf16)
        errors = [0.0]
        wholes = [part.full_tensor() if isinstance(part, DTensor) else part for part in parts]
        for right, part in zip(exact, wholes, strict=True):
            assert (right is None) == (part is None)
            if right is not None:
                errors.append(((part - right).norm() / right.norm().clamp_min(1e-4)).item())
        return abs(got - expected) / expected, max(errors)

    def compare_all() -> dict[str, tuple[float, float]]:
        with open_ranks(config, torch.device("cpu")) as ranks:
            return {name: compare(name, ranks) for name in names}

    return on_ranks(config.size, compare_all)[0]


def agree(*names: str, config: ParallelConfig, checkpointing: Checkpointing = False, offload: bool = False) -> None:
    """Asserts that loss and gradients are those of one process."""
    found = worst(*names, config=config, checkpointing=checkpointing, offload=offload)
    for name, (loss, gradient) in found.items():
        assert loss < 1e-6 and gradient < 2e-5, name


@pytest.mark.slow
def test_shards_have_the_gradients_of_one_process():
    keeping = ["cascade", "dit", "walt, text"]
    agree(*keeping, config=ParallelConfig(shard=2), checkpointing="products")
    others = (name for name in MODELS if "uneven" not in name and name not in keeping)
    agree(*others, config=ParallelConfig(shard=2), checkpointing=True)


def test_shards_recompute_norms_as_one_process_does():
    agree("latte", "stdit", "walt", config=ParallelConfig(shard=2))


@pytest.mark.slow
def test_sharded_copies_have_the_gradients_of_one_process():
    agree("dit", config=ParallelConfig(data=2, shard=2), offload=True)


def test_copies_have_the_gradients_of_one_process():
    agree("cascade", "walt", "vqgan", config=ParallelConfig(data=2))


@pytest.mark.slow
def test_in_bfloat16_shards_have_the_loss_of_one_process():
    for name, (loss, gradient) in worst("dit", "stdit", "walt", config=ParallelConfig(shard=2), bf16=True).items():
        assert loss < 1e-3 and gradient < 0.05, name


class Sent(TorchDispatchMode):
    """Bytes that a rank gives to the collectives inside the block, by the collective."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            name = func._schema.name.removeprefix("c10d::").removesuffix("_base_").strip("_")
            given = args[0] if name in ("allreduce", "broadcast") else args[1]
            self.counts[name] += sum(x.nbytes for x in (given if isinstance(given, list) else [given]))
        return func(*args, **(kwargs or {}))


def sent(name: str, config: ParallelConfig) -> Counter[str]:
    """What a rank gives to the collectives of a step, in bytes: as many as the plan says."""

    def step() -> Counter[str]:
        model, objective, x, y = made(name)
        with open_ranks(config, torch.device("cpu")) as ranks:
            ranks.line = ranks.line._replace(given=Counter())
            parameters = parameters_of(model)
            if ranks.sharded:
                shard(model, ranks, bf16=False)
            loss = replicas(Loss(model, objective), ranks)
            gradients(loss, ranks, x, y, bf16=False)
            ranks.line.given.clear()
            with Sent() as counter:
                gradients(loss, ranks, x, y, bf16=False)
        del counter.counts["broadcast"]  # DDP's own, in its second step
        counter.counts["allreduce"] -= 4  # the mean of the loss
        planned: Counter[str] = Counter()
        for each in collectives(parameters, ranks.line.given, config, bf16=False):
            planned[each.kind] += each.given
        assert +counter.counts == planned
        return planned

    return on_ranks(config.size, step)[0]


def test_a_step_sends_what_the_plan_and_the_docs_say():
    model = made("latte")[0]
    trained = 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    units = 4 * sum(p.numel() for unit in model.units() for module in unit for p in module.parameters())
    rest = 4 * sum(p.numel() for p in model.parameters()) - units
    assert sent("latte", ParallelConfig(data=2)) == {"allreduce": trained}
    # Units are gathered for the forward and for the backward, the rest once.
    gathered = (units + units + rest) // 2
    assert sent("latte", ParallelConfig(shard=2)) == {"allgather": gathered, "reduce_scatter": trained}
    # One of the two blocks has attention over time: tokens of two frames there and back, forward and backward.
    tokens, prediction = 4 * BATCH * 2 * 4 * 32, 4 * BATCH * 3 * 2 * 8 * 8
    one_way = {"alltoall": 4 * tokens, "allgather": prediction, "allreduce": trained}
    assert sent("latte", ParallelConfig(sequence=2)) == one_way
    # Joint attention, of two blocks: q, k and v there, the result back.
    assert sent("dit", ParallelConfig(sequence=2))["alltoall"] == 2 * 2 * (3 + 1) * tokens


@pytest.mark.slow
@pytest.mark.parametrize("config", [ParallelConfig(data=2, shard=2), ParallelConfig(shard=2, sequence=2)], ids=str)
def test_a_step_of_four_ranks_sends_what_the_plan_says(config: ParallelConfig):
    sent("uneven latte", config)


class Order(TorchDispatchMode):
    """How many units were asked for inside the block when each of a model's was through its forward."""

    def __init__(self, units: list[list[nn.Module]]) -> None:
        super().__init__()
        self.gathered, self.asked = 0, [0] * len(units)
        for number, unit in enumerate(units):
            unit[-1].register_forward_hook(lambda *_, number=number: self.note(number))

    def note(self, number: int) -> None:
        self.asked[number] = self.asked[number] or self.gathered  # that of the forward, not of a recomputation

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.gathered += func.namespace == "c10d" and "allgather" in func._schema.name
        return func(*args, **(kwargs or {}))


@pytest.mark.slow
def test_a_unit_is_gathered_while_the_one_before_runs_and_values_stay():
    def steps(
        name: str, ranks: Ranks, *, checkpointing: bool, ahead: bool
    ) -> tuple[list[int], float, list[torch.Tensor]]:
        model, objective, x, y = made(name)
        model.checkpointing = checkpointing
        shard(model, ranks, bf16=False)
        units = model.units()
        if not ahead:
            for unit in units:
                unit[0].set_modules_to_forward_prefetch([])
        with Order(units) as order:
            loss, found = gradients(Loss(model, objective), ranks, x, y, bf16=False)
        return order.asked, loss, [local(each) for each in found if each is not None]

    def compare() -> None:
        with open_ranks(ParallelConfig(shard=2), torch.device("cpu")) as ranks:
            for name in ("latte", "stdit", "walt, text", "cascade"):
                one, loss, exact = steps(name, ranks, checkpointing=False, ahead=False)
                asked, same, got = steps(name, ranks, checkpointing=False, ahead=True)
                count = len(one)
                assert one == [2 + i for i in range(count)]  # what no unit has comes first
                assert asked == [2 + min(i + 1, count - 1) for i in range(count)]
                assert same == loss and all(torch.equal(a, b) for a, b in zip(exact, got, strict=True))
                assert steps(name, ranks, checkpointing=True, ahead=True)[0] == one

    on_ranks(2, compare)


DIVIDED = ["uneven dit", "uneven latte", "uneven stdit, text", "uneven walt", "uneven walt, text", "uneven cascade"]
# A modulation for each frame, or for each token, which here are the same.
ROWS = [
    "uneven latte, frames",
    "uneven stdit, frames",
    "uneven walt, images",
    "uneven dit of a place, frames",
]
MORE = [ParallelConfig(sequence=4), ParallelConfig(data=2, sequence=2), ParallelConfig(shard=2, sequence=2)]


@pytest.mark.parametrize(
    "config", [ParallelConfig(sequence=2), *(pytest.param(config, marks=pytest.mark.slow) for config in MORE)], ids=str
)
def test_ranks_that_divide_tokens_have_the_gradients_of_one_process(config: ParallelConfig):
    agree(*DIVIDED, *ROWS, "walt", config=config, checkpointing=config.data > 1)


def test_more_ranks_than_parts_are_refused_with_how_many_there_may_be():
    message = r"sequence is 8; each rank needs a part of frames of tokens \(5\), heads \(4\): it must be at most 4$"
    with pytest.raises(ValueError, match=message):
        check_divisible(8, DiT(DiTConfig(**VIDEO | {"input_size": (5, 8, 8)})).divisible())
    image = DiT(DiTConfig(**SHAPE | {"patch": (2, 2)}, input_size=(8, 8)))
    with pytest.raises(ValueError, match=r"frames of tokens \(1\), heads \(2\): it must be at most 1$"):
        check_divisible(2, image.divisible())
    with pytest.raises(ValueError, match="sequence is 2; it must be 1, for an autoencoder has no tokens to divide"):
        check_divisible(2, MODELS["vqgan"]().divisible())
    with pytest.raises(ValueError, match=r"frames and images \(7\)"):
        check_divisible(8, MODELS["uneven walt"]().divisible(images=2))


def test_a_rank_has_its_frames_only():
    """What one rank computes depends on its frames alone, but for attention over time."""

    def places() -> list[int]:
        with open_ranks(ParallelConfig(sequence=2), torch.device("cpu")) as ranks, dividing(ranks.line):
            return own(torch.arange(5)[None], 1).flatten().tolist()

    assert on_ranks(2, places) == [[0, 1, 2], [3, 4]]
