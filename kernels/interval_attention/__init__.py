"""Attention whose mask is two integers per row; its cost grows with the visible query-key pairs only."""

from interval_attention.api import check_supported, interval_attention, prepared_attention
from interval_attention.intervals import Prepared, prepare

__all__ = ["Prepared", "check_supported", "interval_attention", "prepare", "prepared_attention"]
