"""Measure generation: tokens and images a second, time to the first token, cached and not, and transformers'.

    python benchmarks/generate.py PIPELINE [--batch 1 8] [--tokens 128] [--steps 25] [--peers DIR]

Text: `decode` greedily continues prompts of 16 random tokens by so many, without ending at eos, beside
transformers' `generate` on the model that `megafusion export --to hf` writes of the same pipeline, in
alternate runs of one process; the tokens must be equal. `generate` is all that a call of the pipeline does,
for as many tokens, never eos. `no cache` is one forward pass over the whole row for each token. Images: draws
of the pipeline's sampler with guidance. Medians of --runs rounds after one to warm up; a ratio is the median
of the rounds' ratios, so that other load on the machine affects both alike. With --peers, a folder as
benchmarks/peers.py takes it, images beside transfusion-pytorch's `sample_many` as well: see sample_many.py.
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import megafusion.device

import torch

from megafusion.generate.decoder import Decoder
from megafusion.generate.events import ImagePreview, TextDelta
from megafusion.generate.generation import Generation
from megafusion.generate.next_tokens import NextTokens
from megafusion.generate.pipeline import TransfusionPipeline
from megafusion.generate.row import Request, Row
from megafusion.sequence.document import Segment, flatten
from megafusion.sequence.packing import SequenceShape, collate, pack_row
from megafusion.train.export import export_text

PROMPT = 16
SAMPLES = "apple, flat style"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pipeline", type=Path)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--peers", type=Path, help="folder with transfusion-pytorch")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    pipeline = TransfusionPipeline.from_pretrained(arguments.pipeline).to(megafusion.device.default_device())
    theirs = exported(arguments.pipeline).to(pipeline.device)
    rows = []
    for batch in arguments.batch:
        rows += [text_row(pipeline, theirs, batch, arguments), image_row(pipeline, batch, arguments)]
        print(json.dumps(rows[-2]), json.dumps(rows[-1]), sep="\n", flush=True)
    if arguments.peers:
        rows += peer_rows(pipeline, arguments)
    packages = ["torch", "transformers", "diffusers", *(["transfusion-pytorch"] if arguments.peers else [])]
    found = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in packages},
        "date": time.strftime("%Y-%m-%d"),
        "pipeline": str(arguments.pipeline),
        "rows": rows,
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


def exported(pipeline: Path) -> torch.nn.Module:
    """The pipeline's text model in transformers."""
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "text"
        export_text(pipeline, path, "float32", None)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    return model.eval()


def text_row(pipeline, theirs, batch: int, arguments: argparse.Namespace) -> dict:
    """Tokens a second of ours, of theirs, and without a cache."""
    num_new, generator = arguments.tokens, torch.Generator().manual_seed(0)
    ids = torch.randint(5, pipeline.tokenizer.num_text_ids, (batch, PROMPT - 1), generator=generator)
    ids = torch.cat([torch.full((batch, 1), pipeline.tokenizer.bos), ids], 1)
    device = pipeline.device

    def transformers() -> torch.Tensor:
        mask = torch.ones_like(ids, device=device)
        options = {"do_sample": False, "max_new_tokens": num_new, "pad_token_id": 0}
        return theirs.generate(input_ids=ids.to(device), attention_mask=mask, **options)[:, PROMPT:]

    runs = {
        "decode": lambda: decode(pipeline, ids, num_new),
        "generate": lambda: generate(pipeline, ids, num_new),
        "transformers": transformers,
        "no cache": lambda: decode_without_cache(pipeline, ids, num_new),
    }
    rounds, outputs = timed(runs, arguments.runs)
    assert torch.equal(outputs["decode"].cpu(), outputs["transformers"].cpu()), "tokens differ"
    eos = (outputs["decode"] == pipeline.tokenizer.eos).cumsum(1) > 0  # from there on they may differ
    assert torch.equal(outputs["generate"].cpu()[~eos.cpu()], outputs["decode"][~eos].cpu()), "tokens differ"
    rates = {name: batch * num_new / median(rounds, name) for name in runs}
    return {
        "kind": "text",
        "batch": batch,
        "new_tokens": num_new,
        **{f"tokens_per_second {name}": round(rate, 1) for name, rate in rates.items()},
        "ratio to transformers": ratio(rounds, "transformers", "decode"),
        "ratio to transformers by processor seconds": ratio(rounds, "transformers", "decode", clock=1),
        "ratio of generate to transformers": ratio(rounds, "transformers", "generate"),
        "ratio of generate to transformers by processor seconds": ratio(
            rounds, "transformers", "generate", clock=1
        ),
        "ratio to no cache": ratio(rounds, "no cache", "decode"),
        "seconds to first token": round(first_event(pipeline, batch, TextDelta, begin="text"), 4),
    }


class WithoutEos(NextTokens):
    """Tokens of which none is eos."""

    def banned(self, row: Row, length: int) -> tuple[int, ...]:
        return self.tokenizer.eos, *super().banned(row, length)


def generate(pipeline: TransfusionPipeline, ids: torch.Tensor, num_new: int) -> torch.Tensor:
    """Greedy tokens by all that a call of the pipeline does."""
    greedy = {"temperature": 0.0, "repetition_penalty": 1.0, "stop": (), "max_new_tokens": num_new}
    sampling = pipeline.config.sampling.model_copy(update=greedy)
    prompts = [[Segment("tokens", row[1:].tolist())] for row in ids]
    requests = [Request(prompt, sampling, begin="text", max_images=0) for prompt in prompts]
    parts = pipeline.model, pipeline.tokenizer, pipeline.codec
    generation = Generation(*parts, requests, streams_text=False)
    own = generation.next_tokens
    generation.next_tokens = WithoutEos(own.tokenizer, own.boi_ids, own.last_image_start)
    generation.run()
    return torch.tensor(generation.outputs)


