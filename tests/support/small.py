"""A small autoencoder, shards of a few real pairs, and a small run of them: what most tests start from.

Ranks import this too, so what makes files is imported where it is used: diffusers' models take seconds.
"""

from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
PACK = ROOT / "data_prep/emoji/emoji-000000.tar"
TOKENIZER = ROOT / "data_prep/tokenizer/tokenizer.model"
GLOSSES = ROOT / "data_prep/text/glosses.txt"


def make_vae(folder: Path) -> Path:
    """A random autoencoder with 4 x 8 x 8 latents for images of 32 pixels."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    model = AutoencoderKL(
        in_channels=48,
        out_channels=48,
        latent_channels=4,
        block_out_channels=(8,),
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        norm_num_groups=4,
        layers_per_block=1,
        scaling_factor=1.5,  # so that normalized latents deviate by about 1.5, which no warning tells of
        shift_factor=0.1,
        mid_block_add_attention=False,
    )
    model.save_pretrained(folder)
    return folder


def make_shards(folder: Path, vae: Path) -> Path:
    """pairs/ with 22 pairs in 3 shards and text/ with 40 glosses in 5."""
    from data_prep.config import PreprocessConfig
    from data_prep.preprocess import preprocess

    folder.mkdir(exist_ok=True)
    keys = folder / "keys.txt"
    starter = (ROOT / "data_prep/emoji/starter.txt").read_text().split()
    keys.write_text("\n".join(starter[:22]))
    texts = folder / "texts.txt"
    texts.write_text("".join(GLOSSES.read_text().splitlines(keepends=True)[:40]))
    preprocess(
        PreprocessConfig(
            out=folder,
            tokenizer=TOKENIZER,
            vae=vae,
            images=(PACK,),
            keys=keys,
            image_sizes=((32, 32),),
            texts=(texts,),
            documents_per_shard=8,
        )
    )
    return folder


def small_run(shards: Path, vae: Path, out: Path) -> dict:
    """Plain values of a run that takes a fraction of a second a step, to be changed at will."""
    return {
        "out": str(out),
        "data": {
            "sources": {
                "pairs": {"path": str(shards / "pairs"), "weight": 0.5},
                "text": {"path": str(shards / "text"), "weight": 0.5},
            },
            "tokenizer": str(TOKENIZER),
            "vae": str(vae),
            "sequence_length": 96,
            "images_per_row": 4,
            "num_streams": 4,
            "packing_buffer_size": 6,
        },
        "model": {
            "num_layers": 2,
            "hidden_size": 32,
            "num_heads": 4,
            "num_kv_heads": 2,
            "ffn_hidden_size": 64,
            "vocab_size": 2048,
            "latent_channels": 4,
            "latent_downsampling": 4,
            "image_sizes": [[32, 32]],
            "patch_size": 2,
        },
        "optimizer": {"learning_rate": 3e-3, "num_warmup_steps": 2},
        "train": {
            "num_steps": 6,
            "global_batch_size": 4,
            "micro_batch_size": 2,
        },
        "checkpoint": {"every": 3},
        "sampling": {"num_inference_steps": 4, "max_new_tokens": 6},
        "telemetry": {"log_every": 1},
    }
