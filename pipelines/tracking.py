"""MLflow: one run per training run, continued over restarts; the bundle logged and registered as a model.

`MLFLOW_TRACKING_URI` is honoured. Without it, runs go to an sqlite file and an artifact folder beside the outputs.
MLflow takes two seconds to import: only who logs does so, not every worker.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from pipelines import cli
from pipelines.output_store import Output

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from mlflow import MlflowClient

EXPERIMENT = "paella"
RECORD = "mlflow_run.json"


@dataclass(frozen=True)
class Run:
    """Names one MLflow run; small enough to send to workers."""

    tracking_uri: str
    run_id: str

    def client(self) -> MlflowClient:
        from mlflow import MlflowClient

        return MlflowClient(self.tracking_uri)


def open_run(output: Path | Output, name: str, config: dict[str, Any]) -> Run:
    """The MLflow run of an output: the one it had before, else a new one with the config as parameters."""
    output = Output(str(output)) if isinstance(output, Path) else output
    if (record := output.read(RECORD)) is not None:
        run = Run(**json.loads(record))
        run.client().update_run(run.run_id, status="RUNNING")
        return run
    from mlflow import MlflowClient
    from mlflow.entities import Param

    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{_beside(output)}/mlflow.db"
    client = MlflowClient(uri)
    created = client.create_run(_experiment(client, uri), run_name=name)
    run = Run(uri, created.info.run_id)
    params = [Param(key, str(value)[:6000]) for key, value in cli.flattened(config).items()]
    client.log_batch(run.run_id, params=params)
    output.write(RECORD, (json.dumps(vars(run)) + "\n").encode())
    return run


def _beside(output: Output) -> Path:
    """Where runs are kept that no tracking server keeps: beside a local output, in `runs` for one in a store."""
    if output.local is not None:
        return output.local.absolute().parent
    Path("runs").mkdir(exist_ok=True)
    return Path("runs").absolute()


def _experiment(client: MlflowClient, uri: str) -> str:
    if found := client.get_experiment_by_name(EXPERIMENT):
        return found.experiment_id
    database = uri.removeprefix("sqlite:///")
    artifacts = str(Path(database).absolute().parent / "mlartifacts") if database != uri else None
    return client.create_experiment(EXPERIMENT, artifact_location=artifacts)


def log_metrics(run: Run, metrics: Mapping[str, float], step: int) -> None:
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    run.client().log_batch(run.run_id, metrics=[Metric(key, value, now, step) for key, value in metrics.items()])


def log_image(run: Run, image: Image.Image, key: str, step: int) -> None:
    run.client().log_image(run.run_id, image, key=key, step=step)


def log_figure(run: Run, figure: Figure, name: str) -> None:
    run.client().log_figure(run.run_id, figure, name)


def log_file(run: Run, file: Path) -> None:
    run.client().log_artifact(run.run_id, str(file))


def log_directory(run: Run, directory: Path) -> str:
    """Keep a directory's files as artifacts; returns the URI by which MLflow finds them."""
    run.client().log_artifacts(run.run_id, str(directory), directory.name)
    return f"runs:/{run.run_id}/{directory.name}"


def metric_history(run: Run, key: str) -> list[tuple[int, float]]:
    """(step, value) pairs of a metric in order of steps; after a restart the newer value of a step counts."""
    history = run.client().get_metric_history(run.run_id, key)
    return sorted({metric.step: metric.value for metric in sorted(history, key=lambda m: m.timestamp)}.items())


def last_step(run: Run, key: str) -> int:
    """The last step of which a metric is logged, 0 where there is none."""
    return max((metric.step for metric in run.client().get_metric_history(run.run_id, key)), default=0)


class Curve:
    """Logs metrics step by step, from one process. What MLflow has of a step from before a restart is not logged again.

    Args:
        key: a metric that every step has.
    """

    def __init__(self, run: Run, key: str) -> None:
        self.run, self.last = run, last_step(run, key)

    def log(self, metrics: dict[str, float], step: int) -> None:
        if step > self.last:
            self.last = step
            log_metrics(self.run, metrics, step)


def run_of(output: Path) -> Run:
    """The MLflow run of an output directory. Raises ValueError where it has none."""
    try:
        return Run(**json.loads((output / "mlflow_run.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{output} is not the output of a training run: it has no readable mlflow_run.json") from error


def metrics_at(run: Run, step: int) -> dict[str, float]:
    """Each metric's last value at or before a step."""
    values = {}
    for key in sorted(run.client().get_run(run.run_id).data.metrics):
        if history := [value for at, value in metric_history(run, key) if at <= step]:
            values[key] = history[-1]
    return values


def register(run: Run, bundle: Path, name: str, alias: str) -> str:
    """Log a bundle and register it as a model; returns the model's URI by its alias."""
    import mlflow

    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    mlflow.set_tracking_uri(run.tracking_uri)
    status = run.client().get_run(run.run_id).info.status
    with mlflow.start_run(run_id=run.run_id):
        info = mlflow.pyfunc.log_model(
            name="bundle",
            python_model=str(Path(__file__).with_name("mlflow_model.py")),
            artifacts={"bundle": str(bundle)},
            registered_model_name=name,
            pip_requirements=["paella-ray"],
        )
    client = run.client()
    client.set_registered_model_alias(name, alias, str(info.registered_model_version))
    client.update_run(run.run_id, status=status)  # a run that is still training goes on
    return f"models:/{name}@{alias}"


def finish_run(run: Run, bundle: Path | None = None, registered_name: str | None = None) -> str | None:
    """End the run; log the bundle and register it as a model. Returns the model's URI by its alias `newest`."""
    uri = register(run, bundle, registered_name, "newest") if bundle is not None and registered_name is not None else None
    run.client().set_terminated(run.run_id)
    return uri
