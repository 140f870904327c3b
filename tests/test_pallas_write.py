"""The quantizing write without a GPU: interpreted it stores the same bits as the XLA path, and it
lowers for cuda."""

from __future__ import annotations

import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lowering import KERNEL, lowered

import jaxkv
from jaxkv import KvCacheConfig, Migration, Precision, QuantSpec
from jaxkv.chain import TierSpec
from jaxkv.codec import rotation
from jaxkv.kernels import dispatch, pallas_write
from jaxkv.tiers import tokens
from jaxkv.tiers.place import Index, Run
from jaxkv.tiers.segment import Tier
from jaxkv.tiers.tokens import Tokens

pytestmark = pytest.mark.slow

HEADS, CAPACITY, NUM_NEW = 4, 12, 5
SPECS = {
    "q8": QuantSpec(8, 64),
    "q8_symmetric": QuantSpec(8, 32, symmetric=True),
    "q4": QuantSpec(4, 64, rotate=True, align=True),
    "q4_centred": QuantSpec(4, 32, center=True),
    "q4_two_level": QuantSpec(4, 32, rotate=True, align=True, two_level=True),
    "q4_all_heads": QuantSpec(4, HEADS * 64),
    "q2": QuantSpec(2, 16, rotate=True),
    "q2_symmetric": QuantSpec(2, 64, symmetric=True),
}
REFUSED = {
    "channel": (QuantSpec(4, 32, axis="channel"), 4, 64, "one by one"),
    "dim96": (QuantSpec(4, 32), 4, 96, "powers of two"),
    "three_heads_together": (QuantSpec(4, 32, two_level=True), 3, 64, "powers of two"),
    "float": (Precision.FP16, 4, 64, "one by one"),
}


def held(rng: np.random.Generator, spec: QuantSpec, lead: tuple[int, ...]) -> Tokens:
    """A tier with something in every slot, and with a basis."""
    empty = tokens.allocate(spec, lead, HEADS, CAPACITY, 64)
    full = jax.tree.map(lambda a: jnp.asarray(rng.integers(1, 100, a.shape), a.dtype), empty)
    direction = jnp.asarray(rng.normal(size=(*lead, HEADS, 64)), jnp.float32)
    return dataclasses.replace(
        full,
        mean=None if full.mean is None else direction,
        mirror=None if full.mirror is None else rotation.mirror_of(direction),
    )


@pytest.mark.parametrize("layer", [None, 1])
@pytest.mark.parametrize("name", SPECS)
def test_stores_the_same_bits(name: str, layer: Index, rng: np.random.Generator) -> None:
    spec = SPECS[name]
    full = held(rng, spec, (2,) if layer is None else (3, 2))
    new = jnp.asarray(
        rng.normal(size=(2, NUM_NEW, HEADS, 64))
        * 10.0 ** rng.integers(-3, 3, (2, NUM_NEW, HEADS, 1)),
        jnp.float32,
    )
    start, first, stop = (
        jnp.asarray(x, jnp.int32) for x in ((CAPACITY - 2, 3), (0, 1), (NUM_NEW, NUM_NEW - 1))
    )
    run = Run(start, first, stop, NUM_NEW, CAPACITY)

    def portable(full: Tokens, new: jax.Array) -> Tokens:
        return tokens.write(
            full, spec, tokens.encode(tokens.basis_of(full, spec, layer), new), run, layer
        )

    def kernel(full: Tokens, new: jax.Array) -> Tokens:
        return pallas_write.write(full, spec, new, run, layer, interpret=True)

    assert pallas_write.refusal(spec, HEADS, 64) is None
    expected = jax.jit(portable)(full, new)
    chex.assert_trees_all_equal(jax.jit(kernel)(full, new), expected)
    assert not np.array_equal(expected.data, full.data)


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_refuses_what_it_cannot_write(case: tuple[Any, int, int, str]) -> None:
    fmt, heads, head_dim, words = case
    assert words in str(pallas_write.refusal(fmt, heads, head_dim))


@pytest.mark.parametrize("migration", Migration)
def test_a_cache_written_by_the_kernel_is_the_same(
    migration: Migration, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    """Prompts, steps and evictions over several wraps, with a warm tier of 8 bits before one of
    4."""
    config = KvCacheConfig(
        4,
        Precision.FP32,
        Precision.Q4,
        24,
        2,
        32,
        warm_length=4,
        warm_precision=Precision.Q8,
        migration=migration,
        migration_batch=4,
    )
    new = jnp.asarray(rng.normal(size=(2, 60, 2, 32)), jnp.float32)

    def appended_all() -> jaxkv.CacheState:
        append, state = jax.jit(lambda *args: jaxkv.append(*args)), jaxkv.init(config, 2)
        for start, size in ((0, 20), *((20 + i, 1) for i in range(30)), (50, 10)):
            state = append(
                state,
                new[:, start : start + size],
                new[:, start : start + size],
                jnp.asarray([size, size // 2]),
            )
        return state

    expected, calls = appended_all(), []

    def interpreted(
        held: Tokens, fmt: Any, new: jax.Array, run: Run, layer: Index, implementation: Any
    ) -> Tokens:
        if pallas_write.refusal(fmt, *new.shape[2:]):
            return tokens.write(
                held, fmt, tokens.encode(tokens.basis_of(held, fmt, layer), new), run, layer
            )
        calls.append(fmt)
        return pallas_write.write(held, fmt, new, run, layer, interpret=True)

    def each(tier: Tier, spec: TierSpec, new: Any, *rest: Any) -> Tier:
        sides = zip(tier.sides, spec.formats, new, strict=True)
        return Tier(*(interpreted(*side, *rest) for side in sides))

    monkeypatch.setattr(dispatch, "write_sides", each)
    chex.assert_trees_all_equal(appended_all(), expected)
    assert {spec.bits for spec in calls} == {4, 8}


def appended(config: KvCacheConfig) -> Any:
    state = jax.eval_shape(lambda: jaxkv.init(config, 2))
    new = jax.ShapeDtypeStruct((2, 1, config.num_kv_heads, config.head_dim), jnp.bfloat16)
    return (lambda *args: jaxkv.append(*args)), state, new, new


@pytest.mark.parametrize("precision", ["q8", "q4", "q4k", "q2"])
def test_append_lowers_for_cuda_with_one_kernel_a_side(precision: str, gpu: None) -> None:
    step = appended(
        KvCacheConfig(16, max_tokens=4096, num_kv_heads=2, head_dim=128, store_precision=precision)
    )
    assert lowered(*step).count(KERNEL) == 2
    assert KERNEL not in lowered(*step, platform="cpu")
    step, *rest = step
    assert KERNEL not in lowered(lambda *args: jaxkv.append(*args, implementation="xla"), *rest)
    assert (
        lowered(
            jax.vmap(step),
            *(
                jax.tree.map(lambda a: jax.ShapeDtypeStruct((3, *a.shape), a.dtype), x)
                for x in rest
            ),
        ).count(KERNEL)
        == 2
    )


def test_append_lowers_for_cuda_without_the_kernel_where_it_cannot_write(gpu: None) -> None:
    assert KERNEL not in lowered(
        *appended(KvCacheConfig(16, max_tokens=4096, num_kv_heads=2, head_dim=96))
    )
    huge = appended(KvCacheConfig(16, max_tokens=13_000_000, num_kv_heads=2, head_dim=128))
    assert KERNEL not in lowered(*huge)
