"""The profile of a step: kernels by kind, what they must move, and the command on a tiny model."""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from paged_kernels.attention import LayerSpec
from paged_kernels.cpu import library

from paged_backend import cli
from paged_backend.bench.step import _attended, _model_bytes, _times, kind_of
from tests.tiny import build


def bench_step(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["paged-backend", "bench", "step", "--device", "cpu", *arguments])
    monkeypatch.setenv("COLUMNS", "160")
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("_decode", "decode attention"),
        ("_shared", "shared prefix"),
        ("_prefill", "prefill attention"),
        ("void flash_fwd_kernel<Flash_fwd_kernel_traits<64, cutlass::bfloat16_t>>(Flash_fwd_params)", "attention"),
        ("nvjet_tst_192x208_64x4_2x1_v_bz_coopB_TNT", "linears"),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_16x16_128x2_tn_align8>", "linears"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, __nv_bfloat16>", "linears"),
        ("_gemv", "linears"),
        ("aten::addmm", "linears"),
        ("mkldnn::_linear_pointwise", "linears"),
        ("_add_norm", "norms"),
        ("_rope_and_write", "rope and cache"),
        ("_gated", "activation"),
        ("_choose", "sampling"),
        ("_add", "sampling"),
        ("locate", "step"),
        ("Memcpy HtoD (Pinned -> Device)", "copies"),
        ("void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda>", "copies"),
        ("void at::native::(anonymous namespace)::indexSelectSmallIndex<c10::BFloat16>", "other"),
        ("aten::embedding", "other"),
        ("paged_attention_bfloat16", "attention"),
        ("paged_linear", "linears"),
        ("paged_add_norm_bfloat16_float32", "norms"),
        ("paged_gated_bfloat16", "activation"),
        ("aten::argmax", "sampling"),
        ("aten::mul", "elementwise"),
    ],
)
def test_kinds(kernel: str, kind: str) -> None:
    assert kind_of(kernel) == kind


def test_kernels_that_overlap_are_counted_once() -> None:
    def event(name: str, start: float, end: float, device: str = "CUDA") -> SimpleNamespace:
        return SimpleNamespace(
            name=name, device_type=SimpleNamespace(name=device), time_range=SimpleNamespace(start=start, end=end)
        )

    # The norm waits for the first projection, the copy is over before the second one.
    events = [
        event("_add_norm", 2, 12),
        event("_gemv", 0, 10),
        event("cudaGraphLaunch", 0, 50, "CPU"),
        event("_gemv", 20, 25),
        event("Memcpy DtoH", 21, 24),
    ]
    times = _times(SimpleNamespace(events=lambda: events), torch.device("cuda"))
    assert times == {"linears": [10, 5], "norms": [2], "copies": [0]}


def test_model_bytes_of_decodes() -> None:
    model = build("llama", vocab_size=100)  # 2 layers, hidden 64, 4 heads, 2 KV heads of 16, inner 96, float32
    layer = LayerSpec(num_heads=4, num_kv_heads=2, key_dim=16, value_dim=16, scale=0.25)
    weights = 2 * (64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 96) + 100 * 64
    in_and_out = 2 * (2 * 128 + 2 * 96 + 3 * 160) + 164
    moved = _model_bytes(model, [layer, layer], [9, 19, 29], 1, decodes=True)
    assert moved["linears"] == 4 * (weights + 3 * in_and_out)
    assert moved["decode attention"] == 4 * 2 * (60 * 2 + 3 * 4) * 32
    assert moved["norms"] == 4 * 4 * 64 * 3 * 5
    assert moved["rope and cache"] == 4 * 2 * 3 * 2 * (4 + 2 + 2) * 16
    assert moved["activation"] == 4 * 3 * 96 * 3 * 2
    assert moved["sampling"] == 4 * 3 * 100
    assert "prefill attention" not in moved
    tied = build("llama", vocab_size=100, tie_word_embeddings=True)
    assert _model_bytes(tied, [layer, layer], [9, 19, 29], 1, decodes=True) == moved


def test_model_bytes_of_a_prefill() -> None:
    layer = LayerSpec(num_heads=4, num_kv_heads=2, key_dim=16, value_dim=16, scale=0.25)
    each = 4 * 50 * (2 + 4) * 32
    last = 4 * (50 * 2 + 4) * 32
    for decodes, expected in ((True, (each, last)), (False, (2 * each, None))):
        moved = _model_bytes(build("llama"), [layer, layer], [0], 50, decodes)
        assert (moved["prefill attention"], moved.get("decode attention")) == expected
        assert moved["sampling"] == 4 * 128


