"""What lies in cluster/: manifests against their schemas with unknown fields refused, jobs' commands against the programs'
parsers, and what has to be the same in several files. Nothing is run.

KubeRay's schemas are read from KUBERAY_CRDS, or from shared/kuberay-crds beside the checkout; overlays are rendered by
kubectl's kustomize. Where one is missing, what needs it is skipped.
"""

import copy
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import ray
import sqlalchemy
import yaml
from conftest import ROOT
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.serve import Application
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
from ray.serve.schema import ServeDeploySchema

from paella import command_line
from pipelines import cli, evaluate, generate, tokenize_config, train_config
from pipelines.workers import _cpus_per_worker
from serve.app import Arguments, app

CLUSTER = ROOT / "cluster"
BASE = CLUSTER / "base"
OVERLAYS = sorted(path.name for path in (CLUSTER / "overlays").iterdir())
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the CRDs are 100,000 lines
KUBERNETES = "1.33"
RAY_GROUPS = ("ray.io", "monitoring.coreos.com")
"""API groups that Kubernetes itself knows nothing of."""
PROGRAMS = {
    "pipelines/tokenize_images.py": tokenize_config.TokenizeConfig,
    "pipelines/train.py": train_config.presets(),
    "pipelines/generate.py": generate.GenerateConfig,
    "pipelines/evaluate.py": evaluate.EvaluateConfig,
}


@pytest.fixture(scope="session")
def rendered() -> dict[str, list[dict]]:
    """The objects of each overlay."""
    if shutil.which("kubectl") is None:
        pytest.skip("there is no kubectl, whose kustomize renders the overlays")
    objects = {}
    for name in OVERLAYS:
        command = ["kubectl", "kustomize", CLUSTER / "overlays" / name]
        objects[name] = list(yaml.load_all(subprocess.run(command, capture_output=True, text=True, check=True).stdout, LOADER))
    return objects


@pytest.fixture(scope="session")
def crds() -> dict[str, jsonschema.Draft202012Validator]:
    """Validators of KubeRay's kinds."""
    places = [os.environ.get("KUBERAY_CRDS"), ROOT.parent / "shared" / "kuberay-crds"]
    found = next((Path(place) for place in places if place and Path(place).is_dir()), None)
    if found is None:
        pytest.skip("there are no KubeRay CRDs: KUBERAY_CRDS names their directory")
    schemas = {}
    for file in found.glob("*.yaml"):
        spec = yaml.load(file.read_text(), LOADER)["spec"]
        (version,) = (version for version in spec["versions"] if version["name"] == "v1")
        schemas[spec["names"]["kind"]] = jsonschema.Draft202012Validator(strict(version["schema"]["openAPIV3Schema"]))
    return schemas


def strict(schema: dict) -> dict:
    """A CRD's schema as JSON Schema, in which fields that it does not know are errors."""
    schema = dict(schema)
    if schema.pop("x-kubernetes-int-or-string", False):
        for key in ("type", "anyOf", "format", "pattern"):
            schema.pop(key, None)
        return schema | {"type": ["integer", "string"]}
    if schema.pop("nullable", False) and "type" in schema:
        schema["type"] = [schema["type"], "null"]
    if "properties" in schema:
        schema["properties"] = {name: strict(value) for name, value in schema["properties"].items()}
        if schema["properties"].get("metadata", {}).get("type") == "object" and "kind" in schema["properties"]:
            schema["properties"]["metadata"] = {"type": "object"}  # Kubernetes' own
        if not schema.pop("x-kubernetes-preserve-unknown-fields", False):
            schema["additionalProperties"] = False
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            schema[key] = strict(schema[key])
    return schema


def pick(objects: list[dict], kind: str, name: str | None = None) -> dict:
    (found,) = (item for item in objects if item["kind"] == kind and name in (None, item["metadata"]["name"]))
    return found


def clusters(objects: list[dict]) -> dict[str, dict]:
    """Ray cluster specs of an overlay, by kind and name."""
    places = {"RayCluster": "", "RayJob": "rayClusterSpec", "RayService": "rayClusterConfig"}
    return {
        f"{item['kind']} {item['metadata']['name']}": item["spec"].get(places[item["kind"]], item["spec"])
        for item in objects
        if item["kind"] in places
    }


