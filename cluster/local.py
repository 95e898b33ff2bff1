"""A Ray cluster of several nodes on this machine, Redis, S3, and MLflow on PostgreSQL: what the manifests start, as processes.

    python cluster/local.py up      # make cluster-local: two nodes and a head without work
    python cluster/local.py node    # one node more, as Kubernetes replaces one that is lost
    python cluster/local.py head    # another head in place of one that is lost
    python cluster/local.py down    # make cluster-down

`up` leaves `runs/cluster/env`, which a shell reads to find it all, and `runs/cluster/serve.yaml`. What is started is written down
before anything else is, so that `down` ends it and nothing else, also after an `up` that was killed.
PostgreSQL and Redis are Debian's (`apt-get install postgresql redis-server`), the S3 server SeaweedFS (of the extra `dev`).
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml
from processes import Processes, free_ports
from seaweedfs import s3_client, start_s3

ROOT = Path(__file__).resolve().parents[1]
PLACE = ROOT / "runs" / "cluster"
FILE = PLACE / "state.json"
BIN = Path(sys.executable).parent
NODES = 2
CPUS = max(1, (os.cpu_count() or 1) // NODES)
"""Of a node; of all together no more than there are, or workers wait for each other's threads."""


def up() -> None:
    """Start everything. Raises ValueError where it runs already, or where something is missing."""
    state = Processes(FILE)
    if state.place is not None:
        raise ValueError(f"there is a cluster already ({state.file}): make cluster-down ends it")
    postgres, redis = _postgres(), _redis()
    state.place = tempfile.mkdtemp(prefix="paella-")  # short: Ray puts sockets there
    state.directory.chmod(0o755)
    state.save()
    try:
        start_s3(state)
        _start_mlflow(state, postgres)
        _start_redis(state, redis)
        _start_ray(state)
    except BaseException:
        down()
        raise
    _write_files(state)
    print(f"a cluster of {NODES} nodes, S3 and MLflow run; `set -a && . {PLACE}/env` finds them, make cluster-down ends them")
    places = {"dashboard": "RAY_API_SERVER_ADDRESS", "MLflow": "MLFLOW_TRACKING_URI", "the service, once deployed,": "PAELLA_URL"}
    print("\n".join(f"{what} {state.variables[name]}" for what, name in places.items()))


def _postgres() -> Path:
    """PostgreSQL's programs, the newest that Debian has put somewhere."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    path = shutil.which("initdb")
    if not found and path is None:
        raise ValueError("there is no PostgreSQL, in which MLflow keeps its runs: apt-get install postgresql")
    return found[-1].parent if found else Path(str(path)).parent


def _redis() -> str:
    if (path := shutil.which("redis-server")) is None:
        raise ValueError("there is no Redis, in which the head keeps what it knows: apt-get install redis-server")
    return path


def _start_mlflow(state: Processes, postgres: Path) -> None:
    """PostgreSQL refuses root, for whom Debian's user runs it."""
    user = "postgres" if os.geteuid() == 0 else None
    data, port, http = state.directory / "postgres", *free_ports(2)
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
    state.wait("PostgreSQL", lambda: _run(create, PGPASSWORD=password))
    state.variables["MLFLOW_TRACKING_URI"] = f"http://127.0.0.1:{http}"
    command = [
        BIN / "mlflow", "server", "--host=127.0.0.1", f"--port={http}", "--workers=1",
        f"--backend-store-uri=postgresql+psycopg2://mlflow:{password}@127.0.0.1:{port}/mlflow", "--artifacts-destination=s3://paella/mlflow",
    ]  # fmt: skip
    state.start("mlflow", command, MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false")
    state.wait("MLflow", lambda: urllib.request.urlopen(f"http://127.0.0.1:{http}/health", timeout=5).close())


def _start_redis(state: Processes, program: str) -> None:
    """Without a password, as Ray 2.60's drivers abort with one."""
    (port,) = free_ports(1)
    state.start("redis", [program, "--bind", "127.0.0.1", "--port", port, "--dir", state.directory, "--appendonly", "yes"])
    state.variables["PAELLA_REDIS"] = f"127.0.0.1:{port}"
    state.wait("Redis", lambda: socket.create_connection(("127.0.0.1", port), timeout=5).close())


def _start_ray(state: Processes) -> None:
    gcs, dashboard, service = free_ports(3)
    state.variables |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
        "RAY_DASHBOARD_ADDRESS": f"http://127.0.0.1:{dashboard}",  # what `serve` calls it
        "RAY_USAGE_STATS_ENABLED": "0",
        "PAELLA_API_KEYS": secrets.token_hex(16),
        "PAELLA_URL": f"http://127.0.0.1:{service}",
        "PAELLA_GCS": f"127.0.0.1:{gcs}",
    }
    head(state)
    for number in range(NODES):  # one after the other: Ray gives each no more than 30 s
        node(state)
        _wait_for_nodes(state, 2 + number)


