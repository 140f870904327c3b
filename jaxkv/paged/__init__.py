"""Pools of pages: many sequences in one state, prefixes that they share, rows that come and go.

`init` gives a state for the verbs of `jaxkv` itself; those of this package are about pages:
`reserve` before each step, `fork`, `release` and `window`, `owned`, `retain` and `drop` for an
index of prefixes (`PrefixIndex`), and `scores` and `compress` to keep only the pages that matter.
"""

from jaxkv.attend import attend as attend
from jaxkv.drop import evict as evict
from jaxkv.drop import rewind as rewind
from jaxkv.extend import extend as extend
from jaxkv.extend import prefill as prefill
from jaxkv.gather import gather as gather
from jaxkv.paged.compress import Protect as Protect
from jaxkv.paged.compress import compress as compress
from jaxkv.paged.compress import scores as scores
from jaxkv.paged.index import Prefix as Prefix
from jaxkv.paged.index import PrefixIndex as PrefixIndex
from jaxkv.paged.pool import drop as drop
from jaxkv.paged.pool import fork as fork
from jaxkv.paged.pool import init as init
from jaxkv.paged.pool import owned as owned
from jaxkv.paged.pool import release as release
from jaxkv.paged.pool import reserve as reserve
from jaxkv.paged.pool import retain as retain
from jaxkv.paged.pool import window as window
from jaxkv.paged.rows import Row as Row
from jaxkv.paged.rows import adopt as adopt
from jaxkv.paged.rows import snapshot as snapshot
from jaxkv.paged.swap import Parked as Parked
from jaxkv.paged.swap import offload as offload
from jaxkv.paged.swap import prefetch as prefetch
from jaxkv.paged.swap import restore as restore
from jaxkv.stats import stats as stats
from jaxkv.update import append as append
