"""Output of a run while it trains, on rank 0 alone."""

import pytest

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
