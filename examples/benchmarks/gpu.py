"""Decode attention on a GPU: correctness first, then speed against cuDNN's and torch's bfloat16
flash attention in the same run.

    python examples/benchmarks/gpu.py             # under ten minutes on an H100; writes results/gpu_<device>.json
    python examples/benchmarks/gpu.py --tune      # how the kernel's tuning fares at one size
    python examples/benchmarks/gpu.py --expected  # the roofline's figures, computed anywhere
    python examples/benchmarks/gpu.py --quick     # without a GPU: correctness in interpret mode at toy sizes

Every timed program goes over several layers of different data, together larger than the L2, in one
compiled call.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import os
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs memory too

import jax
import jax.numpy as jnp
import numpy as np
from peers import layers_for, query_of, seconds, timed_cudnn, timed_torch
from roofline import MODELS, PRECISIONS, SIZES, bytes_per_token, print_expected

import jaxkv
from jaxkv import KvCacheConfig, Migration, Precision
from jaxkv.codec.scales import stored_scale
from jaxkv.kernels import dispatch, pallas_gpu, pallas_write, xla
from jaxkv.kernels.queries import Queries, fold
from jaxkv.scoring import Scoring
from jaxkv.softmax import normalize
from jaxkv.state import segments
from jaxkv.tiers import tokens
from jaxkv.tiers.place import Run

MOST_BYTES = 24e9  # of the bfloat16 keys and values of one layer; larger sizes are left out


# Caches full of random words, in no time.


def cache_config(precision: Precision, length: int, heads: int, head_dim: int) -> KvCacheConfig:
    """One tier of `length` tokens."""
    quantized = precision.is_quantized
    return KvCacheConfig(
        tail_length=0 if quantized else length,
        tail_precision=Precision.FP16 if quantized else precision,
        store_precision=precision if quantized else Precision.Q4,
        max_tokens=length,
        num_kv_heads=heads,
        head_dim=head_dim,
    )


def full_cache(config: KvCacheConfig, batch: int, layers: int | None = None) -> jaxkv.CacheState:
    """A cache whose tokens are random codes with scales near 2**-bits."""
    state = jax.eval_shape(lambda: jaxkv.init(config, batch, layers))

    def fill(index: int, leaf: Any) -> jax.Array:
        key = jax.random.key(index)
        if leaf.dtype == jnp.int8:
            return jax.lax.bitcast_convert_type(
                jax.random.bits(key, leaf.shape, jnp.uint8), jnp.int8
            )
        if leaf.dtype == jnp.int16:
            return jax.lax.bitcast_convert_type(
                jax.random.normal(key, leaf.shape, jnp.bfloat16), jnp.int16
            )
        if leaf.dtype == jnp.int32:
            return jnp.zeros(leaf.shape, leaf.dtype)  # balance: all channels alike
        if leaf.dtype == jnp.uint16:
            return stored_scale(jax.random.uniform(key, leaf.shape, jnp.float32, 0.05, 0.1))
        return jax.random.uniform(key, leaf.shape, leaf.dtype, 0.05, 0.1)

    leaves, tree = jax.tree.flatten(state.tiers)
    tiers = tree.unflatten(
        [jax.jit(lambda i=i, leaf=leaf: fill(i, leaf))() for i, leaf in enumerate(leaves)]
    )
    end = jnp.full(state.end.shape, config.max_tokens, jnp.int32)
    lost, refused, changed = (
        jnp.zeros(x.shape, x.dtype) for x in (state.lost, state.refused, state.changed)
    )
    return jaxkv.CacheState(None, tiers, end, lost, refused, changed, config)


# Correctness.


def worst_error(
    precision: Precision, model: tuple[int, int, int], batch: int, length: int, interpret: bool
) -> float:
    """The kernel's largest difference from the XLA path in float32, over the largest output."""
    heads, kv_heads, head_dim = model
    state = full_cache(cache_config(precision, length, kv_heads, head_dim), batch)
    part = segments(state)[0].codes_only()
    query = fold(query_of(batch, heads, head_dim).astype(jnp.float32) * head_dim**-0.5, kv_heads)
    unit = jnp.ones((*query.shape[:-1], 1))
    own = Queries(query, unit, state.end[:, None] - 1, Scoring(), 0)
    limits = dispatch.limits(own, part)
    found = normalize(
        pallas_gpu.partial_attention(part, query, unit, limits, None, interpret=interpret)
    )
    wanted = normalize(xla.partial_attention(part, own))
    assert bool(jnp.isfinite(found).all())
    return float(jnp.abs(found - wanted).max() / jnp.abs(wanted).max())


