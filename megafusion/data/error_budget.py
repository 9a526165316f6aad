"""How many bad documents a run may skip."""

import math


def exceeds_error_budget(num_skipped: int, num_seen: int, max_rate: float) -> bool:
    """Whether `num_skipped` exceeds what `max_rate` predicts by three standard deviations plus three."""
    expected = max_rate * num_seen
    return num_skipped > expected + 3 * math.sqrt(expected) + 3
