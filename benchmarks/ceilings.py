"""Ceilings of this GPU: bytes a second of a copy, and TFLOP/s of the products that training makes.

    python benchmarks/ceilings.py [--json FILE]

A kernel or a step is judged by these, not by a data sheet: power limits differ between machines.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from triton.testing import do_bench

PRODUCTS = [
    (rows, *weight) for rows in (4096, 16_384) for weight in ((6144, 2048), (11_008, 2048), (2048, 5504))
]
HEADS = [(4096, 32_002, 2048), (4096, 32_064, 2048), (2048, 32_064, 2048)]
"""The head with the paper's vocabulary, and padded so that rows are aligned."""


def copy_rate() -> float:
    """Bytes read and written a second by a copy of 2 GiB."""
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * source.numel() / do_bench(lambda: target.copy_(source), return_mode="median") * 1e3


def product_rates(rows: int, columns: int, depth: int) -> list[float]:
    """FLOP/s of x @ w.T, of the gradient of x, and of that of w, on random bf16."""
    x, weight, gradient = (
        torch.randn(shape, device="cuda", dtype=torch.bfloat16)
        for shape in ((rows, depth), (columns, depth), (rows, columns))
    )
    calls = (lambda: x @ weight.T, lambda: gradient @ weight, lambda: gradient.T @ x)
    return [2 * rows * columns * depth / do_bench(call, return_mode="median") * 1e3 for call in calls]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    where = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "date": time.strftime("%F")}
    figures: dict = where | {"copy_bytes_per_second": copy_rate(), "flops": {}}
    print(f"copy: {figures['copy_bytes_per_second'] / 1e12:.2f} TB/s")
    print("TFLOP/s of forward, gradient of the input, gradient of the weight:")
    for shape in [(8192, 8192, 8192), *PRODUCTS, *HEADS]:
        rates = figures["flops"][" x ".join(map(str, shape))] = product_rates(*shape)
        print(*(f"{size:>6}" for size in shape), *(f"{rate / 1e12:6.0f}" for rate in rates), flush=True)
        if options.json:
            options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
