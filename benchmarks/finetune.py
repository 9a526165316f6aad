"""In how many steps does a model learn 64 new pairs, from the quickstart's weights and from random ones?

    python benchmarks/finetune.py runs/quickstart [KEY=VALUE ...] [--every 20] [--json FILE]

The pairs are 32 concepts of the emoji pack in two styles, none of them the quickstart's. Both runs have the
same seed, data and keys: the quickstart's, with a constant learning rate, so that no step depends on how many
there are. Every so many steps `megafusion report` draws 32 captions and describes all 64 images; a run ends
when its concept_top1 and caption_exact are both 0.9. The classifier of these concepts is trained first, as
the committed one was, and must name all the real images.
"""

import argparse
import json
import time
from pathlib import Path

from train import machine

from data_prep.config import PreprocessConfig
from data_prep.emoji.build import starter_keys
from data_prep.emoji.report import write_report
from data_prep.emoji.train_classifier import measure, read_pack, train_classifier
from data_prep.preprocess import preprocess
from data_prep.readers.webdataset import tar_pairs
from megafusion.config import load_config
from megafusion.errors import UserError, exit_on_user_error
from megafusion.evaluate.classifier import ImageClassifier
from megafusion.storage import write_file
from megafusion.train.config import RunConfig
from megafusion.train.loop import train

PACK = Path("data_prep/emoji/emoji-000000.tar")
CONCEPTS = """
pear, peach, cherries, pineapple, tomato, ear of corn, broccoli, croissant, pretzel, popcorn, ice cream,
lollipop, tiger face, rabbit face, koala, elephant, whale, snail, honeybee, owl, bus, bicycle, tractor,
helicopter, camera, television, wrench, hammer, bomb, teddy bear, drum, violin
"""
WANTED = 0.9


def make_pairs(out: Path) -> tuple[Path, Path]:
    """Shards of the 64 pairs and of the quickstart's texts, and the classifier; the folder and the file."""
    captions = {pair.key: pair.caption.decode() for pair in tar_pairs(PACK)}
    keys = starter_keys(captions, [concept.strip() for concept in CONCEPTS.split(",")])
    write_file(out / "keys.txt", "".join(f"{key}\n" for key in keys))
    overrides = [f"out={out / 'shards'}", f"keys={out / 'keys.txt'}"]
    preprocess(load_config(PreprocessConfig, Path("configs/preprocess/quickstart.yaml"), overrides))
    weights = out / "classifier.safetensors"
    if not weights.is_file():
        images = read_pack(PACK)
        classifier = train_classifier(images, keys, num_steps=700)
        classifier.metrics = measure(classifier, images)
        classifier.save(weights)
    return out / "shards", weights


def steps_needed(config: RunConfig, every: int, classifier: Path) -> dict:
    """Train until both figures are WANTED; the step, or None, and the figures of each evaluation."""
    evaluations: list[dict] = []
    while len(evaluations) * every < config.train.num_steps:
        step = every * (len(evaluations) + 1)
        train(config, stop_after=step)
        report = write_report(config.out, PACK, classifier, seconds_before=0)
        figures = {name: report[name] for name in ("concept_top1", "caption_exact")}
        evaluations.append({"step": step} | figures)
        print(json.dumps(evaluations[-1]), flush=True)
        if min(figures.values()) >= WANTED:
            return {"steps": step, "evaluations": evaluations}
    return {"steps": None, "evaluations": evaluations}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("quickstart", type=Path, help="run or pipeline folder of the quickstart")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="values of both runs' keys")
    parser.add_argument("--out", type=Path, default=Path("runs/finetune"), help="folder of both runs")
    parser.add_argument("--every", type=int, default=20, help="steps between two evaluations")
    parser.add_argument("--max-steps", type=int, default=1200, help="where a run ends in any case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    options = parser.parse_intermixed_args()
    shards, weights = make_pairs(options.out)
    metrics = ImageClassifier.load(weights).metrics
    if metrics["clean"] < 1:
        raise UserError(f"{weights}: names {metrics['clean']:.1%} of the real images, so it cannot judge")
    common = [
        f"seed={options.seed}",
        f"data.sources.emoji.path={shards / 'pairs'}",
        f"data.sources.glosses.path={shards / 'text'}",
        "optimizer.schedule=constant",
        f"train.num_steps={options.max_steps}",
        "samples.every=0",
        f"checkpoint.every={options.every}",
        *options.overrides,
    ]
    record: dict = {"wanted": WANTED, "seed": options.seed, "overrides": common, "classifier": metrics}
    for name, start in (("fine-tuned", [f"train.init_from={options.quickstart}"]), ("random start", [])):
        out = [f"out={options.out / name.replace(' ', '-')}-{options.seed}"]
        config = load_config(RunConfig, Path("configs/quickstart.yaml"), common + start + out)
        began = time.monotonic()
        record[name] = steps_needed(config, options.every, weights)
        record[name]["seconds"] = round(time.monotonic() - began, 1)
    steps = [record[name]["steps"] for name in ("fine-tuned", "random start")]
    record["share_of_steps"] = round(steps[0] / steps[1], 3) if all(steps) else None
    record |= machine()
    print(f"fine-tuned {steps[0]} steps, random start {steps[1]}: {record['share_of_steps']}")
    if options.json:
        write_file(options.json, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    with exit_on_user_error():
        main()
