"""An hour of the object API, run by hand: one cache that is changed, interrupted (Ctrl-C), saved and
given new policies, while other threads read it and change caches of their own.

    python tests/soak.py --minutes 60

After every call the cache holds what it held, or what it would hold; or it says that it lost its
tokens, and is empty. Prints what was done, and the memory in use, once a minute.
"""

from __future__ import annotations

import argparse
import pickle
import signal
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
from test_objects_whole import EXACT, calls, held, interrupted, tokens

from jaxkv.objects import KvCacheError, TwoTierKvCache


def megabytes() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6


def read(cache: TwoTierKvCache, stop: threading.Event, count: Counter[str]) -> None:
    """Every read is of one whole state: its tokens in order, its output finite."""
    while not stop.wait(0.01):
        try:
            seen = held(cache)
            assert seen == sorted(set(seen)), seen
            out = cache.attend(np.zeros(8, np.float32))
            assert np.isfinite(out).all()
            count["reads"] += 1
        except KvCacheError as error:
            assert "interrupted" in str(error)


def change_own(stop: threading.Event, count: Counter[str], seed: int) -> None:
    """A cache of this thread alone: the same call changes it and its clone alike."""
    rng, cache, first = np.random.default_rng(seed), TwoTierKvCache(EXACT), 0
    while not stop.wait(0.01):
        if len(cache) < 12:
            cache.clear()
            for start in (first, first + 6):
                cache.append(*tokens(start, 6))
            first += 20
        other, choice = cache.clone(), int(rng.integers(2**31))
        for one in (cache, other):
            options = calls(one, np.random.default_rng(choice), first)
            options[choice % len(options)]()
        assert held(cache) == held(other)
        first += 10
        count["own"] += 1


def soak(minutes: float) -> None:
    rng, cache, stop, count = (
        np.random.default_rng(0),
        TwoTierKvCache(EXACT),
        threading.Event(),
        Counter[str](),
    )
    failed: list[BaseException] = []

    def guarded(job, *args):  # type: ignore[no-untyped-def]
        def run() -> None:
            try:
                job(*args)
            except BaseException as error:
                failed.append(error)
                stop.set()

        return threading.Thread(target=run)

    threads = [guarded(read, cache, stop, count) for _ in range(2)]
    threads += [guarded(change_own, stop, count, seed) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    end, shown, first = time.time() + 60 * minutes, time.time(), 0
    folder = Path(tempfile.mkdtemp())
    while time.time() < end and not failed:
        if len(cache) < 12:
            cache.clear()
            for start in (first, first + 6):
                cache.append(*tokens(start, 6))
            first += 20
        before, other, choice = held(cache), cache.clone(), int(rng.integers(2**31))
        options = calls(other, np.random.default_rng(choice), first)
        options[choice % len(options)]()
        call = calls(cache, np.random.default_rng(choice), first)[choice % len(options)]
        after, first = held(other), first + 10
        if interrupted(call, float(rng.uniform(1e-6, 3e-3))):
            count["interrupts"] += 1
        try:
            assert held(cache) in (before, after)
        except KvCacheError as error:
            assert "interrupted with the cache's only copy in hand" in str(error)
            assert len(cache) == 0
            count["lost, and said so"] += 1
        count["calls"] += 1
        if count["calls"] % 20 == 0:
            path = folder / "cache.pickle"
            path.write_bytes(pickle.dumps(cache))
            assert held(pickle.loads(path.read_bytes())) == held(cache)
            count["saves"] += 1
        if first > 2**23:  # numbers that float32 tells apart
            first = 0
            cache.clear()
        if time.time() - shown > 60:
            shown = time.time()
            print(f"{megabytes():.0f} MB, {dict(count)}", flush=True)
        time.sleep(0.01)
    stop.set()
    for thread in threads:
        thread.join()
    print(f"{megabytes():.0f} MB, {dict(count)}")
    if failed:
        raise failed[0]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=60)
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    soak(parser.parse_args().minutes)
