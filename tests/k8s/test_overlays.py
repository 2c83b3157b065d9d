"""Every overlay, rendered: valid for KubeRay, hardened, and large enough for what it serves."""

from __future__ import annotations

import copy
import importlib.util
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from strict_schemas import ROOT, ServeDeploySchema, crd_schema, unavailable, unknown_keys

from eft_serve.config import AppConfig, Resources
from eft_serve.config_check.resources import wanted

KUSTOMIZE_S = 60
spec = importlib.util.spec_from_file_location("render", ROOT / "k8s" / "render.py")
assert spec is not None
assert spec.loader is not None
render = importlib.util.module_from_spec(spec)
spec.loader.exec_module(render)
OVERLAYS = sorted(path.name for path in (ROOT / "k8s" / "overlays").iterdir())
Manifest = dict[str, Any]


@cache
def _rendered(overlay: str) -> str:
    command = ["kubectl", "kustomize", str(ROOT / "k8s" / "overlays" / overlay)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=KUSTOMIZE_S).stdout


@cache
def validator() -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(crd_schema("rayservices"))


@pytest.fixture(params=OVERLAYS)
def overlay(request: pytest.FixtureRequest) -> str:
    if shutil.which("kubectl") is None:
        unavailable("no kubectl (Debian: apt-get install kubernetes-client)")
    assert isinstance(request.param, str)
    return request.param


@pytest.fixture
def manifests(overlay: str) -> list[Manifest]:
    return list(yaml.safe_load_all(_rendered(overlay)))


@pytest.fixture
def ray_service(manifests: list[Manifest]) -> Manifest:
    return only(manifests, "RayService")


def only(manifests: list[Manifest], kind: str) -> Manifest:
    (found,) = (m for m in manifests if m["kind"] == kind)
    return found


def groups(ray_service: Manifest) -> list[Manifest]:
    found: list[Manifest] = ray_service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    return found


def pods(ray_service: Manifest) -> list[Manifest]:
    cluster = ray_service["spec"]["rayClusterConfig"]
    return [group["template"] for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]]


def served(ray_service: Manifest) -> Any:
    return yaml.safe_load(ray_service["spec"]["serveConfigV2"])


def config_of(ray_service: Manifest) -> AppConfig:
    return AppConfig.parse(served(ray_service)["applications"][0]["args"]["config"])


def leaves(data: Any, path: str = "") -> dict[str, Any]:
    """Every scalar by its dotted path."""
    if not isinstance(data, dict | list):
        return {path: data}
    items = data.items() if isinstance(data, dict) else enumerate(data)
    return {k: v for key, child in items for k, v in leaves(child, f"{path}.{key}" if path else str(key)).items()}


def limit(group: Manifest, resource: str) -> float:
    (container,) = group["template"]["spec"]["containers"]
    return float(container["resources"]["limits"].get(resource, 0))


def offers(group: Manifest, resources: Resources) -> bool:
    return bool(resources.node_labels.items() <= group["labels"].items())


def misfits(ray_service: Manifest) -> list[str]:
    """Deployments without exactly one worker group that has their node labels, or larger than one of its pods."""
    found = []
    for field, resources, _ in wanted(config_of(ray_service)):
        homes = [group for group in groups(ray_service) if offers(group, resources)]
        fits = [
            limit(g, "cpu") >= resources.num_cpus and limit(g, "nvidia.com/gpu") >= resources.num_gpus for g in homes
        ]
        if fits != [True]:
            found.append(field)
    return found


def test_the_ray_service_is_valid_and_has_no_unknown_key(ray_service: Manifest) -> None:
    assert [f"{e.json_path}: {e.message}" for e in validator().iter_errors(ray_service)] == []


@pytest.mark.parametrize(
    "path",
    [
        "spec.excludeHeadPod",
        "spec.rayClusterConfig.authOption",
        "spec.rayClusterConfig.workerGroupSpecs.0.lables",
        "spec.rayClusterConfig.workerGroupSpecs.0.template.spec.nodeSelectors",
        "spec.rayClusterConfig.headGroupSpec.template.spec.containers.0.securityContext.readOnlyFilesystem",
    ],
)
def test_a_typo_in_the_ray_service_is_found(ray_service: Manifest, path: str) -> None:
    typo = copy.deepcopy(ray_service)
    *parents, last = path.split(".")
    target: Any = typo
    for parent in parents:
        target = target[int(parent) if isinstance(target, list) else parent]
    target[last] = {}
    assert [last in error.message for error in validator().iter_errors(typo)] == [True]