def head(state: Processes | None = None) -> None:
    """Start a head; it goes on with what Redis has kept of the one before. Raises ValueError where no cluster runs."""
    state = state or _running()
    gcs, dashboard = (state.variables[name].rsplit(":", 1)[1] for name in ("PAELLA_GCS", "RAY_API_SERVER_ADDRESS"))
    flags = ["--head", "--num-cpus=0", f"--port={gcs}", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1"]
    flags.append(f"--ray-client-server-port={free_ports(1)[0]}")
    _start_node(state, "head", flags, RAY_REDIS_ADDRESS=state.variables["PAELLA_REDIS"])
    _wait_for_nodes(state, 1)


def node(state: Processes | None = None) -> None:
    """Start a node. Raises ValueError where no cluster runs."""
    state = state or _running()
    flags = [f"--address={state.variables['PAELLA_GCS']}", f"--num-cpus={CPUS}"]
    _start_node(state, "node", flags, RAY_gcs_rpc_server_reconnect_timeout_s="600")  # while there is no head; KubeRay sets it too


def _running() -> Processes:
    state = Processes(FILE)
    if state.place is None:
        raise ValueError("no cluster runs: make cluster-local starts one")
    return state


def _start_node(state: Processes, role: str, flags: list[str], **variables: str) -> None:
    """Each has a directory of its own: in one that they share, each takes the code of a job away when it fetches it anew."""
    name = f"{role}-{sum(process['name'].startswith(role) for process in state.processes) + 1}"
    kinds = ("dashboard-agent-listen", "dashboard-agent-grpc", "runtime-env-agent", "metrics-export")
    ports = [f"--{kind}-port={port}" for kind, port in zip(kinds, free_ports(len(kinds)), strict=True)]
    command = [
        BIN / "ray", "start", "--block", "--node-ip-address=127.0.0.1", f"--temp-dir={state.directory / name}",
        f"--object-store-memory={200 * 2**20}", "--disable-usage-stats", *flags, *ports,
    ]  # fmt: skip
    state.start(name, command, PATH=f"{BIN}:{os.environ['PATH']}", **variables)


def _wait_for_nodes(state: Processes, number: int) -> None:
    state.wait(f"node {number} of Ray", lambda: _require_nodes(state.variables, number))


def _require_nodes(variables: Mapping[str, str], number: int) -> None:
    """Raises an error of some kind where the dashboard does not know of so many nodes."""
    headers = {"authorization": f"Bearer {variables['RAY_AUTH_TOKEN']}"}
    request = urllib.request.Request(f"{variables['RAY_API_SERVER_ADDRESS']}/nodes?view=summary", headers=headers)
    with urllib.request.urlopen(request, timeout=5) as answer:
        nodes = json.load(answer)["data"]["summary"]
    alive = sum(node["raylet"].get("state") == "ALIVE" for node in nodes)
    if alive < number:
        raise RuntimeError(f"{alive} of {number} nodes are there")


def _write_files(state: Processes) -> None:
    """The code on S3, where jobs and service take it from; a Serve config for this machine; variables for shells."""
    values = yaml.safe_load((ROOT / "cluster" / "base" / "serve.yaml").read_text())
    values["http_options"] = {"host": "127.0.0.1", "port": int(state.variables["PAELLA_URL"].rsplit(":", 1)[1])}
    (PLACE / "serve.yaml").write_text(yaml.safe_dump(values))
    archive = state.directory / "code.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for package in ("paella", "pipelines", "serve"):
            for path in sorted((ROOT / package).rglob("*")):
                if path.is_file() and "__pycache__" not in path.parts:
                    file.write(path, Path("paella-ray") / path.relative_to(ROOT))
    uri = values["applications"][0]["runtime_env"]["working_dir"]
    s3_client(state.variables).upload_file(str(archive), "paella", uri.removeprefix("s3://paella/"))
    variables = PLACE / "env"
    variables.touch(mode=0o600)
    variables.write_text("".join(f"{name}={value}\n" for name, value in state.variables.items()))


def down() -> None:
    """End what was started, and leave nothing."""
    Processes(FILE).end()
    shutil.rmtree(PLACE, ignore_errors=True)


def _run(command: Sequence[object], **variables: str) -> None:
    subprocess.run([str(part) for part in command], env=os.environ | variables, check=True, capture_output=True, timeout=60)


if __name__ == "__main__":
    actions = {"up": up, "node": node, "head": head, "down": down}
    if len(sys.argv) != 2 or sys.argv[1] not in actions:
        raise SystemExit(f"error: say one of {', '.join(actions)}")
    try:
        actions[sys.argv[1]]()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
