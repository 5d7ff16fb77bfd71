"""Tests import the modules from the project's root."""
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import pretend_gpu  # before any backward pass: autograd counts the devices once

torch.set_num_threads(2)


@pytest.fixture
def gpu(monkeypatch):
    """The device of a GPU that is pretended (pretend_gpu.py); `--device pretend` on the command line."""
    monkeypatch.setattr(torch, "Generator", pretend_gpu.Generator)
    return pretend_gpu.PRETEND
