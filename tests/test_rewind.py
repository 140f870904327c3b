"""Rewind: speculative decoding leaves no trace of what was rejected, as deep as `rewind_length`;
deeper, nothing held is lost."""

from __future__ import annotations

import functools
from typing import Any

import chex
import jax
import numpy as np
import pytest
from cases import (
    BATCHED,
    CASES,
    FP16,
    FP32,
    Q4,
    REWINDS,
    Array,
    Case,
    channels,
    config,
    random_query,
    random_tokens,
)
from laws import given, over

import jaxkv
from jaxkv import CacheState, Status, reference

DRAFT = 4  # tokens drafted at once; at most the `rewind_length` of every case but "rewind_bf16"
NEW = {
    "fp16_q4": Case("fp16_q4", config(4, FP16, Q4, 18, 1, 16, rewind_length=DRAFT), 2),
    "no_tail": Case("no_tail", config(0, FP16, Q4, 14, 1, 16, rewind_length=DRAFT), 2),
    "fp32_window": Case(
        "fp32_window", config(14, FP32, Q4, 14, 2, 8, rewind_length=DRAFT, window=6), 4
    ),
}
ALL = REWINDS | NEW
over_all = over(
    ALL,
    (),
    ("no_tail", "fp32_window", "rewind_channel", "rewind_fp32_q8_q2_sinks", "latent_bf16_q8"),
)

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
attend, rewind, _append = jit(jaxkv.attend), jit(jaxkv.rewind), jit(jaxkv.append)
gather, stats = jit(jaxkv.gather), jit(jaxkv.stats)


def append(state: CacheState, keys: Array, values: Array, *lengths: Any) -> CacheState:
    return _append(state, keys, given(state.config, values), *lengths)


def assert_same(actual: CacheState, expected: CacheState) -> None:
    """Both hold the same tokens in the same tiers, bit for bit."""
    chex.assert_trees_all_equal(gather(actual), gather(expected))
    chex.assert_trees_all_equal(stats(actual), stats(expected))
    np.testing.assert_array_equal(actual.end, expected.end)


def draft_length(case: Case) -> int:
    return min(DRAFT, case.config.rewind_length)


def grow(state: CacheState, keys: Array, values: Array, count: Array | int) -> CacheState:
    """Appends the first `count` of tokens [B, T, K, H], `DRAFT` at a time."""
    for first in range(0, keys.shape[1], DRAFT):
        lengths = np.broadcast_to(np.clip(np.asarray(count) - first, 0, DRAFT), len(keys)).astype(
            np.int32
        )
        if lengths.any():
            new = [
                np.pad(
                    x[:, first : first + DRAFT],
                    [(0, 0), (0, max(0, first + DRAFT - x.shape[1])), (0, 0), (0, 0)],
                )
                for x in (keys, values)
            ]
            state = append(state, *new, lengths)
    return state


@over_all
def test_speculative_decoding(case: Case, rng: np.random.Generator) -> None:
    """Draft n tokens, verify, accept k (each row its own): the same bits as if only the accepted
    ones had ever been appended.

    15 rounds, so that every ring wraps several times and drafts overwrite slots whose tokens then
    come back.
    """
    size = draft_length(case)
    state = plain = grow(jaxkv.init(case.config, 3), *random_tokens(rng, case, 8), [8, 5, 0])
    for _ in range(15):
        keys, values = random_tokens(rng, case, size)
        accepted = rng.integers(0, size + 1, 3).astype(np.int32)
        drafted = append(state, keys, values)
        assert np.isfinite(attend(drafted, random_query(rng, case, size))).all()
        state, plain = rewind(drafted, size - accepted), append(plain, keys, values, accepted)
        assert_same(state, plain)
        query = random_query(rng, case, 1)
        np.testing.assert_array_equal(attend(state, query), attend(plain, query))
    assert not state.status.any()
    assert int(state.end.max()) > case.config.max_tokens


@over_all
def test_rewinds_in_a_row_add_up(case: Case, rng: np.random.Generator) -> None:
    """What counts is the depth below the highest position reached, however it is split."""
    most, (keys, values) = case.config.rewind_length, random_tokens(rng, case, 40)
    for end in range(20, 20 + 2 * case.config.step):
        plain = grow(jaxkv.init(case.config, 3), keys, values, end)
        state = grow(plain, *random_tokens(rng, case, most), most)
        for _ in range(most):
            state = rewind(state, np.int32(1))
        assert_same(state, plain)
        again = rewind(append(state, *random_tokens(rng, case, 1)), np.int32(1))
        assert_same(again, plain)


@over_all
@pytest.mark.parametrize("beyond", [1, 2, 4])
def test_deeper_rewinds_lose_nothing_that_is_held(
    case: Case, beyond: int, rng: np.random.Generator
) -> None:
    """Past `rewind_length` the positions are the twin's: evicted tokens stay away, all others are
    held, and the cache goes on.

    A row that cannot go back so far stays as it was.
    """
    keys, values = random_tokens(rng, case, 40)
    for end in range(24, 24 + case.config.step):
        state, twin = jaxkv.init(case.config, 3), reference.init(case.config, 3)
        state, twin = (
            grow(state, keys, values, end),
            reference.append(twin, keys, values, [end] * 3),
        )
        depth = case.config.rewind_length + beyond
        after = rewind(state, np.int32(depth))
        try:
            expected = reference.rewind(twin, depth)
        except ValueError:
            assert after.status.all()
            assert_same(after, state)
            continue
        assert not after.status.any()
        np.testing.assert_array_equal(gather(after)[2], reference.gather(expected)[2])
        kept = np.asarray(gather(after)[2])
        assert kept.max() == end - depth - 1
        went_on = grow(after, keys, values, 8)
        np.testing.assert_array_equal(
            gather(went_on)[2],
            reference.gather(reference.append(expected, keys, values, [8] * 3))[2],
        )


