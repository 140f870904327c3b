"""What the object API raises. After any of these errors a cache is what it was before the call.

One exception, which the message names: an append is done in place, so a device that fails in the
middle of one takes the tokens with it, and the cache is empty.
"""


class KvCacheError(ValueError):
    """Input, option or request that does not fit the cache (the original's `KvCache(..)`)."""


class OutOfMemoryError(MemoryError):
    """No memory left, on the device or in a pool (the original's `OutOfMemory(..)`)."""
