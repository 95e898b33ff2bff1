"""Starting Ray on a busy machine."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

SLOW_AGENT = """
import pathlib, sys, time
first = pathlib.Path(__file__).with_name("first")
if "dashboard/agent.py" in " ".join(sys.orig_argv) and not first.exists():
    first.touch()
    time.sleep(40)
"""

PROGRAM = """
import psutil, ray
from pipelines import cli
cli.start_ray()
print(ray.get(ray.put("it runs")), [child.name() for child in psutil.Process().children()].count("gcs_server"))
"""


@pytest.mark.slow
def test_agents_that_start_too_slowly_are_started_again(tmp_path):
    """Ray's node ends where an agent takes more than 15 s; of the first attempt nothing is left."""
    (tmp_path / "sitecustomize.py").write_text(SLOW_AGENT)
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    environment.pop("RAY_ADDRESS", None)
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=300)
    assert (tmp_path / "first").exists()
    assert "Ray did not start, which is tried again" in done.stderr
    assert done.stdout.strip().endswith("it runs 1"), done.stderr
