"""How `pytest -n 2` shares tests out: those that start Ray clusters to one process, whole files of the others to whoever is free.

A raylet gives up on agents that take more than 15 s to start (ray-project/ray#65983), which they do where two clusters start at
once on two cores.
"""

from xdist.scheduler import LoadScopeScheduling

STARTS_RAY = {
    "api_contract", "endpoint", "evaluate", "gauges", "generate", "generate_kills", "page", "programs", "replica", "serve",
    "text_stage", "tokenize_images", "tokenize_kills", "train_resume", "train_vqgan",
}  # fmt: skip


class Scheduling(LoadScopeScheduling):
    """By file, but for the files that start clusters, which are one piece of work, the first one."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.split("::")[0]
        return "clusters" if file.removeprefix("tests/test_").removesuffix(".py") in STARTS_RAY else file


def pytest_xdist_make_scheduler(config, log):
    return Scheduling(config, log)
