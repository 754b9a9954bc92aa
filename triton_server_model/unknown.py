"""Request parameters that mean nothing to this model."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter

logger = logging.getLogger(__name__)

_MOST_NAMES = 64
_PLAIN = re.compile(r"[\w.-]{1,64}", re.ASCII)


class UnknownParameters:
    """Counts them by name, and logs each name once; names beyond the first 64, and odd ones, count as "other"."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._counter = Counter(
            "paged_backend_unknown_parameters",
            "Request parameters ignored, as none of the protocol's",
            ["name"],
            registry=registry,
        )
        self._counter.labels("other")
        self._seen: set[str] = set()

    def count(self, names: Iterable[str]) -> None:
        """The unknown parameters of one request."""
        for name in names:
            label = name if name in self._seen or self._is_new(name) else "other"
            self._counter.labels(label).inc()

    def _is_new(self, name: str) -> bool:
        if len(self._seen) == _MOST_NAMES or not _PLAIN.fullmatch(name):
            return False
        self._seen.add(name)
        logger.warning("request parameter %s is none of this model's; it is ignored here and from now on", name)
        return True
