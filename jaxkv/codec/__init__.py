"""How numbers are written down: quantized groups, packed words, rotations, exact arithmetic."""

from jaxkv.codec.pack import pack, split, unpack
from jaxkv.codec.quantize import (
    SCALE_DTYPE,
    Quantized,
    dequantize,
    full_zero_point,
    quantize,
    widened,
)

__all__ = [
    "SCALE_DTYPE",
    "Quantized",
    "dequantize",
    "full_zero_point",
    "pack",
    "quantize",
    "split",
    "unpack",
    "widened",
]
