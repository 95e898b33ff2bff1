"""What one evaluation is: its settings, the metrics that there are, and the cells of a sweep."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

from paella.sampler import SamplingConfig

METRICS = {
    "fid": ("reference", "inception"),
    "clip-fid": ("reference", "clip"),
    "cmmd": ("reference", "clip"),
    "prdc": ("reference", "clip"),
    "clip-score": ("clip",),
    "scenes": (),
    "reconstruction": ("reference",),
}
"""What each metric needs."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """One evaluation, or a comparison of finished ones."""

    output: str
    """Directory of the results; the same command with the same output continues it."""
    model: str | None = None
    """Bundle: directory, URI or models:/name@alias."""
    reference: str | None = None
    """What pictures should be like: a token dataset, or images with captions that training has not seen."""
    prompts: str | None = None
    """File of prompts, as for generate.py; the reference's captions if not given."""
    metrics: tuple[str, ...] = ("clip-score,clip-fid,cmmd,prdc",)
    """Names, by commas: fid, clip-fid, cmmd, prdc (precision, recall, density, coverage), clip-score, scenes (the demo's checker
    of captions), reconstruction (what the VQGAN alone loses; of images, not of tokens)."""
    num_images: int = 1000
    """Pictures at most, one for each prompt. FID of fewer than some ten thousand compares only with that of as many."""
    num_reference: int = 10_000
    """Reference images at most, an even selection."""
    steps: tuple[int, ...] = ()
    """Numbers of sampling steps to try; what `sampling` says if not given."""
    cfg: tuple[float, ...] = ()
    """Guidance weights to try; what `sampling` says if not given."""
    clip: str | None = None
    """open_clip ARCHITECTURE/PRETRAINED or a directory, which judges; the model's own if not given."""
    inception: str | None = None
    """File of torch-fidelity's Inception weights (pt_inception-2015-12-05), for fid."""
    seed: int = 0
    """Seed of the first picture."""
    batch_size: int = 32
    """Pictures per U-Net pass."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """Settings of the sampler."""
    compare: tuple[str, ...] = ()
    """Finished evaluations to stand side by side, in place of a new one."""

    def __post_init__(self) -> None:
        if bool(self.compare) == (self.model is not None):
            raise ValueError("either model or compare has to be given")
        for name in self.metric_names:
            if name not in METRICS:
                raise ValueError(f"metrics={name!r} is not allowed: {', '.join(METRICS)}")
            if not self.compare and "reference" in METRICS[name] and self.reference is None:
                raise ValueError(f"the metric {name} needs a reference")
        if "fid" in self.metric_names and not (self.inception and Path(self.inception).is_file()):
            raise ValueError(f"inception={self.inception} is not allowed: fid needs a file of torch-fidelity's Inception weights")
        if not self.compare and self.reference is None and self.prompts is None:
            raise ValueError("either a reference or prompts have to be given")
        for name in ("num_images", "num_reference", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is not allowed: an integer of at least 1")
        self.cells  # noqa: B018  raises ValueError for settings that cannot be

    @property
    def metric_names(self) -> list[str]:
        return [name for part in self.metrics for name in part.split(",") if name]

    @property
    def cells(self) -> dict[str, SamplingConfig]:
        """Every pair of steps and guidance, by name."""
        found = {}
        for steps in self.steps or (self.sampling.num_inference_steps,):
            guidance: list[tuple[float, ...]] = [(value,) for value in self.cfg]
            for cfg in guidance or [self.sampling.cfg]:
                name = f"steps{steps}-cfg{'-'.join(f'{value:g}' for value in cfg)}"
                found[name] = dataclasses.replace(self.sampling, num_inference_steps=steps, cfg=cfg)
        return found
