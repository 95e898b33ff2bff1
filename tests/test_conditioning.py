"""Text encoders: any company, dtype and place; dropped and loaded again; cut prompts counted exactly."""

from pathlib import Path

import pytest
import torch
from conftest import small_config

from paella.bundle import load_bundle
from paella.conditioning import TextEncoders
from paella.config import NewByT5, TextConfig
from paella.int8 import Int8Linear


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """A ByT5 of some size, on disk."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("encoders")
    size = NewByT5(d_model=256, d_ff=512, num_layers=4)
    TextEncoders.create(TextConfig(byt5="byt5", new_byt5=size)).save(path / "byt5")
    return path


@pytest.fixture
def text(directory) -> TextEncoders:
    return TextEncoders.load(TextConfig(byt5="byt5", max_length=64), directory).requires_grad_(False)


PROMPTS = ["a", "a rather longer prompt than the first", "blue", "", "ünï¢ödé and 日本語"]


@torch.inference_mode()
def test_a_prompt_is_the_same_in_any_company(text):
    """In float64, where a mask that leaks cannot hide in rounding. Float32 differs by 1e-6 to 3e-6 between sizes of a batch,
    which is why `PromptCache` encodes prompts one by one there.
    """
    text.double()
    together = text(PROMPTS)["byt5"]
    for prompt, states in zip(PROMPTS, together, strict=True):
        alone = text([prompt])["byt5"][0]
        torch.testing.assert_close(states[: len(alone)], alone, atol=1e-6, rtol=0)
        assert (states[len(alone) :] == 0).all()


@torch.inference_mode()
def test_eight_bits(directory, text):
    config = TextConfig(byt5="byt5", max_length=64)
    small = TextEncoders.load(config, directory, load_in_8bit=True).requires_grad_(False)
    assert any(isinstance(module, Int8Linear) for module in small.modules())
    similarity = torch.cosine_similarity(small(PROMPTS[:3])["byt5"], text(PROMPTS[:3])["byt5"], dim=-1)
    mask = text.tokenize(PROMPTS[:3]).mask
    print(f"cosine similarity of 8-bit states: mean {similarity[mask].mean():.5f}, least {similarity[mask].min():.5f}")
    assert similarity[mask].min() > 0.999
    linear = "byt5.encoder.block.0.layer.0.SelfAttention.q"
    assert small.get_submodule(linear).weight.nbytes * 4 == text.get_submodule(linear).weight.nbytes
    half = TextEncoders.load(config, directory, dtype=torch.bfloat16, load_in_8bit=True)(PROMPTS[:3])["byt5"]
    assert half.dtype == torch.bfloat16
    assert torch.cosine_similarity(half.float(), text(PROMPTS[:3])["byt5"], dim=-1)[mask].min() > 0.99


@torch.inference_mode()
def test_freed_and_loaded_again(text):
    before = text(PROMPTS)["byt5"]
    text.free()
    assert all(value.device.type == "meta" for value in text.parameters())
    assert torch.equal(text(PROMPTS)["byt5"], before)
    assert not any(value.requires_grad or value.device.type == "meta" for value in text.parameters())


def test_encoders_without_a_source_keep_their_weights():
    with pytest.raises(ValueError, match="were not loaded from anywhere"):
        TextEncoders.create(small_config().text).free()


def test_a_bundle_frees_its_encoders(model_bundle, monkeypatch):
    kept, bundle = load_bundle(str(model_bundle)), load_bundle(str(model_bundle), free_text=True)
    loads: list[int] = []
    monkeypatch.setattr(bundle.text, "source", lambda source=bundle.text.source: loads.append(1) or source())
    for prompts in (["a", "b"], ["b", "a"], ["a", "c"]):
        assert torch.equal(bundle.generate_tokens(prompts, [0, 1]), kept.generate_tokens(prompts, [0, 1]))
        assert bundle.text.device.type == "meta"
    assert len(loads) == 1, "the first prompts were encoded by what was loaded with the bundle, the second by nothing"


def test_an_eight_bit_bundle_generates(model_bundle):
    bundle = load_bundle(str(model_bundle), text_8bit=True, text_dtype=torch.bfloat16)
    assert bundle.conditions("a")["byt5"].dtype == torch.float32
    assert bundle.generate_tokens(["a"], [0]).shape == (1, 16, 16)


def test_only_prompts_that_are_cut_count_as_cut(text):
    limit = text.config.max_length  # the end of text is one of them
    prompts = ["x" * (limit - 1), "x" * limit, "é" * (limit // 2), "<pad>" * limit, "<pad>" * 3 + "x"]
    assert text.tokenize(prompts).truncated == (False, True, True, True, False)


@pytest.mark.parametrize("family", ["T5", "MT5", "UMT5"])
def test_word_pieces_are_counted_as_such(tmp_path, family):
    """An encoder with a tokenizer of words: 40 bytes are 8 tokens, which 10 hold."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2, "word": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    config = getattr(transformers, f"{family}Config")(vocab_size=8, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
    getattr(transformers, f"{family}EncoderModel")(config).save_pretrained(tmp_path / "encoder")
    tokenizer.save_pretrained(tmp_path / "encoder")
    text = TextEncoders.load(TextConfig(byt5="encoder", max_length=10), tmp_path)
    assert type(text.byt5).__name__ == f"{family}EncoderModel"
    assert text.tokenize(["word " * 8, "word " * 9, "word " * 10]).truncated == (False, False, True)
    assert text(["word " * 2000])["byt5"].shape[1] == 10
    half = TextEncoders.load(TextConfig(byt5="encoder"), tmp_path, dtype=torch.bfloat16, load_in_8bit=True)
    assert torch.equal(half(["word"])["byt5"][0], half(["word"])["byt5"][0])


def test_another_device(model_bundle):
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    bundle = load_bundle(str(model_bundle), "cuda", text_device="cpu")
    assert bundle.text.device.type == "cpu" and bundle.conditions("a")["byt5"].device.type == "cuda"
    assert bundle.generate_tokens(["a"], [0]).shape == (1, 16, 16)
