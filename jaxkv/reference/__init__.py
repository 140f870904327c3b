"""The whole cache in NumPy, slow and obvious at sight: what the fast code is tested against.

A row is a Python list of all its tokens since the last `clear` (a token's index is its position),
each as it was given and as every tier that it has entered gives it back, plus one number per tier:
the first position whose data is still there. All the rest is derived from these by the rules in
`row.starts_of`: which tier holds a token, what is evicted. One layer, no jit. Verbs take a state
first and return a new one.
"""

from jaxkv.reference.adapted import Adapted, adapted, neutral, turned
from jaxkv.reference.attention import (
    Options,
    attend,
    attention_and_lse,
    exact_attention,
    extend,
    prefill,
)
from jaxkv.reference.cache import (
    ReferenceState,
    append,
    clear,
    evict,
    init,
    keep,
    migrate,
    rewind,
    take_rows,
)
from jaxkv.reference.formats import (
    FLOATS,
    as_scale,
    from_groups,
    mirror_of,
    quantize_groups,
    reflect,
    represent,
    rotate,
    to_groups,
)
from jaxkv.reference.pages import PageSummary, best_pages, kept_pages
from jaxkv.reference.reading import counts, gather, held
from jaxkv.reference.row import Row, first_positions

__all__ = [
    "FLOATS",
    "Adapted",
    "Options",
    "PageSummary",
    "ReferenceState",
    "Row",
    "adapted",
    "append",
    "as_scale",
    "attend",
    "attention_and_lse",
    "best_pages",
    "clear",
    "counts",
    "evict",
    "exact_attention",
    "extend",
    "first_positions",
    "from_groups",
    "gather",
    "held",
    "init",
    "keep",
    "kept_pages",
    "migrate",
    "mirror_of",
    "neutral",
    "prefill",
    "quantize_groups",
    "reflect",
    "represent",
    "rewind",
    "rotate",
    "take_rows",
    "to_groups",
    "turned",
]
