"""Speed of the data loader, compared with webdataset's and mosaicml-streaming's.

    python benchmarks/loader.py [--json [FILE]] [--without streaming]

One process each, from a local disk, in alternating rounds. The data are synthetic: images of the paper's size
(latents 8 x 32 x 32, 256 patches) with captions of about 20 tokens, and long texts, half of each, packed into
4,096 positions. All three read and decode the same members and use the same functions to sample and lay out
documents. The peers do not shuffle, and pack in reading order (texts cut to fill, images complete). So they
differ in reading, decoding, order and bookkeeping. Positions are counted without padding.

Also: ms from opening to the first batch of 4 packed sequences; and ms from opening to the first batch when
resuming at the end of an epoch of 10 million samples (10,000 shards, links to one).
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from webdataset import WebDataset

from megafusion.data.config import DataConfig
from megafusion.data.document_format import StoredDocument
from megafusion.data.loader import DataLoader, packed_and_skipped
from megafusion.data.manifest import MANIFEST, Manifest, load_manifest, write_manifest
from megafusion.data.sampling import sample_layout, sample_noise
from megafusion.data.shards import write_shard
from megafusion.data.source import counter_generator, open_sources
from megafusion.objective.ddpm import DDPMConfig
from megafusion.sequence.document import Segment, cut_document, flatten
from megafusion.sequence.packing import SequenceShape, collate, pack_row
from megafusion.sequence.tokenizer import Tokenizer
from megafusion.storage import write_file

SHAPE = SequenceShape(length=4096, num_images=15, patches=(256,), latent_channels=8, sizes=((32, 32),))
LATENT_SHAPE = (8, 32, 32)
NUM_ROWS, NUM_STREAMS, NUM_SAMPLES = 4, 16, 10_000_000
KINDS = ("pairs", "text")
TOKENIZER = Tokenizer(Path("t"), "t", 32000, bos=1, eos=2)


def segments(tokens: np.ndarray, moments: np.ndarray | None) -> list[Segment]:
    """A text, and an image if there is one."""
    return [Segment("tokens", tokens)] + ([] if moments is None else [Segment("moments", moments)])


def documents(kind: str, num: int) -> Iterator[StoredDocument]:
    """Pairs or texts with the lengths of CC12M's captions and of web pages."""
    random = np.random.default_rng(0)
    for number in range(num):
        mean, spread, most = (18, 0.5, 200) if kind == "pairs" else (1200, 1.2, 60000)
        length = int(np.clip(random.lognormal(np.log(mean), spread), 3, most))
        tokens = random.integers(3, 32000, length).astype(np.int32)
        moments = random.standard_normal((2, *LATENT_SHAPE)).astype(np.float16)
        stored = segments(tokens, moments if kind == "pairs" else None)
        yield StoredDocument({"key": str(number)}, tuple(stored))


def write_shards(folder: Path, documents: Iterator[StoredDocument], per_shard: int, **fields: object) -> None:
    """Write a folder of MegaFusion's shards; `fields` are of the manifest."""
    folder.mkdir(parents=True)
    batches = iter(lambda: list(islice(documents, per_shard)), [])
    write_manifest(folder, [write_shard(folder, *batch) for batch in enumerate(batches)], fields)


def write_all(folder: Path, num: int, with_streaming: bool) -> None:
    """Write the same documents as MegaFusion's shards and, if asked for, as mosaicml-streaming's."""
    for kind in KINDS:
        fields = {"kind": kind.removesuffix("s"), "tokenizer_sha256": "t", "provenance": {}}
        if kind == "pairs":
            fields |= {"vae_sha256": "v", "latent_shape": LATENT_SHAPE}
        share = num if kind == "pairs" else num // 5
        write_shards(folder / kind, documents(kind, share), 256, **fields)
        if with_streaming:
            from streaming import MDSWriter

            columns = {"json": "json", "tokens": "ndarray:int32"}
            columns |= {"moments": "ndarray:float16"} if kind == "pairs" else {}
            with MDSWriter(out=str(folder / f"mds-{kind}"), columns=columns) as writer:
                for document in documents(kind, share):
                    arrays = {segment.kind: segment.data for segment in document.segments}
                    writer.write({"json": document.metadata, **arrays})


