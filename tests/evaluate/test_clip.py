"""CLIP score of a random CLIP in a folder, against torchmetrics' on the same images and texts."""

import string
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchmetrics.multimodal import CLIPScore
from transformers import CLIPConfig, CLIPModel, CLIPProcessor, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from megafusion.errors import UserError
from megafusion.evaluate.clip import Clip
from megafusion.evaluate.images import Images
from megafusion.evaluate.run import evaluate


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> Path:
    """A CLIP with random weights and a vocabulary of letters."""
    folder = tmp_path_factory.mktemp("clip")
    tokens = [*string.ascii_lowercase, *(letter + "</w>" for letter in string.ascii_lowercase)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={token: number for number, token in enumerate(tokens)}, merges=[])
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"bos_token_id": 52, "eos_token_id": 53, "pad_token_id": 53, "vocab_size": 54}
    config = CLIPConfig(
        text_config=size | ids | {"max_position_embeddings": 24},
        vision_config=size | {"image_size": 32, "patch_size": 8},
        projection_dim=8,
    )
    torch.manual_seed(0)
    model = CLIPModel(config)
    for parameter in model.parameters():  # as made, all texts would be much alike
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    square = {"height": 32, "width": 32}
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=square)
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture
def images() -> list[Image.Image]:
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (32, 32, 3), np.uint8)) for _ in range(4)]


TEXTS = ["a red apple", "two cups", "a dog left of a bird", "a long text " * 9]


class Tensors(nn.Module):
    """CLIP as torchmetrics asks for it: features as tensors, which transformers 5 gives within an output."""

    def __init__(self, model: CLIPModel):
        super().__init__()
        self.model, self.config = model, model.config

    def get_image_features(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.model.get_image_features(*inputs).pooler_output

    def get_text_features(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.model.get_text_features(*inputs).pooler_output


def test_the_score_is_torchmetrics(clip_folder, images):
    clip = Clip(clip_folder)
    scores = clip.scores(images[:3], TEXTS[:3])
    for image, text, score in zip(images, TEXTS, scores, strict=False):
        metric = CLIPScore(lambda: (Tensors(clip.model), clip._processor))
        metric.update(torch.from_numpy(np.array(image)).permute(2, 0, 1), text)
        assert score == pytest.approx(metric.score.item(), abs=1e-4)  # which compute() cuts at 0
    assert len(set(scores)) == 3
    assert clip.scores(images, TEXTS)[:3] == pytest.approx(scores, abs=1e-4), "alone and beside a longer text"


def test_a_folder_that_holds_no_clip_is_refused(clip_folder, tmp_path):
    with pytest.raises(UserError, match="no folder of a CLIP model; save a CLIP model of transformers"):
        Clip(tmp_path)
    (tmp_path / "config.json").write_text((clip_folder / "config.json").read_text())
    with pytest.raises(UserError, match=r"not a CLIP model \(.*model.safetensors"):
        Clip(tmp_path)


def test_the_images_suite_reports_it_by_group(clip_folder, config, saved, tmp_path):
    few = config.model_copy(update={"judge": None, "clip": clip_folder, "max_items": 1})
    report = evaluate(saved, ["images"], few, tmp_path / "out")
    metrics = report["suites"]["images"]["metrics"]
    assert metrics["all"]["clip_score"] == pytest.approx(
        (metrics["seen"]["clip_score"] + metrics["held-out"]["clip_score"]) / 2
    )
    assert Images.name in report["suites"]
