"""How much may be left out."""

import math


def beyond_chance(num_skipped: int, num_seen: int, max_rate: float) -> bool:
    """Whether more was left out than `max_rate`, three deviations of chance and three more explain."""
    expected = max_rate * num_seen
    return num_skipped > expected + 3 * math.sqrt(expected) + 3
