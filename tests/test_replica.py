"""The deployment's class without Serve: another bundle is taken over while requests run, and none is dropped."""

import asyncio

from serve.modes import Order
from serve.replica import EngineSettings, Generator
from serve.schemas import GenerationRequest


def order(seed, steps):
    request = GenerationRequest(prompt="x", num_inference_steps=steps)
    return Order(request=request, seed=seed, request_id=f"r{seed}", timeout_s=60, trace={})


def test_weights_change_under_load(clip_bundle, model_bundle, ray_session):
    settings = EngineSettings(model=str(clip_bundle), name="m")

    async def run():
        generator = Generator()
        await generator.reconfigure(settings.model_dump())
        first = (await generator.describe())["digest"]
        running = [asyncio.create_task(generator.generate(order(seed, 40))) for seed in range(6)]
        while not await generator.trace():
            await asyncio.sleep(0.01)
        await generator.reconfigure(settings.model_copy(update={"model": str(model_bundle)}).model_dump())
        after = await generator.generate(order(9, 2))
        before = await asyncio.gather(*running)
        assert {result["digest"] for result in before} == {first}
        assert after["digest"] == (await generator.describe())["digest"] != first
        assert all(len(result["images"]) == 1 for result in (*before, after))
        while generator.closing:
            await asyncio.sleep(0.01)
        await generator.check_health()

    asyncio.run(asyncio.wait_for(run(), 120))
