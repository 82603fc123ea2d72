"""The layouts of published weights, by the kind that ``models.convert`` names."""

from __future__ import annotations

from . import cascade, diffusers_dit, vqgan
from .cascade import stage_b, stage_c, to_stage_b, to_stage_c
from .dit import dit, latte, sit, to_dit, to_latte, to_sit, to_sit_adapters
from .layout import Layout
from .stdit import stdit, to_stdit
from .vdit import to_vdit, vdit
from .vqgan import stage_a, to_stage_a

LAYOUTS = {
    "dit": Layout(dit, to_dit, to_diffusers=diffusers_dit.to_diffusers),
    "sit": Layout(sit, to_sit, to_sit_adapters),
    "latte": Layout(latte, to_latte),
    "stdit": Layout(stdit, to_stdit),
    "vdit": Layout(vdit, to_vdit),
    "cascade-a": Layout(stage_a, to_stage_a, to_diffusers=vqgan.to_diffusers),
    "cascade-b": Layout(stage_b, to_stage_b, cascade.no_adapters, cascade.to_diffusers),
    "cascade-c": Layout(stage_c, to_stage_c, cascade.no_adapters, cascade.to_diffusers),
}
