"""Random weights are sampled where they are kept, in as many threads as there are, with the bits of one."""

import deepspeed
import pytest
import torch

from megafusion.engine.process_group import start_process_group
from megafusion.errors import UserError
from megafusion.model.transfusion import Transfusion
from megafusion.parallel import parallelize
from megafusion.parallel.mesh import make_mesh
from megafusion.train.build import build_engine
from megafusion.train.checkpoint_policy import CheckpointPolicy
from megafusion.train.loop import train
from tests.support.hub import make_folder
from tests.support.runs import parsed, start
from tests.support.weights import initialize


@pytest.fixture
def sampled(monkeypatch) -> list[str]:
    """Names of the weights that were sampled."""
    names: list[str] = []
    sample = parallelize.initial_value

    def record(weight, *arguments):
        names.append(weight.name)
        return sample(weight, *arguments)

    monkeypatch.setattr(parallelize, "initial_value", record)
    return names


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_threads_sample_the_bits_of_one(run_values, three_threads):
    config = parsed(run_values)
    start_process_group()
    engine = build_engine(config, make_mesh(config.parallel))
    model = Transfusion(config.model, config.objective)
    initialize(model, config.model.num_layers, config.seed)
    for name, value in engine.stage.named_parameters():
        assert torch.equal(value, model.weights()[name]), name


def test_nothing_is_sampled_before_a_checkpoint(run_values, sampled):
    run = start(run_values, stop_after=1)
    names = {name for name, _ in Transfusion(*_sections(run_values)).named_parameters()}
    assert set(sampled) == names
    assert len(sampled) == len(names)
    sampled.clear()
    assert start(run_values, stop_after=2) == run
    assert sampled == []


def test_only_what_its_origin_lacks_is_sampled(run_values, tmp_path, sampled):
    run = start(run_values, stop_after=1)
    run_values["train"] |= {"init_from": str(run), "num_steps": 1}
    sampled.clear()
    start(run_values, out=str(tmp_path / "next"))
    assert sampled == []
    make_folder(tmp_path / "hub", "llama3")
    from tests.hub.test_init_from import from_hub

    start(from_hub(run_values, tmp_path / "hub"), out=str(tmp_path / "from-hub"))
    tokens = {"stem.embedding.weight", "tail.head.weight"}  # whose last rows are new
    assert tokens <= set(sampled)
    assert all(".adapter." in name for name in set(sampled) - tokens)


def test_a_checkpoint_that_vanishes_during_the_start_is_no_fresh_start(run_values, monkeypatch):
    start(run_values, stop_after=1)
    monkeypatch.setattr(CheckpointPolicy, "load_latest", lambda self: None)
    with pytest.raises(UserError, match="was removed while the run started"):
        train(parsed(run_values))


def test_no_operator_of_deepspeed_is_looked_for(monkeypatch):
    def refuse():
        raise AssertionError("DeepSpeed looks for operators that could be compiled")

    monkeypatch.setattr(deepspeed.ops, "_probe_compatible_ops", refuse)
    monkeypatch.delattr(deepspeed.ops, "__compatible_ops__", raising=False)
    monkeypatch.setattr(deepspeed.comm.comm, "cdb", None)
    start_process_group()
    assert deepspeed.comm.is_initialized()


def _sections(values: dict) -> tuple:
    config = parsed(values)
    return config.model, config.objective
