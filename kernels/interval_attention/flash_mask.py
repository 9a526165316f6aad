"""The intervals as a mask function of flash-attention 4. Imports CuTe, which is rarely installed."""

import cutlass
import cutlass.cute as cute
from flash_attn.cute.utils import scalar_to_ssa


@cute.jit
def sees(batch, head, query, key, seqlen_info, aux_tensors):
    """Whether a query sees a key: aux_tensors are row_end and last_query, int32 [B, padded S or T]."""
    row_end, last_query = aux_tensors
    end = scalar_to_ssa(row_end[batch[0], query[0]], cutlass.Int32)
    last = scalar_to_ssa(last_query[batch[0], key[0]], cutlass.Int32)
    return (key < end) & (query < last)
