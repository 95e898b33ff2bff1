"""Numbers of jobs come out of Ray's exporters under the names that dashboards use."""

import asyncio
import time

from pipelines.gauges import TokenizedSamples, TrainingGauges
from serve.observability import prometheus


def test_numbers_of_jobs_are_exported(ray_session):
    TrainingGauges("mine").set({"loss": 2.5, "mfu": 0.25, "accuracy": 0.1}, step=40)
    TokenizedSamples("tokens").add({"written": 90, "rejected": 10, "filtered": 0})
    wanted = {
        "ray_paella_train_step": ('run="mine"', 40.0),
        "ray_paella_train_loss": ('run="mine"', 2.5),
        "ray_paella_train_mfu": ('run="mine"', 0.25),
        "ray_paella_tokenize_samples_total": ('outcome="rejected"', 10.0),
    }
    deadline, missing = time.monotonic() + 90, set(wanted)
    while missing and time.monotonic() < deadline:
        for line in asyncio.run(prometheus()).splitlines():
            name, (label, value) = line.split("{")[0], wanted.get(line.split("{")[0], ("no", 0.0))
            if label in line and float(line.split()[-1]) == value:
                missing.discard(name)
        time.sleep(1)
    assert missing == set()
