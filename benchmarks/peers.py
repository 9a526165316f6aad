"""A training step beside those of other projects: seconds and memory, in one run and in turns.

    pip install --target .peers --no-deps torchtitan transfusion-pytorch axial-positional-embedding \
        beartype einx ema-pytorch frozendict jaxtyping loguru rotary-embedding-torch shtab spmd_types \
        torch-einops-utils torchdiffeq typeguard tyro wadler-lindig
    python benchmarks/peers.py [--peers .peers] [--json FILE]

- plain: a Llama of our size in plain PyTorch, with causal attention, on text of as many positions as ours.
- torchtitan: its Llama model of our size, on the same text.
- transfusion-pytorch: on our rows' texts and images, a row a sample; at our width and depth, and at our width
  with the depth at which it has about as many parameters as ours.

A step is forward, backward, clipping and fused AdamW. Ours is the real engine's, on rows half of captions
and images, half of texts. Every peer takes its turn in each round. A ratio is the median over the rounds
of its seconds to ours, so that other load on the machine affects both alike; for a CPU also of the seconds
of processors, which other load hardly changes as long as one thread computes. Memory is how much a process
of its own grows at its peak, from before the model is made; on a GPU, the most that is allocated. --compile
compiles ours (train.compile) and the plain one; the others are used as their pages show. A peer that is not
installed or does not run here is named with the reason. float32 on a CPU; on a GPU bf16, the others' by
autocast.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from memory import peak_growth
from rich.console import Console
from rich.table import Table
from synthetic import SyntheticRows
from torch import Tensor, nn
from train import machine

from megafusion.config import load_config
from megafusion.engine.process_group import start_process_group
from megafusion.model.transfusion import Transfusion
from megafusion.parallel.mesh import make_mesh
from megafusion.sequence.packing import PackedBatch, collate
from megafusion.storage import write_file
from megafusion.train.build import build_engine
from megafusion.train.config import RunConfig
from megafusion.train.loop import train_step

ROOT = Path(__file__).parents[1]
RATE, BETAS, EPSILON, CLIP = 1e-4, (0.9, 0.95), 1e-8, 1.0
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Size(NamedTuple):
    """Of a model and its batch: rows of `length` positions, images of 8 x 8 patches of 48 values."""

    hidden_size: int
    num_layers: int
    head_dim: int
    length: int
    num_rows: int
    vocab_size: int = 2048
    is_compiled: bool = False

    @property
    def num_heads(self) -> int:
        return self.hidden_size // self.head_dim

    @property
    def ffn_size(self) -> int:
        return 8 * round(self.hidden_size / 3)

    def config(self) -> RunConfig:
        """Ours: the quickstart's, of this size."""
        on_gpu = DEVICE.type == "cuda"
        values = {
            "model.hidden_size": self.hidden_size,
            "model.num_layers": self.num_layers,
            "model.num_heads": self.num_heads,
            "model.ffn_hidden_size": self.ffn_size,
            "model.vocab_size": self.vocab_size,
            "model.image_sizes": "[[128, 128]]",
            "model.attention": "auto" if on_gpu else "sdpa",
            "data.sequence_length": self.length,
            "data.images_per_row": self.length // 64,
            "data.num_streams": self.num_rows,
            "train.global_batch_size": self.num_rows,
            "train.micro_batch_size": self.num_rows,
            "train.precision": "bf16" if on_gpu else "fp32",
            "train.compile": self.is_compiled,
            # One rank has nothing to shard, but bf16's update is ZeRO 1's.
            "parallel.zero_stage": 1 if on_gpu else 0,
            "optimizer.gradient_clip": CLIP,
            "samples.every": 0,
        }
        overrides = [f"{key}={value}" for key, value in values.items()]
        return load_config(RunConfig, ROOT / "configs/quickstart.yaml", overrides)

    def rows(self) -> PackedBatch:
        rows = SyntheticRows(self.config(), "mixed")
        return collate([rows.next() for _ in range(self.num_rows)])

    def tokens(self) -> Tensor:
        """Random text of as many positions."""
        generator = torch.Generator().manual_seed(0)
        return torch.randint(3, self.vocab_size, (self.num_rows, self.length + 1), generator=generator)


