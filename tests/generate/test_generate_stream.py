"""Streams of events, requests with options of their own, and that a request's answer is its own alone."""

import numpy as np
import pytest
from PIL import Image

from megafusion.errors import UserError
from megafusion.generate.events import ImageDone, ImagePreview, ImageStep, RowDone, TextDelta
from megafusion.generate.pipeline import TransfusionPipeline
from megafusion.objective.config import SamplingConfig
from tests.support.generation import make_pipeline

CAPTIONS = ["apple", "red apple, 3d style", "x", "a much longer caption than the others", "pizza", "cat face"]


@pytest.fixture
def pipeline(run_config, tokenizer, codec) -> TransfusionPipeline:
    return make_pipeline(run_config, tokenizer, codec, num_steps=4)


def prefer_images(pipeline) -> None:
    """Let about a third of sampled tokens be a boi, and some be eos."""

    def hook(_head, inputs, logits):
        logits[..., pipeline.tokenizer.boi] += 5 + 3 * inputs[0][..., 0]
        logits[..., pipeline.tokenizer.eos] += 4 + 3 * inputs[0][..., 1]
        return logits

    pipeline.model.tail.head.register_forward_hook(hook)


def assert_equal_answers(found, expected) -> None:
    assert [type(part) for part in found] == [type(part) for part in expected]
    for a, b in zip(found, expected, strict=True):
        if isinstance(a, str):
            assert a == b
        else:
            assert np.abs(np.asarray(a, int) - np.asarray(b, int)).max() <= 2