def groups(spec: dict) -> dict[str, dict]:
    return {group["groupName"]: group for group in spec["workerGroupSpecs"]}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_ray_kinds_fit_their_crds(rendered, crds, overlay):
    checked = [item for item in rendered[overlay] if item["kind"] in crds]
    for item in checked:
        crds[item["kind"]].validate(item)
    assert sorted(item["kind"] for item in checked) == ["RayCluster", *["RayJob"] * 4, "RayService"]


@pytest.mark.parametrize(
    "kind, path, key",
    [
        ("RayCluster", ("spec", "autoscalerOptions"), "idleTimeoutSecond"),
        ("RayJob", ("spec",), "backofLimit"),
        ("RayJob", ("spec", "rayClusterSpec", "headGroupSpec", "template", "spec", "containers", 0), "imagePullPolice"),
        ("RayService", ("spec", "upgradeStrategy"), "typ"),
    ],
)
def test_misspelt_keys_of_ray_kinds_are_found(rendered, crds, kind, path, key):
    item = copy.deepcopy(next(item for item in rendered["cpu"] if item["kind"] == kind))
    place = item
    for step in path:
        place = place[step]
    place[key] = "x"
    with pytest.raises(jsonschema.ValidationError, match=key):
        crds[kind].validate(item)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_core_kinds_fit_kubernetes(rendered, overlay):
    core = [item for item in rendered[overlay] if item["apiVersion"].split("/")[0] not in RAY_GROUPS]
    assert {item["kind"] for item in core} >= {"Deployment", "StatefulSet", "NetworkPolicy", "PersistentVolumeClaim"}
    for item in core:
        kubernetes_validate.validate(item, KUBERNETES, strict=True)
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(core[0] | {"specs": {}}, KUBERNETES, strict=True)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_fit_kubernetes(rendered, overlay):
    """The CRDs hold pod templates of one version; a pod is checked against Kubernetes' own schema too."""
    for name, spec in clusters(rendered[overlay]).items():
        for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": group["template"]["spec"]}
            kubernetes_validate.validate(pod, KUBERNETES, strict=True)
            assert group["template"]["spec"].get("restartPolicy", "Never") == "Never", f"{name}: autoscaler v2 needs it"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_clusters(rendered, overlay):
    """What schemas do not say: token authentication, a head without work, groups that can come to be what they start with."""
    for name, spec in clusters(rendered[overlay]).items():
        assert spec["authOptions"]["mode"] == "token" and spec["autoscalerOptions"]["version"] == "v2", name
        assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0", name
        assert list(groups(spec)) == ["cpu", "training", "encoders"], name
        for group in spec["workerGroupSpecs"]:
            assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"], (name, group["groupName"])
        assert sum(group["minReplicas"] for group in spec["workerGroupSpecs"]) > 0, f"{name}: programs see what is there at first"
        assert ("gcsFaultToleranceOptions" in spec) == name.startswith("RayService")
    assert pick(rendered[overlay], "RayService")["metadata"]["name"] != pick(rendered[overlay], "RayCluster")["metadata"]["name"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_training_has_its_gpus_before_it_begins(rendered, overlay):
    objects = rendered[overlay]
    group = groups(clusters(objects)["RayJob train"])["training"]
    assert group["minReplicas"] == group["maxReplicas"] == groups(pick(objects, "RayCluster")["spec"])["training"]["maxReplicas"]
    gpus = int(group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]) * group["maxReplicas"]
    workers = parsed(pick(objects, "RayJob", "train")["spec"]["entrypoint"]).num_workers
    assert workers == (gpus or train_config.presets()["tiny"].num_workers)


def parsed(entrypoint: str) -> object:
    """The config that a program makes of its command."""
    python, program, *arguments = shlex.split(entrypoint)
    assert python == "python" and (ROOT / program).is_file()
    before, sys.argv = sys.argv, [program, *arguments]
    try:
        return command_line._parse(PROGRAMS[program], program)
    finally:
        sys.argv = before


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_programs_take_the_jobs_commands(rendered, overlay):
    jobs = [item for item in rendered[overlay] if item["kind"] == "RayJob"]
    assert {item["metadata"]["name"] for item in jobs} == {"tokenize", "train", "generate", "evaluate"}
    for item in jobs:
        spec = item["spec"]
        output = parsed(spec["entrypoint"]).output
        assert output.startswith(("/runs/", "s3://paella/")), "a retry finds it on another cluster"
        assert spec["submissionMode"] == "K8sJobMode" and spec["backoffLimit"] > 0
        assert spec["shutdownAfterJobFinishes"] and spec["ttlSecondsAfterFinished"] > 0


