"""A server, asked by the client of OpenAI: its types, without special cases."""

import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openai
import pytest
import requests
from PIL import Image

from tests.support.serving import data_url, decoded, png, sample_image

MESSAGES = [{"role": "user", "content": "red apple, 3d style"}]
VARIED = {"temperature": 1.0, "seed": 7, "max_tokens": 20}


@pytest.fixture(scope="module", autouse=True)
def model_that_draws(pipeline):
    """Let about a third of sampled tokens be a boi, and some be eos."""

    def hook(_head, inputs, logits):
        logits[..., pipeline.tokenizer.boi] += 5 + 3 * inputs[0][..., 0]
        logits[..., pipeline.tokenizer.eos] += 4 + 3 * inputs[0][..., 1]
        return logits

    pipeline.model.tail.head.register_forward_hook(hook)


def chat(client, **options):
    return client.chat.completions.create(**{"model": "small", "messages": MESSAGES} | options)


def test_models_health_and_metrics(address, client):
    assert [model.id for model in client.models.list()] == ["small"]
    assert client.models.retrieve("small").owned_by == "megafusion"
    assert requests.get(f"{address}/health", timeout=5).json() == {"status": "ok"}
    client.images.generate(prompt="apple", n=2)
    found = requests.get(f"{address}/metrics", timeout=5).text
    assert 'megafusion_requests_total{path="/v1/images/generations",status="200"} ' in found
    assert "megafusion_images_total " in found


def test_a_chat_answers_with_text_as_the_pipeline_does(client, pipeline):
    answer = chat(client, n=2, **VARIED)
    sampling = pipeline.config.sampling.model_copy(update={"temperature": 1.0, "max_new_tokens": 20})
    options = {"begin": "text", "max_images": 0, "seed": 7, "sampling": sampling}
    expected = pipeline.generate([["red apple, 3d style"]] * 2, **options)
    assert [choice.message.content for choice in answer.choices] == [text for (text,) in expected]
    assert answer.choices[0].message.content != answer.choices[1].message.content
    assert {choice.finish_reason for choice in answer.choices} <= {"stop", "length"}
    assert answer.usage.prompt_tokens == len(pipeline.tokenizer.encode("red apple, 3d style")) + 2
    assert 1 < answer.usage.completion_tokens <= 40


def test_a_stream_tells_the_same_answer_piece_by_piece(client):
    options = {**VARIED, "modalities": ["text", "image"], "extra_body": {"max_images": 3}}
    whole = chat(client, **options)
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}, **options))
    text, images, reasons = "", [], []
    for chunk in chunks[:-1]:
        (choice,) = chunk.choices
        text += choice.delta.content or ""
        images += getattr(choice.delta, "images", [])
        reasons += [choice.finish_reason] if choice.finish_reason else []
    assert chunks[0].choices[0].delta.role == "assistant"
    assert len(chunks) > 4
    message = whole.choices[0].message
    assert len(images) == 3
    assert (text, images) == (message.content, message.images)
    assert reasons == [whole.choices[0].finish_reason]
    assert (chunks[-1].choices, chunks[-1].usage) == ([], whole.usage)


def test_images_go_in_and_come_out_and_an_answer_can_be_sent_back(client, pipeline):
    image = sample_image()
    parts = [
        {"type": "text", "text": "before"},
        {"type": "image_url", "image_url": {"url": data_url(image)}},
        {"type": "text", "text": "after"},
    ]
    question = {"role": "user", "content": parts}
    (choice,) = chat(client, messages=[question], modalities=["image"], seed=3).choices
    drawn = choice.message
    assert (drawn.content, choice.finish_reason) == ("", "stop")
    (expected,) = pipeline.chat(["before", image, "after"], begin="image", seed=3, sampling=no_text(pipeline))
    assert np.abs(decoded(drawn.images[0]["image_url"]["url"]) - np.asarray(expected, int)).max() <= 2

    answer = chat(client, modalities=["text", "image"], **VARIED).choices[0].message
    assert answer.images
    again = chat(client, messages=[*MESSAGES, answer, {"role": "user", "content": "x"}], max_tokens=5)
    document, start = ["red apple, 3d style"], 0
    for each in answer.images:
        document += [answer.content[start : each["offset"]], pil(each["image_url"]["url"])]
        start = each["offset"]
    sampling = pipeline.config.sampling.model_copy(update={"max_new_tokens": 5})
    document += [answer.content[start:], "x"]
    options = {"begin": "text", "max_images": 0, "sampling": sampling}
    assert [again.choices[0].message.content] == pipeline.chat(document, **options)


def no_text(pipeline):
    return pipeline.config.sampling.model_copy(update={"max_new_tokens": 0})


def pil(url: str):
    return Image.fromarray(decoded(url).astype(np.uint8))


