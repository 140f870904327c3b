"""Which prefixes of tokens a pool still holds: on the host, in plain Python.

A prefix is some whole pages of tokens, named by a chain of hashes that begins with the cache's
configuration and a salt: the same tokens in another model, format or tenancy are another prefix. A
look-up hashes the tokens page by page and asks a dictionary, longest first; there is no tree to be
kept, so a request that finds nothing has paid for hashing its prompt.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from jaxkv.config import KvCacheConfig


@dataclasses.dataclass
class Prefix:
    """Tokens [0, length) of some request: the pages that a pool keeps for it, and what it takes
    besides to go on from there (a `Row`)."""

    length: int
    pages: NDArray[np.int32]
    row: Any
    key: bytes
    users: int = 0


class PrefixIndex:
    """The prefixes that may be gone on from. It holds one reference to each page of each of them:
    `retain` what `insert` takes, `drop` what `evict` gives back."""

    def __init__(self, config: KvCacheConfig, page_size: int, model: str = "") -> None:
        """Of pools with this configuration and page size; `model` names what else the codes depend
        on: weights, adapters."""
        self.page_size = page_size
        self._root = _digest(b"", repr((config, page_size, model)).encode())
        self._held: OrderedDict[bytes, Prefix] = OrderedDict()  # least recently used first
        self._most = 0  # the longest prefix there has ever been
        self.hits = self.misses = 0

    def __len__(self) -> int:
        return len(self._held)

    def match(self, tokens: ArrayLike, salt: str = "") -> Prefix | None:
        """The longest prefix held of `tokens` (ints [T]) that leaves at least one of them to be
        computed, or None. It is not evicted until it has been released."""
        given = np.asarray(tokens, np.int32)
        keys = list(self._keys(given[: min(len(given) - 1, self._most)], salt))
        for key in reversed(keys):
            found = self._held.get(key)
            if found is not None:
                self._held.move_to_end(key)
                found.users += 1
                self.hits += 1
                return found
        self.misses += 1
        return None

    def release(self, prefix: Prefix) -> None:
        """Says that one request which matched `prefix` is over."""
        prefix.users -= 1

    def insert(self, tokens: ArrayLike, pages: ArrayLike, row: Any, salt: str = "") -> bool:
        """Holds a prefix of whole pages of tokens, whose state is `row` (`snapshot`) and whose
        pages are `pages` (its table's; -1 is left out). True if it is new: the caller then retains
        these pages.

        Raises:
          ValueError: tokens that are no whole pages.
        """
        given, ids = np.asarray(tokens, np.int32), np.asarray(pages, np.int32)
        if not len(given) or len(given) % self.page_size:
            raise ValueError(
                f"{len(given)} tokens: a prefix is whole pages of {self.page_size} tokens"
            )
        *_, key = self._keys(given, salt)
        if key in self._held:
            self._held.move_to_end(key)
            return False
        self._held[key] = Prefix(len(given), ids[ids >= 0], row, key)
        self._most = max(self._most, len(given))
        return True

    def evict(self, count: int | None = None) -> NDArray[np.int32]:
        """Forgets the least recently used prefixes that nobody uses, until they have given back
        `count` references to pages (None: all), and returns these for the caller to drop."""
        found: list[NDArray[np.int32]] = []
        for key, prefix in list(self._held.items()):
            if count is not None and sum(map(len, found)) >= count:
                break
            if not prefix.users:
                found.append(self._held.pop(key).pages)
        return np.concatenate(found) if found else np.empty(0, np.int32)

    def _keys(self, tokens: NDArray[np.int32], salt: str) -> Iterator[bytes]:
        """The names of the prefixes of one, two, ... pages."""
        key = _digest(self._root, salt.encode())
        for end in range(self.page_size, len(tokens) + 1, self.page_size):
            key = _digest(key, tokens[end - self.page_size : end].tobytes())
            yield key


def _digest(before: bytes, more: bytes) -> bytes:
    return hashlib.blake2b(more, key=before, digest_size=16).digest()
