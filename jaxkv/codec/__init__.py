"""How numbers are written down: quantized groups, packed words, rotations, exact arithmetic."""

from jaxkv.codec.pack import pack, planes, split, unpack
from jaxkv.codec.quantize import Quantized, dequantize, quantize
from jaxkv.codec.scales import (
    SCALE_DTYPE,
    ZERO_DTYPE,
    full_zero_point,
    widened,
    widened_scale,
)

__all__ = [
    "SCALE_DTYPE",
    "ZERO_DTYPE",
    "Quantized",
    "dequantize",
    "full_zero_point",
    "pack",
    "planes",
    "quantize",
    "split",
    "unpack",
    "widened",
    "widened_scale",
]
