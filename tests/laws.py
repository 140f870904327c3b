"""What the files of laws share: compiled verbs, runs of the cases, comparisons."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Container, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Array, Case, accumulate, attention_bound, norms, random_tokens, tie_bound

import jaxkv
from jaxkv import CacheState, reference
from jaxkv.reference import ReferenceState

gather = jax.jit(jaxkv.gather)
stats = jax.jit(jaxkv.stats)
_prefill = jax.jit(jaxkv.prefill)
evict = jax.jit(jaxkv.evict)
rewind = jax.jit(jaxkv.rewind)
take_rows = jax.jit(jaxkv.take_rows)
clear = jax.jit(jaxkv.clear)
_append = jax.jit(jaxkv.append)
_attend = jax.jit(jaxkv.attend)

Contents = tuple[Array, Array, Array]  # keys, values and positions, as `gather` gives them


# Three classes of tests. Unmarked: a newcomer's run, of minutes. `slow`: CI runs them besides.
# `exhaustive`: every case of every law, by hand before a release, for hours. Each law is in the
# first two with a few cases, and each case with the laws that say most: the same tokens as the
# twin's, and exact attention over them.

FAST = ("q8", "channel_keys")
"""What a newcomer's run takes of `cases.FEW`: one format of each kind."""

SLOW = (
    "q2_symmetric_sinks",
    "bf16_q4_all_heads",
    "fp16_q3",
    "fp32_q8_q4",
    "bf16_q8_q4_batched_sinks",
    "rotary_channel",
    "rewind_fp32_q8_q2_sinks",
    "latent_q4",
)
"""What CI takes besides: one to three tiers, sinks, eager and batched, both axes, 2, 3, 4 and 8
bits, rewinds, the rotary embedding, values that are a part of the keys."""

IN_CI = (*FAST, *SLOW)


def marked(
    name: Any, fast: Container[Any] = FAST, slow: Container[Any] = SLOW
) -> list[pytest.MarkDecorator]:
    """The class of a case: unmarked, slow, or exhaustive where it is in neither list."""
    if name in fast:
        return []
    return [pytest.mark.slow if name in slow else pytest.mark.exhaustive]


def over(
    cases: dict[str, Case], fast: Container[str] = FAST, slow: Container[str] = SLOW
) -> pytest.MarkDecorator:
    """Runs a law over cases, each of the class that `marked` says; in parallel runs each case stays
    with one worker, which compiles its programs once for all laws."""
    rows = [
        pytest.param(
            case, id=name, marks=[pytest.mark.xdist_group(name), *marked(name, fast, slow)]
        )
        for name, case in cases.items()
    ]
    return pytest.mark.parametrize("case", rows)


def append(state: CacheState, keys: Array, values: Array, lengths: Any = None) -> CacheState:
    """The compiled append; always with lengths, so that there is one program for each shape."""
    lengths = keys.shape[1] if lengths is None else lengths
    lengths = np.broadcast_to(lengths, len(keys)).astype(np.int32)
    return _append(state, keys, given(state.config, values), lengths)


def given(config: jaxkv.KvCacheConfig, values: Array) -> Array | None:
    """Values as the verbs take them: None where they are a part of the keys."""
    return None if config.values_from_keys is not None else values


def prefill(
    state: CacheState, query: Array, keys: Array, values: Array, *rest: Any, **options: Any
) -> Any:
    """The compiled prefill."""
    return _prefill(state, query, keys, given(state.config, values), *rest, **options)


def attend(
    state: CacheState, query: Array, lengths: Any = None, scale: Array | float | None = None
) -> Array:
    """The compiled attend; always with lengths, as above."""
    lengths = query.shape[1] if lengths is None else lengths
    return np.asarray(
        _attend(state, query, scale, lengths=np.broadcast_to(lengths, len(query)).astype(np.int32))
    )


def extend(state: CacheState, keys: Array, values: Array) -> CacheState:
    """Appends tokens [B, T, K, H] five at a time, and the rest one by one."""
    first, total = 0, keys.shape[1]
    while first < total:
        size = 5 if total - first >= 5 else 1
        state = append(state, keys[:, first : first + size], values[:, first : first + size])
        first += size
    return state


def start(case: Case) -> CacheState:
    return jaxkv.init(case.config, case.batch_size)


# Runs of a case, shared by several laws.


@dataclasses.dataclass(frozen=True)
class Run:
    """The states before and after each of a case's steps, and the tokens [B, T, K, H] that went
    in."""

    keys: Array
    values: Array
    ends: list[int]
    states: list[CacheState]
    twins: list[ReferenceState]

    @functools.cached_property
    def contents(self) -> list[Contents]:
        return [jax.tree.map(np.asarray, gather(state)) for state in self.states]


@functools.cache
def run(case: Case) -> Run:
    keys, values = random_tokens(np.random.default_rng(1), case, case.num_tokens)
    done = Run(keys, values, [0], [start(case)], [reference.init(case.config, case.batch_size)])
    for size in case.steps:
        new = [x[:, done.ends[-1] : done.ends[-1] + size] for x in (keys, values)]
        done.states.append(append(done.states[-1], *new))
        done.twins.append(reference.append(done.twins[-1], *new))
        done.ends.append(done.ends[-1] + size)
    return done


