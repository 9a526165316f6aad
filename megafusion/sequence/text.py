"""Cleaning of text, the same for what is learnt (captions, texts) and for what is asked (prompts)."""

import re
import unicodedata

from megafusion.errors import UserError

# Byte order mark, zero-width space, word joiner and invisible operators, soft hyphen, marks of direction.
INVISIBLE = re.compile("[\u00ad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff]")
# Joiners shape emoji and the letters of many scripts; beside ASCII, a space or an end they are noise.
STRAY_JOINER = re.compile(r"(?:(?<![^\x00-\x7f\s])[\u200c\u200d]+)|(?:[\u200c\u200d]+(?![^\x00-\x7f\s]))")
BLANK = frozenset("\u115f\u1160\u2800\u3164\uffa0")
"""Letters and symbols without ink: fillers of Hangul, Braille without a dot."""
SURROGATE = re.compile("[\ud800-\udfff]")


def clean_text(text: str) -> str:
    """A text without invisible characters and without white space at its ends; empty if nothing is visible.

    Cleaning what is clean changes nothing. UserError for bytes that were not UTF-8, as in a prompt.
    """
    if SURROGATE.search(text):
        raise UserError(f"{text!a:.80}: is not UTF-8; give it in UTF-8")
    text = STRAY_JOINER.sub("", INVISIBLE.sub("", text)).strip()
    return text if any(map(_is_visible, text)) else ""


def _is_visible(character: str) -> bool:
    """Whether a character shows something by itself, as one that this Python does not know yet may do."""
    category = unicodedata.category(character)  # C: control; M: mark; Z: separator; Cn: unknown; Co: private
    return category in ("Cn", "Co") or (category[0] not in "CMZ" and character not in BLANK)
