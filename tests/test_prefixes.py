"""The index of prefixes on the host: names, longest match, tenants, what is forgotten first."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from jaxkv import KvCacheConfig
from jaxkv.paged import PrefixIndex

SIZE = 4
TOKENS = np.arange(40, dtype=np.int32)


def index_of(*lengths: int, config: KvCacheConfig | None = None) -> PrefixIndex:
    """An index with prefixes of TOKENS of so many tokens; the pages of a prefix of n are 0 .. n."""
    index = PrefixIndex(config or KvCacheConfig(), SIZE)
    for length in lengths:
        assert index.insert(TOKENS[:length], [*range(length // SIZE), -1], length)
    return index


def test_the_longest_prefix_of_whole_pages_is_found():
    """One token at least is left to be computed; what is not the same from the first token on is
    another prefix."""
    index = index_of(4, 12, 20)
    for length, expected in ((4, None), (5, 4), (12, 4), (13, 12), (20, 12), (40, 20)):
        found = index.match(TOKENS[:length])
        assert (found and found.row) == expected
    changed = TOKENS.copy()
    changed[5] += 1
    assert index.match(changed).length == 4
    changed[0] += 1
    assert index.match(changed) is None
    assert (index.hits, index.misses) == (6, 2)


def test_tenants_and_configurations_do_not_meet():
    """The same tokens under another salt are another prefix; so are they in another format."""
    index = index_of(8)
    assert index.match(TOKENS, salt="other") is None
    assert index.insert(TOKENS[:8], [7], "its own", salt="other")
    assert index.match(TOKENS, salt="other").row == "its own"
    other = index_of(8, config=dataclasses.replace(KvCacheConfig(), tail_length=128))
    assert not set(other._held) & set(index._held)


def test_what_nobody_uses_goes_first_the_longest_unused_before():
    index = index_of(4, 8, 12)
    used = index.match(TOKENS[:9])  # 8 tokens; now the last used, and in use
    np.testing.assert_array_equal(index.evict(1), [0])
    np.testing.assert_array_equal(index.evict(1), [0, 1, 2])
    assert len(index.evict()) == 0
    index.release(used)
    np.testing.assert_array_equal(index.evict(), [0, 1])
    assert not len(index)


def test_a_prefix_is_new_once_and_whole():
    index = index_of(8)
    assert not index.insert(TOKENS[:8], [5, 6], "again")
    with pytest.raises(ValueError, match="9 tokens: a prefix is whole pages of 4"):
        index.insert(TOKENS[:9], [1], None)
