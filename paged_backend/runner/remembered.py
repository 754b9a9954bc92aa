"""Numbers that take long to measure and stay the same, kept on disk between starts."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Mapping

from paged_backend.files import write_json
from paged_backend.models import cache_dir


def remembered(name: str, what: Mapping[str, object], measure: Callable[[], int]) -> int:
    """What `measure` gave the last time for the same `name` and `what`, or gives now.

    `what` must hold all that the number depends on, as JSON. A file that cannot be read or written does not matter.
    """
    key = hashlib.sha256(json.dumps([name, what], sort_keys=True).encode()).hexdigest()
    path = cache_dir() / "measured" / f"{key}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return int(json.loads(path.read_text())["value"])
    value = measure()
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"name": name, "value": value, "what": what})
    return value
