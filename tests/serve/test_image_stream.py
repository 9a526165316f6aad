"""Streams of images in OpenAI's shapes, read by its client."""

import time
from pathlib import Path

import numpy as np
import openai
import pytest

from megafusion.config import parse_config
from megafusion.generate.events import ImagePreview
from megafusion.generate.pipeline import TransfusionPipeline
from megafusion.images.codec import ImageCodec
from megafusion.objective.config import SamplingConfig
from megafusion.serve.app import make_app
from megafusion.serve.config import ServeConfig
from megafusion.train.config import RunConfig
from tests.support.generation import make_pipeline
from tests.support.serving import decoded, png, running, sample_image
from tests.support.small import small_run


@pytest.fixture(scope="module")
def pipeline(tokenizer, codec, vae_folder) -> TransfusionPipeline:
    """A random model of a flow, whose images change at each step: no first step decides all of them."""
    values = small_run(Path("unused"), vae_folder, Path("unused"))
    values["objective"] = {"noise_process": {"kind": "flow"}}
    made = make_pipeline(parse_config(RunConfig, values, "test"), tokenizer, codec, num_steps=4)
    config = made.config.model_copy(update={"sequence_length": 96, "sampling": SamplingConfig()})
    made.model.tail.adapter.linear.weight.data.mul_(30)
    return TransfusionPipeline(made.model, tokenizer, codec, config)


@pytest.mark.parametrize("kind", ["generation", "edit"])
@pytest.mark.parametrize(("steps", "shown"), [(10, [3, 6, 9]), (5, [2, 4]), (2, [1]), (1, [])])
def test_an_image_is_streamed_with_previews(client, pipeline, kind, steps, shown):
    """At most as many as asked for: those of the pipeline's own stream, then the image."""
    asked = {"prompt": "red pizza", "extra_body": {"seed": 5, "num_inference_steps": steps}}
    draw, document = client.images.generate, ["red pizza"]
    if kind == "edit":
        draw, document = client.images.edit, [sample_image(), "red pizza"]
        asked["image"] = png(sample_image())
    whole = draw(**asked)
    *previews, last = draw(**asked, stream=True, partial_images=3)
    assert [event.type for event in draw(**asked, stream=True)] == [f"image_{kind}.completed"]
    assert [event.partial_image_index for event in previews] == list(range(len(shown)))
    assert {event.type for event in previews} <= {f"image_{kind}.partial_image"}
    assert (last.type, last.size, last.output_format) == (f"image_{kind}.completed", "32x32", "png")
    assert last.b64_json == whole.data[0].b64_json
    sampling = pipeline.config.sampling.model_copy(update={"num_inference_steps": steps, "max_new_tokens": 0})
    options = {"begin": "image", "seed": 5, "sampling": sampling}
    events = list(pipeline.stream([document], preview_every=1, **options))
    expected = [e.image for e in events if isinstance(e, ImagePreview) and e.step in shown]
    for event, image in zip(previews, expected, strict=True):
        assert np.abs(decoded(event.b64_json) - np.asarray(image, int)).max() <= 2
    for event in previews[:1]:
        assert np.abs(decoded(event.b64_json) - decoded(last.b64_json)).max() > 10
    assert last.usage.input_tokens_details.text_tokens == len(pipeline.tokenizer.encode("red pizza")) + 2
    assert last.usage.input_tokens_details.image_tokens == (18 if kind == "edit" else 0)
    assert last.usage.output_tokens == whole.usage.output_tokens == 16


def test_what_ends_a_stream_is_told_in_it(client, pipeline, monkeypatch):
    def fail(_latents):
        raise RuntimeError("no memory")

    monkeypatch.setattr(pipeline.codec, "decode_images", fail)
    stream = client.images.generate(prompt="x", stream=True, extra_body={"num_inference_steps": 2})
    with pytest.raises(openai.APIError, match="generation failed with RuntimeError"):
        list(stream)


def test_an_image_of_codes_is_streamed_with_as_many_previews(quantized_values, tokenizer, vq_folder):
    """A step is a code there, of which there are 16, whatever num_inference_steps is."""
    codec = ImageCodec.from_pretrained(vq_folder)
    pipeline = make_pipeline(parse_config(RunConfig, quantized_values, "test"), tokenizer, codec, num_steps=4)
    with running(make_app(pipeline, ServeConfig(), "codes", [])) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=60)
        events = list(client.images.generate(prompt="x", stream=True, partial_images=3))
    assert [getattr(event, "partial_image_index", "done") for event in events] == [0, 1, 2, "done"]


def test_previews_come_while_the_image_is_drawn_and_leaving_ends_it(app, client):
    worker, name = app.state.worker, "megafusion_denoising_steps_total"
    before = worker.metrics.registry.get_sample_value(name)
    options = {"extra_body": {"num_inference_steps": 1000}, "partial_images": 3, "stream": True}
    with client.images.generate(prompt="x", **options) as stream:
        assert next(iter(stream)).type == "image_generation.partial_image"
    end = time.monotonic() + 30
    while worker.num_slots or worker._batches:
        assert time.monotonic() < end
        time.sleep(0.01)
    assert 250 <= worker.metrics.registry.get_sample_value(name) - before < 900