def test_a_misspelt_flag_is_found():
    with pytest.raises(SystemExit):
        parsed("python pipelines/generate.py --model m --promts p --output o")


def test_one_image_and_one_version(rendered):
    images = set()
    for objects in rendered.values():
        text = json.dumps([item for item in objects if item["kind"] != "ConfigMap"])
        images |= set(re.findall(r'"image": "([^"]*paella-ray[^"]*)"', text))
        assert {spec["rayVersion"] for spec in clusters(objects).values()} == {importlib.metadata.version("ray")}
    (image,) = images
    project = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE).group(1)
    assert image == f"registry.example/paella-ray:{project}"
    assert image in (CLUSTER / "Dockerfile").read_text()
    assert f"ray=={ray.__version__}\n" in (ROOT / "constraints.txt").read_text()
    assert f"-{project}.zip" in yaml.safe_load((BASE / "runtime_env.yaml").read_text())["working_dir"]


def test_runtime_environment():
    values = yaml.safe_load((BASE / "runtime_env.yaml").read_text())
    assert values["env_vars"] == cli.WORKER_ENVIRONMENT
    ray.runtime_env.RuntimeEnv(**values)  # raises for what Ray does not know


def serve_problems(values: dict) -> list[str]:
    """What is wrong with a Serve config: by Ray, by our arguments, and keys that Ray does not know and would not mention."""
    problems = []
    try:
        schema = ServeDeploySchema.parse_obj(values)
        problems += unknown_keys(values, schema.dict(exclude_unset=False), "")
        for application in values["applications"]:
            Arguments.model_validate(application["args"])
    except ValueError as error:
        problems.append(str(error))
    return problems


def unknown_keys(values: object, known: object, path: str) -> list[str]:
    if path.endswith((".args", ".runtime_env")):
        return []
    if isinstance(values, list):
        return [problem for i, value in enumerate(values) for problem in unknown_keys(value, known[i], f"{path}.{i}")]
    if not isinstance(values, dict):
        return []
    return [f"{path}.{key}" for key in values if key not in known] + [
        problem for key in values if key in known for problem in unknown_keys(values[key], known[key], f"{path}.{key}")
    ]


def test_serve_config_is_right_and_in_one_place(rendered):
    text = (BASE / "serve.yaml").read_text()
    values = yaml.safe_load(text)
    assert serve_problems(values) == []
    assert values["applications"][0]["runtime_env"] == {
        "working_dir": yaml.safe_load((BASE / "runtime_env.yaml").read_text())["working_dir"]
    }
    for objects in rendered.values():
        assert pick(objects, "RayService")["spec"]["serveConfigV2"] == text
        for item in objects:
            if item["kind"] == "RayJob":
                assert item["spec"]["runtimeEnvYAML"] == (BASE / "runtime_env.yaml").read_text()


def test_serve_makes_the_application_of_its_config():
    """By what `serve deploy` calls."""
    (application,) = yaml.safe_load((BASE / "serve.yaml").read_text())["applications"]
    assert application["import_path"] == "serve.app:app"
    built = call_user_app_builder_with_args_if_necessary(app, application["args"])
    assert isinstance(built, Application)
    with pytest.raises(ValueError, match="max_replica"):
        call_user_app_builder_with_args_if_necessary(app, application["args"] | {"max_replica": 2})


@pytest.mark.parametrize(
    "path, key",
    [
        ((), "proxy_locations"),
        (("http_options",), "hots"),
        (("applications", 0), "import_paths"),
        (("applications", 0, "args"), "max_replica"),
    ],
)
def test_misspelt_keys_of_the_serve_config_are_found(path, key):
    values = yaml.safe_load((BASE / "serve.yaml").read_text())
    place = values
    for step in path:
        place = place[step]
    place[key] = "EveryNode"
    assert any(key in problem for problem in serve_problems(values))


