"""Files that are written whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path


def write_json(path: Path, document: object) -> None:
    """Write `document` to `path`."""
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(json.dumps(document, indent=2) + "\n")
        os.chmod(temporary, 0o644)  # mkstemp's is 0600
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