def make_stream(folder: Path, kinds: tuple[str, ...] = KINDS, num_workers: int = 0) -> DataLoader:
    """MegaFusion's data loader."""
    config = DataConfig(
        sources={kind: {"path": str(folder / kind)} for kind in kinds},
        tokenizer=Path("t"),
        vae=Path("v"),
        sequence_length=SHAPE.length,
        images_per_row=SHAPE.num_images,
        num_streams=NUM_STREAMS,
        num_workers=num_workers,
    )
    sources = open_sources(config, TOKENIZER, "v", 0)
    rows = NUM_ROWS, range(NUM_ROWS), NUM_ROWS
    return DataLoader(config, sources, SHAPE, TOKENIZER, DDPMConfig().build(), *rows)


def ours(folder: Path) -> Iterator[int]:
    """Positions of each batch."""
    stream, before = make_stream(folder), 0
    while True:
        stream.next()
        total = packed_and_skipped(stream.state_dict())[0].total()
        yield total - before
        before = total


def webdataset(folder: Path) -> Iterator[int]:
    """Batches from webdataset's plain loader."""

    def read(kind: str) -> Iterator[list[Segment]]:
        urls = [str(path) for path in sorted((folder / kind).glob("*.tar"))]
        for sample in WebDataset(urls, shardshuffle=False).decode().repeat():
            yield segments(sample["0.tokens.npy"], sample.get("1.moments.npy"))

    return batches({kind: read(kind) for kind in KINDS}, load_manifest(folder / "pairs"))


def streaming(folder: Path) -> Iterator[int]:
    """Batches from mosaicml-streaming's dataset."""
    from streaming import StreamingDataset

    def read(kind: str) -> Iterator[list[Segment]]:
        dataset = StreamingDataset(local=str(folder / f"mds-{kind}"), shuffle=False, batch_size=1)
        while True:
            for sample in dataset:
                yield segments(sample["tokens"], sample.get("moments"))

    return batches({kind: read(kind) for kind in KINDS}, load_manifest(folder / "pairs"))


def batches(readers: dict[str, Iterator], manifest: Manifest) -> Iterator[int]:
    """Positions of each batch of a peer's documents, sampled, laid out and packed in its reading order."""
    config = DataConfig(
        sources={"pairs": {"path": "pairs"}},
        tokenizer=Path("t"),
        vae=Path("v"),
        sequence_length=SHAPE.length,
        images_per_row=SHAPE.num_images,
        num_streams=1,
    )
    texts, noise_process = manifest.model_copy(update={"kind": "text"}), DDPMConfig().build()
    packed, rows, row, used, number = dict.fromkeys(readers, 0), [], [], 0, 0
    while True:
        kind = min(packed, key=packed.get)
        generator = counter_generator(0, 0, number, 0, 0)
        number += 1
        about = manifest if kind == "pairs" else texts
        stored = StoredDocument({}, tuple(next(readers[kind])))
        parts = sample_layout(stored, about, config, SHAPE, generator)
        whole = flatten(parts, TOKENIZER, SHAPE.patches)
        packed[kind] += len(whole)
        pieces = [sample_noise(whole, about, SHAPE, noise_process, generator)]
        while pieces:
            piece, room = pieces.pop(), SHAPE.length - used
            images = sum(len(document.images) for document in row)
            if used + len(piece) <= SHAPE.length and images + len(piece.images) <= SHAPE.num_images:
                row.append(piece)
                used += len(piece)
                continue
            if not piece.images and room:
                row.append(cut_document(piece, 0, room))
                used += room
                piece = cut_document(piece, room, len(piece))
            rows.append((pack_row(row, SHAPE), used))
            pieces.append(piece)
            row, used = [], 0
            if len(rows) == NUM_ROWS:
                collate([made for made, _ in rows])
                yield sum(real for _, real in rows)
                rows = []


def measure(folder: Path, names: list[str], num_rounds: int, num_batches: int) -> dict:
    """Positions per second (median of rounds) and ms to the first batch, by loader."""
    makers = {"megafusion": ours, "webdataset": webdataset, "streaming": streaming}
    loaders, found = {}, {}
    for name in names:
        begin = time.perf_counter()
        loaders[name] = makers[name](folder)
        next(loaders[name])
        found[name] = {"first_batch_ms": 1000 * (time.perf_counter() - begin)}
    speeds: dict[str, list[float]] = {name: [] for name in names}
    fills: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(num_rounds):
        for name in names:
            begin = time.perf_counter()
            real = sum(islice(loaders[name], num_batches))
            speeds[name].append(real / (time.perf_counter() - begin))
            fills[name].append(real / (num_batches * NUM_ROWS * SHAPE.length))
    for name in names:
        found[name] |= {
            "positions_per_second": statistics.median(speeds[name]),
            "fill": statistics.mean(fills[name]),
        }
    # The median of each round's ratio, because other load on the machine affects a round's loaders alike.
    for name in names[1:]:
        ratios = [a / b for a, b in zip(speeds["megafusion"], speeds[name], strict=True)]
        found[name]["ratio"] = statistics.median(ratios)
    return found


