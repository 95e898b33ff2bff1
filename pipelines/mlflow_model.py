"""The bundle as an MLflow model (models-from-code): prompts in, PNG bytes out."""

from __future__ import annotations

import io

import mlflow
from mlflow.pyfunc import PythonModel
from PIL import Image

from paella.bundle import load_bundle
from paella.images import to_uint8


class PaellaModel(PythonModel):
    """Input: a pandas table with columns `prompt` and, if wanted, `seed`. Output: a list of PNG bytes."""

    def load_context(self, context) -> None:
        self.bundle = load_bundle(context.artifacts["bundle"])

    def predict(self, context, model_input, params=None):
        prompts = [str(prompt) for prompt in model_input["prompt"]]
        seeds = [int(seed) for seed in model_input["seed"]] if "seed" in model_input else list(range(len(prompts)))
        return [_png(image) for image in to_uint8(self.bundle.decode(self.bundle.generate_tokens(prompts, seeds)))]


def _png(image) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()


mlflow.models.set_model(PaellaModel())
