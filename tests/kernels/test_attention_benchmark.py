"""benchmarks/attention.py: its counts against brute force, and its files; not its times."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
from test_flash import blocks_of

from interval_attention import configs, prepare
from interval_attention.intervals import RUN
from interval_attention.reference import dense_mask

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import attention as benchmark  # noqa: E402
from attention_cases import LAYOUTS, layout, tile_pairs, visible_pairs  # noqa: E402
from attention_report import draw, summarize  # noqa: E402
from attention_tables import SIZES, candidates, chosen, measure_tiles, write_choices  # noqa: E402

ROW = {
    "layout", "seq", "head_dim", "direction", "backend", "tflops_visible", "tflops_tiles", "milliseconds",
    "peak_bytes", "batch", "heads", "visible_pairs",
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("seq", [64, 90])
def test_counts_equal_the_dense_mask(name, seq):
    mask = layout(name, seq, shrink=16)
    seen = dense_mask(*mask)[:, 0]
    assert visible_pairs(*mask) == seen.sum()
    bounds = prepare(*mask)[:2]
    for rows, keys in ((16, 16), (32, 16), (16, 32)):
        some, _ = blocks_of(seen, rows, keys)
        assert tile_pairs(*bounds, rows, keys, grid=True) == some.sum() * rows * keys
        steps = 0
        for first in range(0, seq, rows):
            (visited,) = torch.nonzero(seen[0, first : first + rows].any(0), as_tuple=True)
            steps += -(-(int(visited[-1]) + 1 - int(visited[0])) // keys)
        assert tile_pairs(*bounds, rows, keys, grid=False) == steps * rows * keys


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_schedule_visits_the_pairs_that_are_counted(name):
    prepared = prepare(*layout(name, 1024))
    parts = prepared.row_schedule[..., 1:, :].flatten(0, 1)
    for rows, keys in ((128, 64), (64, 64), (32, 128)):
        first = RUN // rows
        bounds = parts[:, first - 1 : 2 * first - 1]
        steps = (bounds[..., 3] - bounds[..., 0] + keys - 1) // keys
        assert tile_pairs(*prepared[:2], rows, keys, grid=False) == int(steps.sum()) * rows * keys


def test_layouts_match_their_names():
    end, last = (x[0] for x in layout("interleaved-1024", 8192))
    position = torch.arange(8192)
    patches = end > position + 1
    assert 0.5 < patches.float().mean() < 1
    assert int((end - position).max()) == 1024
    assert last[0] < 8192
    assert (end > position).all()
    end, _ = layout("pairs", 8192)
    assert int((end[0] - position).max()) == 256


@pytest.fixture(scope="module")
def report() -> dict:
    # Two of the four layouts suffice.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "LAYOUTS", ("causal", "interleaved-256"))
        return benchmark.measure(benchmark.TINY)


@pytest.mark.full
def test_the_report_has_its_keys_and_names_its_device(report):
    assert {"rows", "summary", "prepare", "accuracy", "skipped", "device", "versions", "date"} <= set(report)
    assert report["gpu_measurement"] is False
    assert "not a GPU" in report["device"]
    for row in report["rows"]:
        assert set(row) == ROW
        assert row["tflops_tiles"] >= row["tflops_visible"] > 0
        factor = {"forward": 4, "backward": 10, "both": 14}[row["direction"]]
        flops = factor * row["head_dim"] * row["heads"] * row["visible_pairs"]
        assert row["tflops_visible"] == pytest.approx(flops / row["milliseconds"] / 1e9)
    found = {(r["backend"], r["direction"]) for r in report["rows"]}
    for backend in ("interval", "sdpa"):
        assert {(backend, d) for d in benchmark.DIRECTIONS} <= found
    assert all(entry["reason"] for entry in report["skipped"])
    assert {"vs_flex", "best_vs_flex", "vs_best_causal", "packed_vs_causal"} <= set(report["summary"])
    assert report["summary"]["prepare_vs_create_block_mask"] > 0
    assert report["summary"]["vs_flex"] is None  # FlexAttention has no backward here
    json.dumps(report)


@pytest.mark.full
def test_the_errors_on_a_cpu_are_those_of_float32(report):
    errors = {(r["backend"], r["tensor"]): r["error"] for r in report["accuracy"]}
    assert {("interval", name) for name in ("o", "dq", "dk", "dv")} <= set(errors)
    assert all(0 < error < 1e-5 for error in errors.values())


@pytest.mark.full
def test_the_chart_is_drawn(report, tmp_path):
    draw(report, tmp_path / "bars.png")
    assert (tmp_path / "bars.png").read_bytes()[:4] == b"\x89PNG"


def both(name: str, seq: int, backend: str, ms: float, tiles: float = 1.0) -> dict:
    row = {"layout": name, "seq": seq, "head_dim": 128, "direction": "both", "backend": backend}
    return row | {"milliseconds": ms, "tflops_visible": 100 / ms, "tflops_tiles": tiles}


def test_the_summary_reports_the_minimum_ratio():
    spent = {"interval": 1.0, "create_block_mask": 20.0, "create_block_mask compiled": 5.0}
    rows = [
        both("causal", 8192, "interval", 2.0, tiles=10.0),
        both("causal", 8192, "sdpa-cudnn-causal", 1.0),
        both("causal", 8192, "sdpa-flash-causal", 1.5),
        both("pairs", 8192, "interval", 2.0, tiles=9.0),
        both("pairs", 8192, "flex", 3.0),
        both("pairs", 8192, "flash", 1.0),
        both("interleaved-256", 8192, "interval", 2.0, tiles=8.0),
        both("interleaved-256", 8192, "flex", 5.0),
        both("pairs", 4096, "flex", 0.1),
    ]
    report = {"rows": rows, "prepare": [{"what": k, "milliseconds": v} for k, v in spent.items()]}
    summary = summarize(report, [8192], 128)
    assert summary == pytest.approx(
        {
            "vs_flex": 1.5,
            "best_vs_flex": 2.5,
            "vs_best_causal": 0.5,
            "best_vs_causal": 0.5,
            "packed_vs_causal": 0.8,
            "prepare_vs_create_block_mask": 20.0,
            "prepare_vs_compiled": 5.0,
        }
    )
    del rows[7]
    assert summarize(report, [8192], 128)["vs_flex"] is None


def test_choices_order_backends_by_the_sum_over_mixed_layouts():
    rows = [both(name, seq, "interval", ms) for seq, ms in ((4096, 1), (8192, 5)) for name in ("pairs", "x")]
    rows += [both(name, seq, "flash", 2) for seq in (4096, 8192) for name in ("pairs", "x")]
    rows += [
        both("pairs", 4096, "flex", 0.1),
        both("causal", 4096, "flash", 0.01),
        both("pairs", 65536, "flash", 1),
    ]
    assert chosen(rows, 90) == [
        {"architecture": 90, "head_dim": 128, "min_rows": 0, "backends": ["interval", "flash"]},
        {"architecture": 90, "head_dim": 128, "min_rows": 8192, "backends": ["flash", "interval"]},
    ]


def test_candidates_are_unique_and_fit_the_schedule():
    for kernel, present in zip(configs.Tiles._fields, configs.lookup(90, 128, 0), strict=True):
        if kernel not in SIZES:
            continue
        tiles = list(candidates(kernel, present, 90, tiny=False))
        assert tiles[0] == present
        assert len(set(tiles)) == len(tiles) > 30
        assert {tile.tma for tile in tiles} == {False, True}
        older = getattr(configs.lookup(80, 128, 0), kernel)
        assert not any(tile.tma for tile in candidates(kernel, older, 80, tiny=False))
        assert all(RUN % tile.rows == RUN % tile.keys == 0 for tile in tiles)


def test_choices_from_a_cpu_are_refused(tmp_path):
    with pytest.raises(ValueError, match="choices must be measured on a GPU"):
        write_choices(benchmark.describe(benchmark.TINY), tmp_path / "choices.json")
    assert not list(tmp_path.iterdir())


def test_tiles_are_measured_and_stored(tmp_path, monkeypatch):
    before, path = configs.STORED.read_text(), tmp_path / "tiles.json"
    plan = dataclasses.replace(benchmark.TINY, seqs=(32,))
    measure_tiles(plan, benchmark.describe(plan), path, benchmark.directions, benchmark.milliseconds)
    assert configs.STORED.read_text() == before
    stored = json.loads(path.read_text())
    assert "not a GPU" in stored["measured"][0]["device"]
    assert len(stored["tiles"]) == len(json.loads(before)["tiles"])
    monkeypatch.setattr(configs, "STORED", path)
    configs.read_stored.cache_clear()
    try:
        found = configs.lookup(90, 16, 4096)
    finally:
        configs.read_stored.cache_clear()
    for kernel, tile in found._asdict().items():
        assert tile._replace(tma=False) == getattr(configs.INTERPRETED, kernel)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no CUDA device"),
        (["--tiny", "--write-choices"], "not a measurement"),
        (["--tiny", "--json", str(BENCHMARKS / "results/tiny.json")], "nothing to benchmarks/results"),
        (["--tiny", "--tiles"], "name a --tiles-file"),
    ],
)
def test_misleading_runs_are_refused(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["attention.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        benchmark.main()
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
