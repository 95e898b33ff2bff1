"""A Ray cluster of several nodes on this machine, an S3 server and MLflow on PostgreSQL: what the manifests start, as processes.

    python cluster/local.py up      # make cluster-local: two nodes and a head without work
    python cluster/local.py node    # one node more, as Kubernetes replaces one that is lost
    python cluster/local.py down    # make cluster-down

`up` leaves `runs/cluster/env`, which a shell reads to find it all, and `runs/cluster/serve.yaml`. What is started is written down
with its start time before anything else is, so that `down` ends it and nothing else, also after an `up` that was killed.
PostgreSQL is Debian's (`apt-get install postgresql`), the S3 server SeaweedFS (of the extra `dev`).
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import yaml

ROOT = Path(__file__).resolve().parents[1]
PLACE = ROOT / "runs" / "cluster"
BIN = Path(sys.executable).parent
NODES = 2
CPUS = max(1, (os.cpu_count() or 1) // NODES)
"""Of a node: workers whose threads wait for the same core take twenty times as long."""
QUIET = {"stdin": subprocess.DEVNULL, "start_new_session": True}


class State:
    """Processes and directories that are there because of us."""

    def __init__(self) -> None:
        self.file = PLACE / "state.json"
        values = json.loads(self.file.read_text()) if self.file.exists() else {}
        self.processes: list[dict] = values.get("processes", [])
        self.directory = Path(values["directory"]) if "directory" in values else None
        self.variables: dict[str, str] = values.get("variables", {})

    def save(self) -> None:
        PLACE.mkdir(parents=True, exist_ok=True)
        values = {"processes": self.processes, "directory": str(self.directory), "variables": self.variables}
        temporary = self.file.with_suffix(".tmp")
        temporary.touch(mode=0o600)
        temporary.write_text(json.dumps(values, indent=1))
        temporary.replace(self.file)

    def require_alive(self) -> None:
        """Raises RuntimeError with the end of its log where a process has ended."""
        for entry in self.processes:
            if not psutil.pid_exists(entry["pid"]) or psutil.Process(entry["pid"]).status() == psutil.STATUS_ZOMBIE:
                assert self.directory is not None
                raise RuntimeError(
                    f"{entry['name']} has ended: {(self.directory / entry['name']).with_suffix('.log').read_text()[-2000:]}"
                )

    def start(self, name: str, command: Sequence[object], user: str | None = None, **variables: str) -> None:
        """A process with a log, written down."""
        assert self.directory is not None
        with (self.directory / f"{name}.log").open("w") as log:
            environment = os.environ | self.variables | variables
            process = subprocess.Popen(
                [str(part) for part in command], env=environment, user=user, stdout=log, stderr=log, cwd=self.directory, **QUIET
            )
        self.processes.append({"name": name, "pid": process.pid, "created": psutil.Process(process.pid).create_time()})
        self.save()


def up() -> None:
    """Start everything. Raises ValueError where it runs already, or where something is missing."""
    state = State()
    if state.directory is not None:
        raise ValueError(f"there is a cluster already ({state.file}): make cluster-down ends it")
    postgres = _postgres()
    state.directory = Path(tempfile.mkdtemp(prefix="paella-"))  # short: Ray puts sockets there
    state.directory.chmod(0o755)
    state.save()
    try:
        _start_s3(state)
        _start_mlflow(state, postgres)
        _start_ray(state)
    except BaseException:
        down()
        raise
    _write_files(state)
    print(f"a cluster of {NODES} nodes, S3 and MLflow run; `set -a && . {PLACE}/env` finds them, make cluster-down ends them")
    print(f"dashboard {state.variables['RAY_API_SERVER_ADDRESS']}  MLflow {state.variables['MLFLOW_TRACKING_URI']}")


def _postgres() -> Path:
    """PostgreSQL's programs, the newest that Debian has put somewhere."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    path = shutil.which("initdb")
    if not found and path is None:
        raise ValueError("there is no PostgreSQL, in which MLflow keeps its runs: apt-get install postgresql")
    return found[-1].parent if found else Path(str(path)).parent


