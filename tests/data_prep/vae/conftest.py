import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """Trainings set torch's threads for the whole process; put them back."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
