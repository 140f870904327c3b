"""Rows of caches without pages go to the host and come back, and what a pool cannot do says so."""

from __future__ import annotations

import chex
import jax
import numpy as np
import pytest
from cases import FP16, Q4, config

import jaxkv
from jaxkv import CacheState, paged
from jaxkv.kernels import dispatch
from jaxkv.scoring import Scoring
from jaxkv.state import segments

SMALL = config(4, FP16, Q4, 24, 2, 16, sink_tokens=2)
append = jax.jit(jaxkv.append)


def filled(state: CacheState, size: int, seed: int = 0) -> CacheState:
    keys, values = np.random.default_rng(seed).normal(size=(2, 3, 8, 2, 16)).astype(np.float32)
    for start in range(0, size, 8):
        lengths = np.full(3, min(8, size - start), np.int32)
        if state.num_layers is None:
            state = append(state, keys, values, lengths)
        for layer in range(state.num_layers or 0):
            state = append(state, keys, values + layer, lengths, layer=np.int32(layer))
    return state


@pytest.mark.slow
@pytest.mark.parametrize("num_layers", [None, 2])
@pytest.mark.parametrize("early", [False, True])
def test_a_row_of_a_cache_comes_back_bit_for_bit(num_layers: int | None, early: bool) -> None:
    """Parked in the middle of decoding, into another row, whether `prefetch` went before or not;
    the rows beside it stay."""
    state = filled(jaxkv.init(SMALL, 3, num_layers), 29)
    wanted = jaxkv.take_rows(state, [1])
    others = jaxkv.take_rows(state, [0])
    state, parked = paged.offload(state, 1)
    axis = state.end.ndim - 1
    assert not np.asarray(state.end).take(1, axis).any()
    assert parked.nbytes > 0
    parked = paged.prefetch(parked) if early else parked
    state, there = paged.restore(state, 2, parked)
    assert there
    chex.assert_trees_all_equal(jaxkv.take_rows(state, [2]), wanted)
    chex.assert_trees_all_equal(jaxkv.take_rows(state, [0]), others)


def test_what_a_pool_cannot_do_is_refused_in_words() -> None:
    pool = paged.init(SMALL, 8, 3, 4)
    with pytest.raises(ValueError, match="grow: the rows of a pool share their pages"):
        jaxkv.grow(pool, SMALL)
    kernel = dispatch.refusal(segments(pool)[-1], SMALL.head_dim, Scoring(scale=1.0))
    assert kernel == "pages of 4 tokens are no multiple of 16"
    rings = jaxkv.init(SMALL, 3)
    _, parked = paged.offload(jaxkv.copy(pool), 0)
    _, ring = paged.offload(jaxkv.copy(rings), 0)
    for row, error in ((3, "rows 0 .. 2"), (-1, "row=-1"), (1.5, "row=1.5")):
        for state, held in ((pool, parked), (rings, ring)):
            with pytest.raises(ValueError, match=error):
                paged.offload(state, row)
            with pytest.raises(ValueError, match=error):
                paged.restore(state, row, held)
    for bad in ({"num_pages": 0}, {"rows": 0}, {"page_size": 0}, {"num_layers": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(bad))}=0"):
            paged.init(SMALL, **{"num_pages": 8, "rows": 3, **bad})