def unlike(precision: Precision, model: tuple[int, int, int], interpret: bool) -> float:
    """The share of codes that the quantizing write stores unlike XLA: a division may round
    otherwise, and a tie fall to the other side."""
    _, heads, head_dim = model
    spec = (
        KvCacheConfig(store_precision=precision, num_kv_heads=heads, head_dim=head_dim)
        .chain[-1]
        .key
    )
    held = tokens.allocate(spec, (2,), heads, 64, head_dim)
    new = query_of(2 * 64, heads, head_dim).astype(jnp.float32).reshape(2, 64, heads, head_dim)
    first, stop = jnp.zeros(2, jnp.int32), jnp.full(2, 64, jnp.int32)
    run = Run(first, first, stop, 64, 64)
    found = pallas_write.write(held, spec, new, run, None, interpret=interpret)
    portable = jax.jit(
        lambda held, new: tokens.write(
            held, spec, tokens.encode(tokens.basis_of(held, spec, None), new), run, None
        )
    )
    wanted = portable(held, new)
    return max(
        float((a != b).mean())
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    )


def check(interpret: bool) -> dict[str, float]:
    models = {"toy": (4, 2, 64)} if interpret else MODELS
    length = 200 if interpret else 5000
    cases = [(f"{name}_{p.value}", p, model) for name, model in models.items() for p in PRECISIONS]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # compiling takes the time
        errors = pool.map(lambda case: worst_error(*case[1:], 2, length, interpret), cases)
        written = [case for case in cases if case[1].is_quantized]
        shares = pool.map(lambda case: unlike(*case[1:], interpret), written)
        found = {name: error for (name, *_), error in zip(cases, errors, strict=True)}
        writes = {f"{n}_write": share for (n, *_), share in zip(written, shares, strict=True)}
    for name, error in found.items():
        print(f"{name}: largest error {error:.1e} of the largest output")
        assert error < 2.0**-12, name  # bfloat16 attention: 2**-8
    for name, share in writes.items():
        print(f"{name}: {share:.1e} of the words or scales stored unlike XLA")
        assert share < 1e-3, name
    return found | writes


# Timing.


def timed_attend(precision: Precision, model: str, batch: int, length: int) -> Callable[[], float]:
    """The kernel's attention, compiled: what measures it."""
    heads, kv_heads, head_dim = MODELS[model]
    layers = layers_for(bytes_per_token(precision, head_dim) * batch * length * kv_heads)
    state = full_cache(cache_config(precision, length, kv_heads, head_dim), batch, layers)
    query = query_of(batch, heads, head_dim)
    step = jax.jit(
        lambda state, q: sum(
            jaxkv.attend(state, q, layer=i, implementation="pallas") for i in range(layers)
        )
    )
    program = step.lower(state, query).compile()
    return lambda: seconds(lambda: program(state, query), layers)


def time_step(batch: int, length: int, migration: str) -> dict[str, float]:
    """A decode step of 32 layers, hot tier and Q4 store, as one scan with a donated cache; and how
    many copies of its arrays it makes."""
    heads, kv_heads, head_dim = MODELS["gqa"]
    config = KvCacheConfig(
        max_tokens=length, num_kv_heads=kv_heads, head_dim=head_dim, migration=Migration(migration)
    )
    query, token = query_of(batch, heads, head_dim), query_of(batch, kv_heads, head_dim)

    def layer(writes: bool, reads: bool) -> Callable[..., Any]:
        def body(carry: Any, index: jax.Array) -> Any:
            state, x = carry
            state = jaxkv.append(state, token, token, layer=index) if writes else state
            return (state, x + jaxkv.attend(state, x, layer=index) if reads else x), None

        return body

    found: dict[str, float] = {}
    for name, body in (
        ("step", layer(True, True)),
        ("append", layer(True, False)),
        ("attend", layer(False, True)),
    ):
        state = full_cache(config, batch, 32)
        run = jax.jit(
            lambda s, x, body=body: jax.lax.scan(body, (s, x), jnp.arange(32))[0], donate_argnums=0
        )
        if name == "step":
            largest = max(jax.tree.leaves(state.tiers), key=lambda a: a.nbytes)
            shape = f"s8[{','.join(map(str, largest.shape))}]"
            lines = run.lower(state, query).compile().as_text().splitlines()
            found["cache_sized_copies"] = sum(
                " copy(" in line and shape in line.split("=")[1] for line in lines if "=" in line
            )
        holder = [state]

        def once(holder: list[Any] = holder, run: Any = run) -> Any:
            holder[0], out = run(holder[0], query)
            return out

        found[name] = seconds(once, 1)
        del state, holder
    return found | {"append_share": found["append"] / found["step"]}


