"""Prompts on a CPU: `prefill` from empty, a chunk after a long context, and `append` alone, against
torch's and JAX's own attention over the same tokens in the same run.

    python examples/benchmarks/prefill.py           # three minutes; writes results/prefill.json
    python examples/benchmarks/prefill.py --quick   # toy sizes, writes nothing

One JAX device, no mesh; torch is optional (extra `bench`) and gets as many threads. Its keys and
values are repeated for every query head, which is faster than its own `enable_gqa`; a chunk gets a
mask. Peers only attend: what it takes to store their keys and values is not counted. Systems take
turns; medians over all turns.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from cpu_peers import machine, machine_line
from tqdm import tqdm
from turns import medians

import jaxkv

RESULTS = pathlib.Path(__file__).parent / "results" / "prefill.json"
THREADS = 2
LONGEST = 2048  # tokens, for JAX's own attention: it holds all scores at once
SHAPES = {"GQA 32/8/128": (32, 8, 128), "MHA 16/16/64": (16, 16, 64), "MQA 16/1/128": (16, 1, 128)}
CASES = [  # shape, tokens held, new tokens
    *[("GQA 32/8/128", 0, size) for size in (512, 2048, 8192)],
    *[("MHA 16/16/64", 0, size) for size in (640, 2304)],
    *[("MQA 16/1/128", 0, size) for size in (640, 2304)],
    *[(shape, 6144, 512) for shape in SHAPES],
]
Call = Callable[[], Any]


def noise(seed: int, size: int, heads: int, head_dim: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (1, size, heads, head_dim), jnp.bfloat16)


def ours(shape: str, held: int, size: int, preset: str) -> dict[str, Call]:
    """`prefill` and `append` in place, each time from the same positions."""
    heads, kv_heads, head_dim = SHAPES[shape]
    config = jaxkv.preset(
        preset, max_tokens=held + max(size, 1024), num_kv_heads=kv_heads, head_dim=head_dim
    )
    query = noise(0, size, heads, head_dim)
    keys, values = (noise(seed, held + size, kv_heads, head_dim) for seed in (1, 2))
    state = jaxkv.init(config)
    if held:
        state = jax.jit(jaxkv.append)(state, keys[:, :held], values[:, :held])
    new = keys[:, held:], values[:, held:]
    # All but the tokens' own arrays: where everything starts again.
    small = {
        field.name: getattr(state, field.name)
        for field in dataclasses.fields(state)
        if field.name not in ("sinks", "tiers", "config")
    }
    states = {verb: jax.tree.map(jnp.copy, state) for verb in ("prefill", "append")}
    prefill = jax.jit(lambda *args: jaxkv.prefill(*args), donate_argnums=0)
    append = jax.jit(lambda *args: jaxkv.append(*args), donate_argnums=0)

    def again(verb: str) -> Any:
        return dataclasses.replace(states[verb], **jax.tree.map(jnp.copy, small))

    def run_prefill() -> Any:
        states["prefill"], out = prefill(again("prefill"), query, *new)
        return out, states["prefill"].end

    def run_append() -> Any:
        states["append"] = append(again("append"), *new)
        return states["append"].tiers

    return {f"jaxkv {preset}": run_prefill, f"jaxkv {preset}, append alone": run_append}


def peers(shape: str, held: int, size: int) -> dict[str, Call]:
    heads, kv_heads, head_dim = SHAPES[shape]
    query = noise(0, size, heads, head_dim)
    keys, values = (noise(seed, held + size, kv_heads, head_dim) for seed in (1, 2))
    mask = jnp.tril(jnp.ones((size, held + size), bool), held)
    calls: dict[str, Call] = {}
    if held + size <= LONGEST:
        attend = jax.jit(lambda *args: jax.nn.dot_product_attention(*args, mask=mask))
        calls["jax.nn bf16"] = lambda: attend(query, keys, values)
    if importlib.util.find_spec("torch"):
        import torch

        torch.set_num_threads(THREADS)
        arrays = []
        for x in (query, keys, values):
            tensor = torch.tensor(np.asarray(x, np.float32)).to(torch.bfloat16).transpose(1, 2)
            arrays.append(tensor.repeat_interleave(heads // x.shape[2], 1).contiguous())
        given: dict[str, Any] = (
            {"attn_mask": torch.tensor(np.asarray(mask))} if held else {"is_causal": True}
        )
        sdpa = torch.nn.functional.scaled_dot_product_attention
        calls["torch bf16"] = lambda: sdpa(*arrays, **given)
    return calls


def run(quick: bool) -> dict[str, Any]:
    cases = [("GQA 32/8/128", 0, 256), ("GQA 32/8/128", 512, 64)] if quick else CASES
    found: dict[str, Any] = machine() | {"threads": THREADS, "prefill_ms": {}}
    for shape, held, size in tqdm(cases, "prefill"):
        calls = ours(shape, held, size, "Q4") | peers(shape, held, size)
        name = f"{size:,}" + (f" after {held:,}" if held else "")
        found["prefill_ms"].setdefault(shape, {})[name] = medians(calls, 1 if quick else 5)
    return found


def show(found: dict[str, Any]) -> None:
    print(f"{machine_line(found)}, {found['threads']} threads; ms, and the ratio to torch")
    for shape, sizes in found["prefill_ms"].items():
        for size, times in sizes.items():
            peer = times.get("torch bf16")
            for name, ms in times.items():
                ratio = f" {ms / peer:7.2f}" if peer else ""
                print(f"{shape:14} {size:18} {name:26} {ms:10.2f}{ratio}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="toy sizes; writes nothing")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    args = parser.parse_args()
    found = run(args.quick) | {"command": "python examples/benchmarks/prefill.py"}
    show(found)
    if not args.quick:
        args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
