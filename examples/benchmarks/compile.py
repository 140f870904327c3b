"""How long an unrolled model takes before its first decode step: tracing and lowering, and
compiling, beside a dense cache and beside the same layers in a scan.

    python examples/benchmarks/compile.py           # two minutes; writes results/compile.json
    python examples/benchmarks/compile.py --quick   # two layers, writes nothing

A layer is an append and an attention, nothing else. Everything is measured once, from a cold start,
without a persistent cache of compiled programs; XLA compiles with all cores.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from cpu_peers import machine, machine_line
from jax import lax
from tqdm import tqdm

import jaxkv

RESULTS = pathlib.Path(__file__).parent / "results" / "compile.json"
LAYERS, TOKENS, HEADS, KV_HEADS, HEAD_DIM = 32, 4096, 32, 8, 128
Program = tuple[Callable[..., Any], Any]


def shape(*sizes: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, jnp.bfloat16)


NEW = shape(1, 1, KV_HEADS, HEAD_DIM)
QUERY = shape(1, 1, HEADS, HEAD_DIM)


def ours(preset: str, layers: int, *, scanned: bool) -> Program:
    config = jaxkv.preset(preset, max_tokens=TOKENS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM)

    def unrolled(states: list[jaxkv.CacheState], query: jax.Array, new: jax.Array) -> Any:
        for index, state in enumerate(states):
            states[index] = jaxkv.append(state, new, new)
            query = jaxkv.attend(states[index], query)
        return states, query

    def scan(state: jaxkv.CacheState, query: jax.Array, new: jax.Array) -> Any:
        def layer(carry: Any, index: jax.Array) -> Any:
            state, query = carry
            state = jaxkv.append(state, new, new, layer=index)
            return (state, jaxkv.attend(state, query, layer=index)), None

        return lax.scan(layer, (state, query), jnp.arange(layers))[0]

    if scanned:
        return scan, jax.eval_shape(lambda: jaxkv.init(config, num_layers=layers))
    return unrolled, [jax.eval_shape(lambda: jaxkv.init(config)) for _ in range(layers)]


def dense(layers: int, *, scanned: bool) -> Program:
    """A plain cache of bfloat16 and `jax.nn`'s attention."""
    cache = [shape(1, TOKENS, KV_HEADS, HEAD_DIM)] * 2

    def attend(held: Any, query: jax.Array, new: jax.Array) -> Any:
        held = [lax.dynamic_update_slice(x, new, (0, 7, 0, 0)) for x in held]
        return held, jax.nn.dot_product_attention(query, *held)

    def unrolled(caches: list[Any], query: jax.Array, new: jax.Array) -> Any:
        for index, held in enumerate(caches):
            caches[index], query = attend(held, query, new)
        return caches, query

    def scan(caches: Any, query: jax.Array, new: jax.Array) -> Any:
        def layer(query: jax.Array, held: Any) -> Any:
            return attend(held, query, new)[::-1]

        return lax.scan(layer, query, caches)

    stacked = [shape(layers, *x.shape) for x in cache]
    return (scan, stacked) if scanned else (unrolled, [list(cache) for _ in range(layers)])


def times(program: Program) -> dict[str, float]:
    step, cache = program
    jax.clear_caches()
    start = time.perf_counter()
    lowered = jax.jit(step, donate_argnums=0).lower(cache, QUERY, NEW)
    middle = time.perf_counter()
    compiled = lowered.compile()
    stop = time.perf_counter()
    return {
        "trace_and_lower_s": middle - start,
        "compile_s": stop - middle,
        "fusions": compiled.as_text().count(" fusion("),
        "temporaries_mb": compiled.memory_analysis().temp_size_in_bytes / 1e6,
    }


def run(quick: bool) -> dict[str, Any]:
    layers = 2 if quick else LAYERS
    programs: dict[str, Callable[..., Program]] = {
        "jaxkv Q4": lambda **how: ours("Q4", layers, **how),
        "jaxkv FP16": lambda **how: ours("FP16", layers, **how),
        "dense bf16": lambda **how: dense(layers, **how),
    }
    cases = [(name, scanned) for name in programs for scanned in (False, True)]
    found: dict[str, Any] = machine() | {"layers": layers, "programs": {}}
    jax.jit(jnp.sin).lower(1.0).compile()  # what starting XLA itself takes
    for name, scanned in tqdm(cases, "compile"):
        found["programs"].setdefault(name, {})["scanned" if scanned else "unrolled"] = times(
            programs[name](scanned=scanned)
        )
    return found


def show(found: dict[str, Any]) -> None:
    print(f"{machine_line(found)}; {found['layers']} layers; seconds")
    for name, ways in found["programs"].items():
        for way, row in ways.items():
            print(
                f"{name:12} {way:9} trace and lower {row['trace_and_lower_s']:6.2f}, "
                f"compile {row['compile_s']:6.2f}, {row['fusions']:,} fusions, "
                f"{row['temporaries_mb']:.1f} MB of temporaries"
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="toy sizes; writes nothing")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    args = parser.parse_args()
    found = run(args.quick) | {"command": "python examples/benchmarks/compile.py"}
    show(found)
    if not args.quick:
        args.out.parent.mkdir(exist_ok=True)
        args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
