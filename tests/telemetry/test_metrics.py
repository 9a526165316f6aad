"""Output of a run while it trains, on rank 0 alone."""

import pytest

from megafusion.engine.process_group import start_process_group
from megafusion.telemetry import throughput
from megafusion.telemetry.metrics import Metrics


@pytest.mark.parametrize("silent", [False, True])
def test_only_rank_0_prints(run_config, capfd, silent):
    run_config.out.mkdir()
    config = run_config
    metrics = Metrics(config.telemetry, config.out, 6, stops_on_write_error=True, silent=silent)
    with metrics.open(2):
        metrics.say("resumes after step 2")
    output = " ".join(capfd.readouterr().err.split())
    assert output.count("resumes after step 2") == (not silent)


def test_the_flops_of_a_model_are_counted_once(run_config, monkeypatch):
    """On a chip whose peak is known; counting runs a model."""
    start_process_group()
    monkeypatch.setattr(throughput, "peak_flops", lambda precision: 1e12)
    counted, count = [], throughput.layer_flops
    monkeypatch.setattr(throughput, "layer_flops", lambda *given: counted.append(given) or count(*given))
    config = run_config
    lines = [
        throughput.throughput(seconds, config.train, config.model, config.sequence_shape)
        for seconds in (1.0, 2.0, 4.0)
    ]
    assert len(counted) == 1
    flops = 3 * config.train.global_batch_size * sum(count(config.model, config.sequence_shape))
    assert [line["mfu"] for line in lines] == pytest.approx([flops / seconds / 1e12 for seconds in (1, 2, 4)])
