"""The paper's claims (docs/claims.md): which arms and figures each compares, beside the paper's figures."""

from claims_rows import EXPLORATORY, HALVES, Claim, Row, Side

# Figures: their words, their metric, and the sign of a better one.
SEEN = ("seen: closed-set accuracy", "images/seen/closed_both_accuracy", 1)
HELD_OUT = ("held-out: closed-set accuracy", "images/held-out/closed_both_accuracy", 1)
OPEN_SEEN = ("seen: open-set accuracy", "images/seen/both_accuracy", 1)
OPEN_HELD_OUT = ("held-out: open-set accuracy", "images/held-out/both_accuracy", 1)
CONCEPT = ("held-out: closed-set accuracy, concept", "images/held-out/closed_concept_accuracy", 1)
STYLE = ("held-out: closed-set accuracy, style", "images/held-out/closed_style_accuracy", 1)
IMAGES = (OPEN_HELD_OUT, OPEN_SEEN, HELD_OUT, SEEN, CONCEPT, STYLE)
IMAGE_LOSS = ("held-out: image loss", "validation_image_loss_by_range", -1)
LOSS_BY_HALF = tuple(
    (f"held-out: image loss, t {where} 0.5{EXPLORATORY}", metric, -1)
    for where, metric in zip(("<", ">="), HALVES, strict=True)
)
CAPTIONS = (
    ("held-out: CIDEr", "captions/held-out/cider", 1),
    ("seen: CIDEr", "captions/seen/cider", 1),
    ("seen: exact match", "captions/seen/exact_match", 1),
)
TEXT = (("held-out glosses: bits per byte", "perplexity/all/bits_per_byte", -1),)


def _arms(
    first: str, second: str, *figures: tuple[str, str, int], better: int = 1, detail: str = ""
) -> tuple[Row, ...]:
    """Rows of two arms, of which the paper has the first better (1), worse (-1), or says nothing (0)."""
    return tuple(
        Row(name, Side(first, first, metric), Side(second, second, metric), sign * better, detail)
        for name, metric, sign in figures
    )


def _guesses(arm: str) -> tuple[Row, ...]:
    """Rows of an arm's held-out drawings beside what a copy of the nearest seen image and chance have."""
    rows = []
    for part in ("concept", "style"):
        drawn = Side("drawn", arm, f"images/held-out/closed_{part}_accuracy")
        for name, metric in (("nearest seen", f"nearest_seen_{part}"), ("chance", f"{part}_chance")):
            guess = Side(name, arm, f"images/held-out/{metric}")
            rows.append(Row(f"held-out: closed-set accuracy, {part}", drawn, guess, 1, f"drawn vs {name}"))
    held_out, seen = (
        Side(group, arm, f"images/{group}/closed_both_accuracy") for group in ("held-out", "seen")
    )
    return (*rows, Row("closed-set accuracy", held_out, seen, 0, "held-out vs seen"))


def _against_tokens(size: int) -> tuple[Claim, ...]:
    """Claim (a) of a sweep of so many concepts."""
    values = (
        ("images", "FID 16.8 against 29.6 (7B); parity at .029 of the compute", IMAGES, DRAWN),
        ("captions", "CIDEr 27.2 against 18.0 (7B); parity at .218", CAPTIONS, DESCRIBED),
        ("text", "C4 perplexity 7.72 against 8.41 (7B); parity at .489", TEXT, (TEXT[0][0],)),
    )
    return tuple(
        Claim(
            "(a)", f"{name}, {size} concepts", TOKENS, paper, f"concepts-{size}", _arms(*ARMS, *figures),
            main if size == 64 else (),
        )
        for name, paper, figures, main in values
    )  # fmt: skip


def _against_causal(
    name: str, sweep: str, arm: str, causal: str, paper: str, main: tuple[str, ...] = ()
) -> Claim:
    rows = _arms(arm, causal, IMAGE_LOSS, *LOSS_BY_HALF, HELD_OUT, SEEN, *CAPTIONS[:2])
    return Claim("(b)", name, "bidirectional against causal attention in images", paper, sweep, rows, main)


