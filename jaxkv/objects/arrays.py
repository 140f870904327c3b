"""Flat or shaped, NumPy or JAX: what callers pass in, brought to what the pure functions take, and
back.

A compiled function exists for few sizes only: 1, and the powers of two up to `PIECE`. Other numbers
of tokens are filled up with zeros to the next of them and come with their true length; more than
`PIECE` tokens come in several pieces of that size.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from jaxkv.objects.errors import KvCacheError

PIECE = 1024
"""Tokens appended at once."""


@dataclasses.dataclass(frozen=True)
class Form:
    """How a caller writes tokens [T, K, H]: JAX or NumPy, flat (as in the original) or shaped."""

    is_jax: bool = False
    is_flat: bool = True

    def write(self, tokens: NDArray[np.float32]) -> Any:
        """Tokens [T, K, H], of which no one else has a view, in this form."""
        formed = tokens.reshape(-1) if self.is_flat else tokens
        return jax.device_put(formed) if self.is_jax else formed


def check_pair(
    keys: Any, values: Any, heads: int, dims: tuple[int, ...]
) -> tuple[Any, Any, int, Form]:
    """New keys and values, flat or [T, K, H] and [T, K, V] -> the same as arrays, T, their form.
    `dims` is H and V; H alone where values are a part of the keys, and None.

    Raises:
      KvCacheError: keys and values differ in length, are not whole tokens, or not floats.
    """
    keys = _as_array("keys", keys)
    if len(dims) == 1 and values is not None:
        raise KvCacheError("values_from_keys: values are a part of the keys; pass values=None")
    if len(dims) > 1:
        values = _as_array("values", values)
        if dims[0] == dims[1] and keys.shape != values.shape:
            raise KvCacheError(f"Key and value lengths must match: {keys.shape=}, {values.shape=}")
    size = _token_count("keys", keys, heads, dims[0])
    if len(dims) > 1 and _token_count("values", values, heads, dims[1]) != size:
        raise KvCacheError(f"Key and value lengths must match: {keys.shape=}, {values.shape=}")
    return keys, values, size, Form(isinstance(keys, jax.Array), keys.ndim == 1)


def check_query(query: Any, heads: int, head_dim: int) -> Any:
    """A query, flat or [N, H] of one token or [T, N, H] -> the same as an array.

    Raises:
      KvCacheError: not whole heads, or no multiple of the kv heads.
    """
    query = _as_array("query", query)
    rows = (
        query.size // head_dim
        if query.ndim == 1
        else query.shape[-2]
        if query.ndim in (2, 3)
        else 0
    )
    whole = query.size % head_dim == 0 if query.ndim == 1 else query.shape[-1:] == (head_dim,)
    if not whole or not query.size or rows % heads:
        raise KvCacheError(
            f"{query.shape=}: must be [N * H], [N, H] or [T, N, H] with H = head_dim = {head_dim} "
            f"and N a multiple of num_kv_heads = {heads}"
        )
    return query


def _as_array(name: str, given: Any) -> Any:
    array = given if isinstance(given, (jax.Array, np.ndarray)) else np.asarray(given)
    if isinstance(array, jax.core.Tracer):
        raise KvCacheError(
            f"{name} is traced: inside jit use the pure functions (jaxkv.append, jaxkv.attend) on "
            "a CacheState"
        )
    if not jnp.issubdtype(array.dtype, jnp.floating) and array.size:
        raise KvCacheError(f"{name}.dtype={array.dtype}: must be a float; cast it first")
    return array


def _token_count(name: str, array: Any, heads: int, head_dim: int) -> int:
    stride = heads * head_dim
    if array.ndim == 1 and array.size % stride == 0:
        return int(array.size // stride)
    if array.ndim == 3 and array.shape[1:] == (heads, head_dim):
        return int(array.shape[0])
    raise KvCacheError(
        f"{name}.shape={array.shape}: must be [T, {heads}, {head_dim}], or flat with a multiple "
        f"of {stride} elements"
    )


def bucket(size: int) -> int:
    """The next power of two: how many rows a compiled function gets for `size`."""
    return 1 << (size - 1).bit_length()


def pieces(tokens: Any, size: int, shape: tuple[int, int]) -> list[Any]:
    """Tokens, flat or [T, K, H], as arrays of a size that is compiled; they share no memory with a
    caller's NumPy array.

    JAX reads a NumPy argument after the call has returned, so what the caller may overwrite is
    copied.
    """
    width = bucket(size) if size <= PIECE else PIECE
    count = -(-size // width)
    if isinstance(tokens, jax.Array) and size == width:
        return [tokens]
    filled = fill(tokens.reshape(size, *shape), count * width)
    parts = [filled] if count == 1 else [filled[i * width : (i + 1) * width] for i in range(count)]
    return [jax.device_put(part) for part in parts]


def fill(x: Any, size: int) -> Any:
    """x [T, ...] with zero rows added up to [size, ...]; a copy.

    On the CPU NumPy does it, so that no program is compiled for each T; arrays on another device
    stay there.
    """
    if _on_accelerator(x):
        return jnp.pad(x, [(0, size - x.shape[0])] + [(0, 0)] * (x.ndim - 1))
    filled = np.zeros((size, *x.shape[1:]), x.dtype if isinstance(x, jax.Array) else np.float32)
    filled[: x.shape[0]] = x
    return filled


def cut(x: jax.Array, size: int) -> jax.Array:
    """The first rows of x, the inverse of `fill`."""
    if _on_accelerator(x):
        return x[:size]
    return jax.device_put(np.asarray(x)[:size].copy())


def _on_accelerator(x: Any) -> bool:
    return isinstance(x, jax.Array) and any(device.platform != "cpu" for device in x.devices())
