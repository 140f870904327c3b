"""What enters a cache is finite and within the range of every float format on its way, and a bit
per row and head says where it had to be changed for that.

It is done once, where tokens enter, so that all tiers hold the same token. Nothing held can then
turn a sum into NaN, neither a token that a query may not see nor one that shares its scale.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxkv.checks import undifferentiable
from jaxkv.formats import LARGEST
from jaxkv.status import Status, joined


def finite(x: jax.Array, largest: float = LARGEST) -> jax.Array:
    """Float32 within +-`largest`; 0 for NaN, and for what is less than a normal number (XLA:CPU
    takes it for 0 in some operations and not in others)."""
    x = undifferentiable(x.astype(jnp.float32))
    least = float(jnp.finfo(jnp.float32).tiny)
    return jnp.where(jnp.abs(x) >= least, jnp.clip(x, -largest, largest), 0.0)


def changes(x: jax.Array, largest: float, count: jax.Array) -> jax.Array:
    """Status bits [B, K] int32 of what `finite` changes in the first `count` [B] of tokens [B, T,
    K, H]."""
    size = lax.bitcast_convert_type(jnp.abs(x.astype(jnp.float32)), jnp.int32)  # ordered as floats
    bits = jnp.where(
        size > _bits(np.inf) - 1,
        jnp.int32(Status.NOT_FINITE),
        jnp.where(size > _bits(largest), jnp.int32(Status.SATURATED), jnp.int32(0)),
    )
    valid = jnp.arange(x.shape[1], dtype=jnp.int32)[None] < count[:, None]
    bits = jnp.where(valid[:, :, None, None], bits, jnp.int32(0))
    return joined(bits, (1, 3))


def _bits(x: float) -> int:
    return int(np.float32(x).view(np.int32))
