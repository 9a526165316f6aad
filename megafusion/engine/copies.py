"""Micro-batches copied to a GPU beside its work, one ahead of the pass that reads it."""

from collections.abc import Iterable, Iterator

import torch

from megafusion.sequence.packing import PackedBatch


class CopyAhead:
    """Copies to a device on a stream of their own; on a CPU there is nothing to copy."""

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, batches: Iterable[PackedBatch]) -> Iterator[PackedBatch]:
        """The batches on the device. While one is used the next one is on its way. The host does not wait."""
        ahead: list[tuple[PackedBatch, torch.cuda.Event | None]] = []
        for batch in batches:
            ahead.append(self._send(batch))
            if len(ahead) > 1:
                yield self._receive(*ahead.pop(0))
        for sent in ahead:
            yield self._receive(*sent)

    def _send(self, batch: PackedBatch) -> tuple[PackedBatch, torch.cuda.Event | None]:
        if self._stream is None:
            return batch.to(self._device), None
        with torch.cuda.stream(self._stream):
            return batch.to(self._device), self._stream.record_event()

    def _receive(self, batch: PackedBatch, copied: torch.cuda.Event | None) -> PackedBatch:
        """The batch for the work that is launched next, which waits for the copy."""
        if copied is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(copied)
            for tensor in vars(batch).values():
                if tensor.is_cuda:
                    tensor.record_stream(stream)  # its memory is not used again before that work is done
        return batch
