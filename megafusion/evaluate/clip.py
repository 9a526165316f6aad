"""A CLIP model of a folder, by transformers: how well images fit texts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from megafusion.errors import UserError

WHERE_FROM = (
    "save a CLIP model of transformers into a folder, such as openai/clip-vit-large-patch14 with "
    "`hf download`, as safetensors, with its tokenizer and image processor"
)


class Clip:
    """CLIP with its processor. Reads safetensors alone, downloads nothing, runs no code of the folder."""

    def __init__(self, folder: Path, option: str = "clip"):
        if not (folder / "config.json").is_file():
            raise UserError(f"{option}: {folder}: no folder of a CLIP model; {WHERE_FROM}")
        try:
            from transformers import CLIPModel, CLIPProcessor
        except ImportError as error:
            raise UserError(
                f"{option}: needs transformers; pip install 'megafusion[eval]' ({error})"
            ) from error
        try:
            self.model = CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval()
            self._processor: Any = CLIPProcessor.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"{option}: {folder}: not a CLIP model ({reason}); {WHERE_FROM}") from error

    def scores(self, images: Sequence[Image.Image], texts: Sequence[str]) -> list[float]:
        """CLIP score of each image with its text: 100 x the cosine of their embeddings.

        Texts are cut to the model's length.
        """
        images_ND, texts_ND = self._embed(images, texts)
        return (100 * (images_ND * texts_ND).sum(-1)).tolist()

    def nearest(self, images: Sequence[Image.Image], texts: Sequence[str]) -> list[int]:
        """The index of the text that fits each image best."""
        images_ND, texts_MD = self._embed(images, texts)
        return (images_ND @ texts_MD.T).argmax(-1).tolist()

    @torch.no_grad()
    def _embed(self, images: Sequence[Image.Image], texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Embeddings of length 1."""
        inputs = self._processor(
            images=list(images),
            text=list(texts),
            return_tensors="pt",
            padding=True,
            truncation=True,
            max_length=self.model.config.text_config.max_position_embeddings,
        )
        found = self.model(**inputs.to(self.model.device))
        return tuple(
            each / each.norm(dim=-1, keepdim=True) for each in (found.image_embeds, found.text_embeds)
        )
