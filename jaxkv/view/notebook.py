"""A state in a notebook: `_repr_html_`, and `__treescope_repr__` for those who use treescope.

The classes are given both here, since drawing stands on a higher floor than they do.
"""

from __future__ import annotations

import html
from typing import Any

import jax
import numpy as np

from jaxkv.gather import gather
from jaxkv.models.layers import Layers
from jaxkv.state import CacheState
from jaxkv.status import Status
from jaxkv.view.draw import draw

MOST_DECODED = 2**24
"""Elements of keys that are decoded to be looked at; of larger states the config alone is shown."""


def is_readable(state: CacheState) -> bool:
    """Whether there are numbers to look at: not while tracing, nor after a donation."""
    end = state.end
    return isinstance(end, jax.Array | np.ndarray) and not (
        isinstance(end, jax.core.Tracer)
        or (isinstance(end, jax.Array) and (end.is_deleted() or not end.is_fully_addressable))
    )


def as_html(state: CacheState) -> str:
    """The bars of `draw`; where there is nothing to read, what `repr` says."""
    text = draw(state) if is_readable(state) else repr(state)
    return f"<pre>{html.escape(text)}</pre>"


def as_tree(state: CacheState, path: str | None, subtree_renderer: Any) -> Any:
    """treescope's view: the config, where each row is, and the tokens decoded."""
    from treescope.repr_lib import render_object_constructor

    return render_object_constructor(
        CacheState, contents(state), path, subtree_renderer, color="#00798c"
    )


def contents(state: CacheState) -> dict[str, Any]:
    """What there is to see of a state, by name."""
    found: dict[str, Any] = {"config": state.config, "end": state.end}
    if not is_readable(state):
        return found
    found["status"] = sorted({str(Status(bits)) for bits in np.asarray(state.status).ravel()})
    config = state.config
    size = config.max_tokens * config.num_kv_heads * config.head_dim * state.batch_size
    if size <= MOST_DECODED:
        layer = None if state.num_layers is None else 0
        decoded = jax.jit(gather)(state, layer=layer)
        found |= dict(zip(("keys", "values", "positions"), decoded, strict=True))
    return found


def layers_as_html(layers: Layers) -> str:
    """Each stack of layers, its first layer drawn."""
    return "".join(as_html(state) for state in layers.stacks)


# Not by assignment, which mypy takes for a method that the class does not have.
for shown, name, method in (
    (CacheState, "_repr_html_", as_html),
    (CacheState, "__treescope_repr__", as_tree),
    (Layers, "_repr_html_", layers_as_html),
):
    setattr(shown, name, method)
