"""The laws of the cache, each over the table in `cases.py`."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import (
    CASES,
    FEW,
    LONG,
    REWINDS,
    TOLERANCE,
    Array,
    Case,
    Entry,
    accumulate,
    attention_bound,
    is_searched,
    norms,
    quantization_bound,
    random_query,
    random_tokens,
    search_slack,
    tie_bound,
)
from jax import lax
from jax.sharding import PartitionSpec

import jaxkv
from jaxkv import CacheState, Precision, Status, reference
from jaxkv.kernels import xla
from jaxkv.reference import ReferenceState

gather = jax.jit(jaxkv.gather)
stats = jax.jit(jaxkv.stats)
prefill = jax.jit(jaxkv.prefill)
evict = jax.jit(jaxkv.evict)
rewind = jax.jit(jaxkv.rewind)
take_rows = jax.jit(jaxkv.take_rows)
clear = jax.jit(jaxkv.clear)
_append = jax.jit(jaxkv.append)
_attend = jax.jit(jaxkv.attend)

Contents = tuple[Array, Array, Array]  # keys, values and positions, as `gather` gives them


def over(cases: dict[str, Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases.values(), ids=cases)


def append(state: CacheState, keys: Array, values: Array, lengths: Any = None) -> CacheState:
    """The compiled append; always with lengths, so that there is one program for each shape."""
    lengths = keys.shape[1] if lengths is None else lengths
    return _append(state, keys, values, np.broadcast_to(lengths, len(keys)).astype(np.int32))


def attend(state: CacheState, query: Array, lengths: Any = None, scale: float | None = None) -> Array:
    """The compiled attend; always with lengths, as above."""
    lengths = query.shape[1] if lengths is None else lengths
    return np.asarray(_attend(state, query, scale, lengths=np.broadcast_to(lengths, len(query)).astype(np.int32)))


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
    """The states before and after each of a case's steps, and the tokens [B, T, K, H] that went in."""

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
    """Key and value [2, K, H] by position, as `gather` gives them."""
    keys, values, positions = (np.asarray(x)[row] for x in contents)
    return {int(p): np.stack([keys[i], values[i]]) for i, p in enumerate(positions) if p >= 0}


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
    """Both hold the same tokens in the same tiers, bit for bit. (Slots that hold nothing may differ.)"""
    chex.assert_trees_all_equal(gather(actual), gather(expected))
    chex.assert_trees_all_equal(stats(actual), stats(expected))


def assert_like_reference(state: CacheState, twin: ReferenceState) -> None:
    """The same positions in the same tiers, and the same tokens but for rounding ties."""
    contents, counts = gather(state), stats(state)
    np.testing.assert_array_equal(contents[2], reference.gather(twin)[2])
    names = {"total": "total", "hot": "tail", "cold": "store", "sinks": "sink", "warm": "warm"}
    for theirs, ours in names.items():
        np.testing.assert_array_equal(getattr(counts, f"{ours}_tokens"), reference.counts(twin, theirs), ours)
    for row in range(len(twin.rows)):
        expected, bounds = reference.held(twin, row), accumulate(twin, row, tie_bound)
        for position, pair in held(contents, row).items():
            assert_within(norms(pair - expected[position]), bounds[position])


def exact_attention(
    state: CacheState, query: Array, lengths: Any = None, raw: Sequence[dict[int, Array]] | None = None
) -> tuple[Array, Array]:
    """Attention in float64 over what `gather` gives, and `raw` tokens after it; and the rounding allowed [B, T, 1, 1]."""
    contents, out, bound = gather(state), np.zeros(query.shape), np.zeros((*query.shape[:2], 1, 1))
    for b, length in enumerate(np.broadcast_to(query.shape[1] if lengths is None else lengths, len(query))):
        new = {} if raw is None else raw[b]
        visible, end = held(contents, b) | new, int(state.end[b]) + len(new)
        for t in range(length):
            pairs = np.array([pair for p, pair in visible.items() if p <= end - length + t])
            out[b, t] = reference.exact_attention(query[b, t], pairs)
            bound[b, t] = attention_bound(query[b, t], pairs)
    return out, bound


def assert_attends(state: CacheState, query: Array, lengths: Any = None) -> None:
    """`attend` is exact attention over the dequantized tokens, but for rounding."""
    expected, bound = exact_attention(state, query, lengths)
    assert_within(np.abs(attend(state, query, lengths) - expected), bound)


# 1, 2. Positions and counts.


@over(CASES | LONG)
def test_positions_are_contiguous(case: Case) -> None:
    """What is held is a range that ends at the newest token, plus the sinks: as much as fits, oldest first."""
    sinks = case.config.sink_tokens
    for end, (_, _, positions) in zip(run(case).ends, run(case).contents, strict=True):
        expected = [*range(min(sinks, end)), *range(max(sinks, end - case.config.room), end)]
        expected += [-1] * (case.config.max_tokens - len(expected))
        np.testing.assert_array_equal(positions, [expected] * case.batch_size)


