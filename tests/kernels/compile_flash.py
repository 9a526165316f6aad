"""Compile flash-attention 4 with our mask and lists without a GPU; prints shapes as JSON.

FLASH_ATTENTION_ARCH=sm_90 CUTE_DSL_ARCH=sm_90a FLASH_ATTENTION_NUM_SMS=132 TRITON_INTERPRET=1 \
    python tests/kernels/compile_flash.py HEAD_DIM
"""

import json
import sys

import torch
from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd, flash_attn_func
from torch._subclasses import FakeTensorMode

from interval_attention.blocks import BlockLists
from interval_attention.flash import FlashPrepared, flash_4_arguments, flash_prepare


def main(head_dim: int) -> None:
    end = torch.arange(1, 301, dtype=torch.int32).repeat(2, 1)
    real = flash_prepare(end, None, 300, "flash-attn-4")
    with FakeTensorMode():

        def on_gpu(value):
            """Fake CUDA tensors with the shapes of real ones."""
            if isinstance(value, BlockLists):
                return BlockLists(*map(on_gpu, value))
            return (
                torch.empty(value.shape, dtype=value.dtype, device="cuda")
                if torch.is_tensor(value)
                else value
            )

        arguments = flash_4_arguments(FlashPrepared(*map(on_gpu, real)))
        q, k, v = (
            torch.empty(2, 300, heads, head_dim, dtype=torch.bfloat16, device="cuda") for heads in (4, 2, 2)
        )
        by_keys = arguments.pop("block_sparse_tensors_bwd")
        o, lse, *_ = _flash_attn_fwd(q, k, v, return_lse=True, **arguments)
        arguments["block_sparse_tensors"] = by_keys
        _, dk, _ = _flash_attn_bwd(q, k, v, o, o, lse, **arguments)
        # The public call checks and compiles the same; PyTorch without CUDA has no autograd for fake tensors.
        public = flash_attn_func(q, k, v, **arguments | {"block_sparse_tensors_bwd": by_keys})[0]
        assert public.shape == o.shape
    print(json.dumps({"forward": list(o.shape), "dk": list(dk.shape)}))


if __name__ == "__main__":
    main(int(sys.argv[1]))