def test_tail_is_full_again_past_its_edge(rng: np.random.Generator) -> None:
    """A rewind longer than the tail: tokens that had been quantized are float again, because their
    ring still has them."""
    case = Case("deep", config(3, FP32, Q4, 40, 1, 8, rewind_length=8), 2)
    keys, values = random_tokens(rng, case, 28)
    state = rewind(grow(jaxkv.init(case.config, 3), keys, values, 28), np.int32(8))
    assert (np.asarray(stats(state).tail_tokens) == 3).all()
    np.testing.assert_array_equal(np.asarray(gather(state)[0])[:, 17:20], keys[:, 17:20])


def test_without_rewind_length_the_tail_gets_shorter(rng: np.random.Generator) -> None:
    """By all but one: an eager tail has one slot to spare. The codes of tokens that left it stay
    what they are."""
    case = Case("shallow", config(4, FP32, Q4, 40, 1, 8), 2)
    keys, values = random_tokens(rng, case, 20)
    state = grow(jaxkv.init(case.config, 3), keys, values, 20)
    after = rewind(state, np.array([3, 4, 6], np.int32))
    np.testing.assert_array_equal(stats(after).tail_tokens, [2, 1, 0])
    np.testing.assert_array_equal(stats(after).store_tokens, [15, 15, 14])
    np.testing.assert_array_equal(
        np.asarray(gather(after)[0])[:, :14], np.asarray(gather(state)[0])[:, :14]
    )


def test_cut_groups_are_refused_row_by_row(rng: np.random.Generator) -> None:
    """Channel codes whose float tokens are gone cannot be cut: such a row stays as it was, with a
    bit in its status; others go back."""
    case = Case(
        "channel", config(6, FP32, Q4, 24, 2, 16, migration=BATCHED, key_quant=channels(4, 4)), 4
    )
    state = grow(jaxkv.init(case.config, 3), *random_tokens(rng, case, 20), 20)
    counts = np.array([11, 2, 0], np.int32)
    after = rewind(state, counts)
    np.testing.assert_array_equal(after.status, [Status.REWIND_CUTS_GROUP, 0, 0])
    np.testing.assert_array_equal(after.end, [20, 18, 20])
    for row in (0, 2):
        chex.assert_trees_all_equal(*([x[row] for x in gather(s)] for s in (after, state)))
    with pytest.raises(
        ValueError, match=r"cut a frozen group of channel codes; set rewind_length \(now 0\)"
    ):
        jaxkv.rewind(state, counts)


def test_rewind_into_the_sinks(rng: np.random.Generator) -> None:
    """While nothing has been evicted a rewind may take back sinks too, to the very first token;
    afterwards it may not."""
    case = CASES["rewind_bf16"]
    sinks, (keys, values) = case.config.sink_tokens, random_tokens(rng, case, 16)
    early = grow(jaxkv.init(case.config, 3), keys, values, [5, 6, 3])
    back = rewind(early, np.array([3, 4, 3], np.int32))
    np.testing.assert_array_equal(stats(back).sink_tokens, [2, 2, 0])
    again = append(
        back, *(x[:, :DRAFT] for x in (keys[:, 2:], values[:, 2:])), np.array([4, 4, 0], np.int32)
    )
    assert_same(
        jaxkv.take_rows(again, [0, 1]),
        jaxkv.take_rows(grow(jaxkv.init(case.config, 3), keys, values, 6), [0, 1]),
    )
    late = grow(jaxkv.init(case.config, 3), keys, values, 16)
    chain = case.config.max_tokens - sinks
    after = rewind(late, np.array([chain, chain + 1, 14], np.int32))
    np.testing.assert_array_equal(after.status, [0, Status.REWIND_TOO_MANY, Status.REWIND_TOO_MANY])
    np.testing.assert_array_equal(
        stats(after).total_tokens,
        [sinks + case.config.rewind_length, *[case.config.max_tokens] * 2],
    )


@pytest.mark.slow
def test_all_layers_go_back_together(rng: np.random.Generator) -> None:
    """`rewind` counts per row, in every layer."""
    case = NEW["fp16_q4"]
    grown = jaxkv.init(case.config, 3, num_layers=2)
    alone = [jaxkv.init(case.config, 3) for _ in range(2)]
    step = jit(jaxkv.append)
    counts = np.array([4, 0, 2], np.int32)
    tokens = [[random_tokens(rng, case, DRAFT) for _ in range(6)] for _ in range(2)]
    for layer in range(2):
        for new in tokens[layer]:
            grown, alone[layer] = (
                step(grown, *new, layer=np.int32(layer)),
                append(alone[layer], *new),
            )
    back = rewind(grown, counts)
    for layer in range(2):
        one = jax.tree.map(lambda leaf, i=layer: leaf[i], back)
        assert_same(one, rewind(alone[layer], counts))