@over(CASES | LONG)
def test_counts_follow_the_rules(case: Case) -> None:
    """The store is evicted before the tail, which holds `tail_length`, or in batches less than a batch more."""
    config = case.config
    for end, state in zip(run(case).ends, run(case).states, strict=True):
        now, chain = stats(state), max(0, min(end - config.sink_tokens, config.room))
        assert (now.total_tokens == min(end, config.sink_tokens) + chain).all()
        if config.chain[0].name != "hot" or len(config.chain) == 1:
            continue
        assert (now.tail_tokens >= min(config.tail_length, chain)).all()
        assert (now.tail_tokens < config.tail_length + config.step).all()
        boundary = end - config.sink_tokens - now.tail_tokens
        assert ((boundary % config.step == 0) | (now.tail_tokens == chain)).all()


@over(CASES | LONG)
def test_contents_equal_the_reference(case: Case) -> None:
    """After the last step every token is in the tier, and reads back as, in the NumPy twin."""
    assert_like_reference(run(case).states[-1], run(case).twins[-1])


# 3. Quantized once.


@over(CASES)
def test_tokens_change_only_with_their_tier(case: Case) -> None:
    """A token reads back with the same bits as long as it stays in its tier."""
    before: dict[int, Array] = {}
    tiers_before: dict[int, str] = {}
    crossed = set()
    for state, contents in zip(run(case).states, run(case).contents, strict=True):
        now, tiers = held(contents, row=-1), tier_of(state, row=-1)
        for position in now.keys() & before.keys():
            if tiers[position] == tiers_before[position]:
                np.testing.assert_array_equal(now[position], before[position])
            else:
                crossed.add((tiers_before[position], tiers[position]))
        before, tiers_before = now, tiers
    assert len(crossed) >= len(case.config.chain) - 1  # every boundary has been crossed


@over({name: case for name, case in CASES.items() if case.config.chain[-1].group == 1})
def test_stored_words_do_not_change(case: Case) -> None:
    """The packed words of a token in the last tier stay as they are until its slot is due again."""
    last = case.config.chain[-1]
    for old, new in itertools.pairwise(run(case).states):
        number = {"hot": "tail_tokens", "warm": "warm_tokens", "cold": "store_tokens"}[last.name]
        stop = old.begin[0] + getattr(stats(old), number)[0]
        slots = (np.arange(new.begin[0], stop) - case.config.sink_tokens) % last.capacity
        for before, after in ((old.tiers[-1].keys, new.tiers[-1].keys), (old.tiers[-1].values, new.tiers[-1].values)):
            np.testing.assert_array_equal(before.data[0][:, slots], after.data[0][:, slots])


# 4, 5. However the tokens arrive, however the program is put together.


@over(CASES)
def test_append_of_many_is_many_appends(case: Case, rng: np.random.Generator) -> None:
    """append of T tokens == T appends of one, bit for bit."""
    state, query = start(case), random_query(rng, case)
    for t in range(case.num_tokens):
        state = append(state, run(case).keys[:, t : t + 1], run(case).values[:, t : t + 1])
    assert_same(state, run(case).states[-1])
    chex.assert_trees_all_equal(attend(state, query), attend(run(case).states[-1], query))


@over(CASES)
def test_ragged_rows(case: Case, rng: np.random.Generator) -> None:
    """append of lengths[b] tokens == append of just these, whatever stands behind them."""
    tokens = np.stack(random_tokens(rng, case, 60))
    state, done = start(case), np.zeros(3, int)
    for _ in range(12):
        new, lengths = np.full_like(tokens[:, :, :5], np.nan), rng.integers(0, 6, 3)
        for b, length in enumerate(lengths):
            new[:, b, :length] = tokens[:, b, done[b] : done[b] + length]
        state, done = append(state, *new, lengths), done + lengths
    for b in range(3):
        row = np.broadcast_to(tokens[:, b : b + 1, : done[b]], (2, 3, done[b], *tokens.shape[3:]))
        alone = extend(start(case), *row)
        chex.assert_trees_all_equal(held(gather(state), b), held(gather(alone), b))
        assert tier_of(state, b) == tier_of(alone, b)


@pytest.mark.slow
@over({name: FEW[name] for name in ("bf16_q4_all_heads", "channel_keys", "fp32_q8_q4")})
def test_jit_changes_nothing(case: Case, rng: np.random.Generator) -> None:
    """jit == no jit: the same bits are stored, and outputs are equal but for rounding."""
    keys, values = random_tokens(rng, case, 12)
    plain, compiled, query = start(case), start(case), random_query(rng, case, 1)
    for first, size in ((0, 7), (7, 5)):
        new = keys[:, first : first + size], values[:, first : first + size]
        plain, compiled = jaxkv.append(plain, *map(jnp.asarray, new)), append(compiled, *new)
    assert_same(plain, compiled)
    chex.assert_trees_all_equal(jaxkv.gather(plain), gather(plain))
    chex.assert_trees_all_close(jaxkv.stats(plain), stats(plain), rtol=2 * TOLERANCE["float32"])
    expected, bound = exact_attention(plain, query)
    assert_within(np.abs(np.asarray(jaxkv.attend(plain, query)) - expected), bound)


