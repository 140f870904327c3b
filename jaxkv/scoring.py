"""What a query may look at, and what is done to its scores: causality, windows, caps, decay,
biases, masks, sink logits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jaxkv import softmax
from jaxkv.checks import is_concrete
from jaxkv.softmax import Partial

EVERY = jnp.iinfo(jnp.int32).max - 1
"""A position that none reaches."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scoring:
    """The options of attention, all combinable. Applied in this order: scale, soft cap, decay and
    bias, then the masks.

    Attributes:
      scale: of the scores, for all heads or [N] (`attend` passes H**-0.5 unless told otherwise).
      causal: a query sees its own position and those before it. False for cross-attention: every
        token held. A `mask` only ever hides: tokens that see each other both ways, such as those of
        an image within a prompt, need `causal=False` and a mask that says the rest of causality.
      window: a query sees the newest `window` positions up to its own, and the sinks besides
        (StreamingLLM). An int, a traced scalar, or one per row or query: [B], [B, 1] or [B, T]
        (Llama 4's chunks: `position % chunk + 1`).
      window_sinks: False: a window hides sinks too, as local layers beside global ones want it.
      soft_cap: scores become `soft_cap * tanh(score / soft_cap)` (Gemma 2). May be traced, too; one
        that is not positive and finite caps nothing.
      decay: rate, or rates [N]: `-rate * age` is added, age in tokens (ALiBi).
      bias: [B or 1, N or 1, T, P] float, added to the scores of position p < P; 0 beyond P.
      mask: [B or 1, N or 1, T, P] bool, True where position p may be seen; positions beyond P may.
        Bias and mask come without the axis N, too.
      sink_logits: [N] learned logits that join the softmax's denominator (gpt-oss).
    """

    scale: ArrayLike = 1.0
    causal: bool = True
    window: Any = None  # int, or int32 scalar or [B or 1, T or 1]
    window_sinks: bool = True
    soft_cap: ArrayLike | None = None
    decay: ArrayLike | None = None
    bias: jax.Array | None = None
    mask: jax.Array | None = None
    sink_logits: jax.Array | None = None

    def checked(self, batch: int, heads: int, queries: int) -> Scoring:
        """The options as arrays (but for `causal`).

        Raises:
          ValueError: an option of the wrong kind or shape or, where concrete, the wrong sign.
        """
        if not isinstance(self.causal, (bool, np.bool_)):
            raise ValueError(f"causal={self.causal!r}: must be True or False, and not traced")
        if not isinstance(self.window_sinks, (bool, np.bool_)):
            raise ValueError(f"window_sinks={self.window_sinks!r}: must be True or False")
        return dataclasses.replace(
            self,
            scale=_as_numbers("scale", self.scale, ((), (heads,)), "a scalar or [N]"),
            window=_checked_window(self.window, batch, queries),
            soft_cap=_positive(_as_numbers("soft_cap", self.soft_cap, ((),), "a scalar")),
            decay=_as_numbers("decay", self.decay, ((), (heads,)), "a scalar or [N]"),
            sink_logits=_as_numbers("sink_logits", self.sink_logits, ((heads,),), "[N]"),
            bias=_as_table("bias", self.bias, batch, heads, queries),
            mask=_as_table("mask", self.mask, batch, heads, queries),
        )

    @property
    def scale_of_heads(self) -> jax.Array:
        """`scale` as it multiplies queries [B, T, N, H]."""
        return jnp.asarray(self.scale, jnp.float32).reshape(1, 1, -1, 1)

    @property
    def changes_scores(self) -> bool:
        """Whether `adjust` does anything."""
        return any(
            option is not None for option in (self.soft_cap, self.decay, self.bias, self.mask)
        )

    def bounds(self, query: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """The last position that queries at [B, T] (-1: none) may see and, sinks aside, the first
        (None: any), both [B, T]."""
        upto = query if self.causal else jnp.where(query >= 0, EVERY, -1)
        if self.window is None:
            return upto, None
        return upto, query - jnp.asarray(self.window, jnp.int32) + 1

    def reach(self, query: jax.Array, sink_tokens: int) -> tuple[jax.Array, jax.Array]:
        """Positions [B] that no query at [B, T] looks before, or beyond."""
        upto, since = self.bounds(query)
        if since is None or sink_tokens:
            return jnp.zeros_like(upto[:, 0]), upto.max(-1)
        return jnp.where(query >= 0, since, EVERY).min(-1).clip(0), upto.max(-1)

    def visible(self, query: jax.Array, key: jax.Array, sink_tokens: int) -> jax.Array:
        """Whether queries at positions [B, T] (-1: none) may see keys at positions [B, S] -> bool
        [B, T, S]."""
        upto, since = self.bounds(query)
        seen = (key[:, None] <= upto[..., None]) & (key[:, None] >= 0)
        return (
            seen
            if since is None
            else seen & ((key[:, None] >= since[..., None]) | (key[:, None] < sink_tokens))
        )

    def adjust(self, scores: jax.Array, query: jax.Array, key: jax.Array) -> jax.Array:
        """Scores [B, K, G, T, S] of queries at [B, T] and keys at [B, S] with cap, decay and bias;
        -inf where masked."""
        heads = scores.shape[1:3]
        if self.soft_cap is not None:
            cap = jnp.asarray(self.soft_cap, jnp.float32)
            caps = (cap > 0) & (cap < jnp.inf)
            cap = jnp.where(caps, cap, 1.0)
            scores = jnp.where(caps, cap * jnp.tanh(scores / cap), scores)
        if self.decay is not None:
            rates = jnp.broadcast_to(
                jnp.asarray(self.decay, jnp.float32), (heads[0] * heads[1],)
            ).reshape(1, *heads, 1, 1)
            age = (query[:, :, None] - key[:, None]).astype(jnp.float32)
            scores = scores - softmax.bounded(rates * age[:, None, None])
        if self.bias is not None:
            bias = _by_position(self.bias.astype(jnp.float32), key, heads, 0.0)
            # Minus infinity hides; what is finite does not, however large.
            scores = scores + jnp.where(bias == -jnp.inf, bias, softmax.bounded(bias))
        if self.mask is not None:
            scores = jnp.where(_by_position(self.mask, key, heads, True), scores, -jnp.inf)
        return scores

    def padded(self, count: int) -> Scoring:
        """The options with `count` more queries, about which bias and mask say nothing."""
        return self._with_tables(
            lambda table, axis: jnp.pad(
                table, [(0, count if i == axis else 0) for i in range(table.ndim)]
            )
        )

    def block(self, start: jax.Array, size: int) -> Scoring:
        """The options for queries [start, start + size) only."""
        return self._with_tables(
            lambda table, axis: lax.dynamic_slice_in_dim(table, start, size, axis)
        )

    def reordered(self, reorder: Callable[[jax.Array, int], jax.Array]) -> Scoring:
        """The options of queries in another order, that of the first two axes of [B, ..., T, ...]:
        `reorder` is told the axis of T."""
        return self._with_tables(reorder)

    def head(self, head: jax.Array, heads: int) -> Scoring:
        """The options for the queries of one of `heads` kv heads only."""

        def own(table: jax.Array, axis: int) -> jax.Array:
            size = table.shape[axis] // heads
            return lax.dynamic_slice_in_dim(table, head * size, size, axis)

        each: dict[str, Any] = {
            name: own(jnp.asarray(value), 0)
            for name in ("scale", "decay")
            if (value := getattr(self, name)) is not None and jnp.ndim(value)
        }
        for name in ("bias", "mask"):
            table = getattr(self, name)
            each[name] = table if table is None or table.shape[1] == 1 else own(table, 1)
        return dataclasses.replace(self, **each)

    def row(self, row: jax.Array | None) -> Scoring:
        """The options for one row of the batch only; None: for all."""
        if row is None:
            return self

        def of_row(table: jax.Array) -> jax.Array:
            return table if len(table) == 1 else lax.dynamic_slice_in_dim(table, row, 1)

        window = of_row(self.window) if np.ndim(self.window) else self.window
        bias, mask = (x if x is None else of_row(x) for x in (self.bias, self.mask))
        return dataclasses.replace(self, bias=bias, mask=mask, window=window)

    def _with_tables(self, change: Callable[[jax.Array, int], jax.Array]) -> Scoring:
        """The options with what they say of each query changed; `change` is told its axis."""
        bias, mask = (x if x is None else change(x, 2) for x in (self.bias, self.mask))
        window = self.window
        if np.ndim(window) and np.shape(window)[1] > 1:
            window = change(window, 1)
        return dataclasses.replace(self, bias=bias, mask=mask, window=window)

    def sink_partial(self, shape: tuple[int, ...]) -> Partial:
        """The learned logits as a Partial [B, K, G * T] of a token whose value is zero; without
        them, nothing."""
        b, k, rows, h = shape
        if self.sink_logits is None:
            return softmax.empty((b, k, rows), h)
        logits = jnp.minimum(jnp.asarray(self.sink_logits, jnp.float32), softmax.MOST_SCORE)
        logits = logits.reshape(1, k, -1, 1)
        top = jnp.broadcast_to(logits, (b, k, logits.shape[2], rows // logits.shape[2])).reshape(
            b, k, rows
        )
        return Partial(jnp.zeros(shape, jnp.float32), top, jnp.ones_like(top))


def _as_numbers(name: str, given: Any, wanted: Sequence[tuple[int, ...]], kind: str) -> Any:
    """An option as float32 of one of the wanted shapes; None stays."""
    if given is None:
        return None
    array = given if isinstance(given, jax.Array) else np.asarray(given)
    if array.shape not in wanted or not _is_real(array):
        raise ValueError(
            f"{name} has shape {array.shape} and dtype {array.dtype}: must be {kind}, real, "
            f"where [N] is [{wanted[-1][0] if wanted[-1] else 1}]"
        )
    return jnp.asarray(array, jnp.float32)


def _is_real(array: Any) -> bool:
    return jnp.issubdtype(array.dtype, jnp.floating) or jnp.issubdtype(array.dtype, jnp.integer)


def _positive(cap: Any) -> Any:
    if cap is not None and is_concrete(cap) and not cap > 0:
        raise ValueError(f"soft_cap={float(cap)}: must be positive")
    return cap


def _checked_window(window: Any, batch: int, queries: int) -> Any:
    """A window in tokens, an int, a traced scalar or [B or 1, T or 1]. One that is traced and below
    1 shows nothing but the sinks."""
    if window is None:
        return None
    array = window if isinstance(window, jax.Array) else np.asarray(window)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(f"window={window!r}: must be an int, or ints, of at least 1 token")
    if is_concrete(array) and (np.asarray(array) < 1).any():
        raise ValueError(f"window={np.asarray(array).tolist()}: must be at least 1 token")
    if array.ndim == 0:
        return array if isinstance(array, jax.Array) else int(array)
    array = array[:, None] if array.shape == (batch,) else array
    if array.ndim != 2 or array.shape[0] not in (1, batch) or array.shape[1] not in (1, queries):
        raise ValueError(
            f"window has shape {array.shape}: must be a scalar, [B], [B, 1] or [B, T] with "
            f"B={batch}, T={queries}"
        )
    return jnp.asarray(array, jnp.int32)


def _as_table(name: str, given: Any, batch: int, heads: int, queries: int) -> Any:
    """A bias or a mask as an array; None stays."""
    if given is None:
        return None
    array = given if isinstance(given, jax.Array) else np.asarray(given)
    array = array[:, None] if array.ndim == 3 else array
    wanted = ((1, batch), (1, heads), (queries,))
    if array.ndim != 4 or any(
        size not in sizes for size, sizes in zip(array.shape, wanted, strict=False)
    ):
        raise ValueError(
            f"{name} has shape {array.shape}: must be [B or 1, N or 1, T, P] or [B or 1, T, P] "
            f"with B={batch}, N={heads}, T={queries}"
        )
    if name == "mask" and array.dtype != jnp.bool_:
        raise ValueError(f"mask.dtype={array.dtype}: must be bool; pass numbers as `bias`")
    if name == "bias" and not _is_real(array):
        raise ValueError(f"bias.dtype={array.dtype}: must be numbers; pass bools as `mask`")
    return jnp.asarray(array)


def _by_position(
    table: jax.Array, key: jax.Array, heads: tuple[int, ...], beyond: float | bool
) -> jax.Array:
    """[B or 1, N or 1, T, P] looked up at positions [B, S] -> [B, K or 1, G or 1, T, S]."""
    size = table.shape[-1]
    table = jnp.broadcast_to(table, (key.shape[0], *table.shape[1:]))
    found = jnp.take_along_axis(table, jnp.clip(key, 0, size - 1)[:, None, None], axis=3)
    found = jnp.where((key < size)[:, None, None], found, beyond)
    grouped = heads if found.shape[1] > 1 else (1, 1)
    return found.reshape(found.shape[0], *grouped, *found.shape[2:])