@torch.no_grad()
def decode(pipeline: TransfusionPipeline, ids: torch.Tensor, num_new: int) -> torch.Tensor:
    """Greedy tokens with the cache."""
    prompts = [Segment("tokens", row[1:].tolist()) for row in ids]
    decoder, config = Decoder(pipeline.model), pipeline.config.model
    documents = [flatten([prompt], pipeline.tokenizer, config.patches) for prompt in prompts]
    shape = SequenceShape(PROMPT + 1, 1, config.patches, config.latent_channels, config.latent_sizes)
    batch = collate([pack_row([document], shape) for document in documents]).to(pipeline.device)
    cache = decoder.new_cache(len(ids), PROMPT + num_new + 2)
    lengths = torch.full((len(ids),), PROMPT, device=pipeline.device)
    logits, found = decoder.read_prompts(cache, batch, lengths), []
    for step in range(num_new):
        found.append(logits[:, : pipeline.tokenizer.num_text_ids].argmax(-1))
        if step < num_new - 1:
            logits = decoder.read_tokens(cache, found[-1])
    return torch.stack(found, 1)


@torch.no_grad()
def decode_without_cache(pipeline: TransfusionPipeline, ids: torch.Tensor, num_new: int) -> torch.Tensor:
    """Greedy tokens, each from a pass over the whole row."""
    decoder, config = Decoder(pipeline.model), pipeline.config.model
    rows = [row[1:].tolist() for row in ids]
    for _ in range(num_new):
        documents = [flatten([Segment("tokens", row)], pipeline.tokenizer, config.patches) for row in rows]
        length = len(documents[0])
        shape = SequenceShape(length, 1, config.patches, config.latent_channels, config.latent_sizes)
        batch = collate([pack_row([document], shape) for document in documents]).to(pipeline.device)
        cache = decoder.new_cache(len(rows), length + 1)
        lengths = torch.full((len(rows),), length - 1, device=pipeline.device)
        logits = decoder.read_prompts(cache, batch, lengths)
        for row, token in zip(
            rows, logits[:, : pipeline.tokenizer.num_text_ids].argmax(-1).tolist(), strict=True
        ):
            row.append(token)
    return torch.tensor([row[-num_new:] for row in rows])


def image_row(pipeline: TransfusionPipeline, batch: int, arguments: argparse.Namespace) -> dict:
    """Images a second with the pipeline's sampler and guidance."""
    sampling = pipeline.config.sampling.model_copy(update={"num_inference_steps": arguments.steps})
    runs = {"draw": lambda: pipeline.draw([SAMPLES] * batch, sampling=sampling)}
    rounds, _ = timed(runs, arguments.runs)
    return {
        "kind": "images",
        "batch": batch,
        "steps": arguments.steps,
        "size": pipeline.sizes[0],
        "images_per_second": round(batch / median(rounds, "draw"), 3),
        "seconds to first preview": round(first_event(pipeline, batch, ImagePreview, preview_every=1), 4),
    }


def peer_rows(pipeline, arguments: argparse.Namespace) -> list[dict]:
    """Images beside transfusion-pytorch, of the pipeline's size and of 512 x 8 with 8 x 8 patches."""
    sys.path.append(str(arguments.peers))  # last, so that it replaces no package that is here
    from sample_many import compare_images

    own = pipeline.config.model
    wide = {"hidden_size": 512, "num_layers": 8, "num_heads": 8, "ffn_hidden_size": 1368}
    height, width = (8 * own.latent_downsampling * own.patch_size,) * 2
    large = own.model_copy(update={**wide, "image_sizes": ((height, width),)})
    rows = []
    for model, batches in ((own, arguments.batch), (large, arguments.batch[:1])):
        for batch in batches:
            sizes = batch, arguments.steps, arguments.runs
            rows.append(compare_images(model, pipeline.config.objective, pipeline.tokenizer, *sizes))
            print(json.dumps(rows[-1]), flush=True)
    return rows


def first_event(pipeline, batch: int, kind: type, begin="image", **options) -> float:
    """Seconds from a request to its first event of a kind."""
    start = time.perf_counter()
    images = 1 if begin == "image" else 0
    request = Request([SAMPLES], pipeline.config.sampling, begin=begin, max_images=images, **options)
    parts = pipeline.model, pipeline.tokenizer, pipeline.codec
    next(event for event in Generation(*parts, [request] * batch) if isinstance(event, kind))
    return time.perf_counter() - start


def timed(runs: dict[str, Callable], num_runs: int) -> tuple[list[dict], dict]:
    """Seconds by name, by the clock and of processors, of rounds in which each has its turn; last outputs."""
    outputs = {name: run() for name, run in runs.items()}
    rounds: list[dict[str, tuple[float, float]]] = [{} for _ in range(num_runs)]
    for found in rounds:
        for name, run in runs.items():
            start, used = time.perf_counter(), time.process_time()
            outputs[name] = run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            found[name] = time.perf_counter() - start, time.process_time() - used
    return rounds, outputs


def median(rounds: list[dict], name: str) -> float:
    """Seconds of one by the clock."""
    return statistics.median(found[name][0] for found in rounds)


def ratio(rounds: list[dict], one: str, other: str, clock: int = 0) -> float:
    """How many times as long one takes as another; clock 1: by the seconds of processors."""
    return round(statistics.median(found[one][clock] / found[other][clock] for found in rounds), 3)


if __name__ == "__main__":
    main()
