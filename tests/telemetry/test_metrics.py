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
    throughput._block_flops.cache_clear()  # another test may have counted this model
    throughput._image_flops.cache_clear()
    monkeypatch.setattr(throughput, "peak_flops", lambda precision: 1e12)
    counted, count = [], throughput.layer_flops
    monkeypatch.setattr(throughput, "layer_flops", lambda *given: counted.append(given) or count(*given))
    config = run_config
    shape, rows = config.sequence_shape, config.train.global_batch_size
    work = throughput.Work(100, 1000, (3,))
    lines = [
        throughput.throughput(seconds, config.train, config.model, shape, work) for seconds in (1.0, 2.0, 4.0)
    ]
    assert len(counted) == 2, "the blocks and the adapter"
    everything = throughput.Work(rows * shape.length, rows * shape.length**2, (rows * shape.num_images,))
    dense = throughput.step_flops(rows, config.model, shape, everything)
    assert dense == 3 * rows * sum(count(config.model, shape))
    pairs = everything.visible_pairs - 1000
    flops = dense - 12 * config.model.num_layers * config.model.hidden_size * pairs
    flops -= 6 * config.model.vocab_size * config.model.hidden_size * (everything.text_targets - 100)
    image = throughput._image_flops(config.model, shape)[0]
    flops -= 3 * image * (rows * shape.num_images - 3)
    assert [line["mfu"] for line in lines] == pytest.approx([flops / seconds / 1e12 for seconds in (1, 2, 4)])
