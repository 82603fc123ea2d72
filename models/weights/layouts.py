"""The layouts of published weights, by the kind that ``models.convert`` names."""

from __future__ import annotations

from .dit import dit, latte, sit, to_dit, to_latte, to_sit, to_sit_adapters
from .layout import Layout
from .stdit import stdit, to_stdit
from .vdit import to_vdit, vdit

LAYOUTS = {
    "dit": Layout(dit, to_dit),
    "sit": Layout(sit, to_sit, to_sit_adapters),
    "latte": Layout(latte, to_latte),
    "stdit": Layout(stdit, to_stdit),
    "vdit": Layout(vdit, to_vdit),
}