def _start_s3(state: State) -> None:
    assert state.directory is not None
    flags = [f"-{name}.port{kind}" for name in ("master", "volume", "filer", "s3") for kind in ("", ".grpc")]
    ports = dict(zip(flags, _free_ports(len(flags)), strict=True))
    state.variables |= {
        "AWS_ACCESS_KEY_ID": "local",
        "AWS_SECRET_ACCESS_KEY": secrets.token_hex(16),
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{ports['-s3.port']}",
    }
    keys = [{"accessKey": "local", "secretKey": state.variables["AWS_SECRET_ACCESS_KEY"]}]
    identity = {"name": "local", "credentials": keys, "actions": ["Admin", "Read", "Write", "List", "Tagging"]}
    config = state.directory / "s3.json"
    config.write_text(json.dumps({"identities": [identity]}))
    (state.directory / "s3").mkdir()
    chosen = [f"{flag}={port}" for flag, port in ports.items()]
    command = [
        BIN / "weed", "server", f"-dir={state.directory / 's3'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-filer", "-s3", *chosen,
        f"-s3.config={config}", "-volume.max=50", "-master.volumeSizeLimitMB=64", "-s3.port.iceberg=0", "-s3.port.lance=0",
    ]  # fmt: skip
    state.start("s3", command)
    _wait(state, "the S3 server", lambda: _make_bucket(state.variables))


def _make_bucket(variables: Mapping[str, str]) -> None:
    _s3(variables).create_bucket(Bucket="paella")
    _s3(variables).put_object(Bucket="paella", Key="ready", Body=b"")