def test_metrics_exist():
    """Every series of dashboards and alerts is one of ours, or one that Ray's own dashboards draw."""
    ours = "".join((ROOT / name).read_text() for name in ("serve/observability.py", "pipelines/gauges.py"))
    known = {f"ray_{name}" for name in re.findall(r'(?:Counter|Gauge|Histogram)\(\s*"(\w+)"', ours)}
    panels = Path(ray.__file__).parent / "dashboard" / "modules" / "metrics" / "dashboards"
    theirs = "".join(file.read_text() for file in panels.glob("*_panels.py"))
    known |= set(re.findall(r"\bray_\w+", theirs))
    texts = [file.read_text() for file in [*(BASE / "dashboards").glob("*.json"), BASE / "monitoring.yaml"]]
    used = {re.sub("_(bucket|sum|count)$", "", name) for text in texts for name in re.findall(r"\bray_\w+", text)}
    used -= {"ray_io_cluster"}
    assert len(used) > 25
    assert used - known == set()


def test_dashboards_and_alerts():
    for file in (BASE / "dashboards").glob("*.json"):
        board = json.loads(file.read_text())
        assert board["uid"] == f"paella-{file.stem}"
        assert all(target["expr"] for panel in board["panels"] for target in panel["targets"])
    monitors = list(yaml.safe_load_all((BASE / "monitoring.yaml").read_text()))
    head = yaml.safe_load((BASE / "raycluster.yaml").read_text())["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    ports = {port["name"] for port in head["ports"]}
    for monitor in monitors:
        assert {endpoint["port"] for endpoint in monitor["spec"].get("podMetricsEndpoints", [])} <= ports
    for group in pick(monitors, "PrometheusRule")["spec"]["groups"]:
        for rule in group["rules"]:
            assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"} and rule["annotations"]["summary"]


def test_mlflow_has_the_driver_of_its_database(rendered):
    arguments = pick(rendered["cpu"], "Deployment")["spec"]["template"]["spec"]["containers"][0]["args"]
    (uri,) = (argument.split("=", 1)[1] for argument in arguments if argument.startswith("--backend-store-uri"))
    assert (
        sqlalchemy.create_engine(uri.replace("$(POSTGRES_PASSWORD)", "secret")).dialect.name == "postgresql"
    )  # or it cannot import


def test_storage_policy_allows_what_the_manifests_name():
    """No more than objects of the bucket, and every place that a manifest names."""
    policy = json.loads((CLUSTER / "s3-policy.json").read_text())
    reads, writes = (next(item for item in policy["Statement"] if item["Sid"] == name) for name in ("ReadInputs", "WriteOutputs"))
    assert not any("*" in action for item in policy["Statement"] for action in item["Action"])
    folders = {kind: {resource.split("/")[1] for resource in item["Resource"]} for kind, item in (("r", reads), ("w", writes))}
    files = [*BASE.glob("*.yaml"), *(CLUSTER / "overlays").glob("*/*.yaml")]
    named = {name for file in files for name in re.findall(r"s3://paella/([\w-]+)", file.read_text())}
    assert named == folders["r"] | folders["w"]


def test_machines_over_ssh():
    values = yaml.safe_load((CLUSTER / "cluster.yaml").read_text())
    validate_config(prepare_config(copy.deepcopy(values)))
    with pytest.raises(jsonschema.ValidationError, match="setup_command"):
        validate_config(prepare_config(values | {"setup_command": []}))
    for target, source in values["file_mounts"].items():
        assert source.startswith("~") or (ROOT / source).exists(), target


@pytest.mark.parametrize(
    "nodes, num_workers, cpus_beside, share",
    [
        ([{"CPU": 0}, {"CPU": 80, "GPU": 8}, {"CPU": 30}], 8, 0, 10),  # CPUs of other nodes are out of a GPU worker's reach
        ([{"CPU": 0}, {"CPU": 80, "GPU": 8}, {"CPU": 12, "GPU": 4}], 12, 0, 3),
        ([{"CPU": 2}], 2, 0, 1),
        ([{"CPU": 4}, {"CPU": 4}], 2, 2, 3),
        ([{"CPU": 0}, {"CPU": 2}, {"CPU": 2}], 1, 0, 2),  # a worker is on one node
        ([{"CPU": 3}, {"CPU": 3}, {"CPU": 3}], 4, 0, 1),
        ([{"CPU": 2}], 4, 0, 0.5),
        ([{"CPU": 1}, {"CPU": 1}], 3, 0, 0.5),
    ],
)
def test_a_workers_share_of_the_cpus(nodes, num_workers, cpus_beside, share):
    assert _cpus_per_worker(nodes, num_workers, cpus_beside) == share
