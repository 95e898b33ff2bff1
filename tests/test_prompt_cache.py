"""Prompts are encoded once, alone or together with the same result, and kept within a bound."""

import dataclasses

import pytest
import torch
from conftest import small_config

from paella.bundle import load_bundle
from paella.conditioning import TextEncoders
from paella.prompt_cache import PromptCache


@pytest.fixture(scope="module")
def text() -> TextEncoders:
    torch.manual_seed(0)
    return TextEncoders.create(small_config().text).eval().requires_grad_(False)


PROMPTS = ["a", "a rather longer prompt than the first", "blue", "a"]


def test_a_prompt_is_the_same_in_any_company(text):
    together = PromptCache(text)(PROMPTS)
    for prompt, conditions in zip(PROMPTS, together, strict=True):
        alone = PromptCache(text)([prompt])[0]
        assert all(torch.equal(conditions[name], alone[name]) for name in alone)
        assert conditions["byt5"].shape[1] == len(prompt) + 1 and conditions["byt5_mask"].all()


def test_in_batches_too(text, monkeypatch):
    half = TextEncoders.create(small_config().text).eval().bfloat16()
    cache = PromptCache(half)
    calls: list[int] = []
    monkeypatch.setattr(half, "forward", lambda prompts, forward=half.forward: calls.append(len(prompts)) or forward(prompts))
    together = cache(PROMPTS)
    assert calls == [3]
    alone = PromptCache(half)(["blue"])[0]
    torch.testing.assert_close(together[2]["byt5"], alone["byt5"], atol=0.05, rtol=0.05)


def test_each_prompt_is_encoded_once(text):
    cache = PromptCache(text)
    cache(PROMPTS)
    cache(["blue", "new"])
    assert (cache.hits, cache.misses) == (2, 4)


def test_the_least_recently_used_go_first(text):
    one = PromptCache(text)
    one(["aaaa"])
    cache = PromptCache(text, max_bytes=2 * one.bytes)
    cache(["aaaa"])
    cache(["bbbb"])
    cache(["aaaa"])
    cache(["cccc"])
    assert list(cache.kept) == ["aaaa", "cccc"] and cache.bytes == 2 * one.bytes


def test_a_prompt_of_20000_characters_is_cut_with_a_word(text):
    with pytest.warns(UserWarning, match="1 prompt\\(s\\) are longer than 128 tokens"):
        conditions = PromptCache(text)(["x" * 20_000])[0]
    assert conditions["byt5"].shape[1] == 128


def test_text_encoders_in_another_dtype(model_bundle):
    bundle = load_bundle(str(model_bundle), text_dtype=torch.bfloat16)
    assert next(bundle.text.parameters()).dtype == torch.bfloat16
    assert bundle.conditions("a")["byt5"].dtype == torch.float32
    assert bundle.generate_tokens(["a", "b"], [0, 1]).shape == (2, 16, 16)
    assert dataclasses.replace(bundle).prompts is not bundle.prompts
