"""Draw docs/sequence-and-mask.png: one packed sequence of text and patches, and its mask.

python docs/sequence_and_mask.py
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Rectangle

# Two packed documents: (kind, label) of each position.
TEXT, SPECIAL, PATCH, OTHER = "#4C78A8", "#9aa5b1", "#F58518", "#B8B0A0"
ROW = (
    [("t", "bos"), ("t", "a"), ("t", "red"), ("t", "apple"), ("s", "boi")]
    + [("p", "")] * 6
    + [("s", "eoi"), ("t", "eaten"), ("t", "eos")]
    + [("o", "bos"), ("o", "pizza"), ("o", "eos")]
)


def intervals() -> tuple[np.ndarray, np.ndarray]:
    """row_end and last_query of the row above, as packing makes them: two integers a position."""
    end = np.arange(1, 18)
    end[5:11] = 11  # a patch sees its whole image
    last = np.array([14] * 14 + [17] * 3)
    return end, last


def main() -> None:
    end, last = intervals()
    size = len(ROW)
    figure = plt.figure(figsize=(12.2, 5.2), dpi=120)
    axes = figure.add_axes((0.02, 0.02, 0.96, 0.96))
    axes.set_xlim(-6.2, 35.5)
    axes.set_ylim(size + 0.6, -3.4)
    axes.axis("off")
    color = {"t": TEXT, "s": SPECIAL, "p": PATCH, "o": OTHER}
    for i, (kind, label) in enumerate(ROW):
        axes.add_patch(Rectangle((i, -2.2), 0.94, 0.94, color=color[kind]))
        axes.text(i + 0.47, -2.45, label, rotation=50, ha="left", va="bottom", fontsize=8)
        axes.add_patch(Rectangle((-1.3, i), 0.94, 0.94, color=color[kind]))
        axes.text(-1.55, i + 0.5, label or "patch", ha="right", va="center", fontsize=7.5)
        axes.text(
            -3.6,
            i + 0.5,
            str(end[i]),
            ha="right",
            va="center",
            fontsize=7.5,
            family="monospace",
        )
        for j in range(size):
            seen = j < end[i] and i < last[j]
            shade = (PATCH if j > i else color[kind]) if seen else "#f1f1f1"
            axes.add_patch(Rectangle((j, i), 0.94, 0.94, color=shade, alpha=0.85 if seen else 1))
    for j in range(size):
        axes.text(j + 0.47, size + 0.45, str(last[j]), fontsize=7.5, ha="center", family="monospace")
    axes.text(-4.6, -1.3, "row_end", fontsize=8.5, ha="center", weight="bold")
    axes.text(-1.0, size + 0.45, "last_query", fontsize=8.5, ha="right", weight="bold")
    notes = [
        (
            TEXT,
            "text: sees what came before it in its document,",
            "and learns the next token (cross-entropy)",
        ),
        (
            PATCH,
            "image patches: noised latents that see one another both",
            "ways, and learn to be denoised (diffusion loss)",
        ),
        (
            SPECIAL,
            "boi, eoi: the model writes boi itself when an image is to",
            "come; images of several sizes have a boi each",
        ),
        (OTHER, "another document packed into the same row:", "no key is shared, nothing is padded"),
    ]
    for n, (shade, first, second) in enumerate(notes):
        y = 1.2 + 3.2 * n
        axes.add_patch(Rectangle((18.6, y), 0.94, 0.94, color=shade))
        axes.text(20, y + 0.35, first, fontsize=9, va="center")
        axes.text(20, y + 1.3, second, fontsize=9, va="center")
    axes.text(
        18.6,
        14.6,
        "The mask is two integers a position: query i sees key j if\n"
        "j < row_end[i] and i < last_query[j]. Kernels skip all others.",
        fontsize=9.5,
        weight="bold",
        va="top",
    )
    figure.savefig(Path(__file__).with_name("sequence-and-mask.png"))


if __name__ == "__main__":
    main()