def measure_workers(folder: Path, num_batches: int, num_workers: int) -> float:
    """Positions per second that worker processes deliver to a process that does nothing else."""
    with make_stream(folder, num_workers=num_workers) as stream:
        stream.next()
        begin = time.perf_counter()
        for _ in range(num_batches):
            stream.next()
        return num_batches * NUM_ROWS * SHAPE.length / (time.perf_counter() - begin)


def measure_resume(folder: Path, num_tries: int = 5) -> float:
    """Milliseconds from opening to the first batch, at the end of an epoch of NUM_SAMPLES pairs."""
    one = folder / "one"
    write_shards(
        one / "pairs",
        documents("pairs", 1000),
        1000,
        kind="pair",
        tokenizer_sha256="t",
        vae_sha256="v",
        latent_shape=LATENT_SHAPE,
        provenance={},
    )
    many = folder / "many" / "pairs"
    many.mkdir(parents=True)
    values = json.loads((one / "pairs" / MANIFEST).read_text())
    (entry,) = values["shards"]
    values["shards"] = []
    for number in range(NUM_SAMPLES // 1000):
        name = f"shard-{number:06d}"
        values["shards"].append({**entry, "name": f"{name}.tar"})
        for suffix in (".tar", ".index.npy"):
            (many / (name + suffix)).symlink_to(one / "pairs" / f"shard-000000{suffix}")
    (many / MANIFEST).write_text(json.dumps(values))
    state = make_stream(folder / "many", ("pairs",)).state_dict()
    for stream in state["streams"].values():
        stream["position"]["pairs"] = [0, NUM_SAMPLES // NUM_STREAMS - 100, 0]
    spent = []
    for _ in range(num_tries):
        begin = time.perf_counter()
        stream = make_stream(folder / "many", ("pairs",))
        stream.load_state_dict(state)
        stream.next()
        spent.append(1000 * (time.perf_counter() - begin))
    return statistics.median(spent)


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="write the results as JSON")
    parser.add_argument("--without", choices=["streaming"], help="skip a peer that is not installed")
    parser.add_argument("--pairs", type=int, default=3000, help="pairs in the shards; a fifth of it in texts")
    parser.add_argument("--rounds", type=int, default=9, help="alternating rounds")
    parser.add_argument("--batches", type=int, default=10, help="batches of 4 packed sequences in a round")
    arguments = parser.parse_args()
    names = ["megafusion", "webdataset"]
    if arguments.without != "streaming":
        if not installed("mosaicml-streaming"):
            sys.exit("mosaicml-streaming is not installed: pip install it, or give --without streaming")
        names.append("streaming")
    with tempfile.TemporaryDirectory() as folder:
        write_all(Path(folder), arguments.pairs, "streaming" in names)
        found = measure(Path(folder), names, arguments.rounds, arguments.batches)
        workers = {number: measure_workers(Path(folder), 3 * arguments.batches, number) for number in (1, 2)}
        resume_ms = measure_resume(Path(folder))
    figures = {
        **found["megafusion"],
        **{f"vs_{name}": found[name]["ratio"] for name in names[1:]},
        "resume_ms": resume_ms,
        "positions_per_second_of_workers": workers,
        "peers": {name: found[name] for name in names[1:]},
        "settings": {k: v for k, v in vars(arguments).items() if k != "json"},
        "versions": {
            name: installed(name)
            for name in ("megafusion", "webdataset", "mosaicml-streaming", "numpy", "torch")
        },
        "device": _processor(),
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }
    table = Table("loader", "positions/s", "ours is", "fill", "first batch, ms")
    for name in names:
        line = found[name]
        table.add_row(
            name,
            f"{line['positions_per_second']:,.0f}",
            f"{line['ratio']:.2f} x" if "ratio" in line else "",
            f"{line['fill']:.1%}",
            f"{line['first_batch_ms']:.0f}",
        )
    console = Console(stderr=True)
    console.print(table)
    console.print(
        f"resuming at sample {NUM_SAMPLES:,}: {resume_ms:.0f} ms; "
        f"positions/s of one worker and of two: {workers[1]:,.0f}, {workers[2]:,.0f}"
    )
    if arguments.json == "-":
        print(json.dumps(figures, indent=1))
    elif arguments.json:
        write_file(Path(arguments.json), json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
