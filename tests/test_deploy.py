"""The manifests of deploy/ against the schemas of Kubernetes, each other, and the real server they start."""

from __future__ import annotations

import functools
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import kubernetes_validate
import promql_parser
import psutil
import pytest
import tritonclient.grpc as triton
import yaml
from fastapi.testclient import TestClient
from tritonclient.utils import InferenceServerException

from paged_backend.config import EngineConfig
from tests.server.client import Client, eventually
from triton_server_model.launcher import MODEL_NAME, TritonServer, free_ports, packaged_repository
from triton_server_model.openai.app import from_environment

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
KEY = "a-key"


def manifests(folder: str) -> list[dict[str, Any]]:
    return [doc for path in sorted((DEPLOY / folder).glob("*.yaml")) for doc in yaml.safe_load_all(path.read_text())]


def the(kind: str, folder: str = "kubernetes") -> dict[str, Any]:
    (found,) = [doc for doc in manifests(folder) if doc.get("kind") == kind]
    return found


POD = the("Deployment")["spec"]["template"]
CONTAINER = POD["spec"]["containers"][0]
PATCHES = [
    (doc["target"]["kind"], operation["path"], operation["value"])
    for doc in yaml.safe_load((DEPLOY / "kubernetes" / "openai" / "kustomization.yaml").read_text())["patches"]
    for operation in yaml.safe_load(doc["patch"])
]
"""Of the component for OpenAI's API: each adds to a list."""
OPENAI = PATCHES[0][2]
KSERVE = the("ServingRuntime", "kserve")["spec"]
COPIES = re.findall(r"^COPY (.*) (\S+)$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
"""Into the image: what, and where."""
ENGINE = json.loads((DEPLOY / "kubernetes" / "engine.json").read_text())


def flag(name: str) -> str:
    (value,) = [found[1] for argument in CONTAINER["args"] if (found := re.fullmatch(f"--{name}=(.*)", argument))]
    return value


@pytest.mark.parametrize("version", ["1.29", kubernetes_validate.latest_version()])
@pytest.mark.parametrize(
    "manifest",
    [doc for doc in manifests("kubernetes") if re.fullmatch(r"v1|apps/v1|.*/v1|.*/v2", doc.get("apiVersion", ""))],
    ids=lambda doc: f"{doc['kind']}-{doc['metadata']['name']}",
)
def test_schema(manifest: dict[str, Any], version: str) -> None:
    if "coreos" not in manifest["apiVersion"]:
        kubernetes_validate.validate(manifest, version, strict=True)


def test_manifests_belong_together() -> None:
    labels = POD["metadata"]["labels"]
    assert the("Deployment")["spec"]["selector"]["matchLabels"] == labels
    for service in [doc for doc in manifests("kubernetes") if doc.get("kind") == "Service"]:
        assert service["spec"]["selector"] == labels
    for kind, selector in (
        ("PodDisruptionBudget", "selector"),
        ("PodMonitor", "selector"),
        ("NetworkPolicy", "podSelector"),
    ):
        assert the(kind)["spec"][selector]["matchLabels"] == labels
    for kind in ("HorizontalPodAutoscaler", "ScaledObject"):
        assert the(kind)["spec"]["scaleTargetRef"]["name"] == the("Deployment")["metadata"]["name"]
    ports = {port["name"] for port in CONTAINER["ports"]}
    assert the("PodMonitor")["spec"]["podMetricsEndpoints"][0]["port"] in ports
    for rule in the("NetworkPolicy")["spec"]["ingress"]:
        assert {port["port"] for port in rule["ports"]} <= ports
    for container, volumes in ((CONTAINER, POD["spec"]["volumes"]), (KSERVE["containers"][0], KSERVE["volumes"])):
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in volumes}
    kustomization = the("Kustomization")
    assert {CONTAINER["image"]} == {image["name"] for image in kustomization["images"]}
    for name in kustomization["resources"]:
        assert (DEPLOY / "kubernetes" / name).is_file()


@pytest.mark.parametrize("version", ["1.29", kubernetes_validate.latest_version()])
def test_openai_component(version: str) -> None:
    for kind, path, value in PATCHES:
        for doc in [doc for doc in manifests("kubernetes") if doc.get("kind") == kind]:
            *keys, end = path.split("/")[1:]
            assert end == "-"
            functools.reduce(lambda node, key: node[int(key) if key.isdigit() else key], keys, doc).append(value)
            kubernetes_validate.validate(doc, version, strict=True)
    assert (OPENAI["image"], OPENAI["lifecycle"]) == (CONTAINER["image"], CONTAINER["lifecycle"])
    assert OPENAI["securityContext"] == CONTAINER["securityContext"]
    assert f"--timeout-graceful-shutdown={flag('exit-timeout-secs')}" in OPENAI["args"]


