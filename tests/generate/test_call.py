"""The pipeline called as one of diffusers; its other calls; how it is opened and moved."""

import numpy as np
import pytest
import torch
from PIL import Image

from megafusion.errors import UserError
from megafusion.generate.pipeline import TransfusionPipeline
from tests.support.generation import make_pipeline


@pytest.fixture
def pipeline(run_config, tokenizer, codec) -> TransfusionPipeline:
    return make_pipeline(run_config, tokenizer, codec, num_steps=3)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pixels(images) -> list:
    return [np.asarray(image).tolist() for image in images]


def test_a_prompt_or_a_list_of_prompts_is_drawn(pipeline):
    one, listed = pipeline("apple", generator=seeded(4)), pipeline(["apple"], generator=[seeded(4)])
    assert pixels(one.images) == pixels(listed.images) == pixels(pipeline.draw(["apple"], seed=4))
    assert one.images[0].size == (32, 32)
    assert pipeline([]).images == []


def test_images_differ_unless_seeded(pipeline):
    torch.manual_seed(0)
    first, second = pipeline("apple").images[0], pipeline("apple").images[0]
    torch.manual_seed(0)
    again = pipeline("apple").images[0]
    assert pixels([first]) == pixels([again]) != pixels([second])


def test_every_prompt_has_its_number_of_images(pipeline):
    prompts, generators = ["apple", "pizza"], [seeded(seed) for seed in range(4)]
    images = pipeline(prompts, num_images_per_prompt=2, generator=generators).images
    expected = pipeline.draw(["apple", "apple", "pizza", "pizza"], seed=0)
    for a, b in zip(images, expected, strict=True):
        assert np.abs(np.asarray(a, int) - np.asarray(b, int)).max() <= 2
    shared = pipeline("apple", num_images_per_prompt=2, generator=seeded(1)).images
    assert pixels(shared[:1]) != pixels(shared[1:])


def test_options_are_those_of_the_sampling_configuration(pipeline):
    changes = {"num_inference_steps": 2, "guidance_scale": 1.5, "negative_prompt": "grey"}
    called = pipeline("apple", generator=seeded(0), height=32, width=32, **changes).images
    sampling = pipeline.config.sampling.model_copy(update=changes)
    assert pixels(called) == pixels(pipeline.draw(["apple"], sampling=sampling))


def test_each_output_type_is_the_same_image(pipeline):
    def call(kind):
        return pipeline(["apple", "x"], generator=[seeded(0), seeded(1)], output_type=kind).images

    pil, arrays, tensors, latents = map(call, ("pil", "np", "pt", "latent"))
    assert arrays.shape == (2, 32, 32, 3)
    assert arrays.dtype == np.float32
    assert tensors.shape == (2, 3, 32, 32)
    assert latents.shape == (2, 4, 8, 8)
    assert np.abs(arrays * 255 - np.stack([np.asarray(image) for image in pil])).max() <= 0.501
    assert np.array_equal(tensors.permute(0, 2, 3, 1).numpy(), arrays)
    assert pixels(pipeline.codec.decode_images(latents)) == pixels(pil)


def test_sliced_decoding_takes_one_image_at_a_time_and_gives_the_same(pipeline, codec):
    sizes: list[int] = []
    handle = codec.model.decoder.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    together = pipeline.draw(["apple", "x", "pizza"])
    pipeline.enable_vae_slicing()
    sliced = pipeline.draw(["apple", "x", "pizza"])
    pipeline.disable_vae_slicing()
    assert pixels(pipeline.draw(["apple", "x", "pizza"])) == pixels(together)
    handle.remove()
    assert sizes == [3, 1, 1, 1, 3]
    for a, b in zip(sliced, together, strict=True):
        assert np.abs(np.asarray(a, int) - np.asarray(b, int)).max() <= 1


