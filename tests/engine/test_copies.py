"""Tensors of a batch in one storage arrive as they were, bit for bit, in one copy."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megafusion.engine.copies import CopyAhead
from megafusion.sequence.packing import in_one_storage, send_storages

TYPES = (torch.int64, torch.int32, torch.uint8, torch.bool, torch.float32, torch.bfloat16)


@st.composite
def tensors(draw) -> dict[str, Tensor]:
    """Of any type and of 0 to 3 dimensions, some transposed, some empty."""
    found = {}
    for number in range(draw(st.integers(1, 8))):
        shape, dtype = draw(st.lists(st.integers(0, 5), max_size=3)), draw(st.sampled_from(TYPES))
        value = torch.randint(0, 2 if dtype == torch.bool else 256, shape).to(dtype)
        found[str(number)] = value.mT if value.ndim > 1 and draw(st.booleans()) else value
    return found


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


@given(tensors(), tensors())
def test_they_arrive_bit_for_bit(shared, others):
    sent_pieces = []

    def send(piece: Tensor) -> Tensor:
        sent_pieces.append(piece)
        return piece.clone()

    others = {f"other {name}": tensor for name, tensor in others.items()}
    packed = in_one_storage(shared)
    arrived = send_storages(packed | others, send)
    for name, tensor in (shared | others).items():
        assert (arrived[name].dtype, arrived[name].shape) == (tensor.dtype, tensor.shape)
        assert bits(arrived[name]) == bits(tensor)
    num_bytes = sum(tensor.nbytes for tensor in shared.values())
    assert len(sent_pieces) <= len(others) + (1 if num_bytes else len(shared))
    if len(shared) > 1 and num_bytes:
        owned = {tensor.untyped_storage().data_ptr() for name, tensor in arrived.items() if name in shared}
        assert len(owned) == 1


def test_a_batch_is_sent_in_order_and_one_ahead():
    class Batch:
        def __init__(self, number: int):
            self.number = number

        def to(self, device: torch.device) -> "Batch":
            sent.append(self.number)
            return self

    sent: list[int] = []
    received = []
    for batch in CopyAhead(torch.device("cpu"))(Batch(number) for number in range(4)):
        received.append((batch.number, len(sent)))
    assert received == [(0, 2), (1, 3), (2, 4), (3, 4)]