def options_of(row: int) -> SamplingConfig:
    """Options that differ between rows: of text, of images, and limits."""
    return SamplingConfig(
        sampler=("ddim", "EulerAncestralDiscrete", "UniPCMultistep")[row % 3],
        num_inference_steps=3 + row % 2,
        guidance_scale=(3.0, 1.0, 2.0)[row // 3],
        negative_prompt=("", "grey", "blue sky")[row % 3],
        max_new_tokens=(5, 9, 14)[row % 3],
        temperature=(1.0, 0.0, 1.5)[row % 3],
        top_k=(0, 0, 50)[row % 3],
        repetition_penalty=(1.0, 1.2)[row % 2],
    )


@pytest.mark.parametrize("begin", ["free", "image"])
def test_a_request_alone_equals_itself_among_eight_others_at_any_place(pipeline, begin):
    prefer_images(pipeline)
    rows = [([CAPTIONS[row % 6]], 100 + row, options_of(row)) for row in range(9)]

    def generate(order):
        prompts, seeds, samplings = zip(*(rows[row] for row in order), strict=True)
        options = {"seed": seeds, "sampling": samplings, "max_images": 2, "begin": begin}
        return dict(zip(order, pipeline.generate(list(prompts), **options), strict=True))

    together, other = generate(range(9)), generate([4, 8, 1, 0, 7, 2, 6, 3, 5])
    assert len({str(together[row]) for row in range(9)}) >= 6
    assert sum(any(not isinstance(p, str) for p in together[row]) for row in range(9)) >= 3
    for row in range(9):
        assert_equal_answers(other[row], together[row])
        assert_equal_answers(generate([row])[row], together[row])


def test_latents_alone_are_those_among_eight_others_within_rounding(pipeline):
    """Products of another number of rows sum in another order: 1e-4 in float32, as docs/serving.md has it."""
    rows = [([CAPTIONS[row % 6]], 100 + row, options_of(row)) for row in range(9)]

    def latents(order):
        prompts, seeds, samplings = zip(*(rows[row] for row in order), strict=True)
        generation = pipeline.generation(
            pipeline.requests(prompts, seed=seeds, sampling=samplings, begin="image")
        )
        generation.run()
        images = [row.images for row in generation.rows]
        return {row: image.latents for row, (image,) in zip(order, images, strict=True)}

    together, other = latents(range(9)), latents([4, 8, 1, 0, 7, 2, 6, 3, 5])
    for row in range(9):
        most = 1e-4 * max(1, np.abs(together[row]).max())  # random models draw large ones
        np.testing.assert_allclose(other[row], together[row], rtol=0, atol=most)
        np.testing.assert_allclose(latents([row])[row], together[row], rtol=0, atol=most)


def test_answers_do_not_depend_on_the_slots_that_a_cache_begins_with(pipeline, monkeypatch):
    prefer_images(pipeline)
    sampling = SamplingConfig(num_inference_steps=2, temperature=1.0, max_new_tokens=40)
    options = {"seed": 3, "max_images": 4, "sampling": sampling}
    expected = pipeline.generate([[c] for c in CAPTIONS], **options)
    assert sum(not isinstance(part, str) for answer in expected for part in answer) >= 6
    monkeypatch.setattr("megafusion.generate.generation.FIRST_CAPACITY", 1)
    for found, answer in zip(pipeline.generate([[c] for c in CAPTIONS], **options), expected, strict=True):
        assert_equal_answers(found, answer)


def test_another_seed_is_another_text(pipeline):
    sampling = SamplingConfig(temperature=1.0, max_new_tokens=20)
    image = pipeline.draw(["x"])[0]
    texts = [pipeline.describe([image], seed=seed, sampling=sampling)[0] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert pipeline.describe([image] * 2, seed=[2, 1], sampling=sampling) == texts[:0:-1]


def test_events_tell_the_answers_of_generate(pipeline):
    prefer_images(pipeline)
    prompts, options = [[c] for c in CAPTIONS], {"seed": 5, "max_images": 2}
    sampling = SamplingConfig(num_inference_steps=5, temperature=1.0, max_new_tokens=5)
    expected = pipeline.generate(prompts, sampling=sampling, **options)
    stream = pipeline.stream(prompts, sampling=sampling, preview_every=2, **options)
    told: list[list] = [[] for _ in prompts]
    ended, previews, steps = [], [], []
    for event in stream:
        match event:
            case TextDelta(row, text):
                if told[row] and isinstance(told[row][-1], str):
                    told[row][-1] += text
                else:
                    told[row].append(text)
            case ImageDone(row, image):
                told[row].append(image)
            case ImagePreview(row, image, step, num_steps):
                assert image.size == (32, 32)
                previews.append((row, step, num_steps))
            case ImageStep(rows, state):
                steps.append((rows, state.step))
            case RowDone(row, reason):
                ended.append((row, reason))
    assert sorted(row for row, _ in ended) == list(range(6))
    assert {reason for _, reason in ended} == {"eos", "length"}
    drawn = sum(isinstance(part, Image.Image) for answer in expected for part in answer)
    assert drawn >= 3
    assert len(previews) == 2 * drawn
    assert {(step, total) for _, step, total in previews} == {(2, 5), (4, 5)}
    assert sum(len(rows) for rows, _ in steps) == 5 * drawn
    for found, answer, kept in zip(told, expected, stream.answers(), strict=True):
        assert_equal_answers([part for part in found if part], [part for part in answer if part])
        assert_equal_answers(kept, answer)


def test_a_preview_is_what_the_model_expects(pipeline):
    """With a model that predicts no noise and a nearly clean image, the image itself."""
    stream = pipeline.stream([["x"]], begin="image", preview_every=1, seed=3)
    last = [event for event in stream if isinstance(event, ImagePreview | ImageDone)][-2:]
    assert isinstance(last[0], ImagePreview)
    assert last[0].step == 3
    states = [e.state for e in pipeline.stream([["x"]], begin="image", seed=3) if isinstance(e, ImageStep)]
    (expected,) = pipeline.codec.decode_images(states[2].clean())
    assert np.array_equal(np.asarray(last[0].image), np.asarray(expected))


@pytest.mark.parametrize("stop", ["e", "p", "st", "pizza"])
def test_a_stop_text_ends_the_answer_before_it(pipeline, stop):
    sampling = SamplingConfig(temperature=1.0, max_new_tokens=60)
    free = pipeline.generate([["x"], ["y"]], begin="text", max_images=0, seed=2, sampling=sampling)
    stopping = sampling.model_copy(update={"stop": [stop]})
    found = pipeline.generate(
        [["x"], ["y"]], begin="text", max_images=0, seed=2, sampling=[stopping, sampling]
    )
    expected = free[0][0].split(stop)[0]
    assert "".join(found[0]) == expected
    assert found[1] == free[1]
    stream = pipeline.stream([["x"]], begin="text", max_images=0, seed=2, sampling=stopping)
    events = list(stream)
    assert "".join(e.text for e in events if isinstance(e, TextDelta)) == expected
    assert events[-1] == RowDone(0, "stop" if stop in free[0][0] else "length")


def test_a_cancelled_row_ends_and_leaves_the_others_alone(pipeline):
    sampling = SamplingConfig(temperature=1.0, max_new_tokens=10)
    options = {"begin": "text", "max_images": 0, "seed": 7, "sampling": sampling}
    expected = pipeline.generate([["x"], ["y"], ["z"]], **options)
    stream, seen = pipeline.stream([["x"], ["y"], ["z"]], **options), 0
    ended = []
    for event in stream:
        seen += isinstance(event, TextDelta) and event.row == 1
        if seen == 3:
            stream.cancel(1)
        if isinstance(event, RowDone):
            ended.append((event.row, event.reason))
    assert ended[0] == (1, "cancelled")
    answers = stream.answers()
    assert [answers[0], answers[2]] == [expected[0], expected[2]]
    assert expected[1][0].startswith(answers[1][0])
    assert len(answers[1][0]) < len(expected[1][0])


def test_a_cancelled_image_is_not_denoised_to_its_end(pipeline):
    stream, steps = pipeline.stream([["x"]], begin="image"), []
    for event in stream:
        if isinstance(event, ImageStep):
            steps.append(event.state.step)
            stream.cancel(0)
    assert steps == [1]
    assert event == RowDone(0, "cancelled")
    assert stream.answers() == [[]]


def test_a_stream_is_an_iterator_that_can_be_closed(pipeline):
    stream = pipeline.stream([["x"]], begin="image")
    assert [next(stream).state.step for _ in range(2)] == [1, 2]
    assert next(iter(stream)).state.step == 3
    assert len(repr(ImageStep((0,), next(pipeline.stream([["x"]], begin="image")).state))) < 200
    for row in (1, -1, "0"):
        with pytest.raises(UserError, match=rf"row={row!r}: give an integer from 0 to 0"):
            stream.cancel(row)
    rest = list(stream)
    assert [type(event) for event in rest[:2]] == [ImageStep, ImageDone]
    assert next(stream, None) is None
    with pipeline.stream([["x"]], begin="image") as closed:
        next(closed)
    assert list(closed) == []
    assert closed.answers() == [[]]


def test_a_callback_sees_the_events_and_may_end_the_call(pipeline):
    class Enough(Exception):
        pass

    seen = []

    def callback(event):
        seen.append(event)
        if len(seen) == 2:
            raise Enough

    with pytest.raises(Enough):
        pipeline.draw(["x"], callback=callback)
    assert [type(event) for event in seen] == [ImageStep] * 2


def test_a_negative_prompt_beyond_the_rows_of_training_is_refused(pipeline):
    config = pipeline.config.model_copy(update={"sequence_length": 60})
    limited = TransfusionPipeline(pipeline.model, pipeline.tokenizer, pipeline.codec, config)
    sampling = config.sampling.model_copy(update={"negative_prompt": "apple " * 60})
    with pytest.raises(UserError, match=r"negative_prompt takes \d+ positions and 18 of the image.*of 60"):
        limited.draw(["x"], sampling=sampling)
