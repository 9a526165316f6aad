"""Attention whose mask is two integers a row: packed text and images at the speed of what is visible."""

from interval_attention.api import check_served, interval_attention, prepared_attention
from interval_attention.intervals import Prepared, prepare

__all__ = ["Prepared", "check_served", "interval_attention", "prepare", "prepared_attention"]
