"""Attention over what a cache holds, token by token in float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from jaxkv.formats import LARGEST
from jaxkv.reference.cache import ReferenceState, append, per_row
from jaxkv.reference.formats import Array, finite
from jaxkv.reference.reading import held
from jaxkv.reference.row import as_pairs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The options of attention, as in `jaxkv.Scoring`; of T queries that stand at known
    positions."""

    causal: bool = True
    window: ArrayLike | None = None  # scalar, [B], [B, 1] or [B, T]
    window_sinks: bool = True
    soft_cap: float | None = None
    decay: ArrayLike | None = None  # scalar or [N]
    bias: Array | None = None  # [B or 1, N or 1, T, P]
    mask: Array | None = None  # the same
    sink_logits: ArrayLike | None = None  # [N]

    def sees(self, row: int, t: int, query: int, key: int, sink_tokens: int) -> bool:
        """Whether query t of a row, at position `query`, may look at position `key`."""
        if key > query and self.causal:
            return False
        if self.window is None or (key < sink_tokens and self.window_sinks):
            return True
        window = np.atleast_2d(np.asarray(self.window))
        window = window.T if np.ndim(self.window) == 1 else window
        return bool(key > query - window[min(row, len(window) - 1), min(t, window.shape[1] - 1)])

    def added(self, row: int, t: int, query: int, keys: Sequence[int], num_heads: int) -> Array:
        """What is added to the scores [N, S] of query t of a row, at position `query`, with the
        positions `keys`."""
        added = np.zeros((num_heads, len(keys)))
        for s, key in enumerate(keys):
            if self.decay is not None:
                added[:, s] -= bounded(np.asarray(self.decay, np.float64) * (query - key))
            if self.bias is not None and key < self.bias.shape[3]:
                bias = self.bias[min(row, len(self.bias) - 1), :, t, key].astype(np.float64)
                added[:, s] += np.where(bias == -np.inf, bias, bounded(bias))
            if self.mask is not None and key < self.mask.shape[3]:
                added[
                    ~np.broadcast_to(self.mask[min(row, len(self.mask) - 1), :, t, key], num_heads),
                    s,
                ] = -np.inf
        return added


MOST_SCORE = 2.0**125


def bounded(scores: Array) -> Array:
    """Scores, biases and decays count up to +-2**125."""
    return np.clip(scores, -MOST_SCORE, MOST_SCORE)


def exact_attention(query: Array, pairs: Array, scale: ArrayLike | None = None) -> Array:
    """Softmax attention of query [N, H] over pairs [S, 2, K, H], head by head in float64; zeros if
    S is 0."""
    return attention_and_lse(query, pairs, scale, np.zeros((len(query), len(pairs))), Options())[0]


def attention_and_lse(
    query: Array, pairs: Array, scale: ArrayLike | None, added: Array, options: Options
) -> tuple[Array, Array]:
    """Attention of query [N, H] over pairs [S, 2, K, W] with `added` [N, S] to the scores, and as
    wide as the pairs; its log-sum-exps [N], -inf of nothing. Keys are the first H elements."""
    width = pairs.shape[-1] if pairs.ndim == 4 else query.shape[1]
    out, lse = np.zeros((len(query), width)), np.full(len(query), -np.inf)
    scales = np.broadcast_to(query.shape[1] ** -0.5 if scale is None else scale, len(query))
    for head in range(len(query)):
        scores, values = np.zeros(0), np.zeros((0, width))
        if len(pairs):
            kv_head = head * pairs.shape[2] // len(query)
            keys, values = (
                pairs[:, 0, kv_head, : query.shape[1]].astype(np.float64),
                pairs[:, 1, kv_head].astype(np.float64),
            )
            scores = bounded(scales[head] * (keys @ query[head].astype(np.float64)))
            scores = (
                scores
                if options.soft_cap is None
                else options.soft_cap * np.tanh(scores / options.soft_cap)
            )
            scores = scores + added[head]
        if options.sink_logits is not None:  # a token whose value is zero
            logit = np.asarray(options.sink_logits, np.float64)[head]
            scores = np.append(scores, min(logit, MOST_SCORE))
            values = np.append(values, np.zeros((1, width)), axis=0)
        if (scores > -np.inf).any():
            lse[head] = scores.max() + np.log(np.exp(scores - scores.max()).sum())
            out[head] = np.exp(scores - lse[head]) @ values
    return out, lse


