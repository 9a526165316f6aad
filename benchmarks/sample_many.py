"""Images beside transfusion-pytorch's `sample_many`, for benchmarks/generate.py --peers.

Equal on both sides: width, blocks, heads, patches an image, words, prompts, guidance, and evaluations of the
network, each with guidance and with cached prompts. Theirs takes Euler's steps, one evaluation each; its
default, midpoint, takes two a step, of which there are then half as many. Random weights, latents alone: no
autoencoder decodes them. Ours reads each finished image once more, so that a text could follow; theirs keeps
the last evaluation's keys.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from megafusion.generate.generation import Generation
from megafusion.generate.row import Request
from megafusion.model.config import ModelConfig
from megafusion.model.transfusion import Transfusion
from megafusion.objective.config import ObjectiveConfig, SamplingConfig
from megafusion.sequence.tokenizer import Tokenizer

PROMPT = "apple, flat style"
GUIDANCE = 2.0


class Undecoded:
    """A codec that decodes nothing."""

    def decode_images(self, latents: Tensor) -> list[Image.Image]:
        return [Image.new("RGB", (1, 1)) for _ in latents]


def compare_images(
    model: ModelConfig,
    objective: ObjectiveConfig,
    tokenizer: Tokenizer,
    batch: int,
    steps: int,
    num_rounds: int,
) -> dict[str, Any]:
    """Seconds a batch of each, and medians of their ratios to ours, in rounds in which each has its turn."""
    steps += steps % 2  # midpoint's are pairs
    torch.manual_seed(0)
    runs = {"ours": ours(Transfusion(model, objective).eval(), tokenizer, batch, steps)}
    for method in ("euler", "midpoint"):
        runs[f"sample_many, {method}"] = theirs(model, tokenizer, batch, steps, method)
    for run in runs.values():
        run()
    rounds = [{name: seconds(run) for name, run in runs.items()} for _ in range(num_rounds)]
    found: dict[str, Any] = {
        "kind": "images beside transfusion-pytorch",
        "batch": batch,
        "width": model.hidden_size,
        "blocks": model.num_layers,
        "patches": model.patches[0],
        "evaluations": steps,
    }
    for name in runs:
        for clock, key in enumerate(("seconds", "processor_seconds")):
            found[f"{key} {name}"] = round(statistics.median(each[name][clock] for each in rounds), 4)
            if name != "ours":
                ratios = [each[name][clock] / each["ours"][clock] for each in rounds]
                found[f"{key} over ours {name}"] = round(statistics.median(ratios), 3)
    return found


def seconds(run: Callable[[], object]) -> tuple[float, float]:
    """Of a run by the clock, and of this process's processors."""
    begin, used = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - begin, time.process_time() - used


def ours(model: Transfusion, tokenizer: Tokenizer, batch: int, steps: int) -> Callable[[], object]:
    sampling = SamplingConfig(num_inference_steps=steps, guidance_scale=GUIDANCE, max_new_tokens=0)
    requests = [Request([PROMPT], sampling, seed, "image", 1) for seed in range(batch)]
    codec: Any = Undecoded()

    def run() -> None:
        outputs = Generation(model, tokenizer, codec, requests, streams_text=False).run()
        assert [len(output) for output in outputs] == [1] * batch

    return run


def theirs(
    model: ModelConfig, tokenizer: Tokenizer, batch: int, steps: int, method: str
) -> Callable[[], object]:
    from loguru import logger
    from transfusion_pytorch import Transfusion as Peer

    logger.disable("transfusion_pytorch")
    shape = model.grids[0]
    peer = Peer(
        num_text_tokens=model.vocab_size,
        dim_latent=model.latent_channels * model.patch_size**2,
        modality_default_shape=shape,
        modality_num_dim=2,
        transformer={
            "dim": model.hidden_size,
            "depth": model.num_layers,
            "dim_head": model.head_size,
            "heads": model.num_heads,
        },
        odeint_kwargs={"method": method},
    ).eval()
    prompt = torch.tensor(list(tokenizer.encode(PROMPT)))
    evaluations = steps if method == "euler" else steps // 2
    options: dict[str, Any] = {
        "max_length": math.prod(shape) - 1,  # so that it ends after the image
        "force_modality_at_start": (0, shape),
        "modality_steps": evaluations + 1,  # points in time
        "cfg_scale": GUIDANCE,
        "return_unprocessed_modalities": True,
    }
    check_evaluations(peer, lambda: peer.sample_many([prompt], **options), steps)

    def run() -> None:
        samples: Sequence = peer.sample_many([prompt] * batch, **options)
        assert len(samples) == batch

    return run


def check_evaluations(peer: Any, run: Callable[[], object], steps: int) -> None:
    """Assert that an image takes as many passes as steps, with guidance, beside those over the prompts."""
    lengths: list[int] = []
    handle = peer.transformer.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[-2]))
    run()
    handle.remove()
    num_prompts = 2  # with its text, and without
    assert len(lengths) == num_prompts + 2 * steps, lengths
