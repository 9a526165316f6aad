"""Attention whose mask is two integers per row; its cost grows with the visible query-key pairs only."""

from interval_attention.api import check_served, interval_attention, prepared_attention
from interval_attention.intervals import Prepared, prepare

__all__ = ["Prepared", "check_served", "interval_attention", "prepare", "prepared_attention"]
