"""The model's predictions as a solver asks for them: guided, and optionally as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from ..denoisers.text import Text, rows
from ..objectives.common import at_least_float32, expand
from ..protocols import Denoiser


def guide(cond: Tensor, null: Tensor, guidance: Tensor | float, share: float, count: int, guided: int) -> Tensor:
    """The guided prediction, a share of which has the spread of the one with classes.

        g = null + w (cond - null)          share g std(cond) / std(g) + (1 - share) g

    The standard deviation is over all of a sample (StableCascade takes it over the batch, so that a sample depends on
    its batch-mates). Strong guidance widens the prediction, and pictures come out overexposed (Lin et al. 2023, arXiv
    2305.08891).

    Args:
        cond, null: ``[B, C, ...]``, or ``[B, 2 C, ...]`` with a learned variance, which stays that of cond.
        count: C.
        guided: how many of the C channels are guided.

    Returns:
        as cond, in fp32 at least.
    """
    cond, null = at_least_float32(cond), at_least_float32(null)
    g = cond[:, :count].clone()
    g[:, :guided] = torch.lerp(null[:, :guided], cond[:, :guided], guidance)
    if not share:
        return torch.cat((g, cond[:, count:]), dim=1)
    spread, wanted = (expand(part.flatten(1).std(1), g) for part in (g, cond[:, :count]))
    g = g * (share * wanted / spread.clamp_min(1e-9) + 1 - share)
    return torch.cat((g, cond[:, count:]), dim=1)


def bound(prediction: Tensor, x: Tensor, of_x: Tensor, of_prediction: Tensor) -> Tensor:
    """The prediction that points at the same data as this one, but bounded to [-1, 1].

    Args:
        prediction: ``[B, C, ...]``, or ``[B, 2 C, ...]`` with a learned variance, which stays.
        x: where it was made.
        of_x, of_prediction: the weights of both in the data.
    """
    count, of_x = x.shape[1], of_x * x
    data = (of_x + of_prediction * prediction[:, :count]).clamp(-1, 1)
    return torch.cat(((data - of_x) / of_prediction, prediction[:, count:]), dim=1)


class Predictor:
    """The model's predictions with classes or text and, for guidance, without: one call on a doubled batch.

    What a call needs besides x comes from :meth:`conditions`. Of a model with ``modulations``, as DiT has them, those
    are computed for many timesteps at once: its conditional layers read their weights once, not once a step.

    ``conditions`` are further arguments of the model by name, ``[B, ...]``. The call without classes is without past
    frames too. A model with self-conditioning gets its last estimate of the data, each half of a doubled batch its own.

    Raises:
        ValueError: guidance for a model without classes or text, or without labels, unless there are past frames.
    """

    # At a time: enough rows to occupy a matrix product, 200 MB of modulations for DiT-XL.
    ROWS = 256

    def __init__(
        self,
        model: Denoiser,
        y: Tensor | Text | None,
        guidance: float,
        estimate: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
        conditions: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.model, self.guided = model, guidance != 1
        self.ahead = model.computes_ahead and not isinstance(y, Text)
        # Classes whose modulations are needed, and whose are which sample's: all samples share the null class.
        self.classes: Tensor | Text | None = y
        self.places: Tensor | None = None
        if y is not None:
            labels = y.mask if isinstance(y, Text) else y
            self.places = torch.arange(len(labels), device=labels.device)
        self.extra: dict[str, Tensor] = dict(conditions or {})
        self.previous: Tensor | None = None
        self.estimate = estimate if model.self_conditioning else None
        if self.extra and self.ahead:
            raise ValueError(f"{' and '.join(self.extra)} cannot be given to a {type(model).__name__}")
        if self.guided and not (y is None and "past" in self.extra):
            if isinstance(y, Text):
                self.classes = y.with_nulls()
            elif y is None or model.null_class is None:
                raise ValueError(f"guidance is {guidance}; without classes or text it must be 1")
            else:
                self.classes = torch.cat((y, y.new_full((1,), model.null_class)))
        if self.guided and self.places is not None:
            shared = torch.full_like(self.places, len(self.places))
            nulls = self.places + len(self.places) if isinstance(y, Text) else shared
            self.places = torch.cat((self.places, nulls))
        if self.guided:
            self.extra = {name: torch.cat((value, value)) for name, value in self.extra.items()}
            if "past" in self.extra:
                batch, _, k = self.extra["past"].shape[:3]
                self.extra["past_frames"] = (torch.arange(batch, device=self.extra["past"].device) < batch // 2) * k

    def conditions(self, times: Tensor) -> Iterator[Tensor]:
        """One for each of the timesteps ``times``."""
        if not self.ahead:
            yield from times
            return
        labels = self.classes if isinstance(self.classes, Tensor) else None
        count = 1 if labels is None else len(labels)
        for part in times.split(max(1, self.ROWS // count)):
            classes = None if labels is None else labels.repeat(len(part))
            yield from self.model.modulations(part.repeat_interleave(count), classes).unflatten(0, (-1, count))

    def __call__(self, x: Tensor, condition: Tensor) -> tuple[Tensor, Tensor | None]:
        """The predictions at x ``[B, C, ...]``; the second is None without guidance."""
        if self.guided:
            x = torch.cat((x, x))
        if self.ahead:
            modulations = condition.expand(len(x), -1) if self.places is None else condition[self.places]
            prediction = self.model(x, modulations=modulations)
        else:
            y = None if self.classes is None or self.places is None else rows(self.classes, self.places)
            prediction = self._ask(x, condition.expand(len(x)), y)
        if not self.guided:
            return prediction, None
        cond, null = prediction.chunk(2)
        return cond, null

    def _ask(self, x: Tensor, t: Tensor, y: Tensor | Text | None) -> Tensor:
        previous = {} if self.previous is None else {"previous": self.previous}
        prediction = self.model(x, t, y, **self.extra, **previous)
        if self.estimate is not None:
            self.previous = self.estimate(prediction, x, t)
        return prediction


class CudaGraphs:
    """``function`` of tensors (or None) of constant shapes as CUDA graphs, one for each set of arguments that are None.

    A replay launches one graph instead of hundreds of kernels; a capture takes four calls. Not run on a GPU.

    Raises:
        ValueError: a device that is not CUDA.
    """

    def __init__(self, function: Callable[..., Tensor], device: torch.device) -> None:
        if device.type != "cuda":
            raise ValueError(f"CUDA graphs need a CUDA device; this is {device.type}")
        self.function = function
        self.graphs: dict[tuple[bool, ...], tuple[torch.cuda.CUDAGraph, list[Tensor | None], Tensor]] = {}

    def __call__(self, *arguments: Tensor | None) -> Tensor:
        given = tuple(argument is not None for argument in arguments)
        if given not in self.graphs:
            self.graphs[given] = self._capture(arguments)
        graph, places, result = self.graphs[given]
        for place, argument in zip(places, arguments, strict=True):
            if place is not None and argument is not None:
                place.copy_(argument)
        graph.replay()
        return result.clone()  # the next replay overwrites it

    def _capture(self, arguments: Iterable[Tensor | None]) -> tuple[torch.cuda.CUDAGraph, list[Tensor | None], Tensor]:
        places = [None if argument is None else argument.clone() for argument in arguments]
        # Before the capture, and on a stream of its own, as PyTorch asks: what libraries do at their first calls.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.function(*places)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = self.function(*places)
        return graph, places, result