def test_streams_end_before_the_server_and_the_server_before_the_pod() -> None:
    assert ENGINE["timeout"] < int(flag("exit-timeout-secs"))
    wait = int(CONTAINER["lifecycle"]["preStop"]["exec"]["command"][1])
    grace = wait + int(flag("exit-timeout-secs"))
    assert grace < POD["spec"]["terminationGracePeriodSeconds"]
    predictor = the("InferenceService", "kserve")["spec"]["predictor"]
    assert grace < predictor["terminationGracePeriodSeconds"]


def test_kserve_runs_the_same_container() -> None:
    kserve = KSERVE["containers"][0]
    moved = {"--model-repository=/models": "--model-repository=/mnt/models"}
    assert kserve["args"][:-2] == [moved.get(argument, argument) for argument in CONTAINER["args"]]
    assert kserve["args"][-2:] == ["--http-port=8080", "--grpc-port=9000"]
    # KServe sends requests to one port, which is that of HTTP.
    assert (KSERVE["protocolVersions"], kserve["ports"]) == (["v2"], [{"containerPort": 8080, "protocol": "TCP"}])
    for name in ("livenessProbe", "readinessProbe", "startupProbe"):
        same = json.dumps(CONTAINER[name]).replace('"http"', "8080").replace("8000", "8080")
        assert kserve[name] == json.loads(same)
    assert the("InferenceService", "kserve")["spec"]["predictor"]["model"]["runtime"] == "paged-backend-triton"


def test_image(tmp_path: Path) -> None:
    """What the Dockerfile copies is there, is enough to build the package, and holds the packaged models."""
    source = tmp_path / "src"
    source.mkdir()
    for names, target in COPIES:
        for name in names.split():
            kind = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            if target.startswith("./"):
                kind(ROOT / name, source / name)
    assert ("model_repository", flag("model-repository")) in COPIES
    assert packaged_repository() == ROOT / "model_repository"
    (engine,) = [mount for mount in CONTAINER["volumeMounts"] if mount["name"] == "engine"]
    assert (ROOT / "model_repository" / Path(engine["mountPath"]).relative_to("/models")).is_file()
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=source,
        env={"CXX": "/no/compiler"},  # which takes its time, and is tested elsewhere
        check=True,
    )
    assert list(tmp_path.glob("paged_backend-*.whl"))


