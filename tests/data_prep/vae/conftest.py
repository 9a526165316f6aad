import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """Restore the process's number of torch threads, which trainings set."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
