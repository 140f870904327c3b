"""The GPU kernel without a GPU: interpreted it equals the XLA path, it lowers for cuda, and nobody
who has no GPU meets it.

The cases hold random words in every slot, so nothing depends on how tokens are quantized; slots of
no token are poisoned.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lowering import KERNEL, lowered

from jaxkv import (
    CacheState,
    KvCacheConfig,
    Migration,
    Precision,
    QuantSpec,
    attend,
    codec,
    init,
    paged,
    softmax,
)
from jaxkv.chain import TierSpec
from jaxkv.kernels import dispatch, pallas_gpu, xla
from jaxkv.kernels.pallas_codes import side
from jaxkv.kernels.pallas_kernel import Plan, steps
from jaxkv.kernels.queries import Queries
from jaxkv.scoring import Scoring
from jaxkv.softmax import Partial
from jaxkv.tiers import allocation, tokens
from jaxkv.tiers.segment import Segment, Tier
from jaxkv.tiers.tokens import Tokens

pytestmark = pytest.mark.slow

SMALL = pallas_gpu.Tuning(slots=32, programs=12)  # several blocks and splits in few slots
UNIT_OF_QUERIES = 2.0**-3  # queries come in multiples of a power of two
UNIT = 2.0**-17  # of each factor: what two bfloat16 terms leave out
HEADS, LENGTH = 2, 150


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    key: Any
    value: Any
    head_dim: int
    group: int = 4  # queries of a kv head
    queries: int = 1
    capacity: int = LENGTH
    scoring: Scoring = dataclasses.field(default_factory=Scoring)


def channel(bits: int, group: int, **rest: Any) -> QuantSpec:
    return QuantSpec(bits, group, axis="channel", **rest)


FP32, FP16, BF16 = Precision.FP32, Precision.FP16, Precision.BF16
CASES = [
    Case("q8_dim64_mha", QuantSpec(8, 64), QuantSpec(8, 64), 64, group=1),
    Case("q8_dim80_two_tiles_a_head", QuantSpec(8, 40), QuantSpec(8, 80), 80, group=2),
    Case("q4_dim128", QuantSpec(4, 64), QuantSpec(4, 64), 128, capacity=160),
    Case("q4_dim96_symmetric", QuantSpec(4, 32, symmetric=True), QuantSpec(4, 48, symmetric=True), 96, group=3),
    Case("q4_dim256_mqa", QuantSpec(4, 64), QuantSpec(4, 128), 256, group=16),
    Case("q4_all_heads", QuantSpec(4, HEADS * 64), QuantSpec(4, 32), 64),
    Case("q4_two_level", QuantSpec(4, 32, two_level=True), QuantSpec(2, 32, two_level=True), 64),
    Case("two_level_groups_smaller_than_a_tile", QuantSpec(4, 4, two_level=True), QuantSpec(4, 64), 64),
    Case("q2_dim80", QuantSpec(2, 40), QuantSpec(2, 40), 80, group=8),
    Case("q2_dim128_symmetric", QuantSpec(2, 64, symmetric=True), QuantSpec(2, 32), 128, group=5),
    Case("groups_smaller_than_a_tile", QuantSpec(4, 4), QuantSpec(8, 2, symmetric=True), 64),
    Case("channel_keys", channel(4, 32), QuantSpec(8, 64), 64, capacity=160),
    Case("channel_both", channel(2, 8, symmetric=True), channel(8, 4), 96, capacity=152),
    Case("fp16", FP16, FP16, 80),
    Case("bf16", BF16, BF16, 128, group=8),
    Case("fp32_bf16", FP32, BF16, 96, group=2),
    Case("causal_two_chunks", QuantSpec(4, 32), QuantSpec(4, 32), 64, queries=5),
    Case("causal_channel", channel(4, 32), QuantSpec(2, 32), 64, queries=3, capacity=160),
    Case("window", QuantSpec(4, 32), QuantSpec(8, 64), 64, queries=3, scoring=Scoring(window=40)),
    Case("not_causal", BF16, QuantSpec(4, 32), 64, queries=2, scoring=Scoring(causal=False)),
]  # fmt: skip


def held(
    rng: np.random.Generator, fmt: Any, case: Case, layers: int | None, empty: np.ndarray
) -> Tokens:
    """Random tokens of a tier; NaN wherever the format can hold it in the slots `empty` [B, S]."""
    lead = (len(empty),) if layers is None else (layers, len(empty))
    blank = tokens.allocate(fmt, lead, HEADS, case.capacity, case.head_dim)
    by_slot = empty[:, None, None]
    if isinstance(fmt, Precision):
        x = np.where(empty[:, None, :, None], np.nan, rng.normal(size=blank.data.shape))
        return Tokens(tokens.encode(tokens.Basis(fmt), jnp.asarray(x, jnp.float32)))
    if fmt.axis == "channel":
        by_slot = empty.reshape(len(empty), -1, fmt.group_size).all(-1)[:, None, :, None]

    def fill(name: str) -> Any:
        array = getattr(blank, name)
        if array is None:
            return None
        if array.dtype in (jnp.int8, jnp.uint8):
            return jnp.asarray(rng.integers(0, 256, array.shape), jnp.uint8).astype(array.dtype)
        small = rng.uniform(0.5, 1.5, array.shape)
        if name == "zero_point":
            return jnp.asarray(np.where(by_slot, np.nan, -small * 2 ** (fmt.bits - 1)), jnp.float16)
        small *= 2.0**-8 if name.endswith("unit") else 2.0 / 2**fmt.bits
        bits = np.where(by_slot, np.nan, small).astype(np.float32).view(np.uint32) >> 15
        return jnp.asarray(bits, codec.SCALE_DTYPE)

    return Tokens(
        **{
            field.name: fill(field.name)
            for field in dataclasses.fields(blank)
            if field.name not in (*tokens.BASIS, *tokens.LEARNT)
        }
    )


def segment(
    rng: np.random.Generator, case: Case, layers: int | None = None, offset: int = 0
) -> Segment:
    """Rows that wrap around the ring, fill a part of it, and hold nothing."""
    low, high = np.array([70, 13, 9]) + offset, np.array([70 + LENGTH, 40, 9]) + offset
    slot = np.arange(case.capacity)[None]
    position = high[:, None] - 1 - (high[:, None] - 1 - offset - slot) % case.capacity
    empty = position < low[:, None]
    spec = TierSpec("cold", LENGTH, case.capacity, offset, case.key, case.value)
    tier = Tier(*(held(rng, fmt, case, layers, empty) for fmt in (case.key, case.value)))
    return Segment(tier, spec, jnp.asarray(low, jnp.int32), jnp.asarray(high, jnp.int32))


def asked(rng: np.random.Generator, case: Case, part: Segment) -> tuple[jax.Array, jax.Array]:
    """Queries [B, K, G * T, H], scaled, and their positions [B, T]: the row's newest, and none for
    the second row's last."""
    query = (
        rng.normal(size=(3, HEADS, case.group * case.queries, case.head_dim)) * case.head_dim**-0.5
    )
    position = np.asarray(part.high)[:, None] - case.queries + np.arange(case.queries)
    if case.queries > 1:
        position[1, -1] = -1
    return jnp.asarray(query, jnp.float32), jnp.asarray(position, jnp.int32)


