"""Cleaning of text, the same for what is learnt (captions, texts) and for what is asked (prompts)."""

import re
import unicodedata

# Byte order mark, zero-width space, word joiner and invisible operators, soft hyphen, marks of direction.
INVISIBLE = re.compile("[\u00ad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff]")
# Joiners shape emoji and the letters of many scripts; beside ASCII, a space or an end they are noise.
STRAY_JOINER = re.compile(r"(?:(?<![^\x00-\x7f\s])[\u200c\u200d]+)|(?:[\u200c\u200d]+(?![^\x00-\x7f\s]))")


def clean_text(text: str) -> str:
    """A text without invisible characters and without white space at its ends; empty if nothing is visible.

    Cleaning what is clean changes nothing.
    """
    text = STRAY_JOINER.sub("", INVISIBLE.sub("", text)).strip()
    # Categories C (control), M (mark) and Z (separator) show nothing by themselves.
    return text if any(unicodedata.category(character)[0] not in "CMZ" for character in text) else ""
