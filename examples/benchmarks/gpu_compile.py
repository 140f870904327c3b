"""Decode steps compiled to an H100's machine code on a machine without one: what is launched,
copied and held besides the cache.

    pip install "jax[cuda12]" && python examples/benchmarks/gpu_compile.py     # writes results/gpu_compiled.json

Nothing runs, so nothing is timed. It shows that the kernels compile, how many launches a step has,
that no cache is copied, and what portable programs become. JAX's autotuning needs a GPU and is off.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import topologies

import jaxkv
from jaxkv import KvCacheConfig

RESULTS = Path(__file__).parent / "results" / "gpu_compiled.json"
TOKENS, LAYERS = 32768, 32
DEVICE = "NVIDIA H100 80GB HBM3"
TARGET = f"""
gpu_device_info {{
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048  core_count: 132  fpus_per_core: 128
  shared_memory_per_block: 49152  shared_memory_per_core: 233472  shared_memory_per_block_optin: 232448
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  memory_bandwidth: 3352320000000  l2_cache_size: 52428800  clock_rate_ghz: 1.98  device_memory_size: 84978434048
  cuda_compute_capability {{ major: 9 }}
}}
platform_name: "CUDA"  dnn_version_info {{ major: 9 minor: 8 }}  device_description_str: "{DEVICE}"
"""
LAUNCHES = (
    "fusion",
    "custom-call",
    "copy",
    "scatter",
    "dot",
    "reduce",
    "transpose",
    "sort",
    "memset",
)


def compiled(
    what: str, fields: dict[str, Any], batch: int, implementation: Any, device: Any
) -> Any:
    """A step of `what` ("append", "attend" or both) over a stack of layers, the cache donated."""
    config = KvCacheConfig(**{"max_tokens": TOKENS, "num_kv_heads": 8, "head_dim": 128} | fields)

    def step(state: jaxkv.CacheState, new: jax.Array, queries: jax.Array) -> Any:
        def layer(carry: Any, inputs: Any) -> Any:
            (state, total), (index, new, query) = carry, inputs
            if "append" in what:
                state = jaxkv.append(state, new, new, layer=index, implementation=implementation)
            if "attend" in what:
                total += jaxkv.attend(state, query, layer=index, implementation=implementation)
            return (state, total), None

        return lax.scan(
            layer, (state, jnp.zeros_like(queries[0])), (jnp.arange(LAYERS), new, queries)
        )[0]

    shapes = [
        jax.ShapeDtypeStruct((LAYERS, batch, 1, heads, 128), jnp.bfloat16) for heads in (8, 32)
    ]
    state = jax.eval_shape(lambda: jaxkv.init(config, batch, LAYERS))
    there = jax.sharding.SingleDeviceSharding(device)
    abstract = jax.sharding.AbstractMesh(
        (), (), abstract_device=jax.sharding.AbstractDevice(DEVICE, 132, "cuda")
    )
    with jax.sharding.use_abstract_mesh(abstract):
        traced = jax.jit(step, donate_argnums=0, in_shardings=there, out_shardings=there).trace(
            state, *shapes
        )
        return traced.lower(lowering_platforms=("cuda",)).compile()


def launches(text: str) -> dict[str, int]:
    """Operations of every computation that loops and conditionals run."""
    found: dict[str, Counter[str]] = {}
    computation = ""
    for line in text.splitlines():
        head = re.match(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$", line)
        computation = head[1] if head else computation
        operation = re.search(rf" = .*? ({'|'.join(LAUNCHES)})\(", line)
        if operation:
            found.setdefault(computation, Counter())[operation[1]] += 1
    run = re.findall(r"body=%?([\w.\-]+)", text)
    branches = {
        name
        for names in re.findall(r"branch_computations=\{([^}]*)\}", text)
        for name in re.findall(r"[\w.\-]+", names)
    }
    in_body = {name: sum(found.get(name, {}).values()) for name in run}
    body = max(in_body, key=lambda name: in_body[name]) if in_body else ""
    return {
        "a layer": in_body.get(body, 0),
        "in branches": sum(sum(found.get(name, {}).values()) for name in branches),
    }


def cache_sized_copies(text: str, config_slots: int) -> int:
    """Copies of arrays with an axis about as long as the store."""
    sizes = [
        [int(n) for n in m.split(",")]
        for m in re.findall(r"= \w+\[([\d,]+)\]\S* copy(?:-start)?\(", text)
    ]
    return sum(any(axis > config_slots // 2 for axis in size) for size in sizes)


def report(device: Any) -> list[dict[str, Any]]:
    found = []
    cases: list[tuple[str, dict[str, Any], str, Any]] = [
        ("Q4", {}, "append", None),
        ("Q4", {"migration": "batched"}, "append", None),
        ("Q4", {}, "append", "xla"),
        ("FP16", dict(jaxkv.PRESETS["FP16"][0]), "append", None),
        ("FP16", dict(jaxkv.PRESETS["FP16"][0]), "attend", None),
        ("Q8", dict(jaxkv.PRESETS["Q8"][0]), "attend", None),
        ("Q4", {}, "attend", None),
        ("Q4", {}, "attend", "xla"),
    ]
    cases += [
        (name, dict(fields), "append and attend", None)
        for name, (fields, _) in jaxkv.PRESETS.items()
    ]
    for name, fields, what, implementation in cases:
        program = compiled(what, fields, 1, implementation, device)
        text = program.as_text()
        row = {
            "cache": name,
            "step": what,
            "migration": str(fields.get("migration", "eager")),
            "implementation": implementation or "kernels",
        }
        row |= {"launches": launches(text), "cache_sized_copies": cache_sized_copies(text, TOKENS)}
        row["temporaries_mb"] = round(program.memory_analysis().temp_size_in_bytes / 1e6, 2)
        print(row, flush=True)
        found.append(row)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    topology = topologies.get_topology_desc("h100", "cuda", target_config=TARGET, topology="1x1x1")
    rows = report(topology.devices[0])
    header = {
        "device": DEVICE,
        "jax": jax.__version__,
        "command": "python examples/benchmarks/gpu_compile.py",
    }
    sizes = {
        "tokens": TOKENS,
        "layers": LAYERS,
        "batch": 1,
        "kv_heads": 8,
        "query_heads": 32,
        "head_dim": 128,
    }
    args.out.write_text(json.dumps(header | sizes | {"programs": rows}, indent=1) + "\n")


if __name__ == "__main__":
    try:
        import nvidia.cuda_nvcc
    except ImportError:
        sys.exit('this needs the CUDA plugin: pip install "jax[cuda12]"')
    os.environ["XLA_FLAGS"] = (
        f"--xla_gpu_cuda_data_dir={nvidia.cuda_nvcc.__path__[0]} --xla_gpu_autotune_level=0"
    )
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # there is no driver
    jax.config.update("jax_platforms", "cpu")
    main()