def portable(
    part: Segment, query: jax.Array, position: jax.Array, scoring: Scoring, sinks: int, layer: Any
) -> Partial:
    return xla.partial_attention(
        dataclasses.replace(part, layer=layer), queries(query, position, scoring, sinks)
    )


def queries(query: jax.Array, position: jax.Array, scoring: Scoring, sinks: int) -> Queries:
    unit = jnp.full((*query.shape[:-1], 1), UNIT_OF_QUERIES)
    return Queries(query / UNIT_OF_QUERIES, unit, position, scoring, sinks)


def interpreted(
    part: Segment, query: jax.Array, position: jax.Array, scoring: Scoring, sinks: int, layer: Any
) -> Partial:
    own = queries(query, position, scoring, sinks)
    return pallas_gpu.partial_attention(
        part,
        own.folded,
        own.unit,
        dispatch.limits(own, part),
        layer,
        tuning=SMALL,
        interpret=True,
    )


def largest(fmt: Any, array: Tokens) -> float:
    """A bound on the elements of stored tokens and on what they are made of."""
    if isinstance(fmt, Precision):
        return float(jnp.nanmax(jnp.abs(tokens.floats(array.data))))
    scale, zero_point = codec.widened(array)
    top = float(jnp.nanmax(scale)) * 2**fmt.bits
    return top if zero_point is None else top + float(jnp.nanmax(jnp.abs(zero_point)))