@pytest.mark.parametrize(
    ("window", "chunk", "seen"), [(None, None, 100), (8, None, 8), (200, None, 100), (None, 64, 36)]
)
def test_what_a_decode_sees(window: int | None, chunk: int | None, seen: int) -> None:
    layer = LayerSpec(4, 1, 16, 16, 1.0, window=window, chunk=chunk)
    assert _attended(layer, [99], 1) == (seen + 4) * 32


needs_kernels = pytest.mark.skipif(library.load(None) is None, reason="the CPU kernels are not built")


@needs_kernels
def test_decodes(
    tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, trace = tmp_path / "step.json", tmp_path / "trace.json"
    arguments = ["--rows", "3", "--context", "100", "--profile", str(trace), "--output", str(output)]
    arguments += ["--set", "one_call=false"]
    assert bench_step(monkeypatch, "--model", str(tiny_llama_dir), *arguments) == 0
    document = json.loads(output.read_text())
    step = document["step"]
    assert (document["model"], step["rows"], step["tokens"]) == (tiny_llama_dir.name, 3, 1)
    assert step["context"] == pytest.approx(100, abs=2)
    kernels = {each["kind"]: each for each in step["kernels"]}
    assert sum(each["share"] for each in kernels.values()) == pytest.approx(1)
    assert sum(each["microseconds"] for each in kernels.values()) == pytest.approx(step["kernel_microseconds"])
    assert step["busy"] == pytest.approx(step["kernel_microseconds"] / step["wall_microseconds"])
    assert step["host_microseconds"] == max(0, step["wall_microseconds"] - step["kernel_microseconds"])
    # The compiled kernels are seen, and left as they were.
    layers, compiled = 2, library.load(None)
    assert (kernels["attention"]["calls"], kernels["activation"]["calls"]) == (layers, layers)
    assert kernels["norms"]["calls"] == 2 * layers + 1
    assert not [name for name, each in vars(compiled).items() if inspect.isfunction(each)]
    linears = kernels["linears"]
    assert linears["calls"] == 2 * 4 + 1
    assert linears["gb_per_second"] == pytest.approx(linears["model_bytes"] / linears["microseconds"] / 1e3)
    assert linears["of_copy"] == pytest.approx(linears["gb_per_second"] / step["copy_gb_per_second"])
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert names & {"aten::addmm", "aten::mm", "mkldnn::_linear_pointwise", "paged_linear"}
    out = capsys.readouterr().out
    assert "3 x 1 tokens" in out
    assert f"{linears['share']:.1%}" in out


@needs_kernels
def test_kinds_of_layers_in_one_call(tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    output = tmp_path / "step.json"
    arguments = ["--rows", "3", "--context", "100", "--output", str(output), "--set", "quantization=int8"]
    assert bench_step(monkeypatch, "--model", str(tiny_llama_dir), *arguments) == 0
    step = json.loads(output.read_text())["step"]
    kernels = {each["kind"]: each for each in step["kernels"]}
    for kind in ("linears", "attention", "norms", "activation"):
        assert kernels[kind]["calls"] == 1
        assert kernels[kind]["microseconds"] > 0
    assert step["kernel_microseconds"] < 2 * step["wall_microseconds"], "nothing is counted twice"


@needs_kernels
def test_a_prefill(tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    output = tmp_path / "step.json"
    arguments = ["--prompt-tokens", "90", "--output", str(output), "--set", "one_call=false"]
    assert bench_step(monkeypatch, "--model", str(tiny_llama_dir), *arguments) == 0
    step = json.loads(output.read_text())["step"]
    assert (step["rows"], step["tokens"], step["context"]) == (1, 90, 90)
    calls = {each["kind"]: each["calls"] for each in step["kernels"]}
    assert calls["linears"] == 2 * 4 + 1, "one step a prompt"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--context", "480"], "context=480: at most 479, so that there is room for the steps"),
        (["--prompt-tokens", "512"], "prompt_tokens=512: at most 511"),
        (["--prompt-tokens", "9", "--rows", "1"], "prompt_tokens=9: is a step without rows and context"),
        (["--rows", "9", "--set", "max_num_seqs=8"], "rows=9: at most max_num_seqs=8"),
        (
            ["--rows", "6", "--context", "100", "--set", "num_blocks=32"],
            "rows=6: with 100 tokens each need more than 32 KV blocks",
        ),
        (
            ["--prompt-tokens", "90", "--set", "max_num_batched_tokens=80"],
            "prompt_tokens=90: at most 80, the tokens of one step",
        ),
        (
            ["--prompt-tokens", "90", "--set", "max_num_seqs=2"],
            "max_num_seqs=2: must be 1, so that a step prefills one prompt",
        ),
        (["--profile", "absent/x"], "profile='absent/x': its directory does not exist"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    tiny_llama_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    assert bench_step(monkeypatch, "--model", str(tiny_llama_dir), *arguments) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {message}"
