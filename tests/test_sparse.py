"""Reading and keeping only the pages that matter: bounds hold, all is all, and what is left is
attended to as if nothing else had ever been."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, FP16, Q4, Array, config
from laws import append

import jaxkv
from jaxkv import CacheState, Status, paged, reference
from jaxkv.kernels.sparse import FIRST, REACH
from jaxkv.paged import Protect
from jaxkv.reference import Options, PageSummary

B, N, K, H, ROOM = 2, 4, 2, 16, 60
SMALL = config(5, FP16, Q4, ROOM, K, H, rewind_length=3)
FORMATS = {
    "q4": SMALL,
    "fp32": dataclasses.replace(SMALL, store_precision=jaxkv.Precision.FP32),
    "sinks": dataclasses.replace(SMALL, sink_tokens=2),
    "no_tail": dataclasses.replace(SMALL, tail_length=0),
    "channel_keys": dataclasses.replace(
        CASES["channel_keys"].config, max_tokens=ROOM, num_kv_heads=K, head_dim=H
    ),
    "q8_rotary": jaxkv.preset(
        "q8",
        max_tokens=ROOM,
        num_kv_heads=K,
        head_dim=H,
        tail_length=5,
        rotary=jaxkv.Rotary(10000.0),
    ),
}
LENGTHS = np.array([50, 37], np.int32)
attend = jax.jit(jaxkv.attend, static_argnames=("top_pages", "return_lse", "return_mass"))
reserve, compress = jax.jit(paged.reserve), jax.jit(paged.compress)


def over(*names: str) -> Any:
    marks = {name: () if name in names else (pytest.mark.slow,) for name in FORMATS}
    return pytest.mark.parametrize(
        "name", [pytest.param(name, marks=mark) for name, mark in marks.items()]
    )


@functools.cache
def tokens() -> tuple[Array, Array, Array]:
    rng = np.random.default_rng(3)
    keys, values = rng.standard_normal((2, B, ROOM, K, H), np.float32)
    keys[:, 20:24] *= 3  # some pages matter more than others
    return keys, values, 2 * rng.standard_normal((B, 3, N, H), np.float32)


def empty(name: str) -> CacheState:
    config = FORMATS[name]
    unit = max(config.step, config.chain[-1].group)
    return paged.init(config, 60, B, -(-4 // unit) * unit, summaries=True)


@functools.cache
def filled(name: str, step: int = 60) -> CacheState:
    state, (keys, values, _) = empty(name), tokens()
    for start in range(0, int(LENGTHS.max()), step):
        count = np.clip(LENGTHS - start, 0, step)
        state, granted = reserve(state, count)
        assert np.asarray(granted).all()
        stop = min(start + step, ROOM)
        state = append(state, keys[:, start:stop], values[:, start:stop], count)
    return state


def columns(state: CacheState, row: int) -> list[tuple[int, int]]:
    """The columns of a row's pages that hold tokens, oldest first, and where each page starts."""
    low, high = paged.rows.last_positions(state)
    found = np.asarray(state.pages.needed(low, high)[row])
    first = np.asarray(state.pages.first[row])
    return sorted(((int(c), int(first[c])) for c in np.flatnonzero(found)), key=lambda x: x[1])


def full(state: CacheState, row: int) -> list[tuple[int, int]]:
    high = int(paged.rows.last_positions(state)[1][row])
    return [(c, first) for c, first in columns(state, row) if first + state.pages.size <= high]


def held_summary(state: CacheState, row: int, column: int, head: int) -> PageSummary:
    held = state.summaries.of(state.pages.table[row, column])
    mean, unit = np.asarray(held.mean[head], np.float64), float(held.unit[head])
    below, above = (np.asarray(x[head], np.float64) for x in (held.below, held.above))
    return PageSummary(mean - unit * below, mean + unit * above, mean, float(held.norm[head]))