@pytest.fixture(scope="module")
def client(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """The server that the manifests start, but for its paths and ports, with their engine.json on a tiny model."""
    repository = tmp_path_factory.mktemp("deploy") / "models"
    shutil.copytree(packaged_repository(), repository)
    tiny = {"model": str(tiny_llama_dir), "device": "cpu", "dtype": "float32", "num_blocks": 256}
    (repository / MODEL_NAME / "1" / "engine.json").write_text(json.dumps(ENGINE | tiny))
    ports = dict(zip(("http_port", "grpc_port", "metrics_port"), free_ports(3), strict=True))
    arguments = [argument.replace("$(ADMIN_KEY)", KEY) for argument in CONTAINER["args"][1:]]
    assert flag("model-repository") == "/models"
    with TritonServer(repository, arguments=arguments, **ports) as server:
        client = Client(server)
        client.http.headers["connection"] = "close"
        yield client
        server.process.kill()  # it was told to wait for two minutes


def probe(client: Client, name: str) -> bool:
    """Whether the kubelet would be content."""
    action = CONTAINER[name]
    if "httpGet" in action:
        return client.http.get(action["httpGet"]["path"]).is_success
    script, address = action["exec"]["command"]
    assert (f"deploy/{script}", "/usr/local/bin/") in COPIES
    assert address == "localhost:8000"
    command = [DEPLOY / script, client.server.address("http")]
    return subprocess.run(command, timeout=action["timeoutSeconds"], check=False).returncode == 0


def repository_api(client: Client, action: str, **headers: str) -> httpx.Response:
    return client.http.post(f"/v2/repository/{action}", headers=headers)


def test_models_are_loaded_by_those_with_the_key_alone(client: Client) -> None:
    assert repository_api(client, "index").status_code == 403
    assert repository_api(client, "index", **{"admin-key": KEY}).json()[0]["state"] == "READY"
    with triton.InferenceServerClient(
        client.server.address("grpc"), channel_args=[("grpc.enable_http_proxy", 0)]
    ) as grpc:
        assert grpc.is_model_ready(MODEL_NAME)
        with pytest.raises(InferenceServerException, match="restricted"):
            grpc.get_model_repository_index()
        assert grpc.get_model_repository_index(headers={"triton-grpc-protocol-admin-key": KEY}).models


def test_openai_front_without_the_key(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may not see the server's index of models, and is told their names."""
    environment = {variable["name"]: variable.get("value", KEY) for variable in OPENAI["env"]}
    assert environment["PAGED_BACKEND_GRPC"] == "localhost:8001"
    environment |= {"PAGED_BACKEND_GRPC": client.server.address("grpc")}
    for name, value in (
        environment | {"PAGED_BACKEND_MODELS": f"absent,{environment['PAGED_BACKEND_MODELS']}"}
    ).items():
        monkeypatch.setenv(name, value)
    assert OPENAI["command"][1:] == ["--factory", f"{from_environment.__module__}:{from_environment.__name__}"]
    with TestClient(from_environment(), headers={"Authorization": f"Bearer {KEY}"}) as front:
        assert front.get("/health").is_success
        assert [model["id"] for model in front.get("/v1/models").json()["data"]] == [MODEL_NAME]
        body = {"prompt": "the fox", "max_tokens": 1}
        assert front.post("/v1/completions", json=body | {"model": MODEL_NAME}).json()["choices"]
        for name in ("absent", "unknown"):
            answer = front.post("/v1/completions", json=body | {"model": name})
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


def test_probes(client: Client) -> None:
    """They tell a dead engine, and a dead stub, which on this server leaves all it says of itself READY."""

    def alive() -> bool:
        return probe(client, "livenessProbe")

    def reload() -> None:
        for action in ("unload", "load"):
            repository_api(client, f"models/{MODEL_NAME}/{action}", **{"admin-key": KEY}).raise_for_status()
        eventually(lambda: probe(client, "startupProbe") and probe(client, "readinessProbe") and alive())

    def stub() -> psutil.Process:
        (found,) = psutil.Process(client.server.process.pid).children()
        return found

    assert probe(client, "startupProbe")
    assert probe(client, "readinessProbe")
    assert alive()

    stub().children()[0].kill()  # the engine
    eventually(lambda: not probe(client, "readinessProbe"))
    assert not alive()
    eventually(lambda: client.http.get("/v2/health/ready").is_success)  # again, so no probe may ask it
    reload()

    stub().kill()
    eventually(lambda: not alive())
    assert probe(client, "readinessProbe")
    reload()


def queries() -> dict[str, str]:
    """Every PromQL expression, by where it is."""
    rules = the("PrometheusRule")["spec"]["groups"][0]["rules"]
    found = {rule["alert"]: rule["expr"] for rule in rules}
    found |= {
        f"keda-{n}": trigger["metadata"]["query"] for n, trigger in enumerate(the("ScaledObject")["spec"]["triggers"])
    }
    adapter = yaml.safe_load((DEPLOY / "kubernetes" / "prometheus-adapter-values.yaml").read_text())["rules"]["custom"]
    for rule in adapter:
        found[f"{rule['name']['as']}-series"] = rule["seriesQuery"]
        filled = rule["metricsQuery"].replace("<<.GroupBy>>", "pod").replace("<<.LabelMatchers>>", 'pod="a"')
        found[rule["name"]["as"]] = filled
    return found


@pytest.mark.parametrize("query", queries().values(), ids=queries())
def test_queries(client: Client, query: str) -> None:
    promql_parser.parse(query)
    assert client.generate({"text_input": "a", "max_tokens": 1}).is_success
    names = re.findall(r"\bpaged_backend_\w+", query)
    assert names

    def shown() -> set[str]:
        page = httpx.get(f"http://{client.server.address('metrics')}/metrics", trust_env=False).text
        return set(re.findall(r"^paged_backend_\w+", page, re.MULTILINE))

    eventually(lambda: set(names) <= shown(), lambda: f"{set(names) - shown()} are not on the page")


def test_autoscaler_asks_for_what_the_adapter_gives() -> None:
    metrics = {metric["pods"]["metric"]["name"] for metric in the("HorizontalPodAutoscaler")["spec"]["metrics"]}
    assert metrics <= queries().keys()
    (in_flight, _) = the("HorizontalPodAutoscaler")["spec"]["metrics"]
    slots = EngineConfig(**ENGINE).max_num_seqs
    assert int(in_flight["pods"]["target"]["averageValue"]) == slots * 3 // 4
    assert int(the("ScaledObject")["spec"]["triggers"][0]["metadata"]["threshold"]) == slots * 3 // 4


def test_operators_guide() -> None:
    """It explains every field of the engine, and every alert with its expression."""
    guide = (ROOT / "docs" / "operations.md").read_text()
    missing = [name for name in EngineConfig.model_fields if f"`{name}`" not in guide]
    assert not missing
    for rule in the("PrometheusRule")["spec"]["groups"][0]["rules"]:
        assert f"`{rule['expr']}`" in guide
