"""What the GPU kernel can do at best: bytes over bandwidth, instructions over issue slots, and the
overhead of a launch.

An H200 stays behind it where codes have 4 or 2 bits: registers leave room for two warps a
scheduler, which issue 1.4 instructions a clock and multiprocessor, not 3."""

from __future__ import annotations

import dataclasses

from jaxkv import Precision

MODELS = {
    "gqa": (32, 8, 128),
    "mha": (32, 32, 64),
    "mqa": (16, 1, 128),
}  # query heads, kv heads, head dim
PRECISIONS = (Precision.BF16, Precision.Q8, Precision.Q4, Precision.Q2)
SIZES = [(b, s) for b in (1, 16, 64) for s in (8192, 32768, 131072)]

# Warp instructions of the compiled loop (Triton 3.9 for sm_90, read from the machine code), per
# token and kv head of 128.
INSTRUCTIONS = {Precision.BF16: 19.0, Precision.Q8: 49.7, Precision.Q4: 41.7, Precision.Q2: 39.6}

# Launches of an attention over a tail and a store, and of an append of one token
# (`gpu_compile.py`); the kernels are one or two of them.
ATTEND_LAUNCHES = {Precision.BF16: 10, Precision.Q8: 10, Precision.Q4: 18, Precision.Q2: 18}
APPEND_LAUNCHES = {Precision.BF16: 9, Precision.Q8: 10, Precision.Q4: 13, Precision.Q2: 13}


@dataclasses.dataclass(frozen=True)
class Chip:
    """An H100 SXM, as measured elsewhere."""

    copy: float = 3.0e12  # bytes a second, read and written together
    reach: float = 0.90  # of it, by a kernel that only streams
    multiprocessors: int = 132
    clock: float = 1.755e9
    issue: float = (
        4 * 0.75
    )  # warp instructions a clock: four schedulers, three quarters of the time
    launch: float = 1.5e-6  # of a small operation inside a CUDA graph; assumed


def bytes_per_token(precision: Precision, head_dim: int) -> float:
    """Of one kv head: keys and values, and a scale and a zero point of 16 bits for each group of up
    to 64 (8 bits: 128)."""
    if not precision.is_quantized:
        return 2 * 2.0 * head_dim
    group = min(128 if precision is Precision.Q8 else 64, head_dim)
    return 2 * (head_dim * bits(precision) / 8 + 4 * head_dim / group)


def bits(precision: Precision) -> int:
    return {Precision.Q8: 8, Precision.Q4: 4, Precision.Q2: 2}[precision]


def expected(
    precision: Precision, model: str, batch: int, length: int, chip: Chip = Chip()
) -> float:
    """Seconds of one attention: the slower of bytes over bandwidth and instructions over issue
    slots, and the launches."""
    _, heads, head_dim = MODELS[model]
    tokens = batch * length * heads
    memory = tokens * bytes_per_token(precision, head_dim) / (chip.copy * chip.reach)
    arithmetic = (
        tokens
        * INSTRUCTIONS[precision]
        * head_dim
        / 128
        / (chip.multiprocessors * chip.clock * chip.issue)
    )
    return max(memory, arithmetic) + ATTEND_LAUNCHES[precision] * chip.launch


def append_share(
    precision: Precision, model: str, batch: int, length: int, chip: Chip = Chip()
) -> float:
    """Of a decode step of append and attend, eager: its launches, for what it moves is next to
    nothing."""
    append = APPEND_LAUNCHES[precision] * chip.launch
    return append / (append + expected(precision, model, batch, length, chip))


def print_expected() -> None:
    head = "".join(f"{p.value:>12s}" for p in PRECISIONS)
    print(
        f"model  batch  length {head}   append's share, Q4   (microseconds, and times as fast as "
        "our bf16)"
    )
    for model in MODELS:
        for batch, length in SIZES:
            times = [expected(p, model, batch, length) for p in PRECISIONS]
            cells = "".join(f"{t * 1e6:8.0f} {times[0] / t:3.1f}" for t in times)
            print(
                f"{model:6s} {batch:5d} {length:7d} "
                f"{cells}{append_share(Precision.Q4, model, batch, length):12.0%}"
            )