@over(FEW)
def test_scan_is_a_loop(case: Case, rng: np.random.Generator) -> None:
    """Steps of append and attend in a scan, the state in its carry == the same steps one by one."""
    keys, values = (np.moveaxis(x, 1, 0)[:, :, None] for x in random_tokens(rng, case, 24))
    queries = np.stack([random_query(rng, case, 1) for _ in range(24)])

    def step(state: CacheState, new: tuple[Array, Array, Array]) -> tuple[CacheState, jax.Array]:
        state = jaxkv.append(state, new[0], new[1])
        return state, jaxkv.attend(state, new[2])

    scanned, outs = jax.jit(functools.partial(lax.scan, step))(start(case), (keys, values, queries))
    looped = start(case)
    for key, value, query, out in zip(keys, values, queries, outs, strict=True):
        looped = append(looped, key, value)
        expected, bound = exact_attention(looped, query)
        assert_within(np.abs(out - expected), bound)
    assert_same(scanned, looped)


@over(CASES)
def test_rows_do_not_see_each_other(case: Case) -> None:
    """A row stores and gives the same bits whatever the others hold: other tokens, other lengths, NaN."""
    first_row = [x[:1] for x in random_tokens(np.random.default_rng(0), case, 30)]
    query, results = random_query(np.random.default_rng(0), case), []
    for seed in (1, 2):
        rng, state = np.random.default_rng(seed), start(case)
        others = [x[1:] * (np.nan if seed == 2 else 1) for x in random_tokens(rng, case, 30)]
        keys, values = (np.concatenate(pair) for pair in zip(first_row, others, strict=True))
        for first in range(0, 30, 5):
            lengths = np.array([5, *rng.integers(0, 6, case.batch_size - 1)])
            state = append(state, keys[:, first : first + 5], values[:, first : first + 5], lengths)
        results.append([x[0] for x in (*gather(state), attend(state, query))])
    chex.assert_trees_all_equal(*results)


@over(FEW)
def test_batch_is_its_rows_alone(case: Case, rng: np.random.Generator) -> None:
    """A batch holds what its rows hold in batches of one, and attends to them alike but for rounding."""
    query, state = random_query(rng, case), run(case).states[-1]
    for b in range(case.batch_size):
        alone = extend(jaxkv.init(case.config, 1), run(case).keys[b : b + 1], run(case).values[b : b + 1])
        chex.assert_trees_all_equal([x[b] for x in gather(state)], [x[0] for x in gather(alone)])
        expected, bound = exact_attention(alone, query[b : b + 1])
        assert_within(np.abs(attend(state, query)[b] - expected[0]), bound[0])


@over(FEW)
def test_vmap_is_a_loop(case: Case, rng: np.random.Generator) -> None:
    """vmap over a stack of states == each by itself."""
    keys, values = np.stack([random_tokens(rng, case, 30) for _ in range(2)], axis=1)
    states = [extend(start(case), keys[i, :, :25], values[i, :, :25]) for i in range(2)]
    query = np.stack([random_query(rng, case, 1) for _ in range(2)])
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    mapped = jax.jit(jax.vmap(jaxkv.append))(stacked, keys[:, :, 25:], values[:, :, 25:])
    outs = jax.jit(jax.vmap(jaxkv.attend))(mapped, query)
    for i in range(2):
        alone = append(states[i], keys[i, :, 25:], values[i, :, 25:])
        assert_same(jax.tree.map(lambda leaf, i=i: leaf[i], mapped), alone)
        expected, bound = exact_attention(alone, query[i])
        assert_within(np.abs(outs[i] - expected), bound)


@over(FEW)
def test_shards_of_a_batch(case: Case, rng: np.random.Generator) -> None:
    """With the rows spread over devices, each device keeps its own, as one device would keep all."""
    case = dataclasses.replace(case, batch_size=4)
    keys, values = random_tokens(rng, case, 6)
    query, rows = random_query(rng, case, 1), PartitionSpec("rows")

    def step(state: CacheState, keys: Array, values: Array, query: Array) -> tuple[CacheState, jax.Array]:
        state = jaxkv.append(state, keys, values)
        return state, jaxkv.attend(state, query)

    mesh = jax.make_mesh((4,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=rows, out_specs=rows))
    state, alone = start(case), start(case)
    for _ in range(4):
        state, out = sharded(state, keys, values, query)
        alone = jax.jit(step)(alone, keys, values, query)[0]
    assert_same(jax.device_get(state), alone)
    expected, bound = exact_attention(alone, query)
    assert_within(np.abs(out - expected), bound)


# 6. Nothing about a state changes but its numbers.


