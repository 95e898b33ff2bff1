"""Training through `ray job submit` on a cluster of its own, with token authentication: stopped, submitted again, finished."""

import contextlib
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from conftest import ROOT, checkpointed
from process_groups import without_a_cluster
from processes import free_ports
from test_train_resume import assert_same_result, place

from pipelines import train

__all__ = ["place"]
STEPS = 200
"""Which take longer than stopping a job does."""


@contextlib.contextmanager
def cluster(root: Path) -> Iterator[dict[str, str]]:
    """A head node as `ray start --head` makes it; yields the environment in which `ray job` finds it."""
    gcs, dashboard, agent, client = free_ports(4)
    environment = os.environ | {
        "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid.uuid4().hex * 2, "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "RAY_JOB_STOP_WAIT_TIME_S": "60",
    }  # fmt: skip
    environment.pop("RAY_ADDRESS", None)
    command = [
        "ray", "start", "--head", "--block", f"--port={gcs}", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1",
        f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}", "--num-cpus=2",
        f"--temp-dir={root}", "--disable-usage-stats",
    ]  # fmt: skip
    with (root / "ray.log").open("w") as log:
        head = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 180
        while subprocess.run(["ray", "job", "list"], env=environment, capture_output=True).returncode:
            assert head.poll() is None and time.monotonic() < deadline, (root / "ray.log").read_text()
            time.sleep(1)
        yield environment
    finally:
        family = psutil.Process(head.pid).children(recursive=True) if head.poll() is None else []
        head.terminate()
        _, left = psutil.wait_procs(family, timeout=30)
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        head.wait(timeout=30)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_job_is_stopped_and_submitted_again(place):
    with without_a_cluster(train):
        undisturbed = place.run("undisturbed", steps=STEPS)
    root = Path(f"/tmp/paella-{uuid.uuid4().hex[:6]}")  # short: Ray puts sockets there
    root.mkdir()
    arguments = [str(part) for part in place.train_arguments("job")] + ["--steps", str(STEPS)]
    with cluster(root) as environment:
        submit = ["ray", "job", "submit", "--no-wait", "--working-dir", str(ROOT), "--submission-id", "first", "--"]
        subprocess.run([*submit, "python", "pipelines/train.py", *arguments], env=environment, check=True, capture_output=True)
        deadline = time.monotonic() + 400
        while not checkpointed(place.root / "job") and time.monotonic() < deadline:
            time.sleep(0.2)
        subprocess.run(["ray", "job", "stop", "first"], env=environment, check=True, capture_output=True, timeout=120)
        said = subprocess.run(["ray", "job", "logs", "first"], env=environment, capture_output=True, text=True).stdout
        assert "stopping after a last checkpoint" in said and "as asked, with a checkpoint of step" in said, said
        assert not (place.root / "job" / "model").exists()
        submit = ["ray", "job", "submit", "--working-dir", str(ROOT), "--"]
        finished = subprocess.run(
            [*submit, "python", "pipelines/train.py", *arguments], env=environment, capture_output=True, text=True, timeout=600
        )
        assert finished.returncode == 0, finished.stdout + finished.stderr
        assert "from step 0" not in finished.stdout
        bad = [*submit, "python", "pipelines/train.py", *arguments, "--stepz", "3"]
        refused = subprocess.run(bad, env=environment, capture_output=True, text=True, timeout=200)
        assert refused.returncode != 0 and "Unrecognized options: --stepz" in refused.stdout + refused.stderr
    assert_same_result(place.root / "job", undisturbed, STEPS)
