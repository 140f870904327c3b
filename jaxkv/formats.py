"""How numbers are held: float precisions, and recipes of quantization."""

from __future__ import annotations

import dataclasses
import enum
import math


class Precision(enum.StrEnum):
    """How the tokens of a tier are held: three float formats and five quantized ones."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"
    Q8 = "q8"
    Q4 = "q4"
    Q4K = "q4k"
    Q3 = "q3"
    Q2 = "q2"

    @property
    def is_quantized(self) -> bool:
        return self not in _FLOAT_DTYPES

    @property
    def dtype_name(self) -> str:
        """The NumPy name of a float precision's dtype."""
        if self.is_quantized:
            raise ValueError(
                f"{self} is quantized and has no float dtype; test `is_quantized` first"
            )
        return _FLOAT_DTYPES[self]


LARGEST, LARGEST_FP16 = 2.0**100, 65504.0
"""The largest magnitudes that tiers hold, without and with one in fp16. The first leaves room in
float32 for sums over heads and tokens, and for products with queries of size 1."""

_FLOAT_DTYPES = {Precision.FP32: "float32", Precision.FP16: "float16", Precision.BF16: "bfloat16"}


@dataclasses.dataclass(frozen=True)
class QuantSpec:
    """How keys or values are quantized: `x ~ scale * code + zero_point`, codes of `bits` bits,
    16-bit scale and zero point with float32's range.

    Attributes:
      bits: 8, 4, 3 or 2; 1, 2 or 4 codes are packed into a byte, or 8 codes of 3 bits into 3
        bytes.
      group_size: elements that share a scale. `axis="token"`: consecutive elements of one token's
        head (a divisor of `head_dim`), or `num_kv_heads * head_dim` for one group per token over
        all heads, as in the original. `axis="channel"`: consecutive tokens of one channel (KIVI).
        None: the largest divisor of `head_dim` up to 64 (8 bits: 128, two-level: 32; the next one
        where there is none within a quarter of that), or 32 tokens.
      axis: "token" or "channel".
      symmetric: no zero point; codes are centred on zero.
      rotate: a Hadamard transform along the head dim before quantizing (QuaRot, llama.cpp). Queries
        and outputs are rotated once per step; stored tokens never are.
      align: an orthogonal reflection turns the mean of the row's first tokens into a constant
        vector, which the zero point absorbs. It takes the large common component out of keys (and
        any bias of the key projection) at no bits and no cost per token.
      two_level: scales and zero points are small integers (8 bits) under one 16-bit unit per token
        (k-quants; Q4K), so that groups of half the size cost the same.
      center: subtract a mean that the caller gives to `init` (a key bias known beforehand).
      balance: of keys: a factor per channel, learnt from the row's first tokens where its channels
        are uneven; the query takes it back.
      turned_mean: of keys: their mean before the rotary embedding, learnt from the row's first
        tokens where it pays, is taken out at each position, and its score given back. Needs
        `KvCacheConfig(rotary=...)`, and does nothing without.
    """

    bits: int
    group_size: int | None = None
    axis: str = "token"
    symmetric: bool = False
    rotate: bool = False
    align: bool = False
    center: bool = False
    two_level: bool = False
    balance: bool = False
    turned_mean: bool = False

    def __post_init__(self) -> None:
        if self.bits not in (2, 3, 4, 8):
            raise ValueError(f"bits={self.bits}: 2, 3, 4 or 8 are supported; choose one of them")
        if self.axis not in ("token", "channel"):
            raise ValueError(f"axis={self.axis!r}: must be 'token' or 'channel'")
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(
                f"group_size={self.group_size}: must be positive, or None for the default"
            )
        if self.two_level and (self.symmetric or self.axis == "channel"):
            raise ValueError(
                "two_level=True is for groups with a zero point per token: leave symmetric=False "
                "and axis='token'"
            )
        if self.align and (self.symmetric or self.axis == "channel"):
            raise ValueError(
                "align=True needs a zero point per token: leave symmetric=False and axis='token'"
            )

    @property
    def parts(self) -> int:
        """How many pieces of a head are read out of the same words (`codec.split`)."""
        return 4 if self.bits == 3 else 8 // self.bits

    def width(self, head_dim: int) -> int:
        """Elements of a piece; the last one's are filled up."""
        return 2 * -(-head_dim // 8) if self.bits == 3 else -(-head_dim // self.parts)

    def words(self, head_dim: int) -> int:
        """Bytes of a head's codes."""
        return self.width(head_dim) * self.parts * self.bits // 8

    @property
    def levels(self) -> int:
        """The largest code."""
        return 2**self.bits - 1


Format = Precision | QuantSpec  # a float Precision, or a QuantSpec with its group size resolved


def adapting(bits: int, group_size: int | None = None, two_level: bool = False) -> QuantSpec:
    """Codes in a basis that learns all it can."""
    return QuantSpec(
        bits,
        group_size,
        rotate=True,
        align=True,
        two_level=two_level,
        balance=True,
        turned_mean=True,
    )


def learns(fmt: Format) -> bool:
    """Whether a tier of this format learns a basis from a row's first tokens."""
    return isinstance(fmt, QuantSpec) and (fmt.align or fmt.balance or fmt.turned_mean)


def unaligned(fmt: Format) -> Format:
    """A format that learns nothing."""
    if not isinstance(fmt, QuantSpec):
        return fmt
    return dataclasses.replace(fmt, align=False, balance=False, turned_mean=False)


def of_values(fmt: Format) -> Format:
    """A format without what is only for keys."""
    if not isinstance(fmt, QuantSpec):
        return fmt
    return dataclasses.replace(fmt, balance=False, turned_mean=False)


def channel_group(fmt: Format) -> int:
    """Tokens that share a scale in `fmt`, and so must enter a tier together (1: each stands
    alone)."""
    if isinstance(fmt, QuantSpec) and fmt.axis == "channel":
        assert fmt.group_size is not None
        return fmt.group_size
    return 1


def plain(fmt: Format) -> Format:
    """The format of the codes alone, whatever basis they are in."""
    if not isinstance(fmt, QuantSpec):
        return fmt
    return QuantSpec(
        fmt.bits, fmt.group_size, fmt.axis, symmetric=fmt.symmetric, two_level=fmt.two_level
    )


def format_of(precision: Precision, spec: QuantSpec | None, dim: int) -> Format:
    """What a tier of this precision holds heads of `dim` elements in; `spec`, where given, replaces
    a quantized precision's own recipe. Group sizes are filled in."""
    if spec is None and precision.is_quantized:
        spec = _RECIPES[precision]
    if spec is None or spec.group_size is not None:
        return spec or precision
    largest = 32 if spec.two_level else 128 if spec.bits == 8 else 64
    size = 32 if spec.axis == "channel" else _group_size(dim, largest)
    return dataclasses.replace(spec, group_size=size)


_RECIPES = {
    Precision.Q8: QuantSpec(8, rotate=True, align=True, balance=True),
    Precision.Q4: adapting(4),
    Precision.Q4K: adapting(4, two_level=True),
    Precision.Q3: adapting(3),
    Precision.Q2: adapting(2),
}


def _group_size(head_dim: int, largest: int) -> int:
    """The largest divisor of `head_dim` up to `largest`; where that is less than a quarter of it
    (101 has but 1), the smallest one beyond."""
    small = [size for size in range(1, math.isqrt(head_dim) + 1) if head_dim % size == 0]
    divisors = {*small, *(head_dim // size for size in small)}
    up_to = max(size for size in divisors if size <= largest)
    beyond = min((size for size in divisors if size > largest), default=up_to)
    return beyond if 4 * up_to < largest else up_to
