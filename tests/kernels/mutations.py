"""Mutation test of the kernels: break them in many ways, one at a time, and show that a test catches each.

python tests/kernels/mutations.py [name ...]

Each mutation is a substitution in a temporary copy of the package; the tests below then run against the
copy. Exit status 1 if a mutation survives, or if the unbroken copy fails.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "kernels/interval_attention"
TESTS = {
    "test_interval_attention.py": (
        "test_160_random_layouts_equal_dense_attention[3]",
        "test_grouped_queries",
        "test_three_loops_as_on_sm_80[heads0]",
        "test_heads_in_sections_that_fit_in_the_cache",
        "test_one_document_over_everything",
        "test_rows_longer_than_a_run_of_the_schedule[100-131]",
        "test_fully_masked_rows_give_zeros_and_no_gradient",
        "test_fewer_queries_than_keys[17]",
        "test_the_forward_pass_allows_ends_in_any_order",
        "test_inputs_and_gradients_of_any_strides[every_second]",
        "test_intervals_beyond_the_keys_are_clamped",
        "test_random_layouts_with_holes_equal_dense_attention[0]",
        "test_a_hole_smaller_or_larger_than_a_step",
        "test_holes_in_three_loops_as_on_sm_80",
        "test_holes_in_rows_longer_than_a_run_of_the_schedule",
        "TestTma::test_random_layouts[0]",
        "test_which_tensors_support_a_descriptor",
    ),
    "test_interval_prepare.py": (
        "test_rows_have_one_hole_each_in_400_layouts_with_noised_copies",
        "test_rows_of_more_than_two_runs_are_refused",
    ),
    "test_flash.py": (
        "test_block_lists_of_rows_with_holes_equal_brute_force",
        "test_one_long_document_has_full_blocks",
        "test_blocks_past_the_end_are_not_full",
        "test_lists_by_rows_and_by_keys_agree[1000]",
        "test_block_lists_equal_brute_force_over_all_pairs",
        "test_rows_that_are_not_text_only_are_refused",
    ),
}


TESTED_IN = {"blocks.py": ["test_flash.py"], "flash.py": ["test_flash.py"]}


class Mutation(NamedTuple):
    """Replace every occurrence of `old` in `file` by `new`."""

    file: str
    old: str
    new: str


MUTATIONS = {
    "a query sees one key too many": Mutation("tiles.py", "step < (tl.load(end", "step <= (tl.load(end"),
    "a query misses its first key": Mutation("tiles.py", "step >= (tl.load(start", "step > (tl.load(start"),
    "right edge not masked": Mutation("tiles.py", "first + s.shape[1] > inner_high", "first > inner_high"),
    "left edge not masked": Mutation("tiles.py", "if first < inner_low", "if first < 0"),
    "last step skipped": Mutation(
        "tiles.py", "tl.cdiv(tl.maximum(high - begin, 0), BLOCK)", "tl.maximum(high - begin, 0) // BLOCK"
    ),
    "a step counted as full on sm_80 that is not": Mutation(
        "tiles.py", "low + tl.cdiv(inner_low - low, BLOCK) * BLOCK", "low"
    ),
    "heads go on before a part ends": Mutation(
        "backward.py", "begin + num_steps * BLOCK_M", "high - BLOCK_M"
    ),
    "the bounds of another part": Mutation("tiles.py", "fields * (parts + part)", "fields * parts"),
    "the bounds of the whole run's first half": Mutation("tiles.py", "fields * (parts + part)", "fields * 2"),
    "maxima of starts are minima": Mutation(
        "intervals.py", "-x.masked_fill(empty, 0)", "x.masked_fill(empty, FAR)"
    ),
    "keys that no row sees not zeroed": Mutation("backward.py", "tl.where(some, dv_ND, 0.0)", "dv_ND"),
    "lse and delta swapped": Mutation("backward.py", "(statistics >> 32)", "(statistics & 0xFFFFFFFF)"),
    "heads of the first section only": Mutation("tiles.py", "tl.program_id(1) * section + ", ""),
    "wrong head group in forward": Mutation(
        "forward.py", "kv_head = head // group", "kv_head = head % (num_heads // group)"
    ),
    "wrong head group in dK and dV": Mutation("backward.py", "head = kv_head * group", "head = kv_head"),
    "only the group's first head adds to dK and dV": Mutation(
        "backward.py", "num_steps * group", "num_steps"
    ),
    "scale missing in dQ": Mutation("backward.py", "dq_MD * scale", "dq_MD"),
    "scale missing in dK": Mutation("backward.py", "dk_ND * scale", "dk_ND"),
    "lse in base 2": Mutation("forward.py", "* 0.6931471805599453", "* 1.0"),
    "gradient of lse ignored": Mutation("backward.py", " - dlse_M)", ")"),
    "delta ignored in dQ": Mutation("backward.py", "dp - delta_M[:, None]", "dp"),
    "accumulator not shrunk": Mutation("forward.py", "acc * shrink[:, None]", "acc"),
    "first visible row one too late": Mutation(
        "intervals.py",
        "torch.searchsorted(row_end.contiguous(), key, right=True",
        "torch.searchsorted(row_end.contiguous(), key + 1, right=True",
    ),
    "first visible key one too early": Mutation(
        "intervals.py",
        "torch.searchsorted(last_query.contiguous(), row, right=True",
        "torch.searchsorted(last_query.contiguous(), row, right=False",
    ),
    "one run processed twice, another never": Mutation(
        "intervals.py", "descending=True, stable=True)", "descending=True, stable=True) // 2 * 2"
    ),
    "empty rows not zeroed": Mutation(
        "forward.py", "< tl.load(row_end, mask=inside, other=0)", "<= tl.load(row_end, mask=inside, other=0)"
    ),
    "interval not clamped to the keys": Mutation("intervals.py", "row_end.clamp(max=num_keys)", "row_end"),
    "TMA reads the first head": Mutation("tiles.py", "head.to(tl.int32), 0]", "0, 0]"),
    "TMA where the last stride is not 1": Mutation("api.py", "last == 1 and aligned", "aligned"),
    "a block listed as full that is not": Mutation(
        "blocks.py", "past_key[:, None] <= least_end", "first_key[:, None] <= least_end"
    ),
    "a block listed as full that not all keys' queries reach": Mutation(
        "blocks.py", "past_row[..., None] <= least_query", "past_row[..., None] <= most_query"
    ),
    "last visited block not listed": Mutation("blocks.py", "< most_end", "< most_end - block_keys"),
    "a block past the end listed as full": Mutation("blocks.py", "blocks.amin(2)", "bound.amin(1)[:, None]"),
    "full blocks listed among the others": Mutation("blocks.py", "is_visited & ~is_full", "is_visited"),
    "padding sees keys in flash-attention": Mutation(
        "flash.py", "F.pad(row_end, (0, -num_rows % block_rows))", "F.pad(row_end, (0, 0))"
    ),
    "lists by keys one row off": Mutation("blocks.py", "is_full.mT)", "is_full.mT.roll(1, 1))"),
    "images accepted as text": Mutation("flash.py", "row_end != position + 1", "row_end < position + 1"),
    "keys behind a small hole counted twice": Mutation(
        "tiles.py", "tl.maximum(gap[1] - begin - turn * BLOCK, 0)", "gap[1] - begin - turn * BLOCK"
    ),
    "keys behind a hole skipped": Mutation(
        "tiles.py", "tl.maximum(gap[1] - begin - turn * BLOCK, 0)", "tl.maximum(gap[1] - begin, 0)"
    ),
    "the last step before a hole skipped": Mutation(
        "tiles.py", "tl.cdiv(tl.maximum(gap[0] - begin, 0), BLOCK)", "tl.maximum(gap[0] - begin, 0) // BLOCK"
    ),
    "a hole's first key seen": Mutation(
        "tiles.py", "before = step < (tl.load(holes[0]", "before = step <= (tl.load(holes[0]"
    ),
    "the first key behind a hole hidden": Mutation(
        "tiles.py", "behind = step >= (tl.load(holes[1]", "behind = step > (tl.load(holes[1]"
    ),
    "holes masked in steps that begin in them alone": Mutation(
        "tiles.py", "first + s.shape[1] > gap[2]", "first > gap[2]"
    ),
    "holes masked up to the first one's end": Mutation(
        "intervals.py", "hole_end.amax(-1)]", "hole_end.amin(-1)]"
    ),
    "holes masked from the last one's start": Mutation(
        "intervals.py", "hole_start.amin(-1)", "hole_start.amax(-1)"
    ),
    "full steps on sm_80 over holes": Mutation("tiles.py", "tl.minimum(inner_high, gap[2])", "inner_high"),
    "a gap from where the first row's keys end": Mutation("intervals.py", "seen.amax(-1)", "seen[..., 0]"),
    "a gap up to the last hole's end": Mutation(
        "intervals.py", ".amin(-1, keepdim=True)\n    # Where", ".amax(-1, keepdim=True)\n    # Where"
    ),
    "a hole one key too long": Mutation("intervals.py", "(document_end - row)", "(document_end - row - 1)"),
    "a row's own group taken for its hole": Mutation(
        "intervals.py", "(before_group <= row)", "(before_group > row)"
    ),
    "documents by the last key's bound": Mutation(
        "intervals.py", "last_query.cummax(1).values if has_holes", "last_query if has_holes"
    ),
    "last stride assumed to be 1": Mutation("tiles.py", "[None, :] * stride_d", "[None, :]"),
}


def run_tests(mutation: Mutation | None) -> subprocess.CompletedProcess:
    """Run the tests against a copy of the package with one mutation, or with none."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "interval_attention"
        shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
        if mutation is not None:
            source = (copy / mutation.file).read_text()
            if mutation.old not in source:
                raise SystemExit(f"{mutation.file} does not contain {mutation.old!r}: update mutations.py")
            (copy / mutation.file).write_text(source.replace(mutation.old, mutation.new))
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--noconftest"]
        others = ["test_interval_prepare.py", "test_interval_attention.py"]
        files = TESTS if mutation is None else TESTED_IN.get(mutation.file, others)
        command += [f"{ROOT / 'tests/kernels' / file}::{test}" for file in files for test in TESTS[file]]
        environment = os.environ | {"PYTHONPATH": folder, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def main(names: list[str]) -> int:
    """Print one line per mutation, after the tests have passed on the unbroken package."""
    if (whole := run_tests(None)).returncode:
        print(whole.stdout[-3000:])
        return 1
    survivors = 0
    for name in names or MUTATIONS:
        begin = time.perf_counter()
        done = run_tests(MUTATIONS[name])
        caught = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
        by = caught[0].split("::")[1].split(" ")[0] if caught else "NOT CAUGHT"
        survivors += not caught
        print(f"{name:<48}{by:<64}{time.perf_counter() - begin:5.1f} s", flush=True)
    print(f"{len(names or MUTATIONS) - survivors} of {len(names or MUTATIONS)} caught")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
