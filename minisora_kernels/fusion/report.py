"""What the pass found: one site per place of the model where an op could stand."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass


@dataclass(frozen=True)
class Site:
    """A place in a model.

    Attributes:
        module: Path of the module from the root that was traced; empty for the root itself.
        block: Name of that module's class.
        op: The op that fits.
        backend: What serves it; None if the site is left as it is.
        reason: Why it is left; empty if it is served.
    """

    module: str
    block: str
    op: str
    backend: str | None
    reason: str = ""


class Sites:
    """The sites of all graphs of a model. A place that is traced again, for other shapes, counts once."""

    def __init__(self) -> None:
        self.graphs = 0
        self.breaks: dict[str, None] = {}
        self._sites: dict[tuple[str, str, str, int], Site] = {}

    def add(self, sites: list[Site], ended_by: object = None) -> None:
        """The sites of one graph, and what Dynamo says of why it ended."""
        self.graphs += 1
        if getattr(ended_by, "graph_break", False):
            self.breaks[str(getattr(ended_by, "reason", "")).strip().split("\n")[0]] = None
        seen: Counter[tuple[str, str, str]] = Counter()
        for site in sites:
            place = site.module, site.block, site.op
            key = (*place, seen[place])
            self._sites[key] = site
            seen[place] += 1

    def __iter__(self):
        return iter(self._sites.values())

    def text(self) -> str:
        """The report: per class of block, op by op, what serves it and what was left, with the number of sites."""
        if not self.graphs:
            return "no graph yet: the model is read when it is first called"
        served = Counter(site.op for site in self if site.backend)
        lines = [f"{self.graphs} graphs, {sum(served.values())} sites served, {self._left()} left"]
        for block in dict.fromkeys(site.block for site in self):
            sites = [site for site in self if site.block == block]
            modules = {site.module for site in sites}
            lines.append(f"{block} ({len(modules)})")
            alike = Counter((site.op, site.backend or "", site.reason) for site in sites)
            for (op, backend, reason), count in sorted(alike.items()):
                lines.append(f"  {op:20} {count:4}  {backend or 'left: ' + reason}")
        lines += [f"the graph breaks: {reason}" for reason in self.breaks]
        return "\n".join(lines)

    def _left(self) -> int:
        return sum(site.backend is None for site in self)
