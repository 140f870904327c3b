"""Decode steps and prompts compiled for a TPU v5e on a machine without one: what is copied, held
and moved besides the cache, and how long its compiler thinks a step takes.

    pip install libtpu && python examples/benchmarks/tpu_compile.py    # writes results/tpu_compiled.json

Nothing runs, so nothing is timed: cycles are the compiler's own estimates of every operation, times
the turns of the loops that it stands in. `--preset` and `--step` compile some of them; what is
compiled replaces its row in the results.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ |= {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_LOG_DIR": "disabled",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # or a lock file allows one process
}

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import topologies

import jaxkv
from jaxkv import KvCacheConfig
from jaxkv.kernels.xla import TILED

RESULTS = Path(__file__).parent / "results" / "tpu_compiled.json"
TOKENS, LAYERS, PROMPT, CHUNK = 32768, 4, 512, 64
HEADS, QUERY_HEADS, HEAD_DIM = 8, 32, 128
DEVICE = "TPU v5e"
PRESETS = ("FP16", "Q8", "Q4", "Q4_BIAS", "Q2")
STEPS = ("append", "attend", "append and attend", "prefill", "chunk")
ROWS_STEPS = ("rewind", "take_rows", "replace_rows")


def tpu() -> Any:
    """A device to compile for; ImportError or RuntimeError where libtpu is not."""
    return topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0]


def decode(what: str, size: int) -> Any:
    """A step of `what` over a stack of layers, with `size` new tokens."""

    def layer(carry: Any, inputs: Any) -> Any:
        (state, total), (index, new, query) = carry, inputs
        if what == "prefill":
            state, out = jaxkv.prefill(state, query, new, new, layer=index)
            return (state, total + out), None
        if "append" in what or what == "chunk":
            state = jaxkv.append(state, new, new, layer=index)
        if "attend" in what or what == "chunk":
            total += jaxkv.attend(state, query, layer=index)
        return (state, total), None

    def scanned(state: Any, new: jax.Array, query: jax.Array) -> Any:
        carry = state, jnp.zeros_like(query[0])
        return lax.scan(layer, carry, (jnp.arange(LAYERS), new, query))[0]

    return scanned


def unrolled(what: str) -> Any:
    """The same over a list of states."""

    def step(states: Any, new: jax.Array, query: jax.Array) -> Any:
        total = jnp.zeros_like(query[0])
        for index, state in enumerate(states):
            if "append" in what:
                states[index] = state = jaxkv.append(state, new[index], new[index])
            if "attend" in what:
                total += jaxkv.attend(state, query[index])
        return states, total

    return step


def _positional(verb: Any, *arguments: Any) -> Any:
    return verb(*arguments)


def compiled(
    what: str, config: KvCacheConfig, rows: int = 1, *, scan: bool = True, device: Any = None
) -> Any:
    """A step compiled for a TPU, the cache donated."""
    size = PROMPT if what == "prefill" else CHUNK if what == "chunk" else 1
    state = jax.eval_shape(lambda: jaxkv.init(config, rows, LAYERS if scan else None))
    heads = config.num_kv_heads, QUERY_HEADS * config.num_kv_heads // HEADS
    new = [
        jax.ShapeDtypeStruct((LAYERS, rows, size, n, config.head_dim), jnp.bfloat16) for n in heads
    ]
    counts = jax.ShapeDtypeStruct((rows,), jnp.int32)
    other = jax.eval_shape(lambda: jaxkv.init(config, 1, LAYERS if scan else None))
    one = jax.ShapeDtypeStruct((1,), jnp.int32)
    verbs = {
        "rewind": (jaxkv.rewind, counts),
        "take_rows": (jaxkv.take_rows, counts),
        "replace_rows": (jaxkv.replace_rows, one, other),
    }
    if what in verbs:
        verb, *arguments = verbs[what]
        step = functools.partial(_positional, verb)
    elif scan:
        step, arguments = decode(what, size), new
    else:
        step, arguments, state = unrolled(what), new, [state] * LAYERS
    there = jax.sharding.SingleDeviceSharding(device or tpu())
    kind = jax.sharding.AbstractDevice("TPU v5 lite", 1, "tpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=kind)):
        traced = jax.jit(step, donate_argnums=0, in_shardings=there, out_shardings=there).trace(
            state, *arguments
        )
        return traced.lower(lowering_platforms=("tpu",)).compile()


# Reading the compiled program.

_OPERATION = re.compile(r"\s*(?:ROOT )?%?[\w.\-]+ = (\(.*?\)|\S+) ([\w\-]+)\(")


def operations(text: str) -> Iterator[tuple[str, str, str, str]]:
    """Computation, result, operation and line of everything that runs by itself, not in a
    fusion."""
    fused = set(re.findall(r"fusion\(.*calls=%?([\w.\-]+)", text))
    computation = ""
    for line in text.splitlines():
        head = re.match(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$", line)
        computation = head[1] if head else computation
        if computation not in fused and (found := _OPERATION.match(line)):
            yield computation, found[1], found[2], line


def cache_sized_copies(text: str, config: KvCacheConfig) -> list[str]:
    """Copies, in main memory, of arrays that have an axis as long as the store's slots. What is
    copied onto the chip, `S(1)`, is read once; a copy back is one in main memory again."""
    slots = f"{config.chain[-1].capacity}"
    return [
        f"{operation} {result}"
        for _, result, operation, _ in operations(text)
        if operation in ("copy", "copy-start", "transpose")
        and "S(1)" not in result.split("}")[0]
        and any(slots in shape.split(",") for shape in re.findall(r"\w+\[([\d,]+)\]", result))
    ]


def cycles(text: str, blocks: int) -> int:
    """The compiler's estimates of all operations, times the turns of the loops around them: those
    over the blocks of the store, whose number is known only when it runs, turn `blocks` times."""
    own, inner = dict[str, int](), dict[str, list[tuple[int, str]]]()
    for computation, _, operation, line in operations(text):
        found = re.search(r'"estimated_cycles":"(\d+)"', line)
        own[computation] = own.get(computation, 0) + (int(found[1]) if found else 0)
        calls = inner.setdefault(computation, [])
        if operation == "while":
            names = re.search(r"condition=%?([\w.\-]+), body=%?([\w.\-]+)", line)
            assert names
            calls.append((_turns(text, names[1]) or blocks, names[2]))
        elif operation == "conditional":
            names = re.search(r"branch_computations=\{([^}]*)\}", line)
            calls += [(1, name.strip(" %")) for name in (names[1].split(",") if names else [])]

    def total(computation: str) -> int:
        return own.get(computation, 0) + sum(n * total(c) for n, c in inner.get(computation, []))

    entry = re.search(r"^ENTRY %?([\w.\-]+)", text, re.M)
    assert entry
    return total(entry[1])


def _turns(text: str, condition: str) -> int | None:
    """The turns of a loop that counts up to a constant."""
    found = re.search(rf"^%{re.escape(condition)} .*?^}}", text, re.S | re.M)
    bound = re.search(r"= s32\[\]\S* constant\((\d+)\)", found[0] if found else "")
    return int(bound[1]) if bound else None


def report(what: str, name: str, rows: int, scan: bool, device: Any) -> dict[str, Any]:
    """One row of the results."""
    config = jaxkv.preset(name, max_tokens=TOKENS, num_kv_heads=HEADS, head_dim=HEAD_DIM)
    start = time.perf_counter()
    program = compiled(what, config, rows, scan=scan, device=device)
    seconds = time.perf_counter() - start
    text, memory = program.as_text(), program.memory_analysis()
    state = jax.eval_shape(lambda: jaxkv.init(config, rows))
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    keys = state.tiers[-1].keys.data  # [B, K, S, W]; a block is as `kernels.xla` cuts it
    slot = keys.shape[0] * keys.shape[1] * keys.shape[3] * keys.dtype.itemsize
    block = min(TILED[0] // slot, TILED[1] // (QUERY_HEADS * rows))
    return {
        "cache": name,
        "step": what,
        "rows": rows,
        "layers": "scan" if scan else "unrolled",
        "state_mb": round(size * LAYERS / 1e6, 1),
        "temporaries_mb": round(memory.temp_size_in_bytes / 1e6, 2),
        "cache_sized_copies": len(cache_sized_copies(text, config)),
        "moved_mb": round(program.cost_analysis()["bytes accessed"] / 1e6, 1),
        "cycles": cycles(text, -(-config.chain[-1].capacity // block)),
        "code_mb": round(memory.generated_code_size_in_bytes / 1e6, 1),
        "compile_s": round(seconds, 1),
    }


def cases(presets: list[str], steps: list[str]) -> list[tuple[str, str, int, bool]]:
    found = [(step, name, 1, True) for name in presets for step in steps]
    extra = ("append", "attend", *ROWS_STEPS)
    found += [(step, "Q4", 8, True) for step in extra if step in steps]
    return found + [(step, "Q4", 1, False) for step in STEPS[:2] if step in steps]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--preset", action="append", choices=list(jaxkv.PRESETS))
    parser.add_argument("--step", action="append", choices=[*STEPS, *ROWS_STEPS])
    parser.add_argument("--only-scan", action="store_true", help="one row, layers in a scan")
    args = parser.parse_args()
    head = {
        "device": DEVICE,
        "jax": jax.__version__,
        "libtpu": importlib.metadata.version("libtpu"),
        "command": "python examples/benchmarks/tpu_compile.py",
        "tokens": TOKENS,
        "num_layers": LAYERS,
        "prompt": PROMPT,
        "chunk": CHUNK,
        "kv_heads": HEADS,
        "query_heads": QUERY_HEADS,
        "head_dim": HEAD_DIM,
    }
    device, programs = tpu(), dict[str, Any]()
    if args.out.exists():
        programs = json.loads(args.out.read_text())["programs"]
    every = cases(args.preset or list(PRESETS), args.step or [*STEPS, *ROWS_STEPS])
    for case in [case for case in every if not args.only_scan or case[2:] == (1, True)]:
        row = report(*case, device)
        print(row, flush=True)
        programs[" ".join(map(str, case))] = row
        args.out.write_text(json.dumps(head | {"programs": programs}, indent=1) + "\n")


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    main()
