"""Which pages of a pool are read, and which are kept: one row and kv head at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxkv.reference.formats import Array


@dataclasses.dataclass(frozen=True)
class PageSummary:
    """What the keys of one page lie between, element by element, [H] each, and what they are on
    average."""

    low: Array
    high: Array
    mean: Array
    norm: float

    @classmethod
    def of(cls, keys: Array) -> PageSummary:
        """Of keys [S, H]."""
        keys = keys.astype(np.float64)
        norm = float(np.linalg.norm(keys, axis=1).mean())
        return cls(keys.min(0), keys.max(0), keys.mean(0), norm)

    def most(self, query: Array) -> float:
        """The most that a query [H] may score with any of the keys."""
        query = query.astype(np.float64)
        return float(np.maximum(query * self.low, query * self.high).sum())


def best_pages(
    queries: Array, pages: Sequence[PageSummary], number: int, reach: float
) -> list[int]:
    """The `number` pages that are likely to have most of the weight of the queries [R, H] of a kv
    head: a page's best score is taken to be `reach` of the way from that of its mean key to the
    most that any key may have."""
    worth = np.zeros(len(pages))
    for query in queries:
        means = np.array([page.mean @ query.astype(np.float64) for page in pages])
        likely = means + reach * (np.array([page.most(query) for page in pages]) - means)
        weights = np.exp(likely - likely.max())
        worth += weights / weights.sum()
    return sorted(int(i) for i in np.argsort(-worth, kind="stable")[:number])


def kept_pages(scores: Array, stays: Array, budget: int) -> list[int]:
    """The pages that a row keeps of those with `scores` [P]: all that `stays` [P] says, and the
    best of the others as far as the budget goes."""
    kept = [int(i) for i in np.flatnonzero(stays)]
    order = np.argsort(-np.where(np.isnan(scores), -np.inf, scores), kind="stable")
    for index in order:
        if len(kept) < budget and int(index) not in kept:
            kept.append(int(index))
    return sorted(kept)
