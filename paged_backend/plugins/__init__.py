"""The pluggy surface. `from paged_backend.plugins import hookimpl` is all a plugin needs."""

import pluggy

hookimpl = pluggy.HookimplMarker("paged_backend")
"""Marks a function of a plugin as the implementation of the hook of the same name in `hookspecs`."""