def test_a_callback_sees_each_step_and_may_change_the_latents(pipeline):
    seen = []

    def watch(found, step, timestep, values):
        seen.append((found is pipeline, step, int(timestep), values["latents"].shape))
        return values

    watched = pipeline("apple", generator=seeded(0), callback_on_step_end=watch).images
    assert seen == [(True, step, t, (1, 4, 8, 8)) for step, t in enumerate((999, 666, 332))]
    assert pixels(watched) == pixels(pipeline("apple", generator=seeded(0)).images)

    def clear(_pipeline, step, _timestep, values):
        return {"latents": values["latents"] * (step < 2)}

    cleared = pipeline("apple", generator=seeded(0), callback_on_step_end=clear, output_type="latent").images
    assert not cleared.any()
    with pytest.raises(UserError, match=r"latents are not a tensor of shape \[1, 4, 8, 8\]"):
        pipeline("apple", callback_on_step_end=lambda *_: {"latents": torch.zeros(3)})


def test_an_image_and_a_prompt_are_an_edit(pipeline, tmp_path):
    shown = pipeline.draw(["x"])[0]
    shown.save(tmp_path / "shown.png")
    sampling = pipeline.config.sampling.model_copy(update={"image_guidance_scale": 1.5})
    edited = pipeline.edit(shown, "make it blue", seed=5, sampling=sampling)
    called = pipeline("make it blue", shown, generator=seeded(5), image_guidance_scale=1.5).images
    by_path = pipeline("make it blue", str(tmp_path / "shown.png"), generator=seeded(5), sampling=sampling)
    assert pixels(called) == pixels([edited]) == pixels(by_path.images)
    assert pixels([edited]) != pixels(pipeline.draw(["make it blue"], seed=5))


def test_paths_are_read_as_images(pipeline, tmp_path):
    shown = pipeline.draw(["x"])[0]
    path = tmp_path / "a.png"
    shown.save(path)
    assert pipeline.describe([path, str(path), shown]) == pipeline.describe([shown]) * 3
    documents = ([["a", path, "b"]], [["a", shown, "b"]])
    assert pixels(pipeline.generate(documents[0], begin="image")[0][:1]) == pixels(
        pipeline.generate(documents[1], begin="image")[0][:1]
    )
    (tmp_path / "b.png").write_bytes(b"not an image")
    with pytest.raises(UserError, match=r"b\.png: not an image that can be used"):
        pipeline.describe([tmp_path / "b.png"])


def test_chat_answers_one_document(pipeline):
    image = Image.new("RGB", (1, 1))
    for document in ("apple", ["apple", image, "and"]):
        parts = [document] if isinstance(document, str) else document
        assert (
            pipeline.chat(document, begin="text", max_images=0)
            == pipeline.generate([parts], begin="text", max_images=0)[0]
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_inference_steps": 0}, r"num_inference_steps.*greater than 0"),
        ({"num_inference_steps": 10_000}, r"num_inference_steps 10000 exceeds the 1000 timesteps"),
        ({"num_inference_steps": 2.5}, r"num_inference_steps.*valid integer"),
        ({"guidance_scale": float("nan")}, r"guidance_scale.*finite"),
        ({"guidance_scale": -1}, r"guidance_scale.*>= 0"),
        ({"height": 33, "width": 32}, r"size \(33, 32\): the model has 32x32"),
        ({"negative_prompt": 3}, r"negative_prompt=3: give a str, or a list of 1"),
        ({"negative_prompt": ["a", "b"]}, r"negative_prompt=.*a list of 1"),
        ({"generator": 3}, r"generator=3: give a Generator"),
        ({"generator": [seeded(0)] * 2}, r"generator=.*a list of 1"),
        ({"sampling": {"sampler": "ddim"}}, r"give a SamplingConfig"),
    ],
)
def test_values_that_cannot_be_used_are_refused_by_name(pipeline, arguments, message):
    with pytest.raises(UserError, match=message):
        pipeline("apple", **arguments)


def test_a_pipeline_is_opened_in_a_dtype(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "saved")
    opened = TransfusionPipeline.from_pretrained(tmp_path / "saved", torch_dtype=torch.bfloat16)
    assert opened.dtype == opened.codec.model.dtype == torch.bfloat16
    assert (
        TransfusionPipeline.from_pretrained(tmp_path / "saved", torch_dtype="float16").dtype == torch.float16
    )
    for dtype in (torch.int8, "int8", 5):
        with pytest.raises(UserError, match=r"torch_dtype=.*: give one of torch\.float32"):
            TransfusionPipeline.from_pretrained(tmp_path / "saved", torch_dtype=dtype)
