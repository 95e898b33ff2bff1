"""What Prometheus sees of jobs, through Ray's exporters: numbers of a training run, samples of a tokenizing job.

Dashboards and alerts in cluster/base are made of these; curves of a whole run are MLflow's.
"""

from __future__ import annotations

from collections.abc import Mapping

from ray.util.metrics import Counter, Gauge


class TrainingGauges:
    """The last report of a training run. Kept by one worker, by the run's name."""

    def __init__(self, run: str) -> None:
        self.tags = {"run": run}
        self.done = Gauge("paella_train_step", "steps made", ("run",))
        self.gauges = {
            "loss": Gauge("paella_train_loss", "mean loss of the last steps", ("run",)),
            "grad_norm": Gauge("paella_train_grad_norm", "norm of the gradient before it is clipped", ("run",)),
            "images_per_s": Gauge("paella_train_images_per_s", "of all workers", ("run",)),
            "mfu": Gauge("paella_train_mfu", "model FLOPs utilisation", ("run",)),
            "data_wait": Gauge("paella_train_data_wait", "share of the time spent waiting for data", ("run",)),
            "step_s": Gauge("paella_train_step_s", "median time of a step", ("run",)),
            "slowest_step_s": Gauge("paella_train_slowest_step_s", "of the steps since the last report", ("run",)),
        }

    def set(self, values: Mapping[str, float], step: int) -> None:
        self.done.set(step, self.tags)
        for name, gauge in self.gauges.items():
            if name in values:
                gauge.set(values[name], self.tags)


class TokenizedSamples:
    """Samples that have come to the end of a stage (tokens, or unique after it): written, filtered or rejected."""

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self.samples = Counter("paella_tokenize_samples_total", "samples by what became of them", ("stage", "outcome"))

    def add(self, counts: Mapping[str, int]) -> None:
        for outcome, number in counts.items():
            if number > 0:
                self.samples.inc(number, {"stage": self.stage, "outcome": outcome})
