"""How a block of each format is multiplied: scores from keys, weighted sums from values, without a
dequantized copy.

Each format is a class of pure functions with the same five methods. Keys: `query` prepares queries
once per step, `scores` uses them on a block. Values: `zeros` starts a sum, `weigh` gives a block's
share, `finish` turns the sum into outputs. Shapes: B rows, K kv heads, R queries of a head, S slots
of the block, H head dim, W words of a head, g group size.
"""

from __future__ import annotations

from typing import Any, Protocol

import jax

from jaxkv import platform
from jaxkv.formats import Format, Precision
from jaxkv.kernels.codes import ChannelGroups, TokenGroups
from jaxkv.kernels.floats import Floats, Terms
from jaxkv.tiers.tokens import Tokens


class Reader(Protocol):
    def query(self, query: jax.Array) -> Any: ...
    def scores(self, operand: Any, block: Tokens) -> jax.Array: ...
    def zeros(self, shape: tuple[int, ...]) -> Any: ...
    def weigh(self, weights: jax.Array, block: Tokens, valid: jax.Array) -> Any: ...
    def finish(self, total: Any) -> tuple[jax.Array, jax.Array]: ...


def reader(fmt: Format, head_dim: int, never: jax.Array) -> Reader:
    """The reader of a format; `never` is a traced False (see `computed_once`)."""
    if isinstance(fmt, Precision):
        in_terms = fmt is Precision.BF16 and platform.multiplies_bfloat16()
        return (Terms if in_terms else Floats)(never, head_dim)
    return (
        ChannelGroups(never, head_dim, fmt)
        if fmt.axis == "channel"
        else TokenGroups(never, head_dim, fmt)
    )
