"""Where a grammar is compiled for the first time: a process that may take too long or too much memory, or crash.

Compiling what somebody sends takes a millisecond, nearly always. But a schema of a few kilobytes can keep llguidance
busy for minutes while it takes all memory (patterns under `allOf`), or overflow the stack (references to references).
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from paged_backend.structured_outputs import Kind

_SECONDS = 2
_MEMORY = 2**30
_STACK = 2**20
"""Bytes; half of what the smallest of the threads that compile again in earnest may have."""


class Trial:
    """Starts the process when it is first needed, and again after its death. Used from any thread."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._state = threading.Lock()

    def __call__(self, kind: Kind, text: str) -> str:
        """The grammar in llguidance's own form. Raises ValueError saying what is wrong with it."""
        with self._state:
            if self._process is None or self._process.poll() is not None:
                self._process = _start()
            process = self._process
            assert process.stdin is not None
            assert process.stdout is not None
            with suppress(BrokenPipeError):
                process.stdin.write(json.dumps([kind, text]) + "\n")
                process.stdin.flush()
            if not (answer := process.stdout.readline()):
                raise ValueError(_cause_of_death(process.wait()))
        grammar, error = json.loads(answer)
        if error:
            raise ValueError(error)
        return str(grammar)


def _start() -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-sPm", __name__, str(_SECONDS), str(_MEMORY)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # what it dies of is the business of who sent it
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        start_new_session=True,  # a Ctrl-C in the terminal is not for it: it ends with its pipe
    )


def _cause_of_death(code: int) -> str:
    match -code:
        case signal.SIGALRM:
            return f"takes more than {_SECONDS} seconds to compile"
        case signal.SIGSEGV:
            return "is nested too deeply"
        case signal.SIGABRT | signal.SIGKILL:
            return f"takes more than {_MEMORY // 2**20} MiB of memory to compile"
    return f"cannot be compiled: the process that tried ended with code {code}"


def main() -> None:
    """Answer lines of [kind, text] with lines of [grammar, error]. Arguments: seconds for each, bytes in all."""
    from llguidance import LLMatcher, LLParserLimits, grammar_from

    seconds, memory = float(sys.argv[1]), int(sys.argv[2])
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
    for what, most in ((resource.RLIMIT_AS, memory), (resource.RLIMIT_STACK, _STACK), (resource.RLIMIT_CORE, 0)):
        resource.setrlimit(what, (most, resource.getrlimit(what)[1]))
    limits = LLParserLimits(verbose_errors=False)
    for line in sys.stdin:
        kind, text = json.loads(line)
        grammar = ""
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            if kind == "json":
                grammar = LLMatcher.grammar_from_json_schema(text, defaults={"whitespace_pattern": r" |\n[ \t]{0,20}"})
            else:
                grammar = grammar_from(kind, text)
            error = LLMatcher.validate_grammar(grammar, limits=limits)
        except (ValueError, RecursionError) as refusal:
            error = str(refusal)
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps([grammar, error.removeprefix("ERROR: ")]), flush=True)


if __name__ == "__main__":
    main()