def assert_close(
    found: Partial, wanted: Partial, case: Case, part: Segment, query: jax.Array
) -> None:
    """Errors of `UNIT` in each factor add up like a random walk; a score's error e changes outputs
    by 2 e of the largest value."""
    size = 2.0 * float(jnp.abs(query).max()) * largest(case.key, part.tier.keys)
    score = 4 * UNIT * np.sqrt(case.head_dim) * size
    value = largest(case.value, part.tier.values)
    outs = [np.asarray(softmax.normalize(p)) for p in (found, wanted)]
    np.testing.assert_allclose(*outs, rtol=0, atol=4 * (2 * score + UNIT) * value)
    sums = [np.asarray(softmax.log_sum_exp(p)) for p in (found, wanted)]
    np.testing.assert_array_equal(np.isfinite(sums[0]), np.isfinite(sums[1]))
    finite = np.isfinite(sums[1])
    np.testing.assert_allclose(sums[0][finite], sums[1][finite], rtol=0, atol=score + 1e-6)


def both(
    part: Segment,
    query: jax.Array,
    position: jax.Array,
    scoring: Scoring,
    sinks: int = 0,
    layer: Any = None,
) -> list[Any]:
    """The interpreted kernel's result, compiled in haste, and the XLA path's."""

    def compiled(function: Any, **options: Any) -> Any:
        def run(tier: Tier, low: jax.Array, high: jax.Array, *rest: Any) -> Partial:
            return function(
                dataclasses.replace(part, tier=tier, low=low, high=high),
                *rest[:2],
                scoring,
                sinks,
                rest[2],
            )

        return jax.jit(run, compiler_options=options)(
            part.tier, part.low, part.high, query, position, layer
        )

    return [compiled(interpreted, xla_backend_optimization_level=0), compiled(portable)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_the_xla_path(case: Case, rng: np.random.Generator) -> None:
    part = segment(rng, case)
    query, position = asked(rng, case, part)
    assert_close(*both(part, query, position, case.scoring), case, part, query)


def test_reads_the_layer_asked_for(rng: np.random.Generator) -> None:
    case = Case("layers", QuantSpec(4, 32), QuantSpec(4, 32, symmetric=True), 64)
    part = segment(rng, case, layers=3)
    query, position = asked(rng, case, part)
    assert_close(*both(part, query, position, case.scoring, layer=jnp.int32(2)), case, part, query)


@pytest.mark.parametrize("sinks", [0, 12])
def test_window_keeps_the_sinks(sinks: int, rng: np.random.Generator) -> None:
    """Positions that start at an offset, a window shorter than what is held, and a segment that
    holds the sinks as well."""
    case = Case("window", QuantSpec(4, 32), QuantSpec(8, 64), 64, queries=2)
    part = segment(rng, case, offset=3)
    query, position = asked(rng, case, part)
    scoring = Scoring(window=jnp.int32(20))
    if sinks:  # row 1 starts at 16: with a base below zero its tokens from 16 to 21 are the row's own 6 to 11
        part = dataclasses.replace(part, base=jnp.full((3,), -10, jnp.int32))
        position = jnp.where(position >= 0, position - 10, -1)
    found, wanted = both(part, query, position, scoring, sinks)
    assert_close(found, wanted, case, part, query)
    everything = portable(part, query, position, Scoring(), sinks, None)
    assert not np.allclose(
        softmax.normalize(everything), softmax.normalize(wanted), atol=1e-3
    )  # the window matters here


@pytest.mark.parametrize("page_size", [32, 48])
@pytest.mark.parametrize("case", [CASES[i] for i in (2, 6, 11, 14)], ids=lambda case: case.name)
def test_reads_pages_through_the_table(
    case: Case, page_size: int, rng: np.random.Generator
) -> None:
    """Whole blocks of pages in any order; pages in the middle gone, and rows without any."""
    group = max(getattr(fmt, "group_size", 1) or 1 for fmt in (case.key, case.value))
    if "channel" in case.name and page_size % group:
        page_size *= 2
    low, high = jnp.array([70, 13, 9], jnp.int32), jnp.array([70 + LENGTH, 40, 9], jnp.int32)
    pages = allocation.empty(20, 3, LENGTH, page_size, 0)
    pages, granted, *_ = allocation.take(pages, low, high)
    assert np.asarray(granted).all()
    middle = (pages.first > 100) & (pages.first < 100 + 2 * page_size)
    pages = allocation.keep(pages, ~middle)
    stored = dataclasses.replace(case, capacity=page_size)
    empty = np.ones((21, page_size), bool)
    for row in range(3):
        for page, first in zip(
            np.asarray(pages.table[row]), np.asarray(pages.first[row]), strict=True
        ):
            at = first + np.arange(page_size)
            empty[page if page >= 0 else 20] = (page < 0) | (at < low[row]) | (at >= high[row])
    sides = (held(rng, fmt, stored, None, empty) for fmt in (case.key, case.value))
    spec = TierSpec("cold", LENGTH, pages.capacity, 0, case.key, case.value)
    part = Segment(Tier(*sides), spec, low, high, pages=pages)
    query, position = asked(rng, case, part)
    found, wanted = both(part, query, position, case.scoring)
    assert_close(found, wanted, case, part, query)
    assert np.isfinite(np.asarray(softmax.log_sum_exp(wanted))).any()


def test_splits_share_the_blocks_that_hold_tokens() -> None:
    """Every block with tokens belongs to one split, those without to none, and no split has more
    than its share."""
    case = CASES[0]
    ranges = ((0, 0), (5, 1), (40, 64), (100, 37), (149, 2), (31, 34))
    for capacity, splits, (low, held_now) in itertools.product((64, 150), (1, 3, 7), ranges):
        sides = side(case.key, 64), side(case.value, 64)
        plan = Plan(
            *sides,
            capacity=capacity,
            offset=5,
            rows=8,
            slots=16,
            splits=splits,
            windowed=False,
            layered=False,
        )
        shares = [
            steps(plan, jnp.int32(low + 5), jnp.int32(low + 5 + held_now), jnp.int32(i))
            for i in range(splits)
        ]
        visited = [int(step) for start, stop in shares for step in range(int(start), int(stop))]
        slots = {(low + i) % capacity for i in range(held_now)}
        blocks = {slot // 16 for slot in slots}
        first = low % capacity // 16
        assert {(first + step) % plan.blocks for step in visited} == blocks
        assert len(visited) == len(set(visited)) == len(blocks)
        assert all(int(stop) - int(start) <= -(-len(blocks) // splits) for start, stop in shares)


# Lowering for a GPU from a machine that has none.


def attended(config: KvCacheConfig, implementation: dispatch.Implementation, **options: Any) -> Any:
    def step(state: CacheState, query: jax.Array) -> jax.Array:
        return attend(state, query, implementation=implementation, **options)

    state = jax.eval_shape(lambda: init(config, 2))
    return step, state, jax.ShapeDtypeStruct((2, 2, 8, config.head_dim), jnp.bfloat16)


GPU_CONFIGS = {
    "q4": KvCacheConfig(max_tokens=4096, num_kv_heads=2, head_dim=128, store_precision=Precision.Q4),
    "q8_dim80": KvCacheConfig(max_tokens=4096, num_kv_heads=2, head_dim=80, store_precision=Precision.Q8, sink_tokens=4),
    "q2_dim64": KvCacheConfig(max_tokens=4096, num_kv_heads=2, head_dim=64, store_precision=Precision.Q2, tail_precision=BF16),
    "q4k_dim256": KvCacheConfig(max_tokens=4096, num_kv_heads=2, head_dim=256, store_precision=Precision.Q4K, tail_precision=FP32),
    "channel_keys": KvCacheConfig(
        max_tokens=4096, num_kv_heads=2, head_dim=96, key_quant=channel(4, 32), value_quant=QuantSpec(2, 32), migration=Migration.BATCHED
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GPU_CONFIGS)
def test_lowers_for_cuda(name: str, gpu: None) -> None:
    """A walk for each tier; where heads are powers of two a merge for each, too, and one kernel for
    what a basis does to queries."""
    config = GPU_CONFIGS[name]
    parts = len(config.chain) + (config.sink_tokens > 0)
    turned = sum(isinstance(spec.key, QuantSpec) and spec.key.rotate for spec in config.chain)
    kernels = parts if config.head_dim & (config.head_dim - 1) else 2 * parts + turned
    assert lowered(*attended(config, "pallas", window=100)).count(KERNEL) == kernels


def test_a_pool_lowers_for_cuda(gpu: None) -> None:
    """By name; left to choose, pages are XLA's until the kernel has been measured there."""
    config = GPU_CONFIGS["q4"]
    _, _, query = attended(config, None)
    pool = jax.eval_shape(lambda: paged.init(config, 80, 2, 64))
    for implementation, kernels in (("pallas", 5), (None, 3)):
        step = functools.partial(attend, implementation=implementation)
        assert lowered(step, pool, query).count(KERNEL) == kernels


def test_none_chooses_by_platform(gpu: None) -> None:
    """With a GPU in sight the program holds the kernels for cuda and the XLA path for all others;
    what the walk cannot do leaves the one that turns queries."""
    step = attended(GPU_CONFIGS["q4"], None)
    assert lowered(*step).count(KERNEL) == 5
    assert KERNEL not in lowered(*step, platform="cpu")
    assert KERNEL not in lowered(*attended(GPU_CONFIGS["q4"], "xla"))
    assert lowered(*attended(GPU_CONFIGS["q4"], None, soft_cap=30.0)).count(KERNEL) == 1


def test_without_a_gpu_nothing_changes() -> None:
    """The programs for None and for "xla" are the same, text for text; the kernel is not even
    traced."""
    texts = []
    for implementation in (None, "xla"):
        step, *arguments = attended(GPU_CONFIGS["q4"], implementation)
        texts.append(jax.jit(step).lower(*arguments).as_text())
    assert texts[0] == texts[1]


def test_refuses_by_name_and_says_why(gpu: None) -> None:
    config = GPU_CONFIGS["q4"]
    for options, words in (({"soft_cap": 30.0}, "soft_cap"), ({"decay": 0.1}, "decay")):
        with pytest.raises(ValueError, match=f"implementation='pallas': .*{words}"):
            lowered(*attended(config, "pallas", **options))
    with pytest.raises(ValueError, match="head_dim=512"):
        lowered(*attended(dataclasses.replace(config, head_dim=512), "pallas"))
    with pytest.raises(ValueError, match="2 to 4 GiB"):
        lowered(*attended(dataclasses.replace(config, max_tokens=13_000_000), "pallas"))
    with pytest.raises(ValueError, match="must be 'xla', 'pallas' or None"):
        lowered(*attended(config, "triton"))  # type: ignore[arg-type]


def test_refuses_by_name_where_there_is_no_gpu() -> None:
    step, *arguments = attended(GPU_CONFIGS["q4"], "pallas")
    with pytest.raises(
        ValueError, match="implementation='pallas': it runs on NVIDIA GPUs, not on cpu"
    ):
        jax.jit(step).lower(*arguments)
