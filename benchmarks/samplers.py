"""Judge every sampler on the quickstart's model: the share of captions whose image shows what was asked.

    python benchmarks/samplers.py runs/quickstart [--names NAME ...] [--steps 50 ...] [--json FILE]

`concept_top1` as in the quickstart's report, of evenly spaced captions, with the pipeline's guidance; and the
mean PSNR in dB against the image that the model was trained on under the caption, as it is decoded from its
latents. Without names: all schedulers of diffusers that the process takes, after its default sampler at 250
steps. `default` names the pipeline's own sampler.
"""

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path

import megafusion.device

import numpy as np
import torch
from PIL import Image

from data_prep.emoji.report import training_pairs
from megafusion.evaluate.classifier import IMAGE_SIZE, ImageClassifier
from megafusion.generate.pipeline import TransfusionPipeline
from megafusion.images.processor import preprocess_images
from megafusion.images.reconstruction import reconstruction_metrics
from megafusion.objective import ddpm, flow
from megafusion.train.run_folder import load_run_config

EMOJI = Path(__file__).parents[1] / "data_prep/emoji"


def psnr(images: list[Image.Image], others: list[Image.Image]) -> float:
    """Mean dB between images of one size."""
    pairs = [
        [np.asarray(image, np.float64) / 255 for image in pair] for pair in zip(images, others, strict=True)
    ]
    squared = torch.tensor([((one - other) ** 2).mean() for one, other in pairs])
    return round(reconstruction_metrics(squared, squared)["psnr"], 2)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--names", nargs="+", help="of samplers, or default")
    parser.add_argument("--steps", type=int, nargs="+", default=[50])
    parser.add_argument("--captions", type=int, default=44)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    pipeline = TransfusionPipeline.from_pretrained(arguments.run).to(megafusion.device.default_device())
    pairs = training_pairs(load_run_config(arguments.run).data, EMOJI / "emoji-000000.tar")
    chosen = [pairs[len(pairs) * i // arguments.captions] for i in range(arguments.captions)]
    classifier = ImageClassifier.load(EMOJI / "classifier.safetensors")
    kind = pipeline.config.objective.noise_process.kind
    known = {"ddpm": ddpm.SAMPLERS, "flow": flow.SAMPLERS}[kind]
    names = arguments.names or [name for name in known if name[0].isupper()]
    size = pipeline.sizes[0]
    trained_on = pipeline.codec.decode_images(pipeline.codec.encode_images([p.image for p in chosen], size))
    first = [] if arguments.names else [(None, 250)]
    rows = []
    for name, steps in first + [(name, steps) for name in names for steps in arguments.steps]:
        sampler = pipeline.config.sampling.sampler if name == "default" else name
        update = {"sampler": sampler, "num_inference_steps": steps}
        sampling = pipeline.config.sampling.model_copy(update=update)
        start = time.perf_counter()
        drawn = pipeline.draw([pair.caption for pair in chosen], sampling=sampling, size=size)
        seconds = time.perf_counter() - start
        found = classifier.classify(preprocess_images(drawn, IMAGE_SIZE, IMAGE_SIZE) / 2 + 0.5)
        top1 = sum(key == pair.key for key, pair in zip(found, chosen, strict=True)) / len(chosen)
        row = {"sampler": name, "steps": steps, "concept_top1": top1, "psnr": psnr(drawn, trained_on)}
        rows.append(row | {"seconds": round(seconds)})
        print(json.dumps(rows[-1]), flush=True)
    report = {
        "kind": kind,
        "captions": len(chosen),
        "guidance_scale": pipeline.config.sampling.guidance_scale,
        "diffusers": version("diffusers"),
        "date": time.strftime("%Y-%m-%d"),
        "rows": rows,
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
