"""Our log records in the server's log."""

from __future__ import annotations

import logging
from collections.abc import Callable

import triton_python_backend_utils as pb_utils

_PACKAGES = ("paged_backend", "paged_kernels", "triton_server_model")


class TritonLog(logging.Handler):
    """Hands the records of our packages, from INFO on, to Triton's logger. Each takes some 25 us: none for each token.

    `extra={"request_id": ...}` puts the id in front, as in Triton's own lines. Triton names the file that called its
    logger, which is this one; the name of the record's own logger is part of the message.
    """

    def __init__(self, model: str) -> None:
        """Receives from now on; `model` is the name of Triton's model, which is part of every message."""
        super().__init__()
        self._model = model
        for logger in map(logging.getLogger, _PACKAGES):
            logger.addHandler(self)
            if logger.level == logging.NOTSET:
                logger.setLevel(logging.INFO)

    def close(self) -> None:
        """Receive no more: Triton's logger goes away with the model."""
        for logger in map(logging.getLogger, _PACKAGES):
            logger.removeHandler(self)
        super().close()

    def emit(self, record: logging.LogRecord) -> None:
        """One line; Triton escapes the breaks of a traceback."""
        try:
            request_id = getattr(record, "request_id", "")
            request = f"[request id: {request_id}] " if request_id else ""
            _log(record.levelno)(f"{request}{self._model}: {record.name}: {self.format(record)}")
        except Exception:
            self.handleError(record)


def _log(level: int) -> Callable[[str], None]:
    if level >= logging.ERROR:
        log = pb_utils.Logger.log_error
    elif level >= logging.WARNING:
        log = pb_utils.Logger.log_warn
    elif level >= logging.INFO:
        log = pb_utils.Logger.log_info
    else:
        log = pb_utils.Logger.log_verbose
    return log  # type: ignore[no-any-return]
