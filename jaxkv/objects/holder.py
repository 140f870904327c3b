"""An object that holds one state under a lock, and stays whole when it is copied, pickled or
interrupted."""

from __future__ import annotations

import threading
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv.config import KvCacheConfig
from jaxkv.objects.arrays import Form
from jaxkv.objects.buffers import KvMemoryPool
from jaxkv.objects.errors import KvCacheError
from jaxkv.objects.policy import CacheQuantization
from jaxkv.state import CacheState, copy, init
from jaxkv.summary import summary


class Record(NamedTuple):
    """All that a cache holds."""

    state: CacheState
    policy: CacheQuantization
    form: Form


class Holder:
    """What a cache holds is one attribute, set once in a call: an interrupt (Ctrl-C) at any point
    leaves all of it as it was before the call or as it is after.

    But for one: what the device makes of a donated state can be lost on its way into that
    attribute. The next call then raises a KvCacheError that says so, and the cache is empty.
    """

    def __init__(self, config: KvCacheConfig, pool: KvMemoryPool) -> None:
        self.config, self._pool = config, pool
        self._lock = threading.Lock()
        self._record = Record(init(config), CacheQuantization.of(config), Form())

    def _whole(self) -> Record:
        """What is held; to be called under the lock.

        Raises:
          KvCacheError: an earlier call was interrupted and has lost it.
        """
        record = self._record
        if record.state.end.is_deleted():
            self._record = record._replace(state=init(record.state.config))
            raise KvCacheError(
                "a call was interrupted with the cache's only copy in hand; it is empty now"
            )
        return record

    def clone(self) -> Self:
        """A cache of its own with the same tokens and policy, which lends from the same pool.

        `copy.copy` and `copy.deepcopy` give it too. A pickled cache comes back with an empty pool.
        """
        with self._lock:
            record = self._whole()
            record = record._replace(state=copy(record.state))
        return self._of(self._pool, record)

    def _of(self, pool: KvMemoryPool, record: Record) -> Self:
        other = object.__new__(type(self))
        Holder.__init__(other, self.config, pool)
        other._record = record
        return other

    def __copy__(self) -> Self:
        return self.clone()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self.clone()

    def __getstate__(self) -> dict[str, Any]:
        with self._lock:
            record = self._whole()
            record = record._replace(state=jax.tree.map(np.array, record.state))
        return {"config": self.config, "_pool": self._pool, "_record": record}

    def __setstate__(self, given: dict[str, Any]) -> None:
        record = given["_record"]
        record = record._replace(state=jax.tree.map(jnp.asarray, record.state))
        self.__dict__.update(given, _record=record, _lock=threading.Lock())

    def __repr__(self) -> str:
        record = self._record
        name = f"{type(self).__name__}, {record.policy}"
        return summary(name, record.state.config, record.state.end)
