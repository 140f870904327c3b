"""Where XLA:CPU is held back from fusing, or led to code that vectorizes. Elsewhere these are the
plain operations."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def computed_once(never: jax.Array, tree: Any) -> Any:
    """Arrays as they are, each element computed once.

    XLA:CPU fuses what looks cheap into every use, and no barrier stops it: scores were computed
    twice, and converted an f16 scale for every row (17 ms instead of 7 at 16k tokens). It does not
    look into the branches of a conditional on something that it cannot foresee.
    """
    return lax.platform_dependent(
        tree,
        cpu=lambda tree: lax.cond(
            never, lambda t: jax.tree.map(jnp.negative, t), lambda t: t, tree
        ),
        default=lambda tree: tree,
    )


def laid_out(never: jax.Array, flat: list[jax.Array], width: int) -> list[jax.Array]:
    """What was computed of a block's data [B, K, S * W], as [B, K, S, W]. Computed flat: a loop
    over short rows does not vectorize."""
    done = computed_once(never, flat)
    return [x.reshape(*x.shape[:2], -1, width) for x in done]


def leading(x: jax.Array) -> jax.Array:
    """The first 8 significant bits of a float32: what a bfloat16 holds."""

    def masked(x: jax.Array) -> jax.Array:
        return lax.bitcast_convert_type(
            lax.bitcast_convert_type(x, jnp.int32) & -(2**16), jnp.float32
        )

    # Of the two XLA:CPU splits the second between its threads; other platforms may lack the first.
    return lax.platform_dependent(x, cpu=lambda x: lax.reduce_precision(x, 8, 7), default=masked)
