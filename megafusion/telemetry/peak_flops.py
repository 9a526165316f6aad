"""Peak FLOP/s of a device, the denominator of MFU."""

import torch

# Dense bf16 FLOP/s with tensor cores, from NVIDIA's data sheets; longer names first.
_BF16_PEAKS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "GH200": 989e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
}


def peak_flops(precision: str) -> float | None:
    """Peak FLOP/s of this device; None for a chip or a precision that the table does not contain."""
    if not torch.cuda.is_available() or precision == "fp32":
        return None
    name = torch.cuda.get_device_name()
    bf16 = next((peak for part, peak in _BF16_PEAKS.items() if part in name), None)
    return bf16 and bf16 * (2 if precision == "fp8" and "A100" not in name else 1)
