"""Limits of `megafusion serve`. Imports no torch."""

from pydantic import Field

from megafusion.config import Config

LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")


class ServeConfig(Config):
    """Limits of a server; a request beyond one is refused with the limit."""

    max_batch: int = Field(8, gt=0, le=1024)
    """Answers that are generated together; the largest `n` of a request."""
    max_requests: int = Field(64, gt=0)
    """Requests that are received, wait or are answered at a time; another one is refused with status 429."""
    timeout_seconds: float = Field(600, gt=0)
    """Time of a request from its first byte to the last of its answer; status 504 beyond."""
    max_body_bytes: int = Field(2**25, gt=0)
    """Size of a request."""
    max_prompt_characters: int = Field(100_000, gt=0)
    """Characters of a request's texts; the model's sequence_length limits its tokens."""
    max_images: int = Field(8, gt=0)
    """Images that a request gives, and images of an answer."""
    max_pixels: int = Field(2**24, gt=0)
    """Pixels of all images that a request gives."""
    max_tokens: int = Field(4096, gt=0)
    """Text tokens of an answer (`max_tokens` of a request)."""
    max_steps: int = Field(1000, gt=0)
    """Denoising steps of an image (`num_inference_steps` of a request)."""
