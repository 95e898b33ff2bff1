"""The Ray Serve application: an HTTP ingress in front of one deployment for each model.

serve run serve.app:app                                          # the demo's model
serve run serve.app:app model=s3://bucket/bundle max_replicas=4
serve deploy cluster/base/serve.yaml                              # all of it in a file
"""

# no `from __future__ import annotations`: Serve looks at what `app` is annotated with to make its arguments of a config's, and
# would see a string

from pathlib import Path
from typing import Literal

import ray
import torch
from pydantic import BaseModel, ConfigDict, Field
from ray import serve as ray_serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

from serve.ingress import Ingress
from serve.replica import EngineSettings, Generator

DEMO = "runs/demo/train/model"
QUIET = {"enable_access_log": False}
"""The ingress has a log of its own, and a line takes time."""


class Arguments(BaseModel):
    """Arguments of `app`. The defaults suit one CPU, and a GPU for each replica where there are any."""

    model_config = ConfigDict(extra="forbid")

    model: str = DEMO
    """Bundle: directory, URI or models:/name@alias."""
    name: str | None = None
    """What requests call the model; by default the last part of its address."""
    models: dict[str, str] = Field(default_factory=dict)
    """Further bundles, by the names that requests choose them by."""
    dtype: Literal["auto", "float32", "bf16"] = "auto"
    """Of the networks; see `EngineSettings`."""
    min_replicas: int = Field(default=1, ge=0)
    max_replicas: int = Field(default=1, ge=1)
    """Of each model."""
    target_images: int = Field(default=16, ge=1)
    """Images per replica, waiting and under way, above which another replica is started."""
    max_queued_images: int = Field(default=64, ge=1)
    """Images per replica that wait for their first step; more are refused with 429."""
    max_batch_images: int = Field(default=32, ge=1)
    """Images per replica in one step at most."""
    min_batch_images: int = Field(default=2, ge=1)
    lanes: int = Field(default=2, ge=1)
    """Passes of a small model side by side on a CPU; each after the first takes a process of its own, of 350 MB."""
    num_cpus: float = Field(default=1, ge=0)
    num_gpus: float | None = Field(default=None, ge=0)
    """Per replica; by default 1 where the cluster has GPUs."""
    ingress_replicas: int = Field(default=1, ge=1)
    timeout_s: float = Field(default=300, gt=0)
    """For requests that set none."""


def app(arguments: Arguments) -> ray_serve.Application:
    """The application. Raises ValueError for two models of one name."""
    first = arguments.name or Path(arguments.model).name or "paella"
    if first in arguments.models:
        raise ValueError(f"two models are called {first}: give `name`")
    engines = {name: _engine(arguments, name, uri) for name, uri in {first: arguments.model, **arguments.models}.items()}
    ingress = ray_serve.deployment(
        Ingress,
        name="ingress",
        num_replicas=arguments.ingress_replicas,
        max_ongoing_requests=10_000,
        max_queued_requests=-1,
        logging_config=QUIET,
    )
    return ingress.bind(engines, first, arguments.timeout_s)


def threads() -> dict[str, str]:
    """Environment of a replica's threads, whatever share of the machine Ray books for it: as many as the library uses.

    In float32 another number rounds otherwise. A small model has one thread for each lane.
    """
    return {"OMP_NUM_THREADS": str(torch.get_num_threads())}


def _has_gpus() -> bool:
    """Whether the cluster has GPUs: the application may be built on a head without."""
    return ray.cluster_resources().get("GPU", 0) > 0 if ray.is_initialized() else torch.cuda.is_available()


def _engine(arguments: Arguments, name: str, uri: str) -> ray_serve.Application:
    gpus = arguments.num_gpus if arguments.num_gpus is not None else float(_has_gpus())
    shared = arguments.model_dump(include={"dtype", "max_queued_images", "max_batch_images", "min_batch_images", "lanes"})
    settings = EngineSettings(model=uri if ":/" in uri else str(Path(uri).absolute()), name=name, **shared)
    deployment = ray_serve.deployment(
        Generator,
        name=f"engine-{name}",
        user_config=settings.model_dump(),
        ray_actor_options={"num_cpus": arguments.num_cpus, "num_gpus": gpus, "runtime_env": {"env_vars": threads()}},
        max_ongoing_requests=10_000,
        logging_config=QUIET,
        health_check_period_s=2,
        health_check_timeout_s=30,
        graceful_shutdown_wait_loop_s=1,
        graceful_shutdown_timeout_s=arguments.timeout_s,
        autoscaling_config=AutoscalingConfig(
            min_replicas=arguments.min_replicas,
            max_replicas=arguments.max_replicas,
            target_ongoing_requests=arguments.target_images,
            upscale_delay_s=5,
            downscale_delay_s=120,
            look_back_period_s=10,
            metrics_interval_s=2,
            policy=AutoscalingPolicy(policy_function="serve.replica:scale_on_images"),
        ),
    )
    return deployment.bind()
