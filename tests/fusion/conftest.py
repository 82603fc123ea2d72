"""Dynamo starts anew in every test: sizes that one test saw must not become symbols in the next."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch.compiler.reset()
