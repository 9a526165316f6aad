"""The intervals as a mask function of flash-attention 4. Imports CuTe, which is rarely installed."""

import cutlass
import cutlass.cute as cute
from flash_attn.cute.utils import scalar_to_ssa


@cute.jit
def sees(batch, head, query, key, seqlen_info, aux_tensors):
    """Whether a query sees a key: aux_tensors are row_start and row_end, int32 [B, padded S]."""
    row_start, row_end = aux_tensors
    start = scalar_to_ssa(row_start[batch[0], query[0]], cutlass.Int32)
    end = scalar_to_ssa(row_end[batch[0], query[0]], cutlass.Int32)
    return (key >= start) & (key < end)
