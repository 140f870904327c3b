"""What the object API raises. After any of these errors a cache is what it was before the call."""


class KvCacheError(ValueError):
    """Input, option or request that does not fit the cache (the original's `KvCache(..)`)."""


class OutOfMemoryError(MemoryError):
    """No memory left, on the device or in a pool (the original's `OutOfMemory(..)`)."""