def test_images_are_drawn_and_edited_as_the_pipeline_does(client, pipeline):
    options = {"seed": 5, "num_inference_steps": 3, "sampler": "EulerDiscrete", "guidance_scale": 2.0}
    changes = {name: value for name, value in options.items() if name != "seed"}
    sampling = pipeline.config.sampling.model_copy(update=changes)
    drawn = client.images.generate(
        model="small", prompt="pizza", n=2, size="32x32", response_format="b64_json", extra_body=options
    )
    expected = pipeline.draw(["pizza"] * 2, seed=5, sampling=sampling)
    edited = client.images.edit(image=png(sample_image()), prompt="make it blue", extra_body=options)
    expected.append(pipeline.edit(sample_image(), "make it blue", seed=5, sampling=sampling))
    for found, image in zip([*drawn.data, *edited.data], expected, strict=True):
        assert np.abs(decoded(found.b64_json) - np.asarray(image, int)).max() <= 2
    several = client.images.edit(image=[io.BytesIO(png(sample_image(s))) for s in (1, 2)], prompt="mix them")
    assert decoded(several.data[0].b64_json).shape == (32, 32, 3)


NO_OPS = {"user": "me", "safety_identifier": "x"}


def test_fields_that_change_nothing_are_taken(client):
    """The values that OpenAI's clients send by default; each answer is the one without them."""
    asked = {"prompt": "pizza", "extra_body": {"seed": 5, "num_inference_steps": 3}}
    neutral = {"quality": "standard", "style": "vivid", "output_format": "png", "output_compression": 100}
    neutral |= {"background": "auto", "moderation": "low", "response_format": "b64_json"} | NO_OPS
    plain = client.images.generate(**asked)
    assert client.images.generate(**asked, **neutral).data == plain.data
    del neutral["style"], neutral["moderation"]
    image = png(sample_image())
    edits = [client.images.edit(image=image, **asked, **more).data for more in ({}, neutral)]
    assert edits[0] == edits[1]
    neutral = {
        "frequency_penalty": 0.0,
        "presence_penalty": 0,
        "logprobs": False,
        "tools": [],
        "store": False,
    }
    neutral |= {"response_format": {"type": "text"}, "tool_choice": "none", "metadata": {"a": "b"}} | NO_OPS
    neutral["messages"] = [MESSAGES[0] | {"name": "me", "tool_calls": [], "refusal": None}]
    chats = [chat(client, **VARIED, **more).choices[0].message for more in ({}, neutral)]
    assert chats[0].content == chats[1].content


def test_an_answer_is_the_same_alone_and_among_others_in_any_order(client, address):
    """Nine requests of every kind, one after the other, then at once in two orders."""
    asked = [
        {"seed": 1, "temperature": 1.0, "max_tokens": 12},
        {"seed": 2, "temperature": 0.7, "max_tokens": 9, "stop": "e"},
        {"seed": 3, "max_tokens": 30, "extra_body": {"repetition_penalty": 1.3}},
        {"seed": 4, "modalities": ["image"]},
        {"seed": 5, "modalities": ["image"], "extra_body": {"negative_prompt": "grey"}},
        {"seed": 6, "modalities": ["image"], "extra_body": {"sampler": "EulerAncestralDiscrete"}},
        {"seed": 7, "modalities": ["text", "image"], "temperature": 1.0, "max_tokens": 15},
        {"seed": 8, "modalities": ["text", "image"], "temperature": 1.0, "extra_body": {"max_images": 2}},
        {"seed": 9, "modalities": ["text", "image"], "temperature": 1.5, "max_tokens": 15},
    ]
    alone = [chat(client, **options).choices[0] for options in asked]
    assert sum("images" in choice.message.model_extra for choice in alone) >= 4
    before = num_shared_batches(address)
    for order in ([0, 1, 2, 3, 4, 5, 6, 7, 8], [8, 3, 1, 6, 5, 0, 4, 7, 2]):
        with ThreadPoolExecutor(9) as pool:
            together = dict(zip(order, pool.map(lambda i: chat(client, **asked[i]), order), strict=True))
        for i, choice in enumerate(alone):
            assert_same(together[i].choices[0], choice)
    assert num_shared_batches(address) > before


def num_shared_batches(address: str) -> float:
    """Batches so far of several rows."""
    text = requests.get(f"{address}/metrics", timeout=5).text
    lines = [line.rsplit(" ", 1) for line in text.splitlines() if line.startswith("megafusion_batch_rows_")]
    lone = sum(float(value) for name, value in lines if 'le="1.0"' in name)
    return sum(float(value) for name, value in lines if "_count" in name) - lone


def assert_same(found, expected) -> None:
    assert (found.message.content, found.finish_reason) == (expected.message.content, expected.finish_reason)
    images = [getattr(choice.message, "images", []) for choice in (found, expected)]
    for a, b in zip(*images, strict=True):
        assert a["offset"] == b["offset"]
        pixels = [decoded(image["image_url"]["url"]) for image in (a, b)]
        assert np.abs(pixels[0] - pixels[1]).max() <= 2


def test_another_model_is_refused_by_name(client):
    with pytest.raises(openai.NotFoundError, match="model='gpt-5': this server has 'small'"):
        chat(client, model="gpt-5")
    with pytest.raises(openai.NotFoundError, match="this server has 'small'"):
        client.models.retrieve("gpt-5")
