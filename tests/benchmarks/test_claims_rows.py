"""The claims' table and plots: of the committed runs, and of made ones with several seeds and sizes."""

import json
import math
import runpy
from types import SimpleNamespace

import pytest
from PIL import Image

from megafusion.errors import UserError
from megafusion.storage import file_sha256
from tests.support.small import ROOT

SEEN, LOSS = "images/seen/closed_both_accuracy", "validation_image_loss"


def script(monkeypatch, name: str) -> SimpleNamespace:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return SimpleNamespace(**runpy.run_path(str(ROOT / f"benchmarks/{name}.py")))


@pytest.fixture
def rows(monkeypatch) -> SimpleNamespace:
    return script(monkeypatch, "claims_rows")


@pytest.fixture
def claims(monkeypatch) -> tuple:
    return script(monkeypatch, "claims_list").CLAIMS


def make_runs(arm: str, values: list[dict[str, float]]) -> dict[str, dict]:
    """Finished runs of an arm, one of each seed."""
    return {
        f"{arm},seed={seed}": {
            "arm": arm,
            "state": "finished",
            "point": {"seed": str(seed)},
            "metrics": figures,
        }
        for seed, figures in enumerate(values)
    }


def test_pages_have_the_tables_of_the_committed_runs(monkeypatch, rows):
    """And a missing mark is refused. The short table has rows of every claim's letter."""
    pages, command = script(monkeypatch, "pages"), script(monkeypatch, "claims")
    for name, claims in command.PAGES.items():
        page, table = (ROOT / "docs" / name).read_text(), rows.table(claims)
        assert pages.replace_table(page, command.COMMAND, table) == page, command.COMMAND
        assert {f"({letter})" for letter in "abcdefg"} == {claim.letter for claim in claims if claim.rows}
    with pytest.raises(UserError, match="are gone"):
        pages.replace_table(page.replace(pages.END, ""), command.COMMAND, table)


def test_the_page_of_recipes_has_the_table_of_the_committed_runs(monkeypatch):
    recipes, pages = script(monkeypatch, "recipes_table"), script(monkeypatch, "pages")
    page = (ROOT / "docs/recipe.md").read_text()
    assert pages.replace_table(page, recipes.COMMAND, recipes.table()) == page, recipes.COMMAND


def test_a_recipe_beside_the_plain_one(monkeypatch, tmp_path):
    """Seen drawings 0.2, 0.3 and 0.4 better: mean 0.3, half-width 4.303 x 0.1 / sqrt(3)."""
    recipes, cider = script(monkeypatch, "recipes_table"), "captions/seen/cider"
    runs = make_runs("plain", [{SEEN: 0.1, cider: 2.0}] * 3)
    runs |= make_runs("flow", [{SEEN: 0.3, cider: 1.5}, {SEEN: 0.4, cider: 2.5}, {SEEN: 0.5, cider: 2.0}])
    runs |= make_runs("later", [])
    (tmp_path / "concepts-64.json").write_text(json.dumps({"runs": runs}))
    cost = {"over_first": 1.25, "peak_bytes_over_first": 1.5}
    (tmp_path / "cost.json").write_text(json.dumps({"arms": {"flow": cost}}))
    assert recipes.table(tmp_path).splitlines()[2:] == [
        "| plain | 3 | 0.10 |  |  | 2.00 |  |  |",
        "| flow | 3 | 0.40 (**+0.30 ± 0.25**) |  |  | 2.00 (+0.00 ± 1.24) | 1.25 | 1.50 |",
    ]


def test_arms_of_the_claims_are_arms_of_the_sweeps(rows, claims):
    import yaml

    files = {"concepts-64": "claims", "concepts-128": "claims-128", "small": "claims-small"}
    files |= {"sizes": "claims-sizes", "ablations": "claims-ablations"}
    for claim in claims:
        sweep = yaml.safe_load((ROOT / f"configs/sweeps/{files[claim.sweep]}.yaml").read_text())
        assert sweep["out"] == f"runs/claims/{claim.sweep}"
        assert {side.arm for row in claim.rows for side in (row.first, row.second)} <= sweep["runs"].keys()
        assert set(claim.main) <= {row.figure for row in claim.rows}


