"""What a run tells, and which rank tells it."""

import pytest

from megafusion.telemetry.metrics import Metrics


@pytest.mark.parametrize("silent", [False, True])
def test_one_rank_says_where_a_run_goes_on(run_config, capfd, silent):
    run_config.out.mkdir()
    with Metrics(run_config, 2, silent=silent):
        pass
    said = " ".join(capfd.readouterr().err.split())
    assert said.count("goes on after step 2") == (not silent)
