"""docs/configuration.md equals what the configuration classes say."""

from megafusion.commands.keys import REGENERATE, reference
from tests.support.small import ROOT


def test_the_page_is_up_to_date():
    assert (ROOT / "docs/configuration.md").read_text() == reference(), f"regenerate it: {REGENERATE}"