SIZES = {
    "192x5": Size(192, 5, 32, length=128, num_rows=16),
    "192x5-rows-of-512": Size(192, 5, 32, length=512, num_rows=4),
    "512x8": Size(512, 8, 64, length=256, num_rows=8),
    "2048x8": Size(2048, 8, 128, length=4096, num_rows=2, vocab_size=32064),
}
"""The last is for GPUs."""


class Stepper(NamedTuple):
    """A peer that is ready: its number of parameters, and what makes a step."""

    num_parameters: int
    step: Callable[[], object]


def ours(size: Size) -> Stepper:
    start_process_group()
    config = size.config()
    engine, rows = build_engine(config, make_mesh(config.parallel)), size.rows()
    return Stepper(count(engine.stage), lambda: train_step(engine, [rows], RATE))


def stepper(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> Stepper:
    """A peer in PyTorch, in the usual order."""
    model = model.to(DEVICE).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=BETAS, eps=EPSILON, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=DEVICE.type == "cuda"):
            value = loss(model)
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()

    return Stepper(count(model), step)


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


class PlainBlock(nn.Module):
    def __init__(self, size: Size):
        super().__init__()
        width = size.hidden_size
        self.num_heads = size.num_heads
        self.attention_norm, self.ffn_norm = (nn.RMSNorm(width, eps=1e-5) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.gate, self.up = (nn.Linear(width, size.ffn_size, bias=False) for _ in range(2))
        self.down = nn.Linear(size.ffn_size, width, bias=False)

    def forward(self, x_BSD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        qkv = self.qkv(self.attention_norm(x_BSD)).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BSD = x_BSD + self.out(attended.transpose(1, 2).flatten(2))
        hidden = self.ffn_norm(x_BSD)
        return x_BSD + self.down(F.silu(self.gate(hidden)) * self.up(hidden))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embeddings, half by half."""
    first, second = x.float().chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


class Plain(nn.Module):
    """Llama as one would write it."""

    def __init__(self, size: Size):
        super().__init__()
        self.embedding = nn.Embedding(size.vocab_size, size.hidden_size)
        self.blocks = nn.ModuleList(PlainBlock(size) for _ in range(size.num_layers))
        self.norm = nn.RMSNorm(size.hidden_size, eps=1e-5)
        self.head = nn.Linear(size.hidden_size, size.vocab_size, bias=False)
        frequencies = 10_000.0 ** (-torch.arange(0, size.head_dim, 2) / size.head_dim)
        angles = torch.arange(size.length)[:, None] * frequencies
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, tokens_BS: Tensor) -> Tensor:
        x = self.embedding(tokens_BS)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return self.head(self.norm(x))


def on_text(model: nn.Module, size: Size) -> Stepper:
    tokens = size.tokens().to(DEVICE)
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].flatten()
    return stepper(model, lambda model: F.cross_entropy(model(inputs).float().flatten(0, 1), labels))


def plain(size: Size) -> Stepper:
    model = Plain(size)
    if size.is_compiled:
        model.compile()
    return on_text(model, size)


def torchtitan(size: Size) -> Stepper:
    from torchtitan.models.common import ComplexRoPE, Embedding, Linear, RMSNorm
    from torchtitan.models.common.attention import ScaledDotProductAttention
    from torchtitan.models.common.config_utils import make_ffn_config, make_gqa_config
    from torchtitan.models.llama3 import Llama3Model, Llama3TransformerBlock

    width, weights = size.hidden_size, {"weight": nn.init.xavier_normal_}
    norm = RMSNorm.Config(normalized_shape=width, param_init={"weight": nn.init.ones_})
    block = Llama3TransformerBlock.Config(
        attention_norm=norm,
        ffn_norm=norm,
        attention=make_gqa_config(
            dim=width,
            n_heads=size.num_heads,
            wqkv_param_init=weights,
            wo_param_init=weights,
            inner_attention=ScaledDotProductAttention.Config(),
            fuse_qkv=True,
            rope=ComplexRoPE.Config(dim=size.head_dim, max_seq_len=size.length),
        ),
        feed_forward=make_ffn_config(
            dim=width, hidden_dim=size.ffn_size, w1_param_init=weights, w2w3_param_init=weights
        ),
    )
    model = Llama3Model.Config(
        dim=width,
        vocab_size=size.vocab_size,
        tok_embeddings=Embedding.Config(
            num_embeddings=size.vocab_size, embedding_dim=width, param_init=weights
        ),
        norm=norm,
        lm_head=Linear.Config(in_features=width, out_features=size.vocab_size, param_init=weights),
        layers=[block] * size.num_layers,
    ).build()
    model.init_states()
    return on_text(model, size)


def transfusion(size: Size, depth: int) -> nn.Module:
    from transfusion_pytorch import Transfusion as Peer

    transformer = {
        "dim": size.hidden_size,
        "depth": depth,
        "dim_head": size.head_dim,
        "heads": size.num_heads,
        "use_flex_attn": DEVICE.type == "cuda",
    }
    return Peer(
        num_text_tokens=size.vocab_size,
        dim_latent=48,
        modality_default_shape=(8, 8),
        modality_num_dim=2,
        transformer=transformer,
    )


def transfusion_pytorch(size: Size) -> Stepper:
    model, rows = transfusion(size, size.num_layers), samples(size.rows())
    return stepper(model, lambda model: model(rows))


def transfusion_pytorch_of_our_parameters(size: Size) -> Stepper:
    config = size.config()
    with torch.device("meta"):
        wanted = count(Transfusion(config.model, config.objective))
    counts = {depth: count(transfusion(size, depth)) for depth in range(1, size.num_layers + 1)}
    depth = min(counts, key=lambda depth: abs(math.log(counts[depth] / wanted)))
    model, rows = transfusion(size, depth), samples(size.rows())
    return stepper(model, lambda model: model(rows))


def samples(batch: PackedBatch) -> list[list[Tensor]]:
    """A sample a row: its texts, and its images as patches, in order."""
    found = []
    for row in range(len(batch.tokens)):
        sample, at = [], 0
        starts = [int(start) for start in batch.image_start[row] if start >= 0]
        for slot, start in enumerate(starts):
            # Its boi and eoi stand for the tokens that the peer adds of its own.
            sample.append(batch.tokens[row, at : start - 1])
            patches = F.pixel_unshuffle(batch.latents[row, slot], 4).permute(1, 2, 0)
            sample.append(patches)
            at = start + 65
        sample.append(batch.tokens[row, at:])
        found.append([part.to(DEVICE) for part in sample if part.numel()])
    return found


PEERS: dict[str, Callable[[Size], Stepper]] = {
    "ours": ours,
    "plain": plain,
    "torchtitan": torchtitan,
    "transfusion-pytorch": transfusion_pytorch,
    "transfusion-pytorch, our parameters": transfusion_pytorch_of_our_parameters,
}


def finish() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def seconds(step: Callable[[], object]) -> tuple[float, float]:
    """Of a step by the clock, and of this process's processors."""
    begin, used = time.perf_counter(), time.process_time()
    step()
    finish()
    return time.perf_counter() - begin, time.process_time() - used


def compare(size: Size, num_rounds: int) -> tuple[dict[str, dict], dict[str, str]]:
    """Figures by peer, and the reasons of those that do not run."""
    ready, reasons = {}, {}
    for name, make in PEERS.items():
        try:
            ready[name] = make(size)
            for _ in range(2):
                ready[name].step()
        except Exception as error:  # of any package, whose fault ends no benchmark
            if name == "ours":
                raise
            ready.pop(name, None)
            reasons[name] = f"{type(error).__name__}: {str(error)[:300]}"
    rounds = []
    for _ in range(num_rounds):
        rounds.append({name: seconds(peer.step) for name, peer in ready.items()})
        print(", ".join(f"{name} {spent[0]:.3f} s" for name, spent in rounds[-1].items()), file=sys.stderr)
    found = {}
    for name, peer in ready.items():
        found[name] = {"parameters": peer.num_parameters, "rounds": [each[name] for each in rounds]}
        for clock, key in enumerate(("seconds", "processor_seconds")):
            ratios = [each[name][clock] / each["ours"][clock] for each in rounds]
            found[name][key] = statistics.median(each[name][clock] for each in rounds)
            found[name][f"{key}_over_ours"] = statistics.median(ratios)
    return found, reasons


def peak_memory(name: str, size: Size) -> int:
    """Bytes by which this process grows at the most."""
    small = SIZES["192x5"]._replace(num_layers=1, is_compiled=size.is_compiled)
    PEERS[name](small).step()  # imports and libraries' own buffers

    def steps() -> None:
        peer = PEERS[name](size)
        for _ in range(3):
            peer.step()

    return peak_growth(steps)


def peak_memory_apart(name: str, size: str, peers: Path, is_compiled: bool) -> int:
    """The same in a process of its own."""
    command = [sys.executable, __file__, "--peers", str(peers), "--size", size, "--memory", name]
    command += ["--compile"] if is_compiled else []
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.splitlines()[-1])


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def show(size: str, found: dict[str, dict], reasons: dict[str, str]) -> None:
    columns = ("step", "parameters", "seconds", "ours is", "processor s", "ours is", "MiB", "ours takes")
    table = Table(*columns, title=size)
    for name, line in found.items():
        table.add_row(
            name,
            f"{line['parameters'] / 1e6:.1f} M",
            f"{line['seconds']:.4f}",
            f"{line['seconds_over_ours']:.2f} x",
            f"{line['processor_seconds']:.4f}",
            f"{line['processor_seconds_over_ours']:.2f} x",
            f"{line['peak_bytes'] / 2**20:.0f}",
            f"{line['our_bytes_over_its']:.2f} x",
        )
    console = Console(stderr=True)
    console.print(table)
    for name, reason in reasons.items():
        console.print(f"{name}: does not run here: {reason}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peers", type=Path, default=ROOT / ".peers", help="folder with the other projects")
    parser.add_argument("--size", action="append", choices=list(SIZES), help="of all that the device is for")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    parser.add_argument("--compile", action="store_true", help="ours and the plain step by torch.compile")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    parser.add_argument("--memory", choices=list(PEERS), help="print the peak memory of one, in bytes")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    sys.path.append(str(options.peers))  # last, so that it replaces no package that is here
    sizes = options.size or [name for name in SIZES if name != "2048x8" or DEVICE.type == "cuda"]
    chosen = {name: size._replace(is_compiled=options.compile) for name, size in SIZES.items()}
    if options.memory:
        print(peak_memory(options.memory, chosen[sizes[0]]))
        return
    packages = ("megafusion", "torch", "deepspeed", "transfusion-pytorch", "torchtitan")
    record: dict = {"sizes": {}, "versions": {name: installed(name) for name in packages}} | machine()
    record["num_cores"] = len(os.sched_getaffinity(0))
    for name in sizes:
        found, reasons = compare(chosen[name], options.rounds)
        for peer, line in found.items():
            line["peak_bytes"] = peak_memory_apart(peer, name, options.peers, options.compile)
        for line in found.values():
            line["our_bytes_over_its"] = found["ours"]["peak_bytes"] / line["peak_bytes"]
        show(name, found, reasons)
        record["sizes"][name] = {"size": chosen[name]._asdict(), "steps": found, "not_run": reasons}
        if options.json:
            write_file(options.json, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
