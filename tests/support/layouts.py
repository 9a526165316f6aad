"""Random packed rows and the comparison with dense attention that the kernel tests share."""

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from interval_attention import interval_attention
from interval_attention.reference import reference_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def packed_row(rng: random.Random, length: int) -> tuple[list[int], list[int]]:
    """First key and row_end of each query of random documents, images of one patch and more, and padding."""
    start, end = [], []
    while len(start) < length:
        first = len(start)
        if rng.random() < 0.1:  # padding: positions that are fully masked, and that no query sees
            for position in range(first, first + rng.randint(1, 6)):
                start.append(position)
                end.append(position)
            continue
        for _ in range(rng.randint(1, 5)):
            here = len(start)
            size = rng.choice([1, 1, 2, 5, 9, 20])
            if rng.random() < 0.5:  # an image, possibly adjacent to another
                end += [here + size] * size
            else:
                end += range(here + 1, here + size + 1)
            start += [first] * size
    return start[:length], [min(e, length) for e in end[:length]]


def packed_rows(seed: int, num_rows: int, length: int) -> tuple[Tensor, Tensor]:
    """row_end and last_query int32 [num_rows, length] of random layouts."""
    rng = random.Random(seed)
    rows = [packed_row(rng, length) for _ in range(num_rows)]
    start, end = (torch.tensor(bound, dtype=torch.int32, device=DEVICE) for bound in zip(*rows, strict=True))
    return end, last_queries(start, length)


def row_with_holes(rng: random.Random, length: int) -> tuple[list[int], list[int]]:
    """row_end and last_query of a row of documents whose images stand twice: in their place, where all that
    follows sees them, and at the document's end, last image first, where each sees what is before the image
    and itself."""
    end, last = [], []
    while len(end) < length:
        first, images = len(end), []
        for _ in range(rng.randint(1, 5)):
            here, size = len(end), rng.choice([1, 1, 2, 5, 9, 20])
            if rng.random() < 0.5:
                images.append((here, size))
                end += [here + size] * size
            else:
                end += range(here + 1, here + size + 1)
        last += [len(end) + sum(n for at, n in images if at > key) for key in range(first, len(end))]
        for _, size in reversed(images):
            end += [len(end) + size] * size
            last += [len(end)] * size
    return tuple([min(bound, length) for bound in bounds[:length]] for bounds in (end, last))


def rows_with_holes(seed: int, num_rows: int, length: int) -> tuple[Tensor, Tensor]:
    """row_end and last_query int32 [num_rows, length] of random layouts."""
    rng = random.Random(seed)
    rows = [row_with_holes(rng, length) for _ in range(num_rows)]
    return tuple(torch.tensor(bound, dtype=torch.int32, device=DEVICE) for bound in zip(*rows, strict=True))


def attention_with_holes(q, k, v, row_end, last_query) -> tuple[Tensor, Tensor]:
    return interval_attention(q, k, v, row_end, last_query, has_holes=True, return_lse=True)


def last_queries(row_start: Tensor, num_keys: int) -> Tensor:
    """last_query int32 [B, T] of rows that see no key before row_start [B, S], which does not decrease."""
    key = torch.arange(num_keys, dtype=torch.int32, device=DEVICE).repeat(len(row_start), 1)
    return torch.searchsorted(row_start.contiguous(), key, right=True, out_int32=True)


@dataclass
class Case:
    """Inputs of one call, and the gradients of its output and log-sum-exp."""

    q: Tensor
    k: Tensor
    v: Tensor
    row_end: Tensor
    last_query: Tensor
    weight: Tensor
    lse_weight: Tensor

    @classmethod
    def random(
        cls,
        row_end: Tensor,
        last_query: Tensor,
        num_heads: int = 2,
        num_kv_heads: int = 1,
        head_dim: int = 16,
        seed: int = 0,
    ) -> "Case":
        """Normal values."""
        generator = torch.Generator().manual_seed(seed)
        (num_batch, num_rows), num_keys = row_end.shape, last_query.shape[1]

        def normal(*shape):
            return torch.randn(shape, generator=generator).to(DEVICE)

        return cls(
            normal(num_batch, num_rows, num_heads, head_dim),
            normal(num_batch, num_keys, num_kv_heads, head_dim),
            normal(num_batch, num_keys, num_kv_heads, head_dim),
            row_end,
            last_query,
            normal(num_batch, num_rows, num_heads, head_dim),
            normal(num_batch, num_heads, num_rows),
        )

    def results(self, attention, dtype: torch.dtype, backward: bool = True) -> dict[str, Tensor]:
        """Output, log-sum-exp and gradients of attention(q, k, v, row_end, last_query)."""
        q, k, v = (x.detach().to(dtype).requires_grad_(backward) for x in (self.q, self.k, self.v))
        o, lse = attention(q, k, v, self.row_end, self.last_query)
        found = {"o": o.detach(), "lse": lse.detach()}
        if backward:
            finite = torch.where(lse.isfinite(), lse, 0)
            ((o * self.weight.to(dtype)).sum() + (finite * self.lse_weight).sum()).backward()
            found |= {"dq": q.grad, "dk": k.grad, "dv": v.grad}
        return found

    def check(
        self,
        attention=lambda *inputs: interval_attention(*inputs, return_lse=True),
        dtype: torch.dtype = torch.float32,
        forward_error: float = 1e-5,
        gradient_error: float = 1e-4,
        backward: bool = True,
    ) -> None:
        """Compare the kernels with dense attention in float64 on the same values."""
        found = self.results(attention, dtype, backward)
        rounded = Case(*(x.to(dtype) for x in (self.q, self.k, self.v)), *list(vars(self).values())[3:])
        expected = rounded.results(reference_attention, torch.float64, backward)
        for name, value in expected.items():
            error = forward_error if name in ("o", "lse") else gradient_error
            torch.testing.assert_close(
                found[name].double(), value.double(), atol=error, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
            )
