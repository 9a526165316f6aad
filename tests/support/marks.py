"""Parameters of the full suite: `make test-all` runs them, `make test` does not."""

import pytest


def full(*values: object) -> list:
    """Parameters marked full; a tuple holds the arguments of one case."""
    return [
        pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.full)
        for value in values
    ]
