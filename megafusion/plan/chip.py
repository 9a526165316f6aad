"""The ceilings of a chip: a file for each, in chips/, every figure with its source."""

import difflib
import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import median

from megafusion.errors import UserError
from megafusion.storage import read_text

CHIPS = Path(__file__).with_name("chips")


@dataclass(frozen=True)
class Chip:
    """Ceilings of a GPU in its node; rates are numbers a second."""

    name: str
    about: str
    device: str
    """Part of the name that CUDA gives the device."""
    node_gpus: int
    multiprocessors: int
    peak_flops: float
    """Dense bf16 FLOP/s of the data sheet, which MFU is a share of."""
    product_flops: float
    """FLOP/s of large bf16 matrix products."""
    fp32_flops: float
    attention_flops: float
    """FLOP/s of attention over the visible pairs of long rows, forward and backward together."""
    sdpa_flops: float
    """The same of attention with a dense mask, over all pairs."""
    memory_bytes: float
    memory_bandwidth: float
    node_bandwidth: float
    """Bus bandwidth of collectives among the GPUs of a node."""
    card_bandwidth: float
    """Bytes a second of a GPU's network card, each way."""
    host_bandwidth: float
    """Bytes a second of a copy to host memory."""
    latency: float
    """Seconds of a collective without data."""
    gpu_hour: float
    """Dollars."""
    sources: dict[str, str]
    """Where each figure is from."""

    @cached_property
    def memory_gib(self) -> float:
        return self.memory_bytes / 2**30


def chip_names() -> list[str]:
    """The chips with a file of ceilings."""
    return sorted(path.stem for path in CHIPS.glob("*.json"))


def load_chip(name: str) -> Chip:
    """A chip by name, or by the path of a file like those in chips/. Raises UserError."""
    path = Path(name) if name.endswith(".json") else CHIPS / f"{name.lower()}.json"
    if not path.is_file():
        known = chip_names()
        near = difflib.get_close_matches(name.lower(), known, 1, 0.3)
        nearest = f"the nearest is {near[0]}; " if near else ""
        raise UserError(
            f"--gpu {name}: no ceilings of this GPU; {nearest}there are {', '.join(known)}. To add one, copy "
            f"{CHIPS / 'h100.json'}, replace its figures and give the path of the copy"
        )
    try:
        values = json.loads(read_text(path))
        figures = values.pop("figures")
        return Chip(
            name=path.stem,
            **values,
            **{key: figure for key, (figure, _) in figures.items()},
            sources={key: source for key, (_, source) in figures.items()},
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"--gpu {path}: not a chip's ceilings ({error}); compare {CHIPS / 'h100.json'}"
        ) from error


def chip_of_device(device: str) -> Chip | None:
    """The chip of a device by the name that CUDA gives it; None if there is no file of it."""
    return next((chip for chip in map(load_chip, chip_names()) if chip.device in device), None)


def with_ceilings(chip: Chip, path: Path) -> Chip:
    """The chip with what benchmarks/ceilings.py measured on one. Raises UserError for another chip's file."""
    origin = f"--ceilings {path}"
    try:
        measured = json.loads(read_text(path))
        device, bandwidth = measured["device"], float(measured["copy_bytes_per_second"])
        rates = {tuple(map(int, shape.split(" x "))): each for shape, each in measured["flops"].items()}
        # Of a training's products, not of the square one, which is the fastest.
        products = median(rate for shape, each in rates.items() if shape[0] != shape[1] for rate in each)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{origin}: not a file of benchmarks/ceilings.py --json ({error})") from error
    if chip.device not in device:
        raise UserError(
            f"{origin}: measured on {device}, and --gpu is {chip.name} ({chip.about}); give the --gpu of the "
            "file, or measure this chip with benchmarks/ceilings.py"
        )
    source = f"measured: {path}, {measured.get('date', 'no date')}"
    return replace(
        chip,
        product_flops=products,
        memory_bandwidth=bandwidth,
        sources=chip.sources | {"product_flops": source, "memory_bandwidth": source},
    )