VERBS: dict[str, Callable[..., CacheState]] = {
    "append": lambda state, new: jaxkv.append(state, new, new),
    "prefill": lambda state, new: jaxkv.prefill(state, new, new, new)[0],
    "migrate": lambda state, new: jaxkv.migrate(state),
    "evict": lambda state, new: jaxkv.evict(state, jnp.zeros((), jnp.int32) + 2),
    "rewind": lambda state, new: jaxkv.rewind(state, jnp.ones(state.batch_size, jnp.int32)),
    "clear": lambda state, new: jaxkv.clear(state),
    "take_rows": lambda state, new: jaxkv.take_rows(state, np.arange(state.batch_size)),
}


@over(FEW | REWINDS)
def test_shapes_never_change(case: Case) -> None:
    """Every verb returns the tree, the shapes and the dtypes that it got."""
    states = run(case).states
    chex.assert_trees_all_equal_shapes_and_dtypes(*states)
    new = run(case).keys[:, :3]
    for verb in VERBS.values():
        after = jax.eval_shape(verb, states[-1], new)
        chex.assert_trees_all_equal_structs(after, states[-1])
        chex.assert_trees_all_equal_shapes_and_dtypes(after, states[-1])
        weak = [leaf.weak_type for leaf in jax.tree.leaves(after)]
        assert not any(weak), "a weakly typed leaf would be a second program"


@over(FEW)
def test_one_trace_for_a_whole_run(case: Case) -> None:
    """Filling, wrapping, evicting, rewinding and clearing trace each verb once."""
    verbs = {}
    for name, verb in VERBS.items():
        verb.__name__ = name
        verbs[name] = jax.jit(chex.assert_max_traces(verb, n=1))
    state, new = start(case), run(case).keys[:, :3]
    for round_ in range(8):
        for name in ("append", "append", "append", "prefill", "evict", "rewind", "migrate", "take_rows"):
            state = verbs[name](state, new)
        if round_ == 5:
            state = verbs["clear"](state, new)
    assert not state.status.any()


# 7. What is not held has no influence.