def test_serve_config_is_the_deployment_file_with_the_declared_overrides(overlay: str, ray_service: Manifest) -> None:
    data = served(ray_service)
    ServeDeploySchema.model_validate(data)
    assert list(unknown_keys(ServeDeploySchema, data)) == []
    written = (ROOT / "k8s" / "overlays" / overlay / "serve-config.yaml").read_text()
    assert written == render.render(overlay), "run k8s/render.py"
    source = yaml.safe_load((ROOT / "deployments" / render.SOURCES[overlay]).read_text())
    ours, theirs = leaves(data), leaves(source)
    assert {path: ours.get(path) for path in ours.keys() | theirs.keys() if ours.get(path) != theirs.get(path)} == (
        render.OVERRIDES[overlay]
    )


def test_every_deployment_has_one_worker_group_for_it(ray_service: Manifest) -> None:
    assert misfits(ray_service) == []


def test_a_label_that_no_group_has_is_found(ray_service: Manifest) -> None:
    broken = copy.deepcopy(ray_service)
    data = served(broken)
    model = next(iter(data["applications"][0]["args"]["config"]["models"]))
    data["applications"][0]["args"]["config"]["models"][model]["resources"]["node_labels"] = {"a": "typo"}
    broken["spec"]["serveConfigV2"] = yaml.safe_dump(data)
    assert misfits(broken) == [f"models.{model}"]


def test_the_worker_groups_have_room_for_all_that_they_run(ray_service: Manifest) -> None:
    config = config_of(ray_service)
    for group in groups(ray_service):
        here = [(r, replicas) for _, r, replicas in wanted(config) if offers(group, r)]
        assert here, f"{group['groupName']} runs nothing"
        pods_of_group = group["replicas"] * group.get("numOfHosts", 1)
        assert sum(r.num_cpus * n for r, n in here) <= limit(group, "cpu") * pods_of_group
        assert sum(r.num_gpus * n for r, n in here) <= limit(group, "nvidia.com/gpu") * pods_of_group


def test_a_group_that_asks_for_nodes_asks_for_those_of_its_label(ray_service: Manifest) -> None:
    several = len(groups(ray_service)) > 1
    for group in groups(ray_service):
        selector = group["template"]["spec"].get("nodeSelector")
        assert selector == (group["labels"] if several else None)


def test_every_overlay_has_its_deployment_file() -> None:
    assert sorted(render.SOURCES) == OVERLAYS
    assert set(render.OVERRIDES) == set(render.SOURCES)


