"""Fields of OpenAI's interface without a meaning here: taken where they change nothing, else refused."""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from megafusion.serve.errors import Refusal


class Unused(NamedTuple):
    """A field's values that change nothing (None: any), and the way out for others."""

    values: tuple | None = None
    advice: str = "leave it out"


IMAGE_FIELDS: Mapping[str, Unused] = {
    "background": Unused(("auto", "opaque"), "images are opaque"),
    "input_fidelity": Unused(("low",), "give image_guidance_scale"),
    "moderation": Unused(("auto", "low"), "there is none"),
    "output_compression": Unused((100,), "images are PNG, without loss"),
    "output_format": Unused(("png",), "images are PNG"),
    "quality": Unused(("auto", "standard"), "give num_inference_steps"),
    "response_format": Unused(("b64_json",), "images are answered as b64_json"),
    "safety_identifier": Unused(),
    "style": Unused(("vivid",), "write it in the prompt"),
    "user": Unused(),
}
"""Of /v1/images."""
CHAT_FIELDS: Mapping[str, Unused] = {
    "frequency_penalty": Unused((0,), "give repetition_penalty"),
    "function_call": Unused(("auto", "none"), "the model calls no functions"),
    "functions": Unused(([],), "the model calls no functions"),
    "logit_bias": Unused(({},)),
    "logprobs": Unused((False,)),
    "metadata": Unused(),
    "parallel_tool_calls": Unused(),
    "presence_penalty": Unused((0,), "give repetition_penalty"),
    "prompt_cache_key": Unused(),
    "reasoning_effort": Unused(("none",), "the model does not reason"),
    "response_format": Unused(({"type": "text"},), "answers are text"),
    "safety_identifier": Unused(),
    "service_tier": Unused(("auto", "default")),
    "store": Unused((False,), "answers are not stored"),
    "tool_choice": Unused(("auto", "none"), "the model calls no tools"),
    "tools": Unused(([],), "the model calls no tools"),
    "top_logprobs": Unused((0,)),
    "user": Unused(),
    "verbosity": Unused(("medium",), "give max_tokens"),
}
"""Of /v1/chat/completions."""


def without_unused(values: Mapping[str, Any], fields: Mapping[str, Unused]) -> dict[str, Any]:
    """The other fields of a body. Raises Refusal for a value that would change something."""
    for name in values.keys() & fields.keys():
        taken, advice = fields[name]
        if taken is not None and values[name] not in taken:
            known, given = " or ".join(map(json.dumps, taken)), json.dumps(values[name])
            raise Refusal(400, f"{name}={given:.80} is not supported, only {known}; {advice}")
    return {name: value for name, value in values.items() if name not in fields}
