"""A training step: it learns, accumulates exactly, and follows the learning-rate schedule."""

from itertools import pairwise

import pytest
import torch

from megafusion.config import parse_config
from megafusion.data.loader import DataLoader
from megafusion.engine.config import OptimizerConfig
from megafusion.engine.ema import Ema
from megafusion.engine.engine import Engine
from megafusion.engine.optimizer import learning_rate, make_optimizer
from megafusion.engine.process_group import start_process_group
from megafusion.model.transfusion import Transfusion
from megafusion.parallel.mesh import make_mesh
from megafusion.train.build import build_components, build_engine
from megafusion.train.config import RunConfig
from megafusion.train.loop import train_step
from tests.support.weights import initialize


def make_run(config: RunConfig) -> tuple[Engine, DataLoader]:
    """The engine and the data loader of a run in one process."""
    start_process_group()
    mesh = make_mesh(config.parallel)
    return build_engine(config, mesh), build_components(config, mesh).loader


def plain_model(config: RunConfig) -> Transfusion:
    """The whole initial model of a run."""
    model = Transfusion(config.model, config.objective)
    initialize(model, config.model.num_layers, config.seed)
    return model


@pytest.mark.full
def test_overfits_one_batch_of_four_pairs(run_values):
    """Both losses fall below 5% of their first values."""
    run_values["data"] |= {
        "num_streams": 1,
        "sequence_length": 112,
        "caption_first": 1.0,
        "caption_dropout": 0.0,
    }
    del run_values["data"]["sources"]["text"]
    run_values["model"] |= {"hidden_size": 64, "ffn_hidden_size": 192}
    run_values["train"] |= {"global_batch_size": 1, "micro_batch_size": 1}
    run_values["optimizer"] = {"gradient_clip": 1.0, "weight_decay": 0.0}
    config = parse_config(RunConfig, run_values, "test")
    engine, loader = make_run(config)
    batch = loader.next()
    assert batch[0].num_images == 4
    first = last = train_step(engine, batch, 3e-3)
    for step in range(700):
        last = train_step(engine, batch, 5e-3 * (1 - step / 700))
    assert last.text < 0.05 * first.text
    assert last.image < 0.05 * first.image


def test_accumulation_equals_one_large_batch(run_values):
    """Both also equal a plain AdamW loop without DeepSpeed."""
    found = []
    for micro in (1, 2, 4):
        run_values["train"]["micro_batch_size"] = micro
        config = parse_config(RunConfig, run_values, "test")
        engine, loader = make_run(config)
        for _ in range(3):
            train_step(engine, loader.next(), 1e-3)
        found.append({n: p.detach().clone() for n, p in engine.stage.named_parameters()})
    loader = make_run(config)[1]
    model = plain_model(config)
    optimizer = make_optimizer(model, config.optimizer)
    for _ in range(3):
        (batch,) = loader.next()
        optimizer.zero_grad()
        model(batch).total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.gradient_clip)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3
        optimizer.step()
    found.append({n: p.detach().clone() for n, p in model.named_parameters()})
    for other in found[1:]:
        for name, value in found[0].items():
            torch.testing.assert_close(value, other[name], rtol=1e-4, atol=2e-5)


def test_learning_rate_warms_up_and_decays_as_a_cosine():
    config = OptimizerConfig(learning_rate=1.0, final_learning_rate=0.1, num_warmup_steps=10)
    rates = [learning_rate(step, 110, config) for step in range(111)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1.0
    assert rates[60] == pytest.approx(0.55)
    assert rates[110] == pytest.approx(0.1)
    assert all(a >= b for a, b in pairwise(rates[10:]))


def test_wsd_is_constant_until_its_last_steps_and_then_linear():
    config = OptimizerConfig(learning_rate=1.0, final_learning_rate=0.1, num_warmup_steps=10, schedule="wsd")
    rates = [learning_rate(step, 100, config) for step in range(101)]
    assert rates[4] == pytest.approx(0.5)
    assert set(rates[10:91]) == {1.0}
    assert rates[90:101] == pytest.approx([1 - 0.09 * step for step in range(11)])
    late = config.model_copy(update={"num_warmup_steps": 95})
    assert [learning_rate(step, 100, late) for step in (94, 95, 100)] == pytest.approx([1.0, 1.0, 0.1])


@pytest.mark.parametrize("schedule", ["constant", "wsd"])
def test_a_longer_run_has_the_same_rates_until_the_decay(schedule):
    config = OptimizerConfig(num_warmup_steps=10, schedule=schedule)
    before, longer = ([learning_rate(n, end, config) for n in range(end)] for end in (60, 100))
    assert before[:54] == longer[:54]
    assert set(longer[60:90]) == {config.learning_rate}


def test_weight_decay_applies_to_matrices_only(run_config):
    model = plain_model(run_config)
    decayed, others = make_optimizer(model, run_config.optimizer).param_groups
    assert decayed["weight_decay"] == 0.1
    assert others["weight_decay"] == 0
    assert all(p.ndim >= 2 for p in decayed["params"])
    assert all(p.ndim < 2 for p in others["params"])
    assert len(decayed["params"]) + len(others["params"]) == len(list(model.parameters()))


def test_average_follows_its_formula(run_config):
    engine, loader = make_run(run_config)
    shards = engine.optimizer_state.shards
    ema = Ema(shards, 0.5)
    expected = [shard.weight.clone() for shard in shards]
    for step in range(1, 9):
        train_step(engine, loader.next(), 1e-2, ema.after(step))
        decay = min(0.5, (1 + step) / (10 + step))
        expected = [
            decay * value + (1 - decay) * shard.weight for value, shard in zip(expected, shards, strict=True)
        ]
    for value, fragment, shard in zip(expected, ema.fragments, shards, strict=True):
        torch.testing.assert_close(fragment, value)
        assert not torch.equal(fragment, shard.weight)