ARMS = ("transfusion", "quantized")
DRAWN, DESCRIBED = (SEEN[0], HELD_OUT[0]), (CAPTIONS[1][0],)
DENOISED = (IMAGE_LOSS[0], *DRAWN)
TOKENS = "Transfusion against image tokens"
SIZES = ("4x128", "6x192", "8x256")
BY_SIZE = (HELD_OUT, SEEN, *CAPTIONS[:2], *TEXT)
BY_RECIPE = (IMAGE_LOSS, HELD_OUT, SEEN, CAPTIONS[0])
BY_LAMBDA = (IMAGE_LOSS, SEEN, *CAPTIONS[:2], *TEXT)
LINEAR = "FID 20.3 against 61.3, CIDEr 16.0 against 12.7 (0.76B)"
UNET = "FID 16.7 against 16.8, CIDEr 25.4 against 23.3 (0.76B)"
CLAIMS = (
    *_against_tokens(64),
    *_against_tokens(128),
    *(
        Claim(
            "(a)", f"{size}, 1,000 steps", TOKENS, "as above", "sizes",
            _arms(f"transfusion-{size}", f"quantized-{size}", *BY_SIZE), DRAWN,
        )
        for size in SIZES
    ),
    Claim(
        "(a)", "64 patches an image, as many as codes", TOKENS, "as above", "ablations",
        _arms("patch-2", "quantized", *BY_SIZE), (*DRAWN, *DESCRIBED),
    ),
    Claim("(a)", "4x128, reproduce-small", TOKENS, "as above", "small", _arms(*ARMS, *BY_SIZE)),
    _against_causal("linear, 16 patches", "concepts-64", "transfusion", "causal", LINEAR, DENOISED),
    _against_causal("linear, 16 patches, 1,000 steps", "sizes", "transfusion-4x128", "causal-4x128", LINEAR),
    _against_causal("linear, 64 patches", "ablations", "patch-2", "patch-2-causal", LINEAR, DENOISED),
    _against_causal("linear, 64 patches, 600 steps", "small", "patch-2", "patch-2-causal", LINEAR),
    _against_causal("U-Net", "ablations", "unet", "unet-causal", UNET, DENOISED),
    Claim(
        "(c)", "patch size", "1, 2 and 8 latents against 4 (the arm transfusion), equal compute",
        "linear: FID 21.0, 20.3 and 43.5 against 25.6 (0.76B)", "ablations",
        tuple(
            row._replace(second=row.second._replace(name="patch-4"))
            for size, better in ((1, 1), (2, 1), (8, -1))
            for row in _arms(
                f"patch-{size}", "transfusion", *BY_RECIPE, better=better, detail=f"patch {size} vs 4"
            )
        ),
        DRAWN,
    ),
    Claim(
        "(d)", "adapter", "U-Net against linear, equal compute",
        "FID 16.0 against 18.6, CIDEr 33.7 against 27.2 (7B)", "ablations",
        _arms("unet", "transfusion", *BY_RECIPE), DENOISED,
    ),
    Claim(
        "(e)", "noise limit", "of 0.5 for images before their captions, against none",
        "CIDEr 35.2 against 33.7 (7B)", "ablations", _arms("transfusion", "no-limit", *CAPTIONS),
        DESCRIBED,
    ),
    Claim(
        "(f)", "lambda", "5 against 1 and 25", "5 is used", "ablations",
        tuple(
            row
            for weight in (1, 25)
            for row in _arms("transfusion", f"lambda-{weight}", *BY_LAMBDA, better=0, detail=f"5 vs {weight}")
        ),
        (SEEN[0], *DESCRIBED),
    ),
    *(
        Claim(
            "(g)", f"{size} concepts", "held-out combinations against guesses", "not measured",
            f"concepts-{size}", _guesses("transfusion"),
        )
        for size in (64, 128)
    ),
    *(
        Claim(
            "(g)", f"{size}, 1,000 steps", "held-out combinations against guesses", "not measured", "sizes",
            _guesses(f"transfusion-{size}"),
        )
        for size in SIZES
    ),
    Claim(
        "(g)", "64 concepts, the ablations' runs", "held-out combinations against guesses", "not measured",
        "ablations", _guesses("transfusion"), (f"{HELD_OUT[0]}, concept", f"{HELD_OUT[0]}, style"),
    ),
)  # fmt: skip
