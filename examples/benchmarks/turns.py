"""Timing several systems in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax


def medians(
    calls: dict[str, Callable[[], Any]], rounds: int = 5, least_seconds: float = 0.15
) -> dict[str, float]:
    """Milliseconds per call of each system, taken in turns, so that a noisy machine treats them
    alike."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        jax.block_until_ready(call())
    for _ in range(rounds):
        for name, call in calls.items():
            time.sleep(0.05)  # for threads that spin after their work
            jax.block_until_ready(call())
            stop = time.perf_counter() + least_seconds
            while (start := time.perf_counter()) < stop:
                jax.block_until_ready(call())
                times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(found) for name, found in times.items()}
