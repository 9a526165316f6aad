"""Errors keep what they say, their kind and what they hold on the way to another process."""

import pickle

import pytest

from data_prep.readers.records import BadRecord
from megafusion.checkpoint.folder import DamagedCheckpoint
from megafusion.checkpoint.manager import SaveFailed
from megafusion.data.cache import CacheFull
from megafusion.data.document_format import BadDocument
from megafusion.errors import ExitStatus, UserError
from megafusion.images.reader import BadImage, TooManyPixels

ERRORS = [
    UserError("a message", on_every_rank=True, exit_status=ExitStatus.RETRY),
    BadDocument("shard-000000.tar, document 3", "members missing"),
    BadImage("not an image"),
    BadRecord("a line is too long", "line 7", num_lost=0),
    CacheFull("full"),
    DamagedCheckpoint("damaged"),
    SaveFailed("not saved"),
    TooManyPixels("too large"),
]


def kinds(base: type[UserError]) -> set[type[UserError]]:
    return {base}.union(*map(kinds, base.__subclasses__()))


def test_every_kind_is_here():
    ours = {kind for kind in kinds(UserError) if kind.__module__.startswith(("megafusion", "data_prep"))}
    assert ours == set(map(type, ERRORS))


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_error_reaches_another_process_as_it_is(error):
    found = pickle.loads(pickle.dumps(error))
    assert type(found) is type(error)
    assert (str(found), vars(found)) == (str(error), vars(error))
