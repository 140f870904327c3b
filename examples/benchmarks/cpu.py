"""Decode attention on a CPU against other people's, quantized and not, at the same sizes in the
same run.

    python examples/benchmarks/cpu.py                  # ten minutes; writes results/cpu.json and cpu.png
    python examples/benchmarks/cpu.py --quick          # toy sizes, writes nothing
    python examples/benchmarks/cpu.py --ggml FOLDER    # where libggml*.so lie, if llama-cpp-python is not installed here

Our caches lie on a mesh with a device for every core, heads split between them (positions where
there is one kv head); Q4 once more on one device: XLA computes a program for one device on one core
as long as its operations are small. JAX's own attention uses all cores there. The systems take
turns, a few calls each, so that a noisy machine treats them alike; medians over all turns. Peers
that are not installed are left out (extra `bench`). Codes are random: no system's time depends on
what they are.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from cpu_caches import CACHES, filled, on_cores
from cpu_peers import MOST, device_name, peers_of
from tqdm import tqdm
from turns import medians

import jaxkv
from jaxkv import KvCacheConfig

RESULTS = pathlib.Path(__file__).parent / "results" / "cpu.json"
THREADS = 2
SHAPES = {
    "GQA 32/8/128": (1, 32, 8, 128),
    "MHA 32/32/64": (1, 32, 32, 64),
    "MQA 32/1/128": (1, 32, 1, 128),
    "GQA, 8 ragged rows": (8, 32, 8, 128),
    "MHA, 8 ragged rows": (8, 32, 32, 64),
    "MQA, 8 ragged rows": (8, 32, 1, 128),
}
jax.config.update("jax_num_cpu_devices", THREADS)
LENGTHS = {"GQA 32/8/128": (1024, 4096, 16384, 65536)}  # the others: 16,384 and 65,536
Call = Callable[[], Any]


def lengths_of(batch: int, length: int) -> np.ndarray:
    """Tokens per row: all alike, or from a quarter of `length` to all of it."""
    return (
        np.full(1, length)
        if batch == 1
        else np.linspace(length // 4, length, batch).astype(np.int32)
    )


def ours(shape: tuple[int, int, int, int], length: int, caches: Iterable[str]) -> dict[str, Call]:
    """Each cache with a device for every core; Q4 on one device, too."""
    batch, heads, kv_heads, head_dim = shape
    lengths, query = (
        lengths_of(batch, length),
        jax.random.normal(jax.random.key(0), (batch, 1, heads, head_dim)),
    )
    calls: dict[str, Call] = {}
    for name in caches:
        config = KvCacheConfig(
            max_tokens=length, num_kv_heads=kv_heads, head_dim=head_dim, **CACHES[name]
        )
        calls[f"jaxkv {name}"] = on_cores(config, lengths, query, THREADS)
        if name == "Q4":
            calls["jaxkv Q4, one device"] = on_cores(config, lengths, query, 1)
    return calls


def attention(
    shape: str, length: int, ggml: str | None, rounds: int, caches: Iterable[str]
) -> dict[str, float]:
    sizes = SHAPES[shape]
    caches = caches if sizes[0] * length <= MOST else ("Q4",)
    calls = ours(sizes, length, caches) | peers_of(
        *sizes, lengths_of(sizes[0], length), THREADS, ggml
    )
    return medians(calls, rounds)


def capacity(held: int, small: int, large: int) -> dict[str, dict[str, float]]:
    """Attention over `held` tokens, and an append of one token, in a small cache and in a large
    one."""
    states = {
        size: filled(KvCacheConfig(max_tokens=size), np.full(1, min(held, size)))
        for size in (small, large)
    }
    query = jax.random.normal(jax.random.key(0), (1, 1, 32, 128))
    new = jax.random.normal(jax.random.key(1), (1, 1, 8, 128))
    attend, append = jax.jit(jaxkv.attend), jax.jit(jaxkv.append, donate_argnums=0)
    found = {
        "attend": medians(
            {str(size): lambda state=state: attend(state, query) for size, state in states.items()}
        )
    }

    def step(size: int) -> Any:
        states[size] = append(states[size], new, new)
        return states[size].end

    return found | {"append": medians({str(size): lambda size=size: step(size) for size in states})}


def migrations(length: int, steps: int = 256) -> dict[str, dict[str, float]]:
    """An append of one token in both modes of migration: its mean over many, and the slowest of
    them."""
    new, found = jax.random.normal(jax.random.key(1), (1, 1, 8, 128)), {}
    append = jax.jit(jaxkv.append, donate_argnums=0)
    for mode in jaxkv.Migration:
        state, times = (
            filled(KvCacheConfig(max_tokens=length, migration=mode), np.full(1, length)),
            [],
        )
        for _ in range(steps + 8):
            start = time.perf_counter()
            state = jax.block_until_ready(append(state, new, new))
            times.append((time.perf_counter() - start) * 1e3)
        found[str(mode)] = {
            "mean": statistics.fmean(times[8:]),
            "median": statistics.median(times[8:]),
            "slowest": max(times[8:]),
        }
    return found


def temporaries(length: int, caches: Iterable[str]) -> dict[str, float]:
    """Megabytes that a compiled attention needs besides its arguments and its result."""
    found = {}
    for name in caches:
        state = jax.eval_shape(
            lambda fields=CACHES[name]: jaxkv.init(KvCacheConfig(max_tokens=length, **fields))
        )
        query = jax.ShapeDtypeStruct((1, 1, 32, 128), jnp.float32)
        found[name] = (
            jax.jit(jaxkv.attend).lower(state, query).compile().memory_analysis().temp_size_in_bytes
            / 1e6
        )
    return found


def run(quick: bool, ggml: str | None) -> dict[str, Any]:
    sizes = [(shape, length) for shape in SHAPES for length in LENGTHS.get(shape, (16384, 65536))]
    sizes, rounds, caches = (
        ([(next(iter(SHAPES)), 512)], 1, ("Q4",)) if quick else (sizes, 5, tuple(CACHES))
    )
    found: dict[str, Any] = {
        "device": device_name(),
        "threads": THREADS,
        "jax": jax.__version__,
        "attention_ms": {},
    }
    for shape, length in tqdm(sizes, "attention"):
        found["attention_ms"].setdefault(shape, {})[str(length)] = attention(
            shape, length, ggml, rounds, caches
        )
    found["capacity_ms"] = capacity(1024, *((1024, 2048) if quick else (1024, 65536)))
    found["append_ms"] = migrations(1024 if quick else 16384)
    found["temporaries_mb"] = temporaries(1024 if quick else 65536, caches)
    return found


def show(found: dict[str, Any]) -> None:
    """Times, and the ratio to the best unquantized peer."""
    print(
        f"{found['device']}, {found['threads']} threads, jax {found['jax']}; ms, and the ratio to "
        "torch bf16 where it is there"
    )
    for shape, lengths in found["attention_ms"].items():
        for length, times in lengths.items():
            peer = times.get("torch bf16")
            for name, ms in times.items():
                print(
                    f"{shape:20} {int(length):>7,} {name:24} {ms:9.3f}"
                    + (f" {ms / peer:7.2f}" if peer else "")
                )
    for name, times in found["capacity_ms"].items():
        small, large = times.values()
        print(
            f"{name} of a cache for {' / '.join(times)} tokens: {small:.3f} / {large:.3f} ms, "
            f"ratio {large / small:.2f}"
        )
    for mode, times in found["append_ms"].items():
        print(
            f"append of one token, {mode}: "
            + ", ".join(f"{name} {ms:.3f} ms" for name, ms in times.items())
        )
    print(
        "temporaries, MB:",
        {name: round(value, 2) for name, value in found["temporaries_mb"].items()},
    )


def plot(found: dict[str, Any], path: pathlib.Path) -> None:
    import matplotlib.pyplot as plt

    by_length = found["attention_ms"]["GQA 32/8/128"]
    figure, axis = plt.subplots(figsize=(8, 5.5), layout="constrained")
    for name in next(iter(by_length.values())):
        points = [
            (int(length), times[name]) for length, times in by_length.items() if name in times
        ]
        axis.plot(
            *zip(*points, strict=True),
            marker="o",
            linestyle="-" if name.startswith("jaxkv") else "--",
            label=name,
        )
    axis.set(
        xscale="log",
        yscale="log",
        xlabel="tokens held",
        ylabel="ms per decode attention",
        title=found["device"],
    )
    axis.set_xscale("log", base=2)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="toy sizes; writes nothing")
    parser.add_argument(
        "--ggml", metavar="FOLDER", help="folder of libggml.so, libggml-base.so and libggml-cpu.so"
    )
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    args = parser.parse_args()
    found = run(args.quick, args.ggml) | {"command": "python examples/benchmarks/cpu.py"}
    show(found)
    if not args.quick:
        args.out.parent.mkdir(exist_ok=True)
        args.out.write_text(json.dumps(found, indent=1) + "\n")
        plot(found, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
