"""Attention whose mask is an integer per query and one per key; its cost grows with the visible pairs."""

from interval_attention.api import check_supported, interval_attention, prepared_attention
from interval_attention.intervals import Prepared, prepare

__all__ = ["Prepared", "check_supported", "interval_attention", "prepare", "prepared_attention"]
