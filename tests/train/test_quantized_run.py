"""A run whose images are codes: resumed as any other, with sheets, validation and a pipeline that draws."""

import torch

from megafusion.generate.pipeline import TransfusionPipeline
from megafusion.images.codec import QuantizedCodec
from megafusion.telemetry.metrics_file import read_metrics
from tests.support.runs import assert_same_run, start


def test_a_run_on_codes_resumes_bit_for_bit_and_draws(quantized_values, tmp_path):
    values = quantized_values
    sources = {"pairs": values["data"]["sources"]["pairs"]}
    values["data"]["validation"] = {"sources": sources, "every": 3, "num_batches": 1}
    values["samples"] = {"every": 6, "num_pairs": 2}
    values["objective"] = {"z_loss": 1e-5}
    whole = start(values, out=str(tmp_path / "whole"))
    start(values, 3, out=str(tmp_path / "parts"))
    assert_same_run(whole, start(values, out=str(tmp_path / "parts")))
    lines = read_metrics(whole)
    assert all(line["image_loss"] == 0 for line in lines)
    assert lines[-1]["text_loss"] < lines[0]["text_loss"]
    assert (whole / "samples/step-00000006.png").is_file()

    pipeline = TransfusionPipeline.from_pretrained(whole)
    assert isinstance(pipeline.codec, QuantizedCodec)
    assert not [name for name in pipeline.model.weights() if "adapter" in name]
    (image,) = pipeline.draw(["red apple, 3d style"])
    assert image.size == (32, 32)
    assert isinstance(pipeline.describe([image])[0], str)
    half = pipeline.to(torch.bfloat16)
    assert half(["red apple"], output_type="latent").images.dtype == torch.int64
