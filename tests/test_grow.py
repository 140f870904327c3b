"""A grown cache holds the same tokens bit for bit, and goes on as one that was never smaller."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from cases import CASES, Case, random_query, random_tokens
from laws import append, attend, extend, gather, over, start

import jaxkv

GROWN = {
    name: CASES[name] for name in ("fp16_q4", "channel_keys", "bf16_q8_q4_batched_sinks", "q8")
}


def grown(case: Case, more: int = 12) -> jaxkv.KvCacheConfig:
    config = case.config
    return dataclasses.replace(config, max_tokens=config.max_tokens + more)


@pytest.mark.slow
@over(GROWN, slow=GROWN)
def test_nothing_moves_and_what_follows_is_kept_longer(
    case: Case, rng: np.random.Generator
) -> None:
    """Held tokens are the same bits; with all that was ever appended still held, the state is that
    of the larger cache from the start, and so is all that follows."""
    keys, values = random_tokens(rng, case, case.config.max_tokens + 12)
    few = case.config.max_tokens - 2
    before = extend(start(case), keys[:, :few], values[:, :few])
    after = jaxkv.grow(before, grown(case))
    for old, new in zip(gather(before), gather(after), strict=True):
        np.testing.assert_array_equal(old, np.asarray(new)[:, : old.shape[1]])
    large = jaxkv.init(grown(case), case.batch_size)
    large = extend(large, keys[:, :few], values[:, :few])
    for i in range(few, keys.shape[1]):
        token = keys[:, i : i + 1], values[:, i : i + 1]
        after, large = append(after, *token), append(large, *token)
    for new, wanted in zip(gather(after), gather(large), strict=True):
        np.testing.assert_array_equal(new, wanted)
    query = random_query(rng, case, 1)
    np.testing.assert_array_equal(attend(after, query), attend(large, query))


@over({"fp16_q4": CASES["fp16_q4"]}, slow=["fp16_q4"])
def test_what_was_evicted_stays_away(case: Case, rng: np.random.Generator) -> None:
    keys, values = random_tokens(rng, case, 3 * case.config.max_tokens + 5)
    before = extend(start(case), keys, values)
    after = jaxkv.grow(before, grown(case))
    for old, new in zip(gather(before), gather(after), strict=True):
        np.testing.assert_array_equal(old, np.asarray(new)[:, : old.shape[1]])
    assert (np.asarray(gather(after)[2])[:, before.config.max_tokens :] == -1).all()


@pytest.mark.slow
def test_a_stack_grows() -> None:
    config = jaxkv.KvCacheConfig(4, max_tokens=8, num_kv_heads=2, head_dim=8)
    x = jax.random.normal(jax.random.key(0), (2, 7, 2, 8))
    state = jaxkv.append(jaxkv.init(config, 2, num_layers=3), x, x, layer=1)
    after = jaxkv.grow(state, dataclasses.replace(config, max_tokens=16))
    alone = jaxkv.append(jaxkv.init(config, 2), x, x)
    alone = jaxkv.grow(alone, dataclasses.replace(config, max_tokens=16))
    for of_stack, own in zip(jaxkv.gather(after, layer=1), jaxkv.gather(alone), strict=True):
        np.testing.assert_array_equal(of_stack, own)
    assert jax.tree.map(np.shape, after) == jax.tree.map(
        np.shape, jaxkv.init(after.config, 2, num_layers=3)
    )


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"max_tokens": 7}, "larger"),
        ({"num_kv_heads": 1}, "no other change"),
        ({"store_precision": "q8"}, "no other change"),
    ],
    ids=str,
)
def test_other_changes_are_refused(change: dict[str, int], why: str) -> None:
    config = jaxkv.KvCacheConfig(4, max_tokens=8, num_kv_heads=2, head_dim=8)
    with pytest.raises(ValueError, match=why):
        jaxkv.grow(jaxkv.init(config), dataclasses.replace(config, **change))
    single = dataclasses.replace(config, tail_length=8)
    with pytest.raises(ValueError, match="adds a tier"):
        jaxkv.grow(jaxkv.init(single), dataclasses.replace(single, max_tokens=16))
