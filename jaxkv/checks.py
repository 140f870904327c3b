"""Bad input, refused at trace time: each ValueError says what was given, what was wanted and what
to do."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike


def is_concrete(*arrays: Any) -> bool:
    """Whether values can be looked at, that is, nothing is traced."""
    return not any(isinstance(array, jax.core.Tracer) for array in arrays)


def check_layer(layer: Any, num_layers: int | None) -> None:
    """`layer` must be given where the state has layers, and only there."""
    if layer is None and num_layers is not None:
        raise ValueError(
            f"layer=None, but the state has {num_layers} layers: pass layer=0 .. "
            f"{num_layers - 1}, an int or traced"
        )
    if layer is not None and num_layers is None:
        raise ValueError(
            "layer given, but the state has no layer axis: leave it out, or pass num_layers to init"
        )
    if isinstance(layer, int) and num_layers is not None and not 0 <= layer < num_layers:
        raise ValueError(f"layer={layer}: the state has layers 0 .. {num_layers - 1}")


def as_floats(name: str, array: Any, shape: str, wanted: tuple[int | None, ...]) -> jax.Array:
    """A JAX or NumPy array that must be floating and have the wanted shape; None leaves an axis
    free, `shape` names the axes."""
    given = tuple(getattr(array, "shape", ()))
    if not hasattr(array, "dtype"):
        raise ValueError(f"{name} is a {type(array).__name__}: pass a JAX or NumPy array {shape}")
    if len(given) != len(wanted) or any(
        w is not None and g != w for g, w in zip(given, wanted, strict=True)
    ):
        sizes = ", ".join("*" if w is None else str(w) for w in wanted)
        raise ValueError(
            f"{name}.shape={given}: must be {shape} = [{sizes}]; reshape it, or make the cache "
            "with these sizes"
        )
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(f"{name}.dtype={array.dtype}: must be a float; cast it first")
    return jnp.asarray(array)


def check_new_tokens(
    keys: Any, values: Any, batch: int, heads: int, head_dim: int, size: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """New keys and values, which must be [B, T, K, H] alike, with T at least 1 (and `size`, where
    given)."""
    keys = as_floats("keys", keys, "[B, T, K, H]", (batch, size, heads, head_dim))
    if keys.shape[1] == 0:
        raise ValueError(
            f"keys.shape={keys.shape}: T must be at least 1; append nothing by passing lengths=0"
        )
    return keys, as_floats(
        "values", values, "[B, T, K, H]", (batch, keys.shape[1], heads, head_dim)
    )


def check_query(query: Any, batch: int, heads: int, head_dim: int) -> jax.Array:
    """A query, which must be [B, T, N, H] with N a multiple of K."""
    query = as_floats("query", query, "[B, T, N, H]", (batch, None, None, head_dim))
    if query.shape[2] == 0 or query.shape[2] % heads:
        raise ValueError(
            f"query has {query.shape[2]} heads: must be a multiple of num_kv_heads={heads}"
        )
    return query


def as_counts(name: str, counts: ArrayLike | None, batch: int, most: int | None) -> jax.Array:
    """Counts per row [B] int32 from a scalar, an array [B], or None for `most` everywhere.

    Raises ValueError for other shapes and dtypes and, where concrete, for values below 0 or above
    `most`.
    """
    if counts is None:
        if most is None:
            raise ValueError(f"{name}=None: pass an int, or ints [{batch}], one per row")
        return jnp.full((batch,), most, jnp.int32)
    given = counts if isinstance(counts, jax.Array) else np.asarray(counts)
    if given.shape not in ((), (batch,)) or not jnp.issubdtype(given.dtype, jnp.integer):
        raise ValueError(
            f"{name} has shape {given.shape} and dtype {given.dtype}: must be an int or ints "
            f"[{batch}], one per row"
        )
    if is_concrete(given):
        values = np.asarray(given)
        if (values < 0).any() or (most is not None and (values > most).any()):
            raise ValueError(
                f"{name}={values.tolist()}: must lie in 0 .. {'' if most is None else most}"
            )
    return jnp.broadcast_to(jnp.asarray(given, jnp.int32), (batch,))


def in_range(lengths: jax.Array, size: int) -> jax.Array:
    """Lengths [B], 0 for rows whose length is none of 0 .. size, as only compiled code can meet."""
    return jnp.where((lengths < 0) | (lengths > size), 0, lengths)
