"""Triton's interpreter, which takes its time for what is the same every time: kernels' tests take half as long."""

from __future__ import annotations

import functools
from typing import Any


def quicken() -> None:
    """The same results, sooner. What is replaced here is private to Triton, and as it is in 3.6."""
    from triton.language import core
    from triton.runtime import interpreter

    patch = functools.cache(interpreter._patch_lang)
    dtype_of, dtypes = interpreter._get_np_dtype, {}

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Of a device function; the language is patched for it once, which nobody undoes, and not at every call."""
        patch(self.fn)
        return self.rewrite()(*args, **kwargs)

    def get_np_dtype(ty: Any) -> Any:
        if ty.name not in dtypes:
            dtypes[ty.name] = dtype_of(ty)
        return dtypes[ty.name]

    def init(self: Any, types: list[Any], fields: list[str] | None = None) -> None:
        """Of the type of a tuple, as each tensor's shape is one; its name is made when somebody asks for it."""
        self.types, self.fields = types, fields or [""] * len(types)

    def name(self: Any) -> str:
        return "[" + ",".join(f"{field}:{type}" for field, type in zip(self.fields, self.types, strict=False)) + "]"

    interpreter.InterpretedFunction.__call__ = call
    interpreter._get_np_dtype = get_np_dtype
    core.tuple_type.__init__ = init
    core.tuple_type.name = property(name)