def held(contents: Contents, row: int) -> dict[int, Array]:
    """Key and value [2, K, W] by position, as `gather` gives them."""
    keys, values, positions = (np.asarray(x)[row] for x in contents)
    return {int(p): pair(keys[i], values[i]) for i, p in enumerate(positions) if p >= 0}


def pair(keys: Array, values: Array) -> Array:
    """Keys [..., K, H] and values [..., K, V] as [..., 2, K, W], the shorter one filled up."""
    width = max(keys.shape[-1], values.shape[-1])
    sides = [
        np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, width - x.shape[-1])]) for x in (keys, values)
    ]
    return np.stack(sides, axis=-3)


def tier_of(state: CacheState, row: int) -> dict[int, str]:
    """The tier of each position held, from `gather`'s order and the counts of `stats`."""
    counts, order = stats(state), ("sink_tokens", "store_tokens", "warm_tokens", "tail_tokens")
    tiers = [name for name in order for _ in range(int(getattr(counts, name)[row]))]
    return dict(zip(held(gather(state), row), tiers, strict=True))


def assert_within(error: Array, bound: Any) -> None:
    """Elementwise; NaN is never within."""
    excess = np.where(error <= bound, 0, error - bound)
    np.testing.assert_array_equal(excess, 0)


def assert_same(actual: CacheState, expected: CacheState) -> None:
    """Both hold the same tokens in the same tiers, bit for bit. (Slots that hold nothing may
    differ.)"""
    chex.assert_trees_all_equal(gather(actual), gather(expected))
    chex.assert_trees_all_equal(stats(actual), stats(expected))


def assert_like_reference(state: CacheState, twin: ReferenceState) -> None:
    """The same positions in the same tiers, and the same tokens but for rounding ties."""
    contents, counts = gather(state), stats(state)
    np.testing.assert_array_equal(contents[2], reference.gather(twin)[2])
    names = {"total": "total", "hot": "tail", "cold": "store", "sinks": "sink", "warm": "warm"}
    for theirs, ours in names.items():
        np.testing.assert_array_equal(
            getattr(counts, f"{ours}_tokens"), reference.counts(twin, theirs), ours
        )
    for row in range(len(twin.rows)):
        expected, bounds = reference.held(twin, row), accumulate(twin, row, tie_bound)
        for position, pair in held(contents, row).items():
            assert_within(norms(pair - expected[position]), bounds[position])


def as_of(state: CacheState, count: Any) -> CacheState:
    """The state as it was `count` [B] tokens ago, as far as its rings still have it; to look at."""
    return dataclasses.replace(state, end=np.maximum(state.end - np.maximum(count, 0), 0))


def exact_attention(
    state: CacheState,
    query: Array,
    lengths: Any = None,
    raw: Sequence[dict[int, Array]] | None = None,
) -> tuple[Array, Array]:
    """Attention in float64 over what `gather` gives as of each query's own token, or of `raw`
    tokens after it; and the rounding allowed [B, T, 1, 1]."""
    width = state.config.output_dim
    out, bound = np.zeros((*query.shape[:3], width)), np.zeros((*query.shape[:2], 1, 1))
    lengths = np.broadcast_to(query.shape[1] if lengths is None else lengths, len(query))
    room, sinks = state.config.room, state.config.sink_tokens
    contents = gather(state)
    for t in range(query.shape[1]):
        contents = contents if raw else gather(as_of(state, lengths - 1 - t))
        for b, length in enumerate(lengths):
            if t >= length:
                continue
            new = raw[b] if raw else {}
            visible, end = held(contents, b) | new, int(state.end[b]) + len(new) - length + t + 1
            seen = range(end) if not raw else {*range(end - room, end), *range(min(sinks, end))}
            pairs = np.array([pair for p, pair in visible.items() if p in seen])
            if len(pairs):
                out[b, t] = reference.exact_attention(query[b, t], pairs)[:, :width]
            bound[b, t] = attention_bound(query[b, t], pairs)
    return out, bound


def assert_attends(state: CacheState, query: Array, lengths: Any = None) -> None:
    """`attend` is exact attention over the dequantized tokens, but for rounding."""
    expected, bound = exact_attention(state, query, lengths)
    assert_within(np.abs(attend(state, query, lengths) - expected), bound)


def poisoned(state: CacheState, floating: float, word: int) -> CacheState:
    """A state with all its slots overwritten; what belongs to a row (positions, means, mirrors)
    stays."""

    def spoil(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        if path[-1].name not in ("data", "scale", "zero_point"):
            return leaf
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            most = jnp.finfo(leaf.dtype).max
            return jnp.full_like(leaf, jnp.clip(floating, -most, most))
        return jnp.full_like(leaf, word)

    return jax.tree_util.tree_map_with_path(spoil, state)
