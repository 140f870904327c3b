"""Timing on a GPU, and the bfloat16 attention of others at the same sizes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from roofline import MODELS

WORKING_SET = 256e6  # bytes that a timed call goes over at least: five times the L2


def seconds(function: Callable[[], Any], per_call: int) -> float:
    """Median of seven groups of calls, per unit of `per_call`; the first calls compile."""
    for _ in range(2):
        jax.block_until_ready(function())
    start = time.perf_counter()
    jax.block_until_ready(function())
    repeats = max(1, int(0.05 / (time.perf_counter() - start)))
    times = []
    for _ in range(7):
        start = time.perf_counter()
        jax.block_until_ready([function() for _ in range(repeats)][-1])
        times.append((time.perf_counter() - start) / repeats / per_call)
    return statistics.median(times)


def layers_for(size: float) -> int:
    return max(1, min(16, int(-(-WORKING_SET // size))))


def query_of(batch: int, heads: int, head_dim: int) -> jax.Array:
    return jax.random.normal(jax.random.key(9), (batch, 1, heads, head_dim), jnp.bfloat16)


def timed_cudnn(model: str, batch: int, length: int) -> Callable[[], float]:
    """cuDNN's attention, compiled: what measures it."""
    heads, kv_heads, head_dim = MODELS[model]
    layers = layers_for(4.0 * head_dim * batch * length * kv_heads)
    keys = jax.random.split(jax.random.key(1), 2 * layers)
    arrays = [
        jax.random.normal(key, (batch, length, kv_heads, head_dim), jnp.bfloat16) for key in keys
    ]
    pairs = list(zip(arrays[::2], arrays[1::2], strict=True))
    step = jax.jit(
        lambda q, pairs: sum(
            jax.nn.dot_product_attention(q, *pair, implementation="cudnn") for pair in pairs
        )
    )
    query = query_of(batch, heads, head_dim)
    program = step.lower(query, pairs).compile()
    return lambda: seconds(lambda: program(query, pairs), layers)


def timed_torch(model: str, batch: int, length: int) -> Callable[[], float]:
    """torch's flash attention, the group folded into the queries (the faster way, and no mask is
    needed)."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    heads, kv_heads, head_dim = MODELS[model]
    layers = layers_for(4.0 * head_dim * batch * length * kv_heads)
    query = torch.randn(
        batch, kv_heads, heads // kv_heads, head_dim, dtype=torch.bfloat16, device="cuda"
    )
    pairs = [
        [
            torch.randn(batch, kv_heads, length, head_dim, dtype=torch.bfloat16, device="cuda")
            for _ in "kv"
        ]
        for _ in range(layers)
    ]
    graph = torch.cuda.CUDAGraph()
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), torch.no_grad():
        torch.nn.functional.scaled_dot_product_attention(query, *pairs[0])
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            for pair in pairs:
                torch.nn.functional.scaled_dot_product_attention(query, *pair)

    def run() -> None:
        graph.replay()
        torch.cuda.synchronize()

    return lambda: seconds(run, layers)
