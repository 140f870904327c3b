"""The state, and the verbs that change it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from jaxkv.config import KvCacheConfig, Overflow
from jaxkv.reference.adapted import neutral
from jaxkv.reference.formats import Array, finite
from jaxkv.reference.row import (
    Row,
    as_pairs,
    check_groups,
    enter_sinks,
    settle,
    starts_of,
)


@dataclasses.dataclass(frozen=True)
class ReferenceState:
    """The rows of a batch and the configuration they share."""

    config: KvCacheConfig
    rows: tuple[Row, ...]


def init(config: KvCacheConfig, batch_size: int = 1) -> ReferenceState:
    """An empty cache."""
    kept = [config.sink_tokens] * len(config.chain)
    width = max(config.head_dim, config.output_dim)
    mirrors = [np.zeros((2, config.num_kv_heads, width), np.float32)] * len(config.chain)
    others = [neutral(config.num_kv_heads, config.head_dim)] * len(config.chain)
    return ReferenceState(
        config, tuple(Row([], list(kept), list(mirrors), list(others)) for _ in range(batch_size))
    )


def append(
    state: ReferenceState, keys: Array, values: Array | None, lengths: ArrayLike | None = None
) -> ReferenceState:
    """Adds the first `lengths[b]` tokens of keys and values [B, T, K, H] to row b, one after the
    other, within the range of all tiers."""
    config = state.config
    pairs = finite(as_pairs(config, keys, values), config.largest)  # [B, T, 2, K, W]
    state = _copy(state)
    for row, new, length in zip(
        state.rows, pairs, per_row(state, lengths, keys.shape[1]), strict=True
    ):
        if config.overflow is Overflow.REFUSE and _would_evict(config, row, length):
            continue
        for t in range(length):
            row.tokens.append([new[t]])
            if row.end <= config.sink_tokens:
                enter_sinks(config, row)
            settle(config, row)
    return state


def _would_evict(config: KvCacheConfig, row: Row, length: int) -> bool:
    """Whether `length` more tokens do not fit beside those held."""
    begin = starts_of(config, row)[-1]
    return max(row.end + length, config.sink_tokens) - begin > config.room


def migrate(state: ReferenceState) -> ReferenceState:
    """Moves what is due: nothing, since `append` leaves nothing due."""
    return _copy(state)


def evict(state: ReferenceState, count: ArrayLike) -> ReferenceState:
    """Drops the `count` oldest tokens of each row's chain."""
    state = _copy(state)
    for row, number in zip(state.rows, per_row(state, count), strict=True):
        begin = starts_of(state.config, row)[-1]
        _check_count(number, most=max(0, row.end - begin))
        if number:
            row.kept[-1] = max(row.kept[-1], begin + number)
    return state


def rewind(state: ReferenceState, count: ArrayLike) -> ReferenceState:
    """Drops the `count` newest tokens of each row.

    What a ring still holds is back in its tier; the rest of the tokens stay where they are.
    """
    config, state = state.config, _copy(state)
    for row, number in zip(state.rows, per_row(state, count), strict=True):
        begin = starts_of(config, row)[-1]
        _check_count(number, most=row.end - (begin if begin > config.sink_tokens else 0))
        del row.tokens[row.end - number :]
        for i in range(len(row.kept)):
            top = starts_of(config, row)[i - 1] if i else max(row.end, config.sink_tokens)
            row.kept[i] = min(row.kept[i], top)
        check_groups(config, row)
        for i, start in enumerate(starts_of(config, row)):
            for token in row.tokens[start:]:
                del token[i + 2 :]  # it is in tier i again and will enter the next one anew
    return state


def keep(state: ReferenceState, indices: Array, of: ArrayLike) -> ReferenceState:
    """Of the newest `of` tokens keeps those at `indices` [B, n]; -1: none."""
    config = state.config
    newest = [
        [row.tokens[row.end - number + i][1] for i in chosen if i >= 0]
        for row, chosen, number in zip(state.rows, indices, per_row(state, of), strict=True)
    ]
    state = rewind(state, of)
    for t in range(indices.shape[1]):
        nothing = np.zeros_like(state.rows[0].mirrors[0])
        pairs = np.stack([row[t] if t < len(row) else nothing for row in newest])
        lengths = [int(t < len(row)) for row in newest]
        dims = config.head_dim, config.output_dim
        keys, values = (pairs[:, None, side, :, :dim] for side, dim in enumerate(dims))
        state = append(state, keys, values, lengths)
    return state


def clear(state: ReferenceState) -> ReferenceState:
    """Empties every row."""
    return init(state.config, len(state.rows))


def take_rows(state: ReferenceState, rows: Sequence[int]) -> ReferenceState:
    """The given rows in the given order; one may be taken several times."""
    taken = [state.rows[i] for i in rows]
    copies = (
        Row(
            [list(token) for token in row.tokens],
            list(row.kept),
            list(row.mirrors),
            list(row.adapted),
        )
        for row in taken
    )
    return ReferenceState(state.config, tuple(copies))


def _copy(state: ReferenceState) -> ReferenceState:
    return take_rows(state, range(len(state.rows)))


def per_row(state: ReferenceState, number: ArrayLike | None, default: int = 0) -> list[int]:
    return [int(n) for n in np.broadcast_to(default if number is None else number, len(state.rows))]


def _check_count(count: int, most: int) -> None:
    if not 0 <= count <= most:
        raise ValueError(f"count={count}: must be 0 to {most}, the tokens that may be dropped")