@over("q4")
def test_summaries_enclose_what_is_stored(name):
    """Every key of a full page lies inside, and some of them within a unit of the bounds."""
    state = filled(name)
    keys, _, positions = (np.asarray(x) for x in paged.gather(state))
    for row in range(B):
        assert len(full(state, row)) >= 3
        for column, first in full(state, row):
            inside = (positions[row] >= first) & (positions[row] < first + state.pages.size)
            for head in range(K):
                exact = PageSummary.of(keys[row, inside, head])
                held, unit = held_summary(state, row, column, head), np.ptp(keys) / 255
                assert (held.low <= exact.low + 1e-6).all()
                assert (held.high >= exact.high - 1e-6).all()
                np.testing.assert_allclose(held.low, exact.low, atol=1.01 * unit)
                np.testing.assert_allclose(held.high, exact.high, atol=1.01 * unit)
                np.testing.assert_allclose(held.mean, exact.mean, rtol=2**-11, atol=1e-6)
                np.testing.assert_allclose(held.norm, exact.norm, rtol=1e-6)


@over()
def test_summaries_are_the_same_whichever_way_tokens_came(name):
    """All at once, some at a time, and after a rewind: bit for bit those of full pages."""
    whole, parts = filled(name), filled(name, 7)
    again = paged.rewind(whole, 3)
    again, _ = reserve(again, 3)
    at = [np.arange(n - 3, n) for n in LENGTHS]
    new = [np.stack([x[row, own] for row, own in enumerate(at)]) for x in tokens()[:2]]
    for other in (parts, append(again, *new)):
        for row in range(B):
            for column, _ in full(whole, row):
                pages = [x.pages.table[row, column] for x in (whole, other)]
                found = [x.summaries.of(p) for x, p in zip((whole, other), pages, strict=True)]
                chex.assert_trees_all_equal(*found)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 30},
    "cap_and_decay": {"soft_cap": 3.0, "decay": np.linspace(0, 0.2, N)},
    "tables": {
        "bias": np.linspace(-2, 2, ROOM, dtype=np.float32).reshape(1, 1, 1, ROOM),
        "mask": (np.arange(ROOM) % 7 > 0).reshape(1, 1, 1, ROOM),
        "sink_logits": np.linspace(-1, 1, N),
    },
}


@over("q4")
@pytest.mark.parametrize(
    "options",
    [pytest.param(o, marks=[pytest.mark.slow] * (o != "plain")) for o in OPTIONS],
)
def test_all_pages_are_attention_without(name, options):
    """Bit for bit, whether as many are asked for as there are or more, jitted and not."""
    state, query = filled(name), tokens()[2][:, :1]
    plain = attend(state, query, return_lse=True, **OPTIONS[options])
    most = max(len(columns(state, row)) for row in range(B))
    for number in (most, 1000):
        found = attend(state, query, top_pages=number, return_lse=True, **OPTIONS[options])
        chex.assert_trees_all_equal(found[:2], plain)
        np.testing.assert_array_equal(found[2], 0)
    unjitted = jaxkv.attend(state, query, top_pages=most, **OPTIONS[options])
    np.testing.assert_allclose(unjitted, plain[0], atol=2e-6)


@over("q4")
def test_every_row_of_a_pool_has_its_own_options(name):
    """CPUs read its rows one after the other, those of small rings together: the same outputs."""
    keys, values, query = tokens()
    rings = append(jaxkv.init(FORMATS[name], B), keys[:, :50], values[:, :50], LENGTHS)
    rng = np.random.default_rng(5)
    for options in (
        {"window": np.array([[30, 12, 9], [7, 20, 33]], np.int32)},
        {"mask": rng.random((B, 1, 3, ROOM)) < 0.7, "decay": np.linspace(0, 0.2, N)},
        {"bias": rng.standard_normal((B, N, 3, ROOM)), "soft_cap": 5.0},
    ):
        outs = [
            attend(x, query, lengths=np.array([3, 2]), **options) for x in (filled(name), rings)
        ]
        np.testing.assert_allclose(*outs, atol=1e-5)