def _s3(variables: Mapping[str, str]) -> Any:
    import boto3
    from botocore.config import Config

    return boto3.client(
        "s3",
        endpoint_url=variables["AWS_ENDPOINT_URL"],
        aws_access_key_id=variables["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=variables["AWS_SECRET_ACCESS_KEY"],
        region_name=variables["AWS_DEFAULT_REGION"],
        config=Config(retries={"max_attempts": 1}, connect_timeout=5),
    )


def _start_mlflow(state: State, postgres: Path) -> None:
    """PostgreSQL refuses root, for whom Debian's user runs it."""
    assert state.directory is not None
    user = "postgres" if os.geteuid() == 0 else None
    data, port, http = state.directory / "postgres", *_free_ports(2)
    data.mkdir()
    if user is not None:
        shutil.chown(data, user)
    password = secrets.token_hex(16)
    secret = state.directory / "password"
    secret.touch(mode=0o600)
    secret.write_text(password)
    if user is not None:
        shutil.chown(secret, user)
    initdb = [postgres / "initdb", "-D", data, "-U", "mlflow", "-A", "scram-sha-256", f"--pwfile={secret}"]
    subprocess.run(initdb, user=user, check=True, capture_output=True, cwd=state.directory)
    secret.unlink()
    settings = [f"port={port}", "listen_addresses=127.0.0.1", f"unix_socket_directories={data}"]
    flags = [part for setting in settings for part in ("-c", setting)]
    state.start("postgres", [postgres / "postgres", "-D", data, *flags], user)
    create = [postgres / "createdb", "-h", "127.0.0.1", "-p", port, "-U", "mlflow", "mlflow"]
    _wait(state, "PostgreSQL", lambda: _run(create, PGPASSWORD=password))
    state.variables["MLFLOW_TRACKING_URI"] = f"http://127.0.0.1:{http}"
    command = [
        BIN / "mlflow", "server", "--host=127.0.0.1", f"--port={http}", "--workers=1",
        f"--backend-store-uri=postgresql+psycopg2://mlflow:{password}@127.0.0.1:{port}/mlflow", "--artifacts-destination=s3://paella/mlflow",
    ]  # fmt: skip
    state.start("mlflow", command, MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false")
    _wait(state, "MLflow", lambda: urllib.request.urlopen(f"http://127.0.0.1:{http}/health", timeout=5).close())


def _start_ray(state: State) -> None:
    assert state.directory is not None
    gcs, dashboard, client = _free_ports(3)
    state.variables |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
        "RAY_DASHBOARD_ADDRESS": f"http://127.0.0.1:{dashboard}",  # what `serve` calls it
        "RAY_USAGE_STATS_ENABLED": "0",
        "PAELLA_API_KEYS": secrets.token_hex(16),
        "PAELLA_GCS": f"127.0.0.1:{gcs}",
    }
    command = [
        BIN / "ray", "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={gcs}", "--num-cpus=0",
        f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1", f"--ray-client-server-port={client}",
        *_node_flags(state.directory / "head"),
    ]  # fmt: skip
    state.start("head", command, PATH=f"{BIN}:{os.environ['PATH']}")
    _wait_for_nodes(state, 1)
    for number in range(NODES):  # one after the other: Ray gives each no more than 30 s
        node(state)
        _wait_for_nodes(state, 2 + number)


def _wait_for_nodes(state: State, number: int) -> None:
    _wait(state, f"node {number} of Ray", lambda: _require_nodes(state.variables, number))


def _require_nodes(variables: Mapping[str, str], number: int) -> None:
    """Raises an error of some kind where the dashboard does not know of so many nodes."""
    headers = {"authorization": f"Bearer {variables['RAY_AUTH_TOKEN']}"}
    request = urllib.request.Request(f"{variables['RAY_API_SERVER_ADDRESS']}/nodes?view=summary", headers=headers)
    with urllib.request.urlopen(request, timeout=5) as answer:
        nodes = json.load(answer)["data"]["summary"]
    alive = sum(node["raylet"].get("state") == "ALIVE" for node in nodes)
    if alive < number:
        raise RuntimeError(f"{alive} of {number} nodes are there")


def node(state: State | None = None) -> None:
    """Start a node. Raises ValueError where no cluster runs."""
    state = state or State()
    if state.directory is None:
        raise ValueError("no cluster runs: make cluster-local starts one")
    name = f"node-{1 + sum(process['name'].startswith('node-') for process in state.processes)}"
    command = [
        BIN / "ray", "start", "--block", f"--address={state.variables['PAELLA_GCS']}", "--node-ip-address=127.0.0.1",
        f"--num-cpus={CPUS}", *_node_flags(state.directory / name),
    ]  # fmt: skip
    state.start(name, command, PATH=f"{BIN}:{os.environ['PATH']}")


def _node_flags(directory: Path) -> list[str]:
    """A node has a directory of its own: in one that they share, each takes the code of a job away when it fetches it anew."""
    names = ("dashboard-agent-listen-port", "dashboard-agent-grpc-port", "runtime-env-agent-port", "metrics-export-port")
    ports = [f"--{name}={port}" for name, port in zip(names, _free_ports(len(names)), strict=True)]
    return [*ports, f"--temp-dir={directory}", f"--object-store-memory={200 * 2**20}", "--disable-usage-stats"]


def _write_files(state: State) -> None:
    """The code on S3, where jobs and service take it from; a Serve config for this machine; variables for shells."""
    values = yaml.safe_load((ROOT / "cluster" / "base" / "serve.yaml").read_text())
    values["http_options"] = {"host": "127.0.0.1", "port": _free_ports(1)[0]}
    (PLACE / "serve.yaml").write_text(yaml.safe_dump(values))
    assert state.directory is not None
    archive = state.directory / "code.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for package in ("paella", "pipelines", "serve"):
            for path in sorted((ROOT / package).rglob("*")):
                if path.is_file() and "__pycache__" not in path.parts:
                    file.write(path, Path("paella-ray") / path.relative_to(ROOT))
    uri = values["applications"][0]["runtime_env"]["working_dir"]
    _s3(state.variables).upload_file(str(archive), "paella", uri.removeprefix("s3://paella/"))
    variables = PLACE / "env"
    variables.touch(mode=0o600)
    variables.write_text("".join(f"{name}={value}\n" for name, value in state.variables.items()))


def down() -> None:
    """End what was started, children and all, and remove its directory."""
    state = State()
    alive = []
    for entry in state.processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(entry["pid"])
            if abs(process.create_time() - entry["created"]) < 0.1:  # not another that has got its number
                alive += [*process.children(recursive=True), process]
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=30)
    if state.directory is not None:
        shutil.rmtree(state.directory, ignore_errors=True)
    shutil.rmtree(PLACE, ignore_errors=True)


def _run(command: Sequence[object], **variables: str) -> None:
    subprocess.run([str(part) for part in command], env=os.environ | variables, check=True, capture_output=True, timeout=60)


def _wait(state: State, what: str, ready: Callable[[], object], timeout_s: float = 180) -> None:
    """Until `ready` raises nothing. Raises RuntimeError where that takes too long, or where a process has ended."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            ready()
            return
        except Exception as error:  # each server is not ready in a way of its own
            state.require_alive()
            if time.monotonic() > deadline:
                raise RuntimeError(f"{what} does not answer: {error}") from error
            time.sleep(0.5)


def _free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in opened:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in opened]


if __name__ == "__main__":
    actions = {"up": up, "node": node, "down": down}
    if len(sys.argv) != 2 or sys.argv[1] not in actions:
        raise SystemExit(f"error: say one of {', '.join(actions)}")
    try:
        actions[sys.argv[1]]()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
