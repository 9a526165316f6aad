"""The pipeline called as one of diffusers; its other calls; how it is opened and moved."""

import numpy as np
import pytest
import torch
from PIL import Image

from megafusion.errors import UserError
from megafusion.generate.pipeline import TransfusionPipeline
from megafusion.objective.config import SamplingConfig
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


def test_a_callback_is_given_the_tensors_that_it_asks_for(pipeline):
    def call(names):
        seen = []
        options = {"callback_on_step_end_tensor_inputs": names, "generator": seeded(0)}
        images = pipeline("apple", callback_on_step_end=lambda *a: seen.append(set(a[3])), **options).images
        return pixels(images), seen

    assert call(["latents"]) == (pixels(pipeline.draw(["apple"])), [{"latents"}] * 3)
    assert call([]) == (pixels(pipeline.draw(["apple"])), [set()] * 3)
    with pytest.raises(UserError, match=r"inputs=\['prompt_embeds'\]: give a list of names, of latents"):
        call(["prompt_embeds"])


def test_an_interrupted_call_ends_with_the_images_as_they_are(pipeline, monkeypatch):
    """Of both batches, where each prompt has a batch of its own."""
    monkeypatch.setattr("megafusion.generate.generation.image_options", lambda request: str(request.prompt))
    kept = []

    def stop(found, step, _timestep, values):
        kept.append(values["latents"].clone())
        found._interrupt = step == 1

    drawn = pipeline(["apple", "x"], generator=[seeded(0), seeded(1)], callback_on_step_end=stop)
    assert len(kept) == 2
    assert pixels(drawn.images[:1]) == pixels(pipeline.codec.decode_images(kept[-1]))
    assert [image.size for image in drawn.images] == [(32, 32)] * 2
    assert pipeline.interrupt
    assert pixels(pipeline("apple", generator=seeded(0)).images) == pixels(pipeline.draw(["apple"]))
    assert not pipeline.interrupt


def test_latents_are_the_noise_to_begin_with(pipeline):
    noise = torch.randn(2, 4, 8, 8, generator=seeded(3))
    options = {"latents": noise, "generator": [seeded(0), seeded(1)]}
    options["sampling"] = SamplingConfig(sampler="DDPM")  # takes noise of the generator at each step, too
    drawn, again = (pipeline("apple", num_images_per_prompt=2, **options).images for _ in range(2))
    assert pixels(drawn[:1]) != pixels(drawn[1:]) != pixels(again[1:])
    plain = pipeline("apple", latents=noise[:1]).images
    assert (
        pixels(plain)
        == pixels(pipeline.draw(["apple"], seed=3))
        == pixels(pipeline("apple", latents=noise[:1]).images)
    )
    assert torch.equal(noise, torch.randn(2, 4, 8, 8, generator=seeded(3)))


def test_a_tuple_is_given_where_no_object_is_wanted(pipeline):
    (images,) = pipeline("apple", generator=seeded(4), return_dict=False)
    assert pixels(images) == pixels(pipeline.draw(["apple"], seed=4))
    assert pipeline([], return_dict=False) == ([],)


def test_a_height_or_a_width_is_enough_where_it_names_a_size(run_config, tokenizer, codec):
    sizes = ((32, 32), (32, 64), (64, 32))
    vocabulary = run_config.model.vocab_size + 2
    pipeline = make_pipeline(run_config, tokenizer, codec, 1, image_sizes=sizes, vocab_size=vocabulary)
    assert pipeline("apple", height=64).images[0].size == (32, 64)
    assert pipeline("apple", width=64).images[0].size == (64, 32)
    for given, message in (
        ({"height": 32}, r"height=32: the model has 32x32, 32x64 .*; give height and width"),
        ({"width": 33}, r"width=33: the model has 32x32, 32x64, 64x32 .*; choose one of these"),
        (
            {"height": 64, "latents": torch.zeros(1, 4, 8, 8)},
            r"latents: give a tensor of shape \[1, 4, 16, 8\]",
        ),
    ):
        with pytest.raises(UserError, match=message):
            pipeline("apple", **given)
    assert pipeline("apple", latents=torch.zeros(1, 4, 16, 8)).images[0].size == (32, 64)


def test_what_a_sampling_leaves_out_is_the_pipelines_own(pipeline):
    own = {"num_inference_steps": 2, "guidance_scale": 1.5, "sampler": "dpm++"}
    config = pipeline.config.model_copy(update={"sampling": pipeline.config.sampling.model_copy(update=own)})
    pipeline = TransfusionPipeline(pipeline.model, pipeline.tokenizer, pipeline.codec, config)
    expected = pipeline.config.sampling.model_copy(update={"guidance_scale": 4.0})
    assert pipeline.samplings(SamplingConfig(guidance_scale=4.0), 1) == [expected]
    assert pipeline.samplings(SamplingConfig(), 2) == [pipeline.config.sampling] * 2
    # A value that is set counts, also where it is the class's default.
    assert pipeline.samplings(SamplingConfig(num_inference_steps=250), 1)[0].num_inference_steps == 250
    partial = pixels(pipeline.draw(["apple"], sampling=SamplingConfig(guidance_scale=4.0)))
    assert partial == pixels(pipeline.draw(["apple"], sampling=expected)) != pixels(pipeline.draw(["apple"]))
    listed = [SamplingConfig(guidance_scale=4.0), SamplingConfig()]
    assert pixels(pipeline.draw(["apple"] * 2, seed=[0, 0], sampling=listed))[0] == partial[0]
    called = pipeline(
        "apple", guidance_scale=4.0, sampling=SamplingConfig(sampler="dpm++"), generator=seeded(0)
    )
    assert pixels(called.images) == partial


def test_one_text_or_image_is_a_list_of_one(pipeline, tmp_path):
    drawn = pipeline.draw("apple", seed=4)
    assert pixels(drawn) == pixels(pipeline.draw(["apple"], seed=4))
    drawn[0].save(tmp_path / "a.png")
    expected = pipeline.describe(drawn)
    assert [pipeline.describe(each) for each in (drawn[0], tmp_path / "a.png", str(tmp_path / "a.png"))] == [
        expected
    ] * 3
    options = {"begin": "text", "max_images": 0}
    for part in ("apple", drawn[0], tmp_path / "a.png"):
        answers = pipeline.generate([[part]], **options)
        assert pipeline.generate(part, **options) == answers == [pipeline.chat(part, **options)]
        stream = pipeline.stream(part, **options)
        assert list(stream)
        assert stream.answers() == answers


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
        ({"num_inference_steps": 0}, r"num_inference_steps': it must be > 0 and <= 1000000 \(got 0\)$"),
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
        ({"sampling": [SamplingConfig()] * 2}, r"sampling has 2 values for 1 prompts"),
        ({"height": 64}, r"height=64: the model has 32x32 .*; choose one of these"),
        ({"latents": [1]}, r"latents: give a tensor of shape \[1, 4, 8, 8\] \(got \[1\]\)"),
        ({"latents": torch.zeros(1, 4, 8, 9)}, r"of shape \[1, 4, 8, 8\] \(got \[1, 4, 8, 9\]\)"),
        ({"latents": torch.full((1, 4, 8, 8), torch.nan)}, r"latents: has numbers that are not finite"),
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