def twin(state: CacheState, query: Array, number: int | None, options: Options) -> Any:
    """Attention [B, T, N, H] and lse of one query a row over the pages that it reads, by the slow
    twin; and over all."""
    keys, values, positions = (np.asarray(x) for x in paged.gather(state))
    found, size = [], state.pages.size
    for row in range(B):
        own = positions[row] >= 0
        at, pairs = positions[row][own], np.stack([keys[row, own], values[row, own]], 1)
        added = options.added(row, 0, int(state.end[row]) - 1, list(at), N)
        for s, key in enumerate(at):
            if not options.sees(row, 0, int(state.end[row]) - 1, int(key), 0):
                added[:, s] = -np.inf
        if number is not None:
            pages = [page for page in full(state, row) if page[1] >= FIRST]
            for head in range(K):
                heads = slice(head * N // K, (head + 1) * N // K)
                held = [held_summary(state, row, column, head) for column, _ in pages]
                best = reference.best_pages(query[row, 0, heads] * H**-0.5, held, number, REACH)
                for index, (_, first) in enumerate(pages):
                    if index not in best:
                        added[heads, (at >= first) & (at < first + size)] = -np.inf
        found.append(reference.attention_and_lse(query[row, 0], pairs, None, added, options))
    return tuple(np.stack(x)[:, None] for x in zip(*found, strict=True))


@over("q4")
@pytest.mark.parametrize("number", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_the_best_pages_are_read(name, number):
    """And the tail, and what is not full; the weight left out is no more than is said."""
    state, query = filled(name), tokens()[2][:, :1]
    out, lse, left = (
        np.asarray(x) for x in attend(state, query, top_pages=number, return_lse=True)
    )
    wanted, wanted_lse = twin(state, query, number, Options())
    np.testing.assert_allclose(out, wanted, atol=1e-5)
    np.testing.assert_allclose(lse, wanted_lse, atol=2**-16)
    missing = 1 - np.exp(wanted_lse - twin(state, query, None, Options())[1])
    assert missing.max() > 1e-3
    assert (missing <= left + 1e-6).all()
    turned = {"scale": -(H**-0.5), "top_pages": number, "return_lse": True}
    chex.assert_trees_all_equal(attend(state, -query, **turned), (out, lse, left))


@over()
def test_several_queries_read_what_any_of_them_wants(name):
    """More pages bring more; drafts, ragged and causal among each other."""
    state, query = filled(name), tokens()[2]
    exact = np.asarray(attend(state, query, lengths=np.array([3, 2])))
    errors = []
    for number in (1, 20):
        out = np.asarray(attend(state, query, lengths=np.array([3, 2]), top_pages=number))
        errors.append(np.abs(out - exact).max())
    assert errors[0] > 1e-2
    assert errors[-1] == 0
    np.testing.assert_array_equal(out[1, 2], 0)


@over()
def test_mass_is_the_weight_of_pages(name):
    """Summed over the queries of a kv head; with what tail and sinks got it adds up."""
    state, query = filled(name), tokens()[2][:, :1]
    out, mass = (np.array(x) for x in attend(state, query, return_mass=True))
    np.testing.assert_allclose(out, attend(state, query), atol=1e-5)
    keys, _, positions = (np.asarray(x) for x in paged.gather(state))
    for row in range(B):
        own = positions[row] >= 0
        for head in range(N):
            scores = keys[row, own, head * K // N] @ query[row, 0, head] * H**-0.5
            weights = np.exp(scores - scores.max())
            weights /= weights.sum()
            for column, first in columns(state, row):
                at = positions[row][own]
                inside = (at >= first) & (at < first + state.pages.size)
                inside &= at < int(paged.rows.last_positions(state)[1][row])
                mass[row, head * K // N, column] -= weights[inside].sum()
    np.testing.assert_allclose(mass, 0, atol=1e-5)


def assert_attends(state: CacheState) -> None:
    """Attention is that over `gather` of what is kept."""
    query = tokens()[2][:, :1]
    np.testing.assert_allclose(
        attend(state, query), twin(state, query, None, Options())[0], atol=1e-5
    )


@over()
def test_compression_keeps_the_best(name):
    """As many as the budget says, per row; the rest is gone from attention, `gather` and `stats`,
    and free; everything goes on."""
    state, budget = filled(name), np.array([4, 2])
    scores = paged.scores(state, "random", key=jax.random.key(1))
    same = compress(state, scores, 1000)
    chex.assert_trees_all_equal(same, state)
    protect = Protect(sinks=3, recent=8)
    kept = compress(state, scores, budget, protect)
    for row in range(B):
        before, after = columns(state, row), columns(kept, row)
        high, end = int(paged.rows.last_positions(state)[1][row]), int(state.end[row])
        size = state.pages.size
        stays = [f < 3 or f + size > high - 3 or f + size > end - 8 for _, f in before]
        own = np.array([scores[row, c] for c, _ in before])
        wanted = reference.kept_pages(own, np.array(stays), int(budget[row]))
        assert after == [before[i] for i in wanted]
    taken = sum(len(columns(s, row)) * k for s, k in ((state, 1), (kept, -1)) for row in range(B))
    assert int(kept.pages.available) == int(state.pages.available) + taken > 0
    positions = np.asarray(paged.gather(kept)[2])
    np.testing.assert_array_equal((positions >= 0).sum(1), paged.stats(kept).total_tokens)
    assert_attends(kept)
    keys, values, _ = tokens()
    kept, granted = reserve(kept, 9)
    assert np.asarray(granted).all()
    kept = append(kept, keys[:, 40:49], values[:, 40:49])
    assert_attends(kept)
    kept = paged.rewind(kept, 4)
    assert_attends(kept)
    kept = paged.fork(kept, 0, 1)
    assert_attends(kept)
    kept, parked = paged.offload(kept, 0)
    kept, ok = paged.restore(kept, 0, parked)
    assert ok
    assert_attends(kept)
    query = tokens()[2][:, :1]
    out = attend(kept, query, top_pages=2)
    np.testing.assert_allclose(out, twin(kept, query, 2, Options())[0], atol=1e-5)
    kept = paged.release(kept, [0, 1])
    assert int(kept.pages.available) == kept.pages.num_pages


def test_what_was_compressed_cannot_be_rewound_into():
    state = filled("q4")
    gone = compress(state, paged.scores(state, "recency"), 0)
    np.testing.assert_array_equal([len(columns(gone, row)) for row in range(B)], [2, 1])
    np.testing.assert_array_equal(paged.rewind(gone, 3).status, 0)
    with pytest.raises(ValueError, match="would end in compressed tokens"):
        paged.rewind(gone, 20)
    refused = jax.jit(paged.rewind)(gone, 20)
    np.testing.assert_array_equal(refused.status, Status.REWIND_INTO_GAP)
    chex.assert_trees_all_equal(paged.gather(refused), paged.gather(gone))


@pytest.mark.slow
def test_scores_know_pages_apart():
    """Each by what it asks for: recent, short, unlike the others, looked at, to be looked at."""
    state, query = filled("q4"), tokens()[2][:, :1]
    mass = attend(state, query, return_mass=True)[1]
    by = {
        "recency": {},
        "random": {"key": jax.random.key(0)},
        "norm": {},
        "key_diversity": {},
        "attention": {"mass": mass},
        "expected": {"queries": jnp.asarray(tokens()[2])},
    }
    keys = np.asarray(paged.gather(state)[0])
    for name, given in by.items():
        scores = np.asarray(paged.scores(state, name, **given))
        for row in range(B):
            held = dict(columns(state, row))
            assert np.isneginf(np.delete(scores[row], list(held))).all()
            own = [scores[row, c] for c, _ in full(state, row)]
            assert np.isfinite(own).all()
            assert np.isposinf([scores[row, c] for c in held]).sum() == len(held) - len(own)
            pages = [keys[row, f : f + 4] for _, f in full(state, row)]
            if name == "recency":
                assert own == sorted(own)
            if name == "norm":
                norms = np.array([np.linalg.norm(p, axis=-1).mean(0) for p in pages])
                np.testing.assert_allclose(own, -(norms / norms.mean(0)).mean(1), rtol=1e-4)
            if name == "key_diversity":
                means = np.array([p.mean(0) for p in pages])
                every = means.mean(0)
                norms = np.linalg.norm(means, axis=-1) * np.linalg.norm(every, axis=-1)
                cosine = (means * every).sum(-1) / norms
                np.testing.assert_allclose(own, -cosine.mean(-1), atol=1e-3)
            if name == "attention":
                wanted = np.asarray(mass)[row, :, [c for c, _ in full(state, row)]].mean(1)
                np.testing.assert_allclose(own, wanted, rtol=1e-6)
            if name == "expected":
                np.testing.assert_allclose(np.sum(own), 1, rtol=1e-5)


@pytest.mark.slow
def test_layers_share_a_table_and_not_their_summaries():
    keys, values, query = tokens()
    pool = paged.init(SMALL, 60, B, 4, num_layers=2, summaries=True)
    pool, _ = reserve(pool, LENGTHS)
    for layer, factor in enumerate((1, -2)):
        pool = jaxkv.append(pool, factor * keys[:, :50], values[:, :50], LENGTHS, layer=layer)
    single = filled("q4")
    for layer, number in ((0, 3), (jnp.int32(0), 3)):
        found = jax.jit(functools.partial(jaxkv.attend, top_pages=number))(
            pool, query[:, :1], layer=layer
        )
        np.testing.assert_allclose(found, attend(single, query[:, :1], top_pages=3), atol=2e-6)
    scores = paged.scores(pool, "norm")
    kept = compress(pool, scores, 3)
    assert paged.scores(pool, "key_diversity").shape == scores.shape
    totals = np.asarray(paged.stats(kept).total_tokens)
    np.testing.assert_array_equal(totals[0], totals[1])
    assert (totals < LENGTHS).all()


@pytest.mark.slow
def test_a_decoding_step_copies_nothing():
    """Appending to a pool with summaries needs no more memory than without."""
    config = jaxkv.preset("q4", max_tokens=4096, num_kv_heads=K, head_dim=64)
    key = jnp.zeros((1, 1, K, 64))
    found = []
    for summaries in (False, True):
        pool = paged.init(config, 40, 1, summaries=summaries)
        step = jax.jit(jaxkv.append, donate_argnums=0).lower(pool, key, key).compile()
        found.append(step.memory_analysis().temp_size_in_bytes)
    assert found[1] < found[0] + 2**18
    assert found[1] < 2**20


def test_bad_input_says_what_was_wanted():
    state, query = filled("q4"), tokens()[2][:, :1]
    without = paged.init(SMALL, 20, B, 4)
    plain = jaxkv.init(SMALL, B)
    for match, call in {
        "no pages: make a pool": lambda: jaxkv.attend(plain, query, top_pages=2),
        "summaries=True": lambda: jaxkv.attend(without, query, top_pages=2),
        "top_pages=0": lambda: jaxkv.attend(state, query, top_pages=0),
        "does not read single pages": lambda: jaxkv.attend(
            state, query, top_pages=1, implementation="pallas"
        ),
        "must be one of 'recency'": lambda: paged.scores(state, "age"),
        "needs key=": lambda: paged.scores(state, "random"),
        "mass has shape None": lambda: paged.scores(state, "attention"),
        "queries has shape": lambda: paged.scores(state, "expected"),
        "have no summaries": lambda: paged.scores(without, "norm"),
        r"scores has shape \(2,\)": lambda: paged.compress(state, jnp.zeros(2), 1),
        "budget": lambda: paged.compress(state, paged.scores(state, "recency"), -1),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()
    refused = compress(state, paged.scores(state, "recency"), jnp.array([-1, 3]))
    np.testing.assert_array_equal(refused.status, [Status.OUT_OF_RANGE, 0])
    assert columns(refused, 0) == columns(state, 0)