def test_a_verdict_is_of_the_interval_over_seeds(rows):
    """Of three paired seeds; differences -1, -2 and -3 have a half-width of 4.303 / sqrt(3)."""
    runs = make_runs("a", [{LOSS: 1.0}, {LOSS: 1.0}, {LOSS: 1.0}])
    runs |= make_runs("b", [{LOSS: 2.0, "flops": 3e12}, {LOSS: 3.0}, {LOSS: 4.0, "flops": 5e12}, {LOSS: 9.0}])
    row = rows.Row("loss", rows.Side("a", "a", LOSS), rows.Side("b", "b", LOSS), -1)
    found = rows.measure(row, runs)
    assert found.differences == [-1.0, -2.0, -3.0]
    assert found.interval == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert found.flops == (None, 4e12)
    assert found.verdict == "not shown at this size"
    runs["b,seed=0"]["metrics"][LOSS] = 2.9
    assert rows.measure(row, runs).verdict == "**agrees**"
    assert rows.measure(row._replace(better=1), runs).verdict == "**does not agree**"
    assert rows.measure(row._replace(better=0), runs).verdict == ""
    assert rows.measure(row._replace(figure=f"loss{rows.EXPLORATORY}"), runs).verdict == "agrees"
    del runs["a,seed=2"]
    assert rows.measure(row, runs).verdict == "same sign, 2 seeds"
    runs["a,seed=0"]["state"] = runs["a,seed=1"]["state"] = "training"
    assert rows.measure(row, runs) is None


def test_with_few_seeds_a_verdict_is_of_the_number_of_drawings(rows):
    sides = rows.Side("a", "a", SEEN), rows.Side("b", "b", SEEN)
    for number, verdict in ((100, "agrees, 1 seed"), (20, "not shown at this size, 1 seed")):
        runs = make_runs("a", [{SEEN: 0.5, "images/seen/images": number}])
        runs |= make_runs("b", [{SEEN: 0.3, "images/seen/images": number}])
        found = rows.measure(rows.Row("seen", *sides, 1), runs)
        first, second = ((share * number + 1) / (number + 2) for share in (0.5, 0.3))
        error = math.sqrt((first * (1 - first) + second * (1 - second)) / (number + 2))
        assert first - second - 1.96 * error == pytest.approx(0.2 - found.interval), "Agresti and Caffo's end"
        assert found.verdict == verdict
    del runs["a,seed=0"]["metrics"]["images/seen/images"]
    assert rows.measure(rows.Row("seen", *sides, 1), runs).interval is None


def test_the_wider_interval_counts(rows):
    """Of three seeds that agree by chance to a hundredth, each of 100 drawings."""
    runs = make_runs("a", [{SEEN: 0.30, "images/seen/images": 100}] * 3)
    runs |= make_runs("b", [{SEEN: 0.25 + seed / 1000, "images/seen/images": 100} for seed in range(3)])
    found = rows.measure(rows.Row("seen", rows.Side("a", "a", SEEN), rows.Side("b", "b", SEEN), 1), runs)
    assert 0.07 < found.interval < 0.08
    assert found.verdict == "not shown at this size"


def test_a_few_drawings_against_none_show_nothing(rows):
    """4 of 102 against 0 of 102: Fisher's p is 0.12. 9 against 0 has 0.003."""
    row = rows.Row("seen", rows.Side("a", "a", SEEN), rows.Side("b", "b", SEEN), 1)
    for number, verdict in ((4, "not shown at this size, 1 seed"), (9, "agrees, 1 seed")):
        for few, many in ((0, number), (102 - number, 102)):
            runs = make_runs("a", [{SEEN: many / 102, "images/seen/images": 102}])
            runs |= make_runs("b", [{SEEN: few / 102, "images/seen/images": 102}])
            assert rows.measure(row, runs).verdict == verdict, (few, many)


