"""A pool of pages against a cache of rings: attention, capacity, what taking pages and moving rows
costs.

python examples/benchmarks/pages.py
python examples/benchmarks/pages.py --quick
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxkv
from jaxkv import paged

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
SIZES = (64, 128, 256)


def median(run: Callable[[], Any], times: int) -> float:
    """Milliseconds of a call."""
    jax.block_until_ready(run())
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - start)
    return 1e3 * statistics.median(seconds)


def attention(rows: int, tokens: int, times: int) -> dict[str, float]:
    """Decode attention of one row, or of rows of a quarter of the tokens to all of them."""
    config = jaxkv.KvCacheConfig(64, max_tokens=tokens, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM)
    x = jax.random.normal(jax.random.key(0), (rows, tokens, KV_HEADS, HEAD_DIM))
    query = jax.random.normal(jax.random.key(1), (rows, 1, HEADS, HEAD_DIM))
    lengths = np.linspace(tokens if rows == 1 else tokens // 4, tokens, rows).astype(np.int32)
    append, attend = jax.jit(jaxkv.append, donate_argnums=0), jax.jit(jaxkv.attend)
    found = {}
    for size in (None, *SIZES):
        if size is None:
            state = jaxkv.init(config, rows)
        else:
            state = paged.init(config, rows * (tokens // size + 1), rows, size)
            state, granted = jax.jit(paged.reserve, donate_argnums=0)(state, lengths)
            assert granted.all()
        state = append(state, x, x, lengths)
        found[f"pages of {size}" if size else "rings"] = median(lambda: attend(state, query), times)  # noqa: B023
    return found


def sparse(tokens: int, times: int) -> dict[str, float]:
    """Decode attention of one row that reads some of its pages for each kv head."""
    config = jaxkv.KvCacheConfig(64, max_tokens=tokens, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM)
    pages, chunk = tokens // paged.pool.PAGE_SIZE, min(tokens, 8192)
    state = paged.init(config, pages + 2, 1, summaries=True)
    state, granted = jax.jit(paged.reserve, donate_argnums=0)(state, tokens)
    assert granted.all()
    append = jax.jit(jaxkv.append, donate_argnums=0)
    for start in range(0, tokens, chunk):
        x = jax.random.normal(jax.random.key(start), (1, chunk, KV_HEADS, HEAD_DIM))
        state = append(state, x, x)
    query = jax.random.normal(jax.random.key(1), (1, 1, HEADS, HEAD_DIM))
    found = {}
    for share in (1, 2, 4, 8):
        read = {"top_pages": pages // share} if share > 1 else {}
        attend = jax.jit(functools.partial(jaxkv.attend, **read))
        found[f"1/{share}"] = median(lambda: attend(state, query), times)  # noqa: B023
    return found


def allocation(num_pages: int, times: int) -> dict[str, float]:
    """What taking, sharing and returning pages costs in a pool of so many pages and 32 rows."""
    config = jaxkv.KvCacheConfig(64, max_tokens=32768, num_kv_heads=1, head_dim=8)
    state, rows = paged.init(config, num_pages, 32, 64), np.arange(2, dtype=np.int32)
    held, found = [state], {}
    verbs: dict[str, Callable[[Any, int], Any]] = {
        "reserve": jax.jit(lambda s, i: paged.reserve(s, i)[0], donate_argnums=0),
        "fork": jax.jit(lambda s, i: paged.fork(s, rows[:1], rows[1:]), donate_argnums=0),
        "release": jax.jit(lambda s, i: paged.release(s, rows[1:]), donate_argnums=0),
    }
    held[0] = verbs["reserve"](held[0], jnp.int32(30000))
    for name, verb in verbs.items():

        def step(verb: Callable[[Any, int], Any] = verb) -> Any:
            held[0] = verb(held[0], 1)
            return held[0].pages

        found[name] = median(step, times)
    return found


def swapping(tokens: int, times: int, pooled: bool, num_layers: int = 16) -> dict[str, float]:
    """GB/s at which a row that holds so many tokens leaves a pool, or a cache of rings, and comes
    back, and of a plain copy of as many bytes: those of its pages, or of its rings."""
    config = jaxkv.KvCacheConfig(64, max_tokens=tokens, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM)
    lengths = np.array([tokens, 0], np.int32)
    if pooled:
        pages = tokens // paged.pool.PAGE_SIZE + 1
        state = paged.init(config, 2 * pages, 2, num_layers=num_layers)
        state, granted = jax.jit(paged.reserve, donate_argnums=0)(state, lengths)
        assert granted.all()
    else:
        state = jaxkv.init(config, 2, num_layers)
    x = jax.random.normal(jax.random.key(0), (2, tokens, KV_HEADS, HEAD_DIM))
    append = jax.jit(jaxkv.append, donate_argnums=0)
    for layer in range(num_layers):
        state = append(state, x, x, lengths, layer=np.int32(layer))
    seconds: dict[str, list[float]] = {"out": [], "back": [], "copy": []}
    for _ in range(times):
        marks = [time.perf_counter()]
        state, parked = paged.offload(state, 0)
        jax.block_until_ready((state, parked.row, parked.stored))
        marks.append(time.perf_counter())
        state, there = paged.restore(state, 0, parked)
        jax.block_until_ready(state)
        assert there
        marks.append(time.perf_counter())
        held = [x[: parked.num_pages or 1] for x in jax.tree.leaves(parked.stored)]
        marks.append(time.perf_counter())
        copied = [np.array(x) for x in (*held, *jax.tree.leaves(parked.row))]
        marks.append(time.perf_counter())
        for name, start, end in zip(seconds, (0, 1, 3), (1, 2, 4), strict=True):
            seconds[name].append(marks[end] - marks[start])
        size = sum(x.nbytes for x in copied)
    return {name: size / statistics.median(times) / 1e9 for name, times in seconds.items()}


def capacity(tokens: int = 2048) -> dict[str, float]:
    """How many sequences of so many tokens fit where one fits in pages of fp16."""

    def sequence(config: jaxkv.KvCacheConfig, size: int) -> int:
        def nbytes(num_pages: int, rows: int) -> int:
            state = jax.eval_shape(lambda: paged.init(config, num_pages, rows, size, 32))
            return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))

        one = nbytes(1, 1)
        pages = -(-(tokens - config.tail_length) // size)
        return pages * (nbytes(2, 1) - one) + nbytes(1, 2) - one

    sizes = {"max_tokens": tokens, "num_kv_heads": KV_HEADS, "head_dim": HEAD_DIM}
    fp16 = jaxkv.KvCacheConfig(0, store_precision=jaxkv.Precision.FP16, **sizes)
    q4 = jaxkv.KvCacheConfig(64, **sizes)
    return {f"pages of {size}": sequence(fp16, size) / sequence(q4, size) for size in SIZES}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer tokens and runs")
    quick = parser.parse_args().quick
    tokens, times = (2048, 3) if quick else (16384, 25)
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, Q4, a tail of 64, ms (medians)")
    for rows in (1, 8):
        print(f"attention, {rows} row(s) of {tokens:,}:", rounded(attention(rows, tokens, times)))
    for length in (tokens, 4 * tokens):
        print(f"the best pages of {length:,} tokens:", rounded(sparse(length, times)))
    print("pool of 100,000 pages, 32 rows:", rounded(allocation(100_000, 2 * times)))
    for length in (tokens // 4, tokens // 4 + 200):  # pages a power of two, and one more
        for pooled in (True, False):
            place = "a pool" if pooled else "rings"
            found = rounded(swapping(length, times, pooled))
            print(f"a row of {length:,} tokens out of {place} and back, GB/s:", found)
    print("sequences of 2,048 tokens for one in fp16 pages:", rounded(capacity()))


def rounded(found: dict[str, float]) -> str:
    return "; ".join(f"{name} {value:.3g}" for name, value in found.items())


if __name__ == "__main__":
    main()
