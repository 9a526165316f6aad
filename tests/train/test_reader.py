"""A checkpoint from a stranger may name what it likes: nothing of it runs."""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch

from megafusion.errors import UserError
from megafusion.storage import file_sha256
from megafusion.train.checkpoint import load_ema


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil-was-here",)


@pytest.mark.parametrize("content", [pickle.dumps(Evil()), b"", b"garbage", pickle.dumps(eval)])
def test_a_list_of_tensors_that_asks_for_more_is_refused(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    checkpoint = tmp_path / "step-00000001"
    (checkpoint / "tensors").mkdir(parents=True)
    metadata = checkpoint / "tensors/.metadata"
    metadata.write_bytes(content)
    written = {"bytes": len(content), "sha256": file_sha256(metadata)}
    (checkpoint / "manifest.json").write_text(json.dumps({"files": {"tensors/.metadata": written}}))
    with pytest.raises(UserError, match=r"\.metadata: not read"):
        load_ema(checkpoint, {"x": torch.Size([1])})
    assert not Path("evil-was-here").exists()