def test_against_chance_the_interval_is_of_one_share(rows):
    """0 of 20 against a chance of 0.1: (0 + 2) / (20 + 4) = 0.083, and no less than 20 drawings leave."""
    chance = "images/seen/concept_chance"
    runs = make_runs("a", [{SEEN: 0.0, "images/seen/images": 20, chance: 0.1}])
    found = rows.measure(rows.Row("it", rows.Side("a", "a", SEEN), rows.Side("c", "a", chance), 1), runs)
    share = 2 / 24
    half = 1.96 * math.sqrt(share * (1 - share) / 24)
    assert found.interval == pytest.approx(half + share)
    assert found.verdict == "not shown at this size, 1 seed"


def test_no_difference_has_no_sign(rows):
    row = rows.Row("loss", rows.Side("a", "a", LOSS), rows.Side("b", "b", LOSS), -1)
    runs = make_runs("a", [{LOSS: 1.0}]) | make_runs("b", [{LOSS: 1.0}])
    assert rows.measure(row, runs).verdict == "no difference, 1 seed"


def test_a_table_has_mean_deviation_and_seeds(rows, tmp_path):
    """And beside the difference the interval, of differences -0.5, -0.25 and 0: 4.303 x 0.25 / sqrt(3)."""
    runs = make_runs("a", [{LOSS: 1.0}, {LOSS: 2.0}, {LOSS: 3.0}])
    runs |= make_runs("b", [{LOSS: 1.5, "flops": 3e12}, {LOSS: 2.25}, {LOSS: 3.0}])
    (tmp_path / "made.json").write_text(json.dumps({"runs": runs}))
    side = {name: rows.Side(name, name, LOSS) for name in "ab"}
    claim = rows.Claim(
        "(z)", "it", "a against b", "1 against 2", "made", (rows.Row("loss", *side.values(), -1),)
    )
    lines = rows.table([claim, claim._replace(sweep="absent")], tmp_path).splitlines()
    figures = "2.0000 ± 1.0000 vs 2.2500 ± 0.7500 | -0.2500 ± 0.6210 | 3 | - vs 3.0"
    assert lines[2:] == [
        f"| (z) it: a against b | 1 against 2 | loss | {figures} | not shown at this size |",
        "| (z) it: a against b | 1 against 2 | | not run yet | | | | |",
        "",
        "1 rows have an interval, of 95%: if no difference were real, about 0 of them would exclude 0 by "
        "chance.",
    ]


def test_losses_of_unequal_numbers_of_images_are_compared_by_range(rows, tmp_path):
    metrics = {f"validation_image_loss_t{bucket}": float(bucket) for bucket in range(10)}
    runs = make_runs("a", [{LOSS: 9.0, **metrics}])
    (tmp_path / "made.json").write_text(json.dumps({"runs": runs}))
    (found,) = rows.load_runs("made", tmp_path).values()
    by_range = {name: found["metrics"][name] for name in rows.RANGES}
    assert list(by_range.values()) == [4.5, 2.0, 7.0]


