"""What is kept, in input order, and in which shard each stands: the same however the scan was shared out."""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow
from pyarrow import parquet

from data_prep.config import PreprocessConfig
from data_prep.filters import Deduplicator, RecordInfo
from data_prep.readers.inputs import InputSplit
from data_prep.readers.records import Record
from megafusion.data.error_budget import exceeds_error_budget
from megafusion.errors import UserError

NUM_EXAMPLES = 3


class Plan(NamedTuple):
    """The records that are kept, and what became of the others."""

    pieces: np.ndarray
    """int32 [n]: the piece of each."""
    rows: np.ndarray
    """int32 [n]: its row in the piece's table."""
    num_seen: int
    """Records looked at."""
    dropped: dict[str, int]
    """By reason: what filters left out."""
    skipped: dict[str, int]
    """By reason: what was bad."""
    examples: dict[str, list[str]]
    """By reason: the first that were left out."""
    sides: dict[str, int]
    """Pictures of pairs that are kept, by the power of two below their shorter side."""

    def shard(self, number: int, per_shard: int) -> tuple[np.ndarray, np.ndarray]:
        """Pieces and rows of one shard's records."""
        here = slice(number * per_shard, (number + 1) * per_shard)
        return self.pieces[here], self.rows[here]

    def num_shards(self, per_shard: int) -> int:
        """How many shards hold them."""
        return -(-len(self.rows) // per_shard)


def make_plan(
    pieces: list[InputSplit], tables: Iterable[Path], config: PreprocessConfig, wanted: set[str] | None
) -> Plan:
    """Go through the scan's tables in order. UserError for keys that are nowhere and too much that is bad."""
    kept: list[tuple[int, np.ndarray]] = []
    dropped, skipped, sides = Counter(), Counter(), Counter()
    examples: dict[str, list[str]] = {}
    seen, found, total = Deduplicator(config.filters), set(), 0
    tables = list(tables)
    before = lines_before(pieces, tables)
    for piece, path in zip(pieces, tables, strict=True):
        table = parquet.read_table(path)
        total += len(table)
        if wanted is not None:
            found.update(table.column("key").to_pylist())
        reasons, is_bad = table.column("reason").to_pylist(), table.column("bad").to_pylist()
        if config.filters.duplicates != "keep":
            _mark_duplicates(table, reasons, seen)
        rows = np.array([row for row, reason in enumerate(reasons) if reason is None], np.int32)
        kept.append((piece.number, rows))
        shorter = np.minimum(table.column("width").to_numpy(), table.column("height").to_numpy())[rows]
        sides.update(Counter((1 << np.log2(shorter[shorter > 0]).astype(int)).tolist()))
        for row, reason in enumerate(reasons):
            if reason is not None:
                (skipped if is_bad[row] else dropped)[reason] += 1
                if len(examples.setdefault(reason, [])) < NUM_EXAMPLES:
                    key = numbered(table.column("key")[row].as_py(), before[piece.number])
                    examples[reason].append(_where(piece, key))
    _check_keys(config, wanted, found)
    _check_rate(config, skipped, examples, total)
    return Plan(
        np.concatenate([np.full(len(rows), number, np.int32) for number, rows in kept] or [np.int32([])]),
        np.concatenate([rows for _, rows in kept] or [np.int32([])]),
        total,
        dict(sorted(dropped.items())),
        dict(sorted(skipped.items())),
        examples,
        {f"{side} to {2 * side - 1}": count for side, count in sorted(sides.items())},
    )


def lines_before(pieces: list[InputSplit], tables: Iterable[Path]) -> list[int]:
    """By piece: the lines of its file before those of a part of it; 0 for all else."""
    found, before = [], 0
    for piece, path in zip(pieces, tables, strict=True):
        before = 0 if piece.opens_file else before
        found.append(before)
        if piece.part:
            before += json.loads(parquet.read_schema(path).metadata[b"lines"])
    return found


def numbered(key: str, before: int) -> str:
    """A record's key in the whole file, from that in its part."""
    return str(int(key) + before) if before and key else key


def records_at(path: Path, rows: Iterable[int], before: int) -> list[Record]:
    """Records of a scan's table by their rows; `before` as `lines_before` gives it."""
    table = parquet.read_table(path, columns=["key", "at"]).take(pyarrow.array(rows))
    keys, places = (table.column(name).to_pylist() for name in ("key", "at"))
    return [Record(numbered(key, before), json.loads(at)) for key, at in zip(keys, places, strict=True)]


def _mark_duplicates(table: pyarrow.Table, reasons: list[str | None], seen: Deduplicator) -> None:
    columns = [table.column(name).to_pylist() for name in RecordInfo._fields]
    for row, facts in enumerate(zip(*columns, strict=True)):
        if reasons[row] is None:
            reasons[row] = seen.duplicate(RecordInfo(*facts))


def _where(piece: InputSplit, key: str) -> str:
    place = str(piece.folder or piece.files[0])
    return f"{place}, {key}" if key else place


def _check_keys(config: PreprocessConfig, wanted: set[str] | None, found: set[str]) -> None:
    missing = sorted((wanted or set()) - found)
    if missing:
        raise UserError(
            f"{config.keys}: {len(missing)} keys are in no picture source, the first {missing[0]!r}"
        )


def _check_rate(config: PreprocessConfig, skipped: Counter, examples: dict, total: int) -> None:
    """As a stream's: more than the limit by what chance brings."""
    if exceeds_error_budget(skipped.total(), total, config.max_skip_rate):
        reasons = ", ".join(f"{count} x {reason}" for reason, count in sorted(skipped.items()))
        first = examples[min(skipped)][0]
        raise UserError(
            f"{skipped.total()} of {total} inputs are bad ({reasons}), more than max_skip_rate "
            f"{config.max_skip_rate}; one is {first}; mend the inputs, or raise it"
        )
