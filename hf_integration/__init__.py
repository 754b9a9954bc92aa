"""`model.generate(...)` on the paged engine: `patch(model)`, and the same call is batched with every other one."""

from hf_integration.patching import GenerateStats, paged, patch, reset_prefix_cache, stats, unpatch
from hf_integration.translate import NotServed

__all__ = ["GenerateStats", "NotServed", "paged", "patch", "reset_prefix_cache", "stats", "unpatch"]
