"""The state, what it holds, and the verbs that change it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from jaxkv.config import KvCacheConfig, Overflow
from jaxkv.formats import Precision, QuantSpec
from jaxkv.reference.adapted import Adapted, adapted, neutral
from jaxkv.reference.formats import Array, finite, mirror_of, represent


@dataclasses.dataclass
class Row:
    """One sequence of tokens, and where their data is. W is the larger one of H and V: the other
    side is filled up with zeros."""

    tokens: list[
        list[Array]
    ]  # [position][0]: key and value [2, K, W] as given; [1 + tier]: as read back
    kept: list[int]  # [tier]: the first position whose data is still there
    mirrors: list[Array]  # [tier]: of keys and values [2, K, W]; zeros where nothing is aligned
    adapted: list[Adapted]  # [tier]: what else was learnt of keys

    @property
    def end(self) -> int:
        return len(self.tokens)


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


def _starts(config: KvCacheConfig, row: Row, end: int | None = None) -> list[int]:
    """Each tier's first position: tier i holds [starts[i], starts[i - 1]), the first tier up to the
    end (or as of an earlier `end`)."""
    last = len(config.chain) - 1
    above = max(row.end if end is None else end, config.sink_tokens)
    begin = min(above, max(above - config.room, row.kept[last]))  # what comes before it is evicted
    starts = []
    for i, tier in enumerate(config.chain):
        due = _batch_start(
            config, above - tier.length
        )  # what comes before it has to leave this tier
        above = begin if i == last else min(above, max(due, row.kept[i], begin))
        starts.append(above)
    return starts


def _batch_start(config: KvCacheConfig, position: int) -> int:
    """The first position of the batch of tokens, moved together, that contains `position`."""
    return position - (position - config.sink_tokens) % config.step


def _settle(config: KvCacheConfig, row: Row) -> None:
    """Lets every token that is due enter the tiers below, and forgets what the rings have
    overwritten."""
    starts = _starts(config, row)
    tops = [row.end, *starts[:-1]]
    for i, (tier, start, top) in enumerate(zip(config.chain, starts, tops, strict=True)):
        for first in range(_batch_start(config, start), top - tier.group + 1, tier.group):
            group = range(first, first + tier.group)
            if top > row.kept[i] and any(len(row.tokens[p]) == i + 1 for p in group):
                if i == len(config.chain) - 1 and not any(
                    len(token) > i + 1 for token in row.tokens[row.kept[i] :]
                ):
                    _learn(config, row, i)
                for p in group:
                    if (
                        i and p < row.kept[i - 1]
                    ):  # evicted and gone: the oldest token that is there takes its place
                        row.tokens[p] = row.tokens[row.kept[i - 1]][: i + 1]
                _enter(config, row, group, i, tier.formats, row.mirrors[i], row.adapted[i])
        row.kept[i] = max(row.kept[i], top - tier.capacity)


def as_pairs(config: KvCacheConfig, keys: Array, values: Array | None) -> Array:
    """Keys [..., K, H] and values [..., K, V] (None, or whatever, where they are the first V
    elements of the keys) as [..., 2, K, W]."""
    if config.values_from_keys is not None or values is None:
        values = keys[..., : config.output_dim]
    width = max(keys.shape[-1], values.shape[-1])
    sides = [
        np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, width - x.shape[-1])]) for x in (keys, values)
    ]
    return np.stack(sides, axis=-3)


def _enter(
    config: KvCacheConfig,
    row: Row,
    positions: Sequence[int],
    tier: int,
    formats: Sequence[Precision | QuantSpec],
    mirror: Array,
    basis: Adapted,
) -> None:
    """Adds to a row's tokens what a tier gives back for them; `formats` of keys and, unless they
    are a part of these, of values, `mirror` [2, K, W]."""
    given = np.stack([row.tokens[p][tier] for p in positions])
    keys = basis.enter(given[:, 0, :, : config.head_dim], positions)
    keys = represent(keys, formats[0], mirror[0, :, : config.head_dim])
    keys, values = basis.leave(keys, positions), None
    if len(formats) > 1:
        dim = config.output_dim
        values = represent(given[:, 1, :, :dim], formats[1], mirror[1, :, :dim])
    for position, pair in zip(positions, as_pairs(config, keys, values), strict=True):
        row.tokens[position][tier + 1 :] = [pair]


def _enter_sinks(config: KvCacheConfig, row: Row) -> None:
    nothing = neutral(config.num_kv_heads, config.head_dim)
    mirror = np.zeros_like(row.mirrors[0])
    _enter(config, row, [row.end - 1], 0, config.sink_spec.formats, mirror, nothing)


def _learn(config: KvCacheConfig, row: Row, tier: int) -> None:
    """The basis of a tier that is empty, from the first tokens that will come to it."""
    positions, spec = first_positions(config, row, tier), config.chain[tier]
    given = np.stack([row.tokens[p][tier] for p in positions])
    keys = given[:, 0, :, : config.head_dim]
    basis = row.adapted[tier] = adapted(keys, positions, spec)
    row.mirrors[tier] = np.zeros_like(given[0])
    sides = [basis.enter(keys, positions), given[:, 1, :, : config.output_dim]]
    for side, (x, fmt) in enumerate(zip(sides, spec.formats, strict=False)):
        row.mirrors[tier][side, :, : x.shape[-1]] = mirror_of(x, fmt)


def first_positions(config: KvCacheConfig, row: Row, tier: int) -> range:
    """The tokens that an empty tier is aligned by: those in the tier above when the first of them
    leaves it.

    Four are left out: attention heads dump their weight on the first of a row, and these look like
    no other.
    """
    size = min(128, config.chain[tier - 1].length) if tier else 1
    skip = min(max(4 - config.sink_tokens, 0), size - 1)
    return range(row.kept[tier] + skip, row.kept[tier] + size)


def held(state: ReferenceState, row: int, end: int | None = None) -> dict[int, Array]:
    """Key and value [2, K, H] of every token that a row holds, by position, oldest first; or of
    what it held when it ended at an earlier `end`, as far as that is still there."""
    tokens = state.rows[row].tokens[:end]
    starts = _starts(state.config, state.rows[row], end)
    found = {
        position: tokens[position][1]
        for position in range(min(len(tokens), state.config.sink_tokens))
    }
    for position in range(starts[-1], len(tokens)):
        tier = next(i for i, start in enumerate(starts) if position >= start)
        found[position] = tokens[position][1 + tier]
    return found


# The verbs.


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
                _enter_sinks(config, row)
            _settle(config, row)
    return state


def _would_evict(config: KvCacheConfig, row: Row, length: int) -> bool:
    """Whether `length` more tokens do not fit beside those held."""
    begin = _starts(config, row)[-1]
    return max(row.end + length, config.sink_tokens) - begin > config.room


def migrate(state: ReferenceState) -> ReferenceState:
    """Moves what is due: nothing, since `append` leaves nothing due."""
    return _copy(state)


def evict(state: ReferenceState, count: ArrayLike) -> ReferenceState:
    """Drops the `count` oldest tokens of each row's chain."""
    state = _copy(state)
    for row, number in zip(state.rows, per_row(state, count), strict=True):
        begin = _starts(state.config, row)[-1]
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
        begin = _starts(config, row)[-1]
        _check_count(number, most=row.end - (begin if begin > config.sink_tokens else 0))
        del row.tokens[row.end - number :]
        for i in range(len(row.kept)):
            top = _starts(config, row)[i - 1] if i else max(row.end, config.sink_tokens)
            row.kept[i] = min(row.kept[i], top)
        _check_groups(config, row)
        for i, start in enumerate(_starts(config, row)):
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


