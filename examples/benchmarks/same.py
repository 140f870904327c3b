"""Whether two platforms store the same bits, and how far their outputs are apart.

    python examples/benchmarks/same.py --write cpu.npz               # on one machine
    python examples/benchmarks/same.py --against cpu.npz             # on the other
    python examples/benchmarks/same.py --quick                       # one preset, against itself

A prompt and some steps of decoding through every preset: the tokens held are compared bit for bit,
the outputs by their largest difference.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import jaxkv

SHAPES = {"gqa": (8, 2, 128), "mqa": (8, 1, 128), "odd": (4, 2, 96)}
ROWS, PROMPT, STEPS = 2, 300, 40


def results(preset: str, shape: str) -> dict[str, np.ndarray]:
    """Outputs [B, T, N, H], and keys, values and positions held at the end."""
    heads, kv_heads, head_dim = SHAPES[shape]
    config = jaxkv.preset(
        preset, max_tokens=1024, num_kv_heads=kv_heads, head_dim=head_dim, tail_length=64
    )
    rng = np.random.default_rng(0)

    def tokens(size: int) -> list[jax.Array]:
        sizes = ((ROWS, size, n, head_dim) for n in (heads, kv_heads, kv_heads))
        return [jnp.asarray(rng.standard_normal(each), jnp.float32) for each in sizes]

    extend, state, outs = jax.jit(jaxkv.extend), jaxkv.init(config, ROWS), []
    for size in (PROMPT, *[1] * STEPS):
        state, out = extend(state, *tokens(size))
        outs.append(np.asarray(out))
    keys, values, positions = map(np.asarray, jaxkv.gather(state))
    return {
        "outputs": np.concatenate(outs, 1),
        "keys": keys,
        "values": values,
        "positions": positions,
    }


def compare(name: str, found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> str:
    pairs = [(found[side], wanted[f"{name}/{side}"]) for side in ("keys", "values")]
    unlike = np.mean([np.any(a != b, axis=(-1, -2)).mean() for a, b in pairs])
    apart = np.abs(found["outputs"] - wanted[f"{name}/outputs"]).max()
    return f"{name}: {unlike:.1e} of the tokens held differ, outputs by {apart:.1e} at most"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", type=Path)
    parser.add_argument("--against", type=Path)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", nargs="+", choices=tuple(jaxkv.PRESETS), metavar="PRESET")
    arguments = parser.parse_args()
    jax.config.update("jax_default_matmul_precision", "highest")
    cases = [(preset, shape) for preset in arguments.only or jaxkv.PRESETS for shape in SHAPES]
    cases = [("Q8", "odd")] if arguments.quick else cases
    found = {f"{p}/{s}": results(p, s) for p, s in tqdm(cases, "presets")}
    flat = {f"{name}/{part}": x for name, parts in found.items() for part, x in parts.items()}
    if arguments.write:
        np.savez_compressed(arguments.write, **flat)
    if arguments.against or arguments.quick:
        wanted = dict(np.load(arguments.against)) if arguments.against else flat
        for name, parts in found.items():
            print(compare(name, parts, wanted))


if __name__ == "__main__":
    main()
