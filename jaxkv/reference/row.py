"""One row: what it holds where, and how its tokens pass from tier to tier."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxkv.config import KvCacheConfig
from jaxkv.formats import Precision, QuantSpec
from jaxkv.reference.adapted import Adapted, adapted, neutral
from jaxkv.reference.formats import Array, mirror_of, represent


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


def starts_of(config: KvCacheConfig, row: Row, end: int | None = None) -> list[int]:
    """Each tier's first position: tier i holds [starts[i], starts[i - 1]), the first tier up to the
    end (or as of an earlier `end`)."""
    last = len(config.chain) - 1
    above = max(row.end if end is None else end, config.sink_tokens)
    begin = min(above, max(above - config.room, row.kept[last]))  # what comes before it is evicted
    starts = []
    for i, tier in enumerate(config.chain):
        due = batch_start(
            config, above - tier.length
        )  # what comes before it has to leave this tier
        above = begin if i == last else min(above, max(due, row.kept[i], begin))
        starts.append(above)
    return starts


def batch_start(config: KvCacheConfig, position: int) -> int:
    """The first position of the batch of tokens, moved together, that contains `position`."""
    return position - (position - config.sink_tokens) % config.step


def settle(config: KvCacheConfig, row: Row) -> None:
    """Lets every token that is due enter the tiers below, and forgets what the rings have
    overwritten."""
    starts = starts_of(config, row)
    tops = [row.end, *starts[:-1]]
    for i, (tier, start, top) in enumerate(zip(config.chain, starts, tops, strict=True)):
        for first in range(batch_start(config, start), top - tier.group + 1, tier.group):
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


def enter_sinks(config: KvCacheConfig, row: Row) -> None:
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


def check_groups(config: KvCacheConfig, row: Row) -> None:
    """A group of tokens that enters a tier anew needs all of its tokens in the tier before."""
    starts = starts_of(config, row)
    for start, kept, tier in zip(starts[:-1], row.kept[:-1], config.chain[1:], strict=True):
        first = batch_start(config, start)
        if tier.group > 1 and start > max(first, starts[-1]) and kept > first:
            raise ValueError(
                f"position {start} lies inside a group of codes whose tokens are gone from "
                f"{first} on"
            )
