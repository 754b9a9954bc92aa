"""Runs the HTTP application beside a tritonserver, in a thread of this process."""

from __future__ import annotations

import importlib.util
import socket
import threading
import time
from typing import Self

from paged_backend.errors import InvalidArgument
from triton_server_model.launcher import ServerError

_EXIT_SECONDS = 10
"""How long running requests may go on when told to stop."""


class OpenAIServer:
    """OpenAI's API at `http://host:port/v1` as a context manager; `grpc_address` is the tritonserver's.

    Raises `InvalidArgument` at once for a port that is taken, `ServerError` without the packages that it needs. On exit
    no request is let in any more, and those that run are finished.
    """

    def __init__(self, host: str, port: int, grpc_address: str, api_key: str | None = None) -> None:
        if importlib.util.find_spec("fastapi") is None or importlib.util.find_spec("uvicorn") is None:
            raise ServerError("--openai needs fastapi and uvicorn: pip install 'paged-backend[openai]'")
        self.address = f"{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"
        self.has_key = api_key is not None
        self._grpc_address, self._api_key = grpc_address, api_key
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._socket.bind((host, port))  # nobody can connect before the thread listens
        except OSError as error:
            self._socket.close()
            message = f"cannot listen on {host}: {error}; choose another with --openai"
            raise InvalidArgument("openai", port, message) from None

    def __enter__(self) -> Self:
        import uvicorn

        from triton_server_model.openai.app import create_app

        config = uvicorn.Config(
            create_app(self._grpc_address, self._api_key),
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=_EXIT_SECONDS,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],), name="openai", daemon=True)
        self._thread.start()
        while not self._server.started:
            if not self._thread.is_alive():
                raise ServerError("the OpenAI front end did not start; its error is above")
            time.sleep(0.01)
        return self

    def __exit__(self, *error: object) -> None:
        self._server.should_exit = True
        self._thread.join()
