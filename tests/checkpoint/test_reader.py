"""An untrusted checkpoint may name any code; none of it runs."""

import io
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, BytesStorageMetadata

from megafusion.checkpoint.folder import FORMAT
from megafusion.checkpoint.tensor_list import _Unpickler, read_tensor_list
from megafusion.errors import UserError
from megafusion.storage import file_sha256
from tests.support.checkpoints import load_full_tensors


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil-was-here",)


class Attribute:
    """Reads an attribute when it is unpickled."""

    def __init__(self, owner, name):
        self.arguments = owner, name

    def __reduce__(self):
        return getattr, self.arguments


def test_enumeration_members_pickled_by_older_pythons_are_read():
    for member in _MEM_FORMAT_ENCODING:
        content = pickle.dumps(Attribute(_MEM_FORMAT_ENCODING, member.name))
        assert _Unpickler(io.BytesIO(content), with_torch=True).load() is member


# A name of torch, in another module.
ELSEWHERE = b"cantigravity\nfloat32\n."


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps(Evil()),
        b"",
        b"garbage",
        pickle.dumps(eval),
        pickle.dumps(Attribute(_MEM_FORMAT_ENCODING, "__subclasses__")),
        pickle.dumps(Attribute(torch.Size, "mro")),
        ELSEWHERE,
        pickle.dumps(BytesStorageMetadata()),  # which torch would unpickle with no limit
    ],
)
def test_metadata_that_names_other_code_is_refused(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    checkpoint = tmp_path / "step-00000001"
    (checkpoint / "tensors").mkdir(parents=True)
    metadata = checkpoint / "tensors/.metadata"
    metadata.write_bytes(content)
    written = {"bytes": len(content), "sha256": file_sha256(metadata)}
    manifest = {"format": FORMAT, "files": {"tensors/.metadata": written}}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest, indent=1))
    with pytest.raises(UserError, match=r"\.metadata: damaged"):
        read_tensor_list(checkpoint)
    with pytest.raises(UserError, match=r"\.metadata: damaged"):
        load_full_tensors(checkpoint, {"x": torch.Size([1])}, "ema")
    assert not Path("evil-was-here").exists()
