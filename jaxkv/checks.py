"""Bad input, refused at trace time: each ValueError says what was given, what was wanted and what
to do."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

MOST_INT = int(np.iinfo(np.int32).max)


def is_concrete(*arrays: Any) -> bool:
    """Whether values can be looked at, that is, nothing is traced."""
    return not any(isinstance(array, jax.core.Tracer) for array in arrays)


@jax.custom_jvp
def undifferentiable(x: jax.Array) -> jax.Array:
    """`x`, of which no derivative can be taken: those of codes and digits would be wrong."""
    return x


@undifferentiable.defjvp
def _refuse(primals: Any, tangents: Any) -> Any:
    raise ValueError(
        "a derivative was asked through a jaxkv cache, which decodes and has none: put "
        "jax.lax.stop_gradient around its keys, values and queries, or attend to the raw tokens "
        "with jax.nn.dot_product_attention"
    )


def as_int(name: str, value: Any, least: int) -> int:
    """A Python or NumPy integer of at least `least`, as an int; no more than int32 counts."""
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}={value!r}: must be an int of at least {least}")
    if value > MOST_INT:
        raise ValueError(f"{name}={value!r}: must be at most {MOST_INT}, as int32 counts")
    return int(value)


def as_layer(layer: Any, num_layers: int | None) -> tuple[Any, jax.Array | bool]:
    """A layer that can be indexed with, and whether it is one that the state has.

    Only a traced layer may be none of them. It comes back as the nearest one, for the caller to do
    nothing with.

    Raises:
      ValueError: a layer where the state has no layers, or none where it has; no integer; out of
        range, where concrete.
    """
    if layer is None and num_layers is not None:
        raise ValueError(
            f"layer=None, but the state has {num_layers} layers: pass layer=0 .. "
            f"{num_layers - 1}, an int or traced"
        )
    if layer is not None and num_layers is None:
        raise ValueError(
            "layer given, but the state has no layer axis: leave it out, or pass num_layers to init"
        )
    if num_layers is None:
        return None, True
    given = layer if isinstance(layer, jax.Array) else np.asarray(layer)
    if given.ndim or not jnp.issubdtype(given.dtype, jnp.integer):
        raise ValueError(f"layer={layer!r}: must be an int, or an integer scalar, traced or not")
    if not is_concrete(given):
        exists = (layer >= 0) & (layer < num_layers)
        return jnp.clip(layer, 0, num_layers - 1).astype(jnp.int32), exists
    if not 0 <= int(layer) < num_layers:
        raise ValueError(f"layer={layer}: the state has layers 0 .. {num_layers - 1}")
    return layer if isinstance(layer, jax.Array) else int(layer), True


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
    keys: Any,
    values: Any,
    batch: int,
    heads: int,
    dims: tuple[int, ...],
    size: int | None = None,
) -> tuple[jax.Array, ...]:
    """New keys [B, T, K, H] and values [B, T, K, V], with T at least 1 (and `size`, where given).
    `dims` is H and V; H alone where values are a part of the keys, and none may be given."""
    keys = as_floats("keys", keys, "[B, T, K, H]", (batch, size, heads, dims[0]))
    if keys.shape[1] == 0:
        raise ValueError(
            f"keys.shape={keys.shape}: T must be at least 1; append nothing by passing lengths=0"
        )
    if len(dims) == 1:
        if values is not None:
            raise ValueError("values_from_keys: values are a part of the keys; pass values=None")
        return (keys,)
    wanted = (batch, keys.shape[1], heads, dims[1])
    return keys, as_floats("values", values, "[B, T, K, V]", wanted)


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
            wanted = "be at least 0" if most is None else f"lie in 0 .. {most}"
            raise ValueError(f"{name}={values.tolist()}: must {wanted}")
    return jnp.broadcast_to(jnp.asarray(given, jnp.int32), (batch,))


def check_either(lengths: Any, valid: Any) -> None:
    """`lengths` and `valid` say the same thing, so only one of them may be given."""
    if lengths is not None and valid is not None:
        raise ValueError(
            "lengths and valid are both given: valid says which tokens count, and so how many"
        )


def in_range(lengths: jax.Array, size: int, exists: jax.Array | bool = True) -> jax.Array:
    """Lengths [B], 0 for rows whose length is none of 0 .. size, as only compiled code can meet;
    and for all rows of a layer that does not exist."""
    refused = (lengths < 0) | (lengths > size)
    return jnp.where(refused if exists is True else refused | ~jnp.asarray(exists), 0, lengths)


def check_rows(rows: Any, batch_size: int) -> None:
    """Refuses row numbers, where concrete, that are none of 0 .. batch_size - 1."""
    if is_concrete(rows) and ((np.asarray(rows) < 0) | (np.asarray(rows) >= batch_size)).any():
        raise ValueError(
            f"rows={np.asarray(rows).tolist()}: the state has rows 0 .. {batch_size - 1}"
        )


def as_enum(kind: type[Any], name: str, value: Any) -> Any:
    """A member of an enum, given as one or by its value."""
    try:
        return kind(value)
    except ValueError:
        raise ValueError(
            f"{name}={value!r}: must be one of {[member.value for member in kind]}"
        ) from None
