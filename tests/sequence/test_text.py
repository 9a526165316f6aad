"""Cleaning of text: invisible characters and white space at the ends go, what is visible stays."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megafusion.errors import UserError
from megafusion.sequence.text import clean_text

INVISIBLE = "\ufeff\u200b\u2060\u200e\u200f\u00ad\u202a\u2066\u061c"
VISIBLE = [
    "red",
    "apple,",
    "3d",
    "é",
    "苹果",
    "яблоко",
    "🍎",
    "👩\u200d👩\u200d👧",
    "❤\ufe0f",
    "می\u200cخواهم",
    "क\u094d\u200dष",
]


@given(st.lists(st.sampled_from(VISIBLE), min_size=1), st.data())
def test_invisible_characters_anywhere_do_not_change_a_text(words, data):
    text = " ".join(words)
    dirty = "".join(c + data.draw(st.text(INVISIBLE, max_size=2)) for c in text)
    ends = st.text(INVISIBLE + "\u200c\u200d \t\r\n", max_size=4)
    assert clean_text(data.draw(ends) + dirty + data.draw(ends)) == text
    assert clean_text(text) == text


@given(st.text())
def test_cleaning_twice_is_cleaning_once(text):
    clean = clean_text(text)
    assert clean_text(clean) == clean
    assert clean == clean.strip()
    # Every character that stays stands in the text in this order.
    rest = iter(text)
    assert all(character in rest for character in clean)


@given(st.text(INVISIBLE + "\u200c\u200d\ufe0f \x00\r\n\u3000\u0301\u3164\uffa0\u2800\u115f"))
def test_a_text_of_invisible_characters_alone_is_empty(text):
    assert clean_text(text) == ""


@pytest.mark.parametrize(
    ("text", "clean"), [("a\u200db", "ab"), ("a \u200d👩", "a 👩"), ("👩\u200d a", "👩 a")]
)
def test_joiners_that_join_nothing_are_dropped(text, clean):
    assert clean_text(text) == clean


@pytest.mark.parametrize(
    "text", ["\U0001fae8", "\U0001fada", "\ue000", "\U000fffff", "\u3164\U0001f9ff", "\u1100\u1160"]
)
def test_characters_that_unicodedata_does_not_know_may_show_something(text):
    """Emoji are added each year, and icon fonts use private characters."""
    assert clean_text(text) == text


@given(st.text(), st.characters(categories=["Cs"]), st.text())
def test_bytes_that_are_not_utf_8_are_refused(before, byte, after):
    """As the command line passes them on."""
    with pytest.raises(UserError, match=r"is not UTF-8; give it in UTF-8"):
        clean_text(before + byte + after)
