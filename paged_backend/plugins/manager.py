"""Finds plugins and calls their hooks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import pluggy

from paged_backend.errors import InvalidArgument, PagedBackendError
from paged_backend.plugins import builtin, hookspecs

logger = logging.getLogger(__name__)
T = TypeVar("T")


class PluginManager:
    """The built-in plugins, those installed under the entry-point group `paged_backend`, and those given."""

    def __init__(self, plugins: Iterable[object] = ()) -> None:
        self.pluggy = pluggy.PluginManager("paged_backend")
        self.pluggy.add_hookspecs(hookspecs)
        self.pluggy.register(builtin, name="builtin")
        try:
            self.pluggy.load_setuptools_entrypoints("paged_backend")
            for plugin in plugins:
                self.pluggy.register(plugin)
            self.pluggy.check_pending()
        except Exception as error:
            raise PagedBackendError(f"a plugin cannot be loaded: {type(error).__name__}: {error}") from error

    @property
    def hook(self) -> Any:
        """pluggy's hook relay: `manager.hook.paged_load_model(config=config)`."""
        return self.pluggy.hook

    def make(self, hook: str, field: str, name: str, **arguments: object) -> Any:
        """Ask a factory hook for `name`. Raises `InvalidArgument` for `field` when no plugin knows it."""
        made = getattr(self.hook, hook)(name=name, **arguments)
        if made is None:
            known = ", ".join(builtin.NAMES[hook])
            asked = ", ".join(self.providers(hook))
            raise InvalidArgument(field, name, f"no plugin provides it; built in are {known}; asked {asked}")
        return made

    def providers(self, hook: str) -> list[str]:
        """Names of the plugins that implement `hook`."""
        return [impl.plugin_name for impl in getattr(self.hook, hook).get_hookimpls()]

    def observer(self, hook: str) -> Callable[..., None]:
        """A call of `hook`, resolved once, that logs what its plugins raise instead of raising it."""
        implementations = [
            (impl.plugin_name, impl.function, impl.argnames) for impl in getattr(self.hook, hook).get_hookimpls()
        ]

        def notify(**arguments: object) -> None:
            for name, function, wanted in implementations:
                try:
                    function(*(arguments[argument] for argument in wanted))
                except Exception:
                    logger.exception("plugin %s failed in %s; the engine goes on", name, hook)

        return notify
