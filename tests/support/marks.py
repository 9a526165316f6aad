"""Marks: parameters of the full suite, which `make test-all` runs and `make test` does not, and devices."""

import pytest
import torch

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")


def full(*values: object) -> list:
    """Parameters marked full; a tuple holds the arguments of one case."""
    return [
        pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.full)
        for value in values
    ]
