"""What the object API adds to a call: `TwoTierKvCache` against the bare compiled functions,
donated, in the same run.

    python examples/benchmarks/objects.py [--quick] [--json]

Appends of one token, and attention of one token's query over a full cache of 4,096 tokens. Calls of
the two are taken in turns and each is waited for; medians. The same with NumPy arrays in and out,
where a copy and a wait are part of the contract, is given besides.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import jaxkv
from jaxkv.objects import TwoTierKvCache

CONFIG = (
    jaxkv.KvCacheConfig()
)  # 4,096 tokens, 8 kv heads of 128, a tail of 256 in fp16, the rest in Q4
NUM_HEADS = 32


class Bare:
    """The pure functions, as one would call them without the objects."""

    append_to = staticmethod(jax.jit(jaxkv.append, donate_argnums=0))
    attend_to = staticmethod(jax.jit(jaxkv.attend))

    def __init__(self, config: jaxkv.KvCacheConfig) -> None:
        self.state = jaxkv.init(config)

    def append(self, keys: jax.Array, values: jax.Array) -> None:
        self.state = self.append_to(self.state, keys[None], values[None])

    def one_token(self, keys: jax.Array, values: jax.Array) -> Any:
        self.state = self.append_to(self.state, keys, values)
        return self.state.end

    def attend(self, query: jax.Array) -> jax.Array:
        return self.attend_to(self.state, query)


def medians(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Microseconds of each call, taken in turns so that the machine treats them alike."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for index in range(repeats + 5):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            if index >= 5:
                times[name].append((time.perf_counter() - start) * 1e6)
    return {name: statistics.median(found) for name, found in times.items()}


def measure(repeats: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    heads, head_dim = CONFIG.num_kv_heads, CONFIG.head_dim
    shape = (CONFIG.max_tokens + 1, heads, head_dim)
    keys, values = (jax.device_put(rng.normal(size=shape).astype(np.float32)) for _ in range(2))
    bare, cache = Bare(CONFIG), TwoTierKvCache(CONFIG)
    bare.append(keys, values)
    cache.append(keys, values)

    new = [jax.device_put(np.asarray(x)[:1]) for x in (keys, values)]
    batched = [jax.device_put(np.asarray(x)[None]) for x in new]
    query = rng.normal(size=(NUM_HEADS, head_dim)).astype(np.float32)
    device_query, batched_query = jax.device_put(query), jax.device_put(query[None, None])
    host_new = [np.asarray(x) for x in new]

    def append(pair: list[Any]) -> Any:
        cache.append(*pair)
        return cache._record.state.end

    appends = {
        "bare": lambda: bare.one_token(*batched),
        "object": lambda: append(new),
        "object_numpy": lambda: append(host_new),
    }
    attends = {
        "bare": lambda: bare.attend(batched_query),
        "object": lambda: cache.attend(device_query),
        "object_numpy": lambda: cache.attend(query),
    }
    found: dict[str, Any] = {}
    for name, calls in (
        ("append_1", medians(appends, 10 * repeats)),
        ("attend_4096", medians(attends, repeats)),
    ):
        found[name] = {f"{who}_us": round(time_us, 1) for who, time_us in calls.items()}
        found[name]["ratio"] = round(calls["object"] / calls["bare"], 3)
    return {
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "repeats": repeats,
        **found,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of the calls, for tests")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    print("compiling, then timing appends and attends in turns", file=sys.stderr)
    found = measure(30 if args.quick else 300)
    if args.json:
        print(json.dumps(found))
        return
    print(f"jax {found['jax']} on {found['device']}, {found['repeats']} repeats, medians in us")
    for name in ("append_1", "attend_4096"):
        row = found[name]
        print(
            f"{name:12} bare {row['bare_us']:8} object {row['object_us']:8} ratio "
            f"{row['ratio']:.2f}  (NumPy {row['object_numpy_us']})"
        )


if __name__ == "__main__":
    main()