def poisoned(state: CacheState, floating: float, word: int) -> CacheState:
    """A state with all its slots overwritten; what belongs to a row (positions, means, mirrors) stays."""

    def spoil(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        if path[-1].name not in ("data", "scale", "zero_point"):
            return leaf
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            most = jnp.finfo(leaf.dtype).max
            return jnp.full_like(leaf, jnp.clip(floating, -most, most))
        return jnp.full_like(leaf, word)

    return jax.tree_util.tree_map_with_path(spoil, state)


@pytest.mark.parametrize(("floating", "word"), [(np.nan, -1), (1e38, 0x55)], ids=["nan", "large"])
@over(CASES)
def test_empty_slots_never_reach_an_output(case: Case, floating: float, word: int, rng: np.random.Generator) -> None:
    """With NaN or large numbers in every empty slot, the same bits come out as with zeros."""
    clean, query = start(case), random_query(rng, case)
    dirty = poisoned(clean, floating, word)
    chex.assert_trees_all_equal(attend(dirty, query), np.zeros_like(query))
    keys, values = random_tokens(rng, case, 32)
    for first, size in ((0, 1), (1, 1), (2, 5), (7, 5), (12, 5), (17, 5), (22, 5), (27, 5)):
        new = keys[:, first : first + size], values[:, first : first + size]
        clean, dirty = append(clean, *new), append(dirty, *new)
        assert_same(dirty, clean)
        chex.assert_trees_all_equal(attend(dirty, query), attend(clean, query))


@over({name: case for name, case in CASES.items() if all(tier.group == 1 for tier in case.config.chain)})
def test_dropped_tokens_never_reach_an_output(case: Case, rng: np.random.Generator) -> None:
    """Tokens of NaN that were evicted, rewound, or cleared leave no trace."""
    keys, values = random_tokens(rng, case, 10)
    bad, query = np.full_like(keys[:, :5], np.nan), random_query(rng, case)
    lengths = np.full(case.batch_size, 5, np.int32)
    state = append(start(case), bad, bad)
    states = [clear(state), rewind(state, lengths)]
    if not case.config.sink_tokens:
        states.append(evict(state, lengths))
    for state in states:
        assert not state.status.any()
        chex.assert_trees_all_equal(attend(state, query), np.zeros_like(query))
        for first in (0, 5):
            state = append(state, keys[:, first : first + 5], values[:, first : first + 5])
            assert_attends(state, query)


def test_evicted_neighbours_do_not_spoil_a_group() -> None:
    """Tokens evicted before their group was quantized are still there to be quantized with it, in every tier."""
    case = CASES["fp32_q8_channel"]
    keys, values = random_tokens(np.random.default_rng(0), case, 30)
    state = poisoned(start(case), np.nan, -1)
    twin = reference.init(case.config)
    for first in range(0, 30, 5):
        new = keys[:, first : first + 5], values[:, first : first + 5]
        state, twin = append(state, *new), reference.append(twin, *new)
        if first == 5:
            state, twin = evict(state, np.int32([7])), reference.evict(twin, 7)
        assert_like_reference(state, twin)


# 8, 10. What attend computes.


@over(CASES | LONG)
def test_attend_is_exact_on_what_is_held(case: Case, rng: np.random.Generator) -> None:
    """attend == softmax attention in float64 over the dequantized tokens, to float32 rounding; causal, any T."""
    for state in run(case).states[:: max(1, len(case.steps) // 5)]:
        assert_attends(state, random_query(rng, case))
    for _ in range(3):
        assert_attends(run(case).states[-1], random_query(rng, case), rng.integers(0, 6, case.batch_size))
    if case.name in FEW | LONG:
        assert_attends(run(case).states[-1], random_query(rng, case, 1))


@over({name: CASES[name] for name in ("fp32", "q4", *FEW, "fp16_q2_batched")})
def test_attend_block_by_block(case: Case, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same where a tier is read in several blocks, also where the last one is not full."""
    monkeypatch.setattr(xla, "BLOCK", 5 if all(tier.group == 1 for tier in case.config.chain) else 8)
    query, blockwise = random_query(rng, case), jax.jit(lambda state, query: jaxkv.attend(state, query))
    for state in (*run(case).states[:4], run(case).states[-1]):
        expected, bound = exact_attention(state, query)
        assert_within(np.abs(np.asarray(blockwise(state, query)) - expected), bound)


@over(CASES | LONG)
def test_stored_tokens_are_near_the_raw_ones(case: Case) -> None:
    """A token read back is off by half a step of each tier that it has been in, and 16-bit rounding, at most."""
    contents, row = run(case).contents[-1], case.batch_size - 1
    bounds = accumulate(run(case).twins[-1], row, quantization_bound)
    for position, pair in held(contents, row).items():
        raw = np.stack([run(case).keys[row, position], run(case).values[row, position]])
        assert_within(norms(pair - raw), bounds[position])


@over({name: case for name, case in CASES.items() if is_searched(case.config.chain[-1].key)})
def test_search_is_no_worse_than_the_whole_range(case: Case) -> None:
    """Where scales are searched for, the squared error of a head is at most that of plain rounding (see the reference)."""
    row, spec, twin = 0, case.config.chain[-1], run(case).twins[-1]
    gains = []
    for position, pair in held(run(case).contents[-1], row).items():
        token = twin.rows[row].tokens[position]
        exact = all(isinstance(tier.key, Precision) for tier in case.config.chain[:-1])
        if len(token) == len(case.config.chain) + 1 and position >= case.config.sink_tokens and exact:
            entry = Entry(token[-2][:1], spec.key, twin.rows[row].mirrors[-1][0])
            plain, searched = norms(token[-1][0] - token[-2][0]), norms(pair[0] - token[-2][0])
            assert_within(searched, plain + search_slack(entry)[0])
            gains.append(np.mean(searched / plain))
    assert not gains or np.mean(gains) < 1


@over(CASES)
def test_attend_is_near_exact_attention(case: Case, rng: np.random.Generator) -> None:
    """attend is off from attention over the raw tokens by no more than their quantization explains.

    If scores move by at most e, weights change by a factor within exp(-2 e) .. exp(2 e). A head's output is then off by
    the largest error of a value, plus exp(2 e) - 1 times the largest value (all as lengths of vectors).
    """
    row, head_dim = case.batch_size - 1, case.config.head_dim
    bounds = accumulate(run(case).twins[-1], row, quantization_bound)
    positions = list(bounds)
    raw = np.stack([run(case).keys[row, positions], run(case).values[row, positions]], axis=1)
    key_error, value_error = np.max(list(bounds.values()), axis=0)  # [K]
    query = random_query(rng, case)
    moved = head_dim**-0.5 * norms(query[row, -1]).max() * max(key_error.max(), 1e-7)
    query *= min(1, 0.05 / moved)  # keeps the bound small enough to say something
    error = norms(attend(run(case).states[-1], query)[row, -1] - reference.exact_attention(query[row, -1], raw))
    from_scores = np.expm1(2 * min(moved, 0.05)) * norms(raw[:, 1]).max()
    assert_within(error, value_error.max() + from_scores + attention_bound(query[row, -1], raw) * head_dim**0.5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_output_has_the_dtype_of_the_query(dtype: Any, rng: np.random.Generator) -> None:
    """Attention is computed in float32 and rounded once; half-precision keys and values are taken as they are."""
    case = CASES["fp16_q4"]
    query = random_query(rng, case).astype(dtype)
    out = attend(run(case).states[-1], query)
    assert out.dtype == dtype
    expected, bound = exact_attention(run(case).states[-1], query.astype(np.float32))
    rounding = TOLERANCE[jnp.dtype(dtype).name] * np.abs(expected)
    assert_within(np.abs(out.astype(np.float64) - expected), bound + rounding)
    keys, values = (x.astype(dtype) for x in random_tokens(rng, case, 5))
    widened = keys.astype(np.float32), values.astype(np.float32)
    assert_same(append(start(case), keys, values), append(start(case), *widened))


@over(FEW)
def test_scale_of_the_scores(case: Case, rng: np.random.Generator) -> None:
    """scale=s is the default scale with a query s * sqrt(H) times as long."""
    query, state = random_query(rng, case), run(case).states[-1]
    longer = (query * 0.5 * case.config.head_dim**0.5).astype(np.float32)
    expected, bound = exact_attention(state, longer)
    assert_within(np.abs(attend(state, query, scale=0.5) - expected), 2 * bound)


@over(FEW)
def test_prefill_attends_to_raw_tokens(case: Case, rng: np.random.Generator) -> None:
    """prefill == exact attention over what was held and the unrounded new tokens, then append."""
    query = random_query(rng, case)
    for state in (run(case).states[0], run(case).states[2], run(case).states[-1]):
        keys, values = random_tokens(rng, case, 5)
        lengths = rng.integers(0, 6, case.batch_size).astype(np.int32)
        raw = [{int(end) + t: np.stack([keys[b, t], values[b, t]]) for t in range(lengths[b])} for b, end in enumerate(state.end)]
        after, out = prefill(state, query, keys, values, lengths)
        expected, bound = exact_attention(state, query, lengths, raw)
        assert_within(np.abs(out - expected), bound)
        assert_same(after, append(state, keys, values, lengths))


@over(CASES)
def test_empty_attends_to_zeros(case: Case, rng: np.random.Generator) -> None:
    """An empty cache gives zeros, before any token and after `clear`."""
    query = random_query(rng, case)
    for state in (start(case), clear(run(case).states[-1])):
        chex.assert_trees_all_equal(attend(state, query), np.zeros_like(query))
        assert (gather(state)[2] == -1).all()
        assert not stats(state).total_tokens.any()


# The other verbs.


@over(CASES)
def test_clear_is_as_new(case: Case) -> None:
    """After `clear` the same tokens give the same bits as in a new cache."""
    again = clear(run(case).states[-1])
    for first, size in zip(run(case).ends, case.steps[:6], strict=False):
        again = append(again, run(case).keys[:, first : first + size], run(case).values[:, first : first + size])
    assert_same(again, run(case).states[len(case.steps[:6])])


@over(CASES)
def test_migrate_has_nothing_to_do(case: Case) -> None:
    """`append` leaves nothing due."""
    for state in run(case).states[-3:]:
        assert_same(jaxkv.migrate(state), state)


@over(CASES)
def test_evict_drops_the_oldest(case: Case, rng: np.random.Generator) -> None:
    """evict(n) drops the n oldest tokens after the sinks; the others keep their bits, and the cache goes on."""
    state, twin = run(case).states[-1], run(case).twins[-1]
    chain = stats(state).total_tokens - stats(state).sink_tokens
    for count in (np.zeros_like(chain), rng.integers(1, np.minimum(chain, 4) + 1), chain):
        fewer, before = evict(state, count.astype(np.int32)), held(gather(state), row=-1)
        kept = [p for p in before if p >= case.config.sink_tokens][int(count[-1]) :]
        wanted = {p: before[p] for p in (*range(min(case.config.sink_tokens, len(before))), *kept)}
        chex.assert_trees_all_equal(held(gather(fewer), row=-1), wanted)
        new = random_tokens(rng, case, 5)
        assert_like_reference(append(fewer, *new), reference.append(reference.evict(twin, count), *new))
        assert_attends(fewer, random_query(rng, case))


@over(REWINDS)
def test_rewind_within_its_length_leaves_no_trace(case: Case, rng: np.random.Generator) -> None:
    """append, then rewind of as many (each row its own number up to `rewind_length`) == nothing, bit for bit."""
    keys, values = random_tokens(rng, case, 60)
    most = case.config.rewind_length
    for end in range(18, 18 + 2 * case.config.step + 1):
        plain = extend(start(case), keys[:, :end], values[:, :end])
        depth = rng.integers(1, most + 1, case.batch_size).astype(np.int32)
        drafted = plain
        for t in range(most):
            drafted = append(drafted, *(x[:, :1] for x in random_tokens(rng, case, 1)), t < depth)
        drafted = rewind(drafted, depth)
        for first in range(end, end + 10, 5):
            assert_same(drafted, plain)
            new = keys[:, first : first + 5], values[:, first : first + 5]
            drafted, plain = append(drafted, *new), append(plain, *new)
        assert_same(drafted, plain)
        assert not drafted.status.any()


@over(CASES)
def test_deep_rewind_keeps_what_is_held(case: Case, rng: np.random.Generator) -> None:
    """Beyond its length, rewind(n) drops the n newest and nothing else; evicted tokens stay away; the cache goes on."""
    for state, twin in ((run(case).states[3], run(case).twins[3]), (run(case).states[-1], run(case).twins[-1])):
        for depth in (5, 8, int(stats(state).total_tokens.min()) - case.config.sink_tokens):
            before, end = held(gather(state), row=0), int(state.end[0])
            rewound = rewind(state, np.full(case.batch_size, depth, np.int32))
            try:
                expected = reference.rewind(twin, depth)
            except ValueError:
                assert rewound.status.all()
                assert_same(rewound, state)
                continue
            after = held(gather(rewound), row=0)
            assert not rewound.status.any()
            assert max(after, default=-1) == end - depth - 1 or not after
            assert after.keys() >= {p for p in before if p < end - depth}
            assert_like_reference(rewound, expected)
            new = random_tokens(rng, case, 5)
            assert_like_reference(append(rewound, *new), reference.append(expected, *new))


@over(CASES)
def test_take_rows(case: Case, rng: np.random.Generator) -> None:
    """Rows may be reordered, dropped and repeated; copies then go their own ways."""
    keys, values = random_tokens(rng, case, 5)
    state = append(run(case).states[-1], keys, values, np.arange(3) + 1)
    for order in ([2, 0, 1], [1, 1, 1], [2], [0, 2, 1, 0]):
        taken = take_rows(state, np.array(order))
        chex.assert_trees_all_equal(gather(taken), jax.tree.map(lambda x, rows=order: x[np.array(rows)], gather(state)))
    forked, one = take_rows(state, np.array([1, 1, 1])), append(state, keys, values)
    forked = append(forked, keys, values)
    assert_tier_and_bits(forked, one, row=1)
    assert not np.array_equal(forked_newest(forked, 0), forked_newest(forked, 2))


def assert_tier_and_bits(actual: CacheState, expected: CacheState, row: int) -> None:
    chex.assert_trees_all_equal(held(gather(actual), row), held(gather(expected), row))
    assert tier_of(actual, row) == tier_of(expected, row)


def forked_newest(state: CacheState, row: int) -> Array:
    return list(held(gather(state), row).values())[-1]


@over(FEW)
def test_layers_of_a_stack(case: Case, rng: np.random.Generator) -> None:
    """A scan over layers with the stacked state in the carry == a list of states, one per layer."""
    layers = 3
    stack = jaxkv.init(case.config, case.batch_size, num_layers=layers)
    states = [start(case) for _ in range(layers)]

    @jax.jit
    def step(stack: CacheState, keys: Array, values: Array, query: Array) -> tuple[CacheState, jax.Array]:
        def layer(stack: CacheState, xs: Any) -> tuple[CacheState, jax.Array]:
            index, key, value, query = xs
            stack = jaxkv.append(stack, key, value, layer=index)
            return stack, jaxkv.attend(stack, query, layer=index)

        return lax.scan(layer, stack, (jnp.arange(layers), keys, values, query))

    for _ in range(24):
        keys, values = np.stack([random_tokens(rng, case, 1) for _ in range(layers)], axis=1)
        query = np.stack([random_query(rng, case, 1) for _ in range(layers)])
        stack, outs = step(stack, keys, values, query)
        states = [append(state, keys[i], values[i]) for i, state in enumerate(states)]
    drop = np.full(case.batch_size, 2, np.int32)
    for change in (lambda state: state, lambda state: evict(state, drop), lambda state: take_rows(state, np.array([0]))):
        changed = change(stack)
        for i, state in enumerate(states):
            chex.assert_trees_all_equal(jax.tree.map(lambda x, i=i: x[i], gather(changed)), gather(change(state)))
            chex.assert_trees_all_equal(gather(changed, layer=i), gather(change(state)))
            chex.assert_trees_all_equal(stats(changed).tail_tokens[i], stats(change(state)).tail_tokens)
    for i, state in enumerate(states):
        expected, bound = exact_attention(state, query[i])
        assert_within(np.abs(outs[i] - expected), bound)


def test_layers_prefill_one_by_one(rng: np.random.Generator) -> None:
    """prefill with `layer` fills that layer alone, int or traced."""
    case = CASES["fp16_q4"]
    stack = jaxkv.init(case.config, case.batch_size, num_layers=2)
    keys, values = random_tokens(rng, case, 5)
    query = random_query(rng, case)
    alone, expected = prefill(start(case), query, keys, values)
    for layer in (1, jnp.int32(1)):
        filled, out = prefill(stack, query, keys, values, layer=layer)
        chex.assert_trees_all_equal(jaxkv.gather(filled, layer=1), gather(alone))
        assert not stats(filled).total_tokens[0].any()
        chex.assert_trees_all_close(out, expected, atol=1e-5)


@over(CASES)
def test_bytes_are_the_devices(case: Case) -> None:
    """nbytes is what the arrays take; tail_bytes + store_bytes is their share behind the tokens held."""
    state = run(case).states[-1]
    config, now = case.config, stats(run(case).states[-1])
    assert jaxkv.nbytes(state) == sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    elements = config.num_kv_heads * config.head_dim
    fp16 = np.asarray(now.total_tokens).sum() * 4.0 * elements
    np.testing.assert_allclose(now.compression_ratio, fp16 / (now.tail_bytes + now.store_bytes), rtol=1e-6)
    if config.tail_length and not config.tail_precision.is_quantized:
        element = {Precision.FP32: 4}.get(config.tail_precision, 2)
        tokens = np.asarray(now.tail_tokens + now.sink_tokens).sum()
        np.testing.assert_allclose(now.tail_bytes, tokens * 2 * elements * element, rtol=1e-6)


# Refused inside compiled functions.


def test_refused_rows_stay_as_they_were(rng: np.random.Generator) -> None:
    """A count that is too large leaves its row alone and sets a bit that stays until `clear`; other rows go on."""
    case = CASES["fp16_q4"]
    state = extend(start(case), *random_tokens(rng, case, 10))
    for verb, bit in ((evict, Status.EVICT_TOO_MANY), (rewind, Status.REWIND_TOO_MANY)):
        after = verb(state, np.array([11, 10, 2], np.int32))
        np.testing.assert_array_equal(after.status, [bit, 0, 0])
        np.testing.assert_array_equal(stats(after).total_tokens, [10, 0, 8])
        chex.assert_trees_all_equal(held(gather(after), 0), held(gather(state), 0))
        again = append(after, *random_tokens(rng, case, 1))
        np.testing.assert_array_equal(again.status, [bit, 0, 0])
        np.testing.assert_array_equal(take_rows(again, np.array([2, 0])).status, [0, bit])
        assert not clear(again).status.any()


# Random sequences of verbs.


@dataclasses.dataclass
class Pair:
    """A state and its twin, changed together."""

    case: Case
    state: CacheState
    twin: ReferenceState
    refused: Array

    def append(self, size: int, lengths: Array, rng: np.random.Generator) -> None:
        keys, values = random_tokens(rng, self.case, size)
        self.state = append(self.state, keys, values, lengths)
        self.twin = reference.append(self.twin, keys, values, lengths)
        assert_attends(self.state, random_query(rng, self.case), lengths)

    def prefill(self, size: int, lengths: Array, rng: np.random.Generator) -> None:
        keys, values = random_tokens(rng, self.case, size)
        self.state, out = prefill(self.state, random_query(rng, self.case, size), keys, values, lengths)
        self.twin = reference.append(self.twin, keys, values, lengths)
        assert np.isfinite(out).all()

    def drop(self, ours: Callable[..., CacheState], theirs: Callable[..., ReferenceState], counts: Array) -> None:
        """evict or rewind; a row whose count the twin refuses is to stay as it was."""
        self.state = ours(self.state, counts.astype(np.int32))
        for b, count in enumerate(counts):
            try:
                theirs(reference.take_rows(self.twin, [b]), count)
            except ValueError:
                self.refused[b], counts[b] = True, 0
        self.twin = theirs(self.twin, counts)

    def take_rows(self, rows: Array) -> None:
        self.state, self.twin = take_rows(self.state, rows), reference.take_rows(self.twin, list(rows))
        self.refused = self.refused[rows]

    def clear(self) -> None:
        self.state, self.twin = clear(self.state), reference.clear(self.twin)
        self.refused[:] = False

    def check(self) -> None:
        np.testing.assert_array_equal(np.asarray(self.state.status) != 0, self.refused)
        assert_like_reference(self.state, self.twin)


RANDOM = [
    "fp16_q4",
    "fp32_q4_batched_sinks",
    "fp32_q8_q4",
    "fp32_q8_channel",
    "rewind_fp32_q8_q2_sinks",
    "rewind_channel",
    "q2_symmetric_sinks",
]


@pytest.mark.slow
@over({name: CASES[name] for name in RANDOM})
@hypothesis.settings(max_examples=15)
@hypothesis.given(data=st.data())
def test_random_verbs(case: Case, data: st.DataObject) -> None:
    """Any sequence of verbs leaves the state as the NumPy twin has it, and attends exactly to what it holds."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), "seed"))
    pair = Pair(case, start(case), reference.init(case.config, 3), np.zeros(3, bool))

    def numbers(most: int) -> Array:
        return np.array(data.draw(st.lists(st.integers(0, most), min_size=3, max_size=3), "numbers"))

    for _ in range(data.draw(st.integers(1, 20), "length")):
        verb = data.draw(st.sampled_from(["append"] * 4 + ["append5"] * 3 + ["prefill", "evict", "rewind", "rewind"] + ["rare"]))
        if verb == "append":
            pair.append(1, numbers(1), rng)
        elif verb == "append5":
            pair.append(5, numbers(5), rng)
        elif verb == "prefill":
            pair.prefill(5, numbers(5), rng)
        elif verb == "evict":
            pair.drop(evict, reference.evict, numbers(data.draw(st.sampled_from([2, 9]))))
        elif verb == "rewind":
            pair.drop(rewind, reference.rewind, numbers(data.draw(st.sampled_from([3, 9]))))
        elif data.draw(st.booleans(), "clear"):
            pair.clear()
        else:
            pair.take_rows(numbers(2))
        pair.check()