def _check_groups(config: KvCacheConfig, row: Row) -> None:
    """A group of tokens that enters a tier anew needs all of its tokens in the tier before."""
    starts = _starts(config, row)
    for start, kept, tier in zip(starts[:-1], row.kept[:-1], config.chain[1:], strict=True):
        first = _batch_start(config, start)
        if tier.group > 1 and start > max(first, starts[-1]) and kept > first:
            raise ValueError(
                f"position {start} lies inside a group of codes whose tokens are gone from "
                f"{first} on"
            )


def _check_count(count: int, most: int) -> None:
    if not 0 <= count <= most:
        raise ValueError(f"count={count}: must be 0 to {most}, the tokens that may be dropped")


# Reading.


def gather(state: ReferenceState) -> tuple[Array, Array, Array]:
    """Keys and values [B, max_tokens, K, H or V] and positions [B, max_tokens], oldest first, -1
    where empty."""
    config = state.config
    shape = (len(state.rows), config.max_tokens)
    width = max(config.head_dim, config.output_dim)
    pairs = np.zeros((*shape, 2, config.num_kv_heads, width), np.float32)
    positions = np.full(shape, -1, np.int32)
    for b in range(len(state.rows)):
        for slot, (position, pair) in enumerate(held(state, b).items()):
            pairs[b, slot], positions[b, slot] = pair, position
    keys, values = pairs[:, :, 0, :, : config.head_dim], pairs[:, :, 1, :, : config.output_dim]
    return keys, values, positions


def counts(state: ReferenceState, name: str) -> Array:
    """Tokens of each row [B] int32 in a tier ("hot", "warm", "cold"), in "sinks", or in "total"."""
    config, found = state.config, []
    for row in state.rows:
        starts = _starts(config, row)
        tops = [max(row.end, config.sink_tokens), *starts]
        here = {tier.name: tops[i] - starts[i] for i, tier in enumerate(config.chain)}
        here["sinks"] = min(row.end, config.sink_tokens)
        found.append(sum(here.values()) if name == "total" else here.get(name, 0))
    return np.array(found, np.int32)
