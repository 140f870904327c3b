"""An object that holds one state under a lock, and stays whole when it is copied, pickled or
interrupted."""

from __future__ import annotations

import threading
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv.config import KvCacheConfig
from jaxkv.devices import copy, settled
from jaxkv.objects.arrays import Form
from jaxkv.objects.buffers import KvMemoryPool
from jaxkv.objects.errors import KvCacheError
from jaxkv.objects.policy import CacheQuantization
from jaxkv.state import CacheState, init
from jaxkv.summary import summary


class Record(NamedTuple):
    """All that a cache holds."""

    state: CacheState
    policy: CacheQuantization
    form: Form


class Holder:
    """What a cache holds is one attribute, set once in a call: an interrupt (Ctrl-C) at any point
    leaves all of it as it was before the call or as it is after.

    One that comes while a program is compiled can lose what the device has made of a donated
    state. The next call then raises a KvCacheError that says so, and the cache is empty.
    """

    def __init__(self, config: KvCacheConfig, pool: KvMemoryPool) -> None:
        self.config, self._pool = config, pool
        self._lock = threading.Lock()
        self._record = Record(init(config), CacheQuantization.of(config), Form())
        # What the call under way is to leave, and the leaves of its state once there are any.
        self._planned, self._made = self._record, list[list[jax.Array]]()

    def _whole(self) -> Record:
        """What is held; to be called under the lock.

        Raises:
          KvCacheError: an earlier call was interrupted and has lost it.
        """
        if self._record.state.end.is_deleted():
            if not self._made or any(leaf.is_deleted() for leaf in self._made[0]):
                self._lose()
                raise KvCacheError(
                    "a call was interrupted with the cache's only copy in hand; it is empty now"
                )
            self._keep()
        return self._record

    def _lose(self) -> None:
        self._record = self._record._replace(state=init(self._record.state.config))

    def _donate(self, planned: Record, verb: Any, *args: Any) -> list[jax.Array]:
        """Has a function of `compiled` change the state of `planned`, and keeps that -> what else
        the function gives."""
        leaves, structure = jax.tree.flatten(planned.state)
        self._made.clear()
        self._planned = planned
        # One call into C: interrupts, which come between lines of Python, find the leaves stored.
        self._made[:] = map(verb, [structure], [leaves], *([arg] for arg in args))
        return self._keep()

    def _keep(self) -> list[jax.Array]:
        structure: Any = jax.tree.structure(self._planned.state)
        made, size = self._made[0], structure.num_leaves
        self._record = self._planned._replace(state=jax.tree.unflatten(structure, made[:size]))
        self._made.clear()
        return made[size:]

    def clone(self) -> Self:
        """A cache of its own with the same tokens and policy, which lends from the same pool.

        `copy.copy` and `copy.deepcopy` give it too. A pickled cache comes back with an empty pool.
        """
        with self._lock:
            record = self._whole()
            record = record._replace(state=copy(record.state))
        other = object.__new__(type(self))
        other.__setstate__({"config": self.config, "_pool": self._pool, "_record": record})
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
        record = record._replace(state=settled(jax.tree.map(jnp.asarray, record.state)))
        Holder.__init__(self, given["config"], given["_pool"])
        self._record = record

    def __repr__(self) -> str:
        record = self._record
        name = f"{type(self).__name__}, {record.policy}"
        return summary(name, record.state.config, record.state.end)
