"""The plan: which records are kept, in input order, and which shard each belongs to.

It depends on the scan's tables alone, not on how the scan was distributed.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Set
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import pyarrow
from pyarrow import parquet

from data_prep.config import PreprocessConfig
from data_prep.filters import Deduplicator, RecordInfo, plain_key
from data_prep.readers.records import UNKNOWN, Record
from data_prep.readers.splits import InputSplit
from megafusion.data.document_format import exceeds_error_budget
from megafusion.errors import UserError

NUM_EXAMPLES = 3


class Plan(NamedTuple):
    """The kept records, and counts of the others."""

    splits: np.ndarray
    """int32 [n]: index of each kept record's split."""
    rows: np.ndarray
    """int32 [n]: its row in the split's table."""
    num_records: int
    """Records inspected."""
    dropped: dict[str, int]
    """Records that filters dropped, by reason."""
    skipped: dict[str, int]
    """Bad records, by reason."""
    estimated: dict[str, int]
    """Those of them that files which are cut have lost, by file: see `_estimate_lost`."""
    examples: dict[str, list[str]]
    """The first dropped or skipped records, by reason."""
    shorter_sides: dict[str, int]
    """Number of kept pairs' images by ranges of their shorter side: powers of two."""

    def shard(self, number: int, per_shard: int) -> tuple[np.ndarray, np.ndarray]:
        """Splits and rows of one shard's records."""
        own = slice(number * per_shard, (number + 1) * per_shard)
        return self.splits[own], self.rows[own]

    def num_shards(self, per_shard: int) -> int:
        return -(-len(self.rows) // per_shard)


def make_plan(
    splits: list[InputSplit],
    tables: Iterable[Path],
    config: PreprocessConfig,
    selected_keys: set[str] | None,
) -> Plan:
    """Make the plan from the scan's tables, in order. UserError for missing keys and too many bad records."""
    kept: list[tuple[int, np.ndarray]] = []
    dropped: Counter[str] = Counter()
    skipped: Counter[str] = Counter()
    sides: Counter[int] = Counter()
    examples: dict[str, list[str]] = {}
    deduplicator = Deduplicator(config.filters)
    found: set[str] = set()
    held: Counter[Path] = Counter()
    cut: dict[Path, str] = {}
    tables = list(tables)
    offsets = line_offsets(splits, tables)
    for split, path in zip(splits, tables, strict=True):
        table = parquet.read_table(path)
        num_lost = table.column("num_lost").to_pylist()
        held[split.files[0]] += sum(num_lost)
        if selected_keys is not None:
            found.update(map(plain_key, table.column("key").to_pylist()))
        reasons, is_bad = table.column("reason").to_pylist(), table.column("is_bad").to_pylist()
        if config.filters.duplicates != "keep":
            _mark_duplicates(table, reasons, deduplicator)
        rows = np.array([row for row, reason in enumerate(reasons) if reason is None], np.int32)
        kept.append((split.number, rows))
        shorter = np.minimum(table.column("width").to_numpy(), table.column("height").to_numpy())[rows]
        sides.update(Counter((1 << np.log2(shorter[shorter > 0]).astype(int)).tolist()))
        for row, reason in enumerate(reasons):
            if reason is not None:
                (skipped if is_bad[row] else dropped)[reason] += num_lost[row]
                if num_lost[row] == UNKNOWN:
                    cut[split.files[0]] = reason
                if len(examples.setdefault(reason, [])) < NUM_EXAMPLES:
                    key = renumber(table.column("key")[row].as_py(), offsets[split.number])
                    examples[reason].append(_where(split, key))
    check_keys(config, selected_keys, found)
    estimated = _estimate_lost(held, cut.keys())
    for path, number in estimated.items():
        skipped[cut[path]] += number
    total = held.total() + sum(estimated.values())
    _check_skip_rate(config, skipped, estimated, examples, total)
    empty = np.zeros(0, np.int32)
    return Plan(
        np.concatenate([empty, *(np.full(len(rows), number, np.int32) for number, rows in kept)]),
        np.concatenate([empty, *(rows for _, rows in kept)]),
        total,
        dict(sorted(dropped.items())),
        dict(sorted(skipped.items())),
        {str(path): number for path, number in estimated.items()},
        examples,
        {f"{side} to {2 * side - 1}": count for side, count in sorted(sides.items())},
    )


def line_offsets(splits: list[InputSplit], tables: Iterable[Path]) -> list[int]:
    """By split: the number of lines of its file before it; 0 unless it is a later part of a text file."""
    found, offset = [], 0
    for split, path in zip(splits, tables, strict=True):
        offset = 0 if split.opens_file else offset
        found.append(offset)
        if split.span:
            offset += json.loads(parquet.read_schema(path).metadata[b"lines"])
    return found


def renumber(key: str, line_offset: int) -> str:
    """A record's key in the complete file, from that in its split."""
    return str(int(key) + line_offset) if line_offset and key else key


def records_at(path: Path, rows: Iterable[int], line_offset: int) -> list[Record]:
    """Records at some rows of a scan's table."""
    table = parquet.read_table(path, columns=["key", "location"]).take(pyarrow.array(rows))
    keys, locations = (table.column(name).to_pylist() for name in ("key", "location"))
    return [
        Record(renumber(key, line_offset), json.loads(location))
        for key, location in zip(keys, locations, strict=True)
    ]


def _mark_duplicates(table: pyarrow.Table, reasons: list[str | None], deduplicator: Deduplicator) -> None:
    columns = [table.column(name).to_pylist() for name in RecordInfo._fields]
    for row, info in enumerate(zip(*columns, strict=True)):
        if reasons[row] is None:
            reasons[row] = deduplicator.duplicate_reason(RecordInfo(*info))


def _where(split: InputSplit, key: str) -> str:
    path = str(split.folder or split.files[0])
    return f"{path}, {key}" if key else path


def check_keys(config: PreprocessConfig, selected_keys: set[str] | None, found: set[str]) -> None:
    """UserError for selected keys that were not found."""
    missing = sorted((selected_keys or set()) - found)
    if missing:
        raise UserError(
            f"{config.keys}: {len(missing)} keys are not in any of `images`, the first {missing[0]!r}"
        )


def _estimate_lost(held: Counter[Path], cut: Set[Path]) -> dict[Path, int]:
    """Inputs that each file has lost which is cut and does not tell: an estimate, at least one.

    As many as it holds fewer than the median of the complete files of its kind in its folder, or anywhere;
    without such, as many as it still holds.
    """
    complete: dict[Any, list[int]] = {}
    for path in held.keys() - cut:
        for kind in ((path.parent, path.suffix), path.suffix):
            complete.setdefault(kind, []).append(held[path])
    found = {}
    for path in cut:
        numbers = complete.get((path.parent, path.suffix)) or complete.get(path.suffix) or [2 * held[path]]
        found[path] = max(1, int(median(numbers)) - held[path])
    return found


def _check_skip_rate(
    config: PreprocessConfig, skipped: Counter, estimated: dict[Path, int], examples: dict, total: int
) -> None:
    """UserError for a rate above max_skip_rate by more than chance explains, as in training."""
    if exceeds_error_budget(skipped.total(), total, config.max_skip_rate):
        reasons = ", ".join(f"{count} x {reason}" for reason, count in sorted(skipped.items()))
        first = examples[min(skipped)][0]
        raise UserError(
            f"{skipped.total()} of {total} inputs are bad ({reasons}){describe_estimate(estimated)}, more "
            f"than max_skip_rate {config.max_skip_rate}; one is {first}; fix the inputs, or raise it"
        )


def format_counts(counts: dict[str, int]) -> str:
    """Numbers by reason as text."""
    return ", ".join(f"{number} x {reason}" for reason, number in sorted(counts.items())) or "none"


def describe_estimate(estimated: Mapping[Any, int]) -> str:
    """How many of the bad inputs are an estimate, and why; empty if none is."""
    if not estimated:
        return ""
    names = ", ".join(map(str, list(estimated)[:NUM_EXAMPLES])) + ", ..." * (len(estimated) > NUM_EXAMPLES)
    return f", {sum(estimated.values())} of them by estimate: {names} cannot be read to the end"
