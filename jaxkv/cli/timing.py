"""What `jaxkv bench` times: steps of decoding on a full cache, a prompt, and the memory itself."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import jaxkv
from jaxkv.cli.common import progress
from jaxkv.plan import state_bytes

LARGE = 2**26
"""Floats whose sum is timed: 256 MiB, more than any cache of a processor."""

WARM = 3
"""Calls that are not counted."""

Step = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Task:
    """What is done to a cache."""

    heads: int  # of the query
    batch: int
    prompt: int  # tokens
    repeats: int

    def tokens(
        self, config: jaxkv.KvCacheConfig, count: int, heads: int | None = None
    ) -> jax.Array:
        """Random keys [B, count, K, H], or queries of so many heads."""
        sizes = (self.batch, count, heads or config.num_kv_heads, config.head_dim)
        return jax.random.normal(jax.random.key(count), sizes)


def of_cache(name: str, config: jaxkv.KvCacheConfig, task: Task) -> dict[str, Any]:
    """Milliseconds of the steps of one layer on a full cache, and seconds to compile them."""
    found: dict[str, Any] = {"bytes": state_bytes(config, None, task.batch), "compile": 0.0}
    state = full(config, task)
    for label, step in steps_of(config, task).items():
        progress(f"{name}: compiling {label}")
        start = time.perf_counter()
        compiled = jax.jit(step, donate_argnums=0).lower(state).compile()
        found["compile"] += time.perf_counter() - start
        progress(f"{name}: timing {label}")
        found[label], state = median(compiled, state, task.repeats)
    return found


def steps_of(config: jaxkv.KvCacheConfig, task: Task) -> dict[str, Step]:
    """Name -> a function of the state."""
    new, query = task.tokens(config, 1), task.tokens(config, 1, task.heads)
    prompt, asked = task.tokens(config, task.prompt), task.tokens(config, task.prompt, task.heads)

    def append(state: Any) -> Any:
        return jaxkv.append(state, new, new), jnp.zeros(())

    def attend(state: Any) -> Any:
        return state, jaxkv.attend(state, query)

    def both(state: Any) -> Any:
        state = jaxkv.append(state, new, new)
        return state, jaxkv.attend(state, query)

    def read(state: Any) -> Any:
        return jaxkv.prefill(jaxkv.clear(state), asked, prompt, prompt)

    return {"append": append, "attend": attend, "both": both, "prompt": read}


def full(config: jaxkv.KvCacheConfig, task: Task) -> jaxkv.CacheState:
    """A cache with all the tokens that it can hold."""
    chunk = task.tokens(config, min(512, config.max_tokens))
    fill = jax.jit(jaxkv.append, donate_argnums=0)
    state = jaxkv.init(config, task.batch)
    progress("compiling what fills the cache")
    for _ in range(-(-config.max_tokens // chunk.shape[1])):
        state = fill(state, chunk, chunk)
    return jax.block_until_ready(state)


def of_jax(config: jaxkv.KvCacheConfig, task: Task) -> dict[str, Any]:
    """JAX's own attention over the same tokens in bfloat16; there is nothing to append."""
    keys = task.tokens(config, config.max_tokens).astype(jnp.bfloat16)
    query = task.tokens(config, 1, task.heads).astype(jnp.bfloat16)
    values = keys + 1
    progress("jax.nn: compiling attend")
    start = time.perf_counter()
    attend = jax.jit(jax.nn.dot_product_attention).lower(query, keys, values).compile()
    compiled = time.perf_counter() - start
    progress("jax.nn: timing attend")
    elapsed, _ = median(lambda state: (state, attend(query, keys, values)), None, task.repeats)
    return {"bytes": 2 * keys.nbytes, "compile": compiled, "attend": elapsed}


def bandwidth(repeats: int) -> float:
    """GB/s that this device reads when it sums a large array."""
    progress("measuring the memory's bandwidth")
    large, add = jnp.ones(LARGE, jnp.float32), jax.jit(jnp.sum)
    elapsed, _ = median(lambda state: (state, add(large)), None, min(repeats, 10))
    return large.nbytes / elapsed / 1e6


def median(step: Step, state: Any, repeats: int) -> tuple[float, Any]:
    """Milliseconds of a call, and the state after all of them."""
    times = []
    for _ in range(repeats + WARM):
        start = time.perf_counter()
        state, _ = jax.block_until_ready(step(state))
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times[WARM:]), state