def attend(
    state: ReferenceState,
    query: Array,
    scale: ArrayLike | None = None,
    lengths: ArrayLike | None = None,
    *,
    return_lse: bool = False,
    **options: Any,
) -> Any:
    """Query t [B, T, N, H] of row b stands at position `end - lengths[b] + t` and sees what was
    held when the row ended there, as far as it is still there; as `jaxkv.attend`."""
    found = _attend(state, query, [{}] * len(state.rows), scale, lengths, options)
    return found if return_lse else found[0]


def prefill(
    state: ReferenceState,
    query: Array,
    keys: Array,
    values: Array | None,
    lengths: ArrayLike | None = None,
    scale: ArrayLike | None = None,
    *,
    return_lse: bool = False,
    **options: Any,
) -> tuple[ReferenceState, Any]:
    """Attends over what was held and the raw new keys and values, causally; then appends these.
    One token is appended first, and attends to itself as it is held."""
    if query.shape[1] == 1:
        state = append(state, keys, values, lengths)
        found = attend(state, query, scale, lengths, return_lse=return_lse, **options)
        return state, found
    pairs, counts = as_pairs(state.config, keys, values), per_row(state, lengths, keys.shape[1])
    raw = [
        dict(enumerate(finite(new[:length], LARGEST), row.end))
        for row, new, length in zip(state.rows, pairs, counts, strict=True)
    ]
    found = _attend(state, query, raw, scale, lengths, options)
    return append(state, keys, values, lengths), found if return_lse else found[0]


def extend(
    state: ReferenceState,
    query: Array,
    keys: Array,
    values: Array,
    valid: Array,
    scale: float | None = None,
    **options: Any,
) -> tuple[ReferenceState, Array]:
    """`prefill` of the tokens where `valid` [B, T] is True; zeros elsewhere. Masks and windows come
    in the caller's order, too."""
    out, (batch, size) = np.zeros((*query.shape[:3], state.config.output_dim)), valid.shape
    order = np.argsort(~valid, axis=1, kind="stable")

    def front(x: Array, axis: int = 1) -> Array:
        x = np.broadcast_to(x, (batch, *x.shape[1:]))
        shape = [size if i == axis else batch if i == 0 else 1 for i in range(x.ndim)]
        return np.take_along_axis(x, order.reshape(shape), axis)

    for name, axis in (("mask", 2), ("bias", 2), ("window", 1)):
        if options.get(name) is not None and np.ndim(options[name]) > axis:
            options[name] = front(options[name], axis)
    state, found = prefill(
        state, front(query), front(keys), front(values), valid.sum(1), scale, **options
    )
    for b in range(batch):
        out[b, order[b]] = found[b]
    return state, out


def _visible(
    state: ReferenceState, row: int, raw: dict[int, Array], position: int, causal: bool
) -> dict[int, Array]:
    """What a query at `position` finds: of `raw` tokens and those held before these what had not
    been evicted by then; without raw ones what was held then."""
    config = state.config
    if not raw:
        return held(state, row, max(position + 1, 0) if causal else None)
    begin = position + 1 - config.room
    every = held(state, row) | raw
    return {p: pair for p, pair in every.items() if p >= begin or p < config.sink_tokens}


def _attend(
    state: ReferenceState,
    query: Array,
    raw: Sequence[dict[int, Array]],
    scale: ArrayLike | None,
    lengths: ArrayLike | None,
    given: dict[str, Any],
) -> tuple[Array, Array]:
    config, lse = state.config, np.zeros(query.shape[:3])
    out = np.zeros((*query.shape[:3], config.output_dim))
    shape = (-1, *state.rows[0].mirrors[0].shape)
    defaults = {"window": config.window, "window_sinks": config.window_sinks}
    options = Options(**{**defaults, **{k: v for k, v in given.items() if v is not None}})
    for b, (row, length) in enumerate(
        zip(state.rows, per_row(state, lengths, query.shape[1]), strict=True)
    ):
        for t in range(query.shape[1]):
            position = row.end + len(raw[b]) - length + t
            is_one = t < length  # the rest are padding, which sees nothing
            visible = _visible(state, b, raw[b], position, options.causal) if is_one else {}
            seen = [p for p in visible if options.sees(b, t, position, p, config.sink_tokens)]
            added = options.added(b, t, position, seen, query.shape[2])
            pairs = np.array([visible[p] for p in seen]).reshape(shape)
            found, lse[b, t] = attention_and_lse(query[b, t], pairs, scale, added, options)
            out[b, t] = found[:, : config.output_dim]
    return out, lse