def test_pods_have_no_privileges(ray_service: Manifest) -> None:
    for pod in pods(ray_service):
        assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
        assert pod["spec"]["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["spec"]["automountServiceAccountToken"] is False
        (container,) = pod["spec"]["containers"]
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert container["resources"]["limits"]["memory"] == container["resources"]["requests"]["memory"]
        writable = {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
        assert writable == {"/tmp", "/home/eft"}, "all else is read-only, so Ray needs just these"


def test_every_mount_has_its_volume_and_every_volume_its_mount(
    manifests: list[Manifest], ray_service: Manifest
) -> None:
    claims = {m["metadata"]["name"] for m in manifests if m["kind"] == "PersistentVolumeClaim"}
    for pod in pods(ray_service):
        volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
        assert set(volumes) == {mount["name"] for mount in pod["spec"]["containers"][0]["volumeMounts"]}
        used = {v["persistentVolumeClaim"]["claimName"] for v in volumes.values() if "persistentVolumeClaim" in v}
        assert used <= claims


def test_the_tenants_file_is_mounted_where_the_ingress_runs(ray_service: Manifest) -> None:
    server = config_of(ray_service).server
    assert server.tenants_file is not None
    (home,) = (group for group in groups(ray_service) if offers(group, server.resources))
    mounts = {m["mountPath"] for m in home["template"]["spec"]["containers"][0]["volumeMounts"]}
    assert str(server.tenants_file.parent) in mounts


def test_checkpoints_are_mounted_where_they_are_read(ray_service: Manifest) -> None:
    config = config_of(ray_service)
    mounted = any(model.path.startswith("/models/") for model in config.deployments.values())
    for group in groups(ray_service):
        mounts = {m["mountPath"] for m in group["template"]["spec"]["containers"][0]["volumeMounts"]}
        assert ("/models" in mounts) == mounted


def test_only_the_http_port_is_open_to_others(manifests: list[Manifest], ray_service: Manifest) -> None:
    policy = only(manifests, "NetworkPolicy")["spec"]
    selector = policy["podSelector"]["matchLabels"]
    assert all(selector.items() <= pod["metadata"]["labels"].items() for pod in pods(ray_service))
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    http_port = served(ray_service)["http_options"]["port"]
    to_all = [rule["ports"] for rule in policy["ingress"] if "from" not in rule]
    assert to_all == [[{"port": http_port, "protocol": "TCP"}]]
    inside, operator = [rule for rule in policy["ingress"] if "from" in rule]
    assert inside == {"from": [{"podSelector": {"matchLabels": selector}}]}
    assert operator["ports"] == [{"port": 8265, "protocol": "TCP"}], "the dashboard, and nothing else"


def test_everything_is_in_one_restricted_namespace(manifests: list[Manifest]) -> None:
    name = only(manifests, "Namespace")["metadata"]["name"]
    assert {m["metadata"]["namespace"] for m in manifests if m["kind"] != "Namespace"} == {name}
    assert not [m for m in manifests if m["kind"] == "Secret"]


def test_ray_authenticates_and_its_version_is_the_locked_one(ray_service: Manifest) -> None:
    cluster = ray_service["spec"]["rayClusterConfig"]
    assert cluster["authOptions"] == {"mode": "token"}
    locked = re.search(r"^ray==(.+)$", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    assert locked is not None
    assert cluster["rayVersion"] == locked[1]


def test_the_image_is_built_from_files_that_reach_the_builder() -> None:
    dockerfile = (ROOT / "k8s" / "Dockerfile").read_text()
    sources = {
        source
        for line in re.findall(r"^COPY (.+)$", dockerfile, re.MULTILINE)
        for source in line.split()[:-1]  # the last is where it goes
    }
    first, *rest = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert first == "*"
    assert {line.removeprefix("!") for line in rest if line.startswith("!")} == sources
    assert all((ROOT / source).exists() for source in sources)


def test_the_image_runs_as_the_user_of_the_pods(ray_service: Manifest) -> None:
    dockerfile = (ROOT / "k8s" / "Dockerfile").read_text()
    assert {str(pod["spec"]["securityContext"]["runAsUser"]) for pod in pods(ray_service)} == set(
        re.findall(r"^USER (.+)$", dockerfile, re.MULTILINE)
    )


def test_what_the_image_compiles_is_kept_where_pods_can_write(ray_service: Manifest) -> None:
    """Their root file system is read-only."""
    dockerfile = (ROOT / "k8s" / "Dockerfile").read_text()
    kept = re.findall(r"\b(?:TORCH_EXTENSIONS_DIR|NUMBA_CACHE_DIR)=(\S+)", dockerfile)
    assert len(kept) == 2
    for pod in pods(ray_service):
        writable = {volume["name"] for volume in pod["spec"]["volumes"] if "emptyDir" in volume}
        for container in pod["spec"]["containers"]:
            mounts = [m["mountPath"] for m in container["volumeMounts"] if m["name"] in writable]
            assert all(any(path.startswith(f"{mount}/") for mount in mounts) for path in kept)


def test_what_is_missing_skips_here_and_fails_in_ci(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EFT_SERVE_KUBERAY_CRDS", str(tmp_path))
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="EFT_SERVE_KUBERAY_CRDS"):
        crd_schema("rayservices")
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="EFT_SERVE_KUBERAY_CRDS"):
        crd_schema("rayservices")