def test_a_sheet_is_drawn_of_each_claim_that_is_measured_and_of_sizes(monkeypatch, claims, tmp_path, capsys):
    """Patch sizes share a panel; runs on two power laws give the parity ratio that made them."""
    plot = script(monkeypatch, "claims_plot")
    values = [{LOSS: 0.8 + seed / 100, SEEN: 0.3, "images/seen/images": 100} for seed in range(3)]
    ablations = [make_runs(arm, values) for arm in ("patch-1", "patch-2", "patch-8", "transfusion")]
    (tmp_path / "ablations.json").write_text(
        json.dumps({"runs": {k: v for each in ablations for k, v in each.items()}})
    )
    sizes = {}
    for size, flops in (("4x128", 1e12), ("6x192", 3e12), ("8x256", 8e12)):
        for arm, cost in (("transfusion", 0.25), ("quantized", 1.0)):
            bits = 3.0 * (flops / cost / 1e12) ** -0.1
            sizes |= make_runs(f"{arm}-{size}", [{"perplexity/all/bits_per_byte": bits, "flops": flops}] * 2)
    (tmp_path / "sizes.json").write_text(json.dumps({"runs": sizes}))
    (sheet,) = plot.draw_claims([c for c in claims if c.letter == "(c)"], tmp_path, tmp_path)
    panels = 2
    assert sheet.name == "claims-c-ablations.png"
    image = Image.open(sheet)
    assert image.size == (100 * 3.4 * panels, 100 * (3.1 + 0.5))
    assert image.text["Results"] == f"ablations.json {file_sha256(tmp_path / 'ablations.json')}"
    points = plot.compute_points({"sizes": sizes}, "perplexity/all/bits_per_byte")
    assert {arm: len(each) for arm, each in points.items()} == {"transfusion": 6, "quantized": 6}
    laws = plot.fit_arms(points, "quantized")
    assert laws["arms"]["transfusion"]["parity"] == pytest.approx(0.25)
    assert [path.name for path in plot.draw_computes(tmp_path, tmp_path)] == ["claims-compute-sizes.png"]
    assert "no plot of seen: CIDEr: not measured at two computes" in capsys.readouterr().err
    more = {}
    for key, run in sizes.items():
        if "4x128" in key:
            figures = {name: 0.8 * value for name, value in run["metrics"].items()} | {"flops": 4e12}
            more[key.replace("-4x128", "")] = run | {"arm": run["arm"][:-6], "metrics": figures}
    (tmp_path / "concepts-64.json").write_text(json.dumps({"runs": more}))
    assert [path.name for path in plot.draw_computes(tmp_path, tmp_path)] == list(plot.COMPUTES)
    sources = Image.open(tmp_path / "claims-compute-steps.png").text["Results"]
    assert [line.split()[0] for line in sources.splitlines()] == ["sizes.json", "concepts-64.json"]


def test_the_committed_plots_are_of_the_committed_results(rows, claims):
    """By the hash that each has of them; and every sweep of a claim with results has a plot."""
    found = set()
    for path in (ROOT / "docs").glob("claims-*.png"):
        sources = Image.open(path).text["Results"].splitlines()
        for name, sha256 in map(str.split, sources):
            command = "python benchmarks/claims.py plot"
            assert file_sha256(rows.RESULTS / name) == sha256, f"{path.name}: {name} has changed: {command}"
        found.add(path.name)
    measured = {f"claims-{c.letter[1]}-{c.sweep}.png" for c in claims if rows.load_runs(c.sweep)}
    assert {name for name in found if "compute" not in name} == measured
    text = "".join((ROOT / "docs" / page).read_text() for page in ("results.md", "claims.md"))
    assert all(f"({name})" in text for name in found)


def test_a_bar_is_the_interval_and_none_where_there_is_none(monkeypatch, rows):
    """Two equal seeds have an interval, of their drawings; that of three is Student's where it is wider."""
    plot = script(monkeypatch, "claims_plot")
    runs = make_runs("a", [{SEEN: 0.0, LOSS: 1.0, "images/seen/images": 46}] * 2)
    side = rows.Side("a", "a", SEEN)
    low, high = plot.interval_of(side, {"0": 0.0, "1": 0.0}, runs)
    share = 2 / 96
    assert (low, high) == (0, pytest.approx(share + 1.96 * math.sqrt(share * (1 - share) / 96)))
    assert plot.interval_of(side._replace(metric=LOSS), {"0": 1.0, "1": 1.0}, runs) is None
    half = 4.302653 / math.sqrt(3)
    found = plot.interval_of(side, {"0": 1.0, "1": 2.0, "2": 3.0}, runs)
    assert found == pytest.approx((2 - half, 2 + half), rel=1e-6)


def test_directions_are_those_of_the_claim(monkeypatch, rows, claims):
    plot = script(monkeypatch, "claims_plot")
    (claim,) = (claim for claim in claims if claim.letter == "(c)")
    said = plot.direction([row for row in claim.rows if row.first.metric == SEEN])
    assert said == "claimed: patch-1 > patch-4; patch-2 > patch-4; patch-8 < patch-4"
    assert plot.direction([row._replace(better=0) for row in claim.rows]) == "no direction claimed"