def copy_bandwidth() -> float:
    x = jnp.ones((2**30,), jnp.float32)
    step = jax.jit(lambda x: x + 1)
    return 2 * x.nbytes / seconds(lambda: step(x), 1)


def measure(budget: float) -> dict[str, Any]:
    start, rows = time.perf_counter(), []
    copy = copy_bandwidth()
    print(f"copy: {copy / 1e12:.2f} TB/s")
    sizes = [(model, *size) for size in SIZES for model in MODELS]
    for model, batch, length in sizes:
        _, kv_heads, head_dim = MODELS[model]
        if (
            4.0 * head_dim * batch * length * kv_heads > MOST_BYTES
            or time.perf_counter() - start > budget
        ):
            continue
        row: dict[str, Any] = {"model": model, "batch": batch, "length": length}
        size = model, batch, length
        peers = {"cudnn": timed_cudnn, "torch": timed_torch}
        ours = {p.value: functools.partial(timed_attend, p) for p in PRECISIONS}
        with ThreadPoolExecutor() as pool:
            made = {name: pool.submit(make, *size) for name, make in (peers | ours).items()}
        for name, timed in made.items():
            try:
                row[name] = timed.result()()
            except Exception as error:  # a peer that is missing must not end the run
                row[name + "_error"] = f"{type(error).__name__}: {str(error)[:200]}"
        made.clear()
        best = min((row[name] for name in peers if name in row), default=None)
        for p in PRECISIONS:
            if p.value in row:
                row[p.value + "_speedup"] = best and best / row[p.value]
                row[p.value + "_share"] = (
                    bytes_per_token(p, head_dim) * batch * length * kv_heads / row[p.value] / copy
                )
        rows.append(row)
        print(
            json.dumps(
                {k: float(f"{v:.3g}") if isinstance(v, float) else v for k, v in row.items()}
            )
        )
    return {
        "copy_bandwidth": copy,
        "attention": rows,
        "decode_step": {mode.value: time_step(1, 32768, mode.value) for mode in Migration},
    }


def tune(
    length: int = 32768, batch: int = 1, precision: Precision = Precision.Q4
) -> list[dict[str, Any]]:
    found = []
    for slots, warps, stages in itertools.product((32, 64, 128), (1, 2, 4), (2, 3, 4)):
        pallas_gpu.TUNING = pallas_gpu.Tuning(slots=slots, num_warps=warps, num_stages=stages)
        row: dict[str, Any] = dataclasses.asdict(pallas_gpu.TUNING)
        try:
            row["seconds"] = timed_attend(precision, "gqa", batch, length)()
        except Exception as error:  # too much shared memory, say
            row["error"] = str(error)[:100]
        found.append(row)
        print(row)
    return sorted(found, key=lambda row: row.get("seconds", 1.0))


def about() -> dict[str, str]:
    root = Path(__file__).resolve().parents[2]
    commit = subprocess.run(
        ["git", "-C", str(root), "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "numpy": np.__version__,
        "commit": commit.stdout.strip(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("--expected", "--quick", "--tune"):
        parser.add_argument(name, action="store_true")
    parser.add_argument(
        "--budget", type=float, default=420.0, help="seconds after which no new size is begun"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results"))
    arguments = parser.parse_args()
    if arguments.expected:
        return print_expected()
    if arguments.quick:
        check(interpret=True)
        return None
    if jax.default_backend() != "gpu":
        raise SystemExit(
            "no GPU here: --quick checks the kernel in interpret mode, --expected prints the "
            "roofline's figures"
        )
    result = about() | {"errors": check(interpret=False)}
    result |= {"tuning": tune()} if arguments.tune else measure(arguments.budget)
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = (
        arguments.out
        / f"gpu_{'tuning_' if arguments.tune else ''}{result['device'].lower().replace(' ', '_')}.json"
    )
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
