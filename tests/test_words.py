"""A text encoder of words: its tokenizer, states that depend on their own caption alone, and training it with a U-Net."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from conftest import small_config
from transformers import AutoModelForTextEncoding

from paella import memory
from paella.bundle import load_bundle, save_bundle
from paella.conditioning import TextEncoders
from paella.config import ModelConfig, TextConfig
from paella.layout import TextToLayout, cells_of, layout_loss
from paella.parallel import count_parameters
from paella.training import NoiseConfig, TextToTokens, draw_noise
from paella.vqgan import VQModel
from paella.words import NewWords, learn_tokenizer, new_encoder
from pipelines import scenes

CAPTIONS = [scenes.caption(scene) for scene, _ in scenes.scenes(200, seed=0, held_out=False)]
SIZE = NewWords(max_length=24)
STRANGE = ["Ünï¢ödé  and 日本語 🎨", "", " a", "\ttabs\nand lines", "<pad> </s>", "\x00 \u202e"]


@pytest.fixture(scope="module")
def text() -> TextEncoders:
    """A new encoder for scenes."""
    torch.manual_seed(0)
    tokenizer = learn_tokenizer(CAPTIONS, SIZE)
    return TextEncoders(TextConfig(byt5="words", max_length=SIZE.max_length), new_encoder(SIZE, tokenizer), tokenizer)


@pytest.fixture
def directory(text, tmp_path) -> Path:
    text.save(tmp_path / "words")
    return tmp_path / "words"


@pytest.fixture
def config(directory) -> ModelConfig:
    small = small_config()
    return dataclasses.replace(small, text=TextConfig(byt5=str(directory), max_length=SIZE.max_length, train=True))


def test_a_frequent_word_is_one_token_wherever_it_stands(text):
    words = {word for caption in CAPTIONS for word in caption.split()}
    assert len(words) > 20
    for word in words:
        first, end = text.tokenizer(word)["input_ids"]
        assert text.tokenizer(f"a {word}")["input_ids"][1:] == [first, end] and end == text.tokenizer.eos_token_id
    assert learn_tokenizer(CAPTIONS, SIZE).get_vocab() == text.tokenizer.get_vocab(), "the same captions, the same tokenizer"


@pytest.mark.parametrize("prompt", STRANGE)
def test_any_text_can_be_written(text, prompt):
    ids = text.tokenizer(prompt)["input_ids"]
    assert ids[-1] == text.tokenizer.eos_token_id
    assert not {text.tokenizer.pad_token_id, text.tokenizer.eos_token_id} & set(ids[:-1]), "nothing stands for padding or the end"
    written = text.tokenizer.decode(ids, skip_special_tokens=True)
    assert written.removeprefix(" ") == prompt.removeprefix(" ")


@torch.inference_mode()
def test_states_depend_on_their_own_caption_alone(text):
    """To the last bit in float32 among captions of any length; zero where padded."""
    prompts = [CAPTIONS[0], "red", *STRANGE[:3], CAPTIONS[1]]
    together = text.tokenize(prompts)
    states = text.states(together.ids, together.mask)
    others = text.tokenize([CAPTIONS[0], *["blue " * 20] * 5])
    assert others.mask.shape[1] != together.mask.shape[1]
    length = int(together.mask[0].sum())
    assert torch.equal(text.states(others.ids, others.mask)[0, :length], states[0, :length])
    assert not states[~together.mask].any()
    turned = text.states(together.ids.flip(0), together.mask.flip(0)).flip(0)
    assert torch.equal(turned, states)


@torch.inference_mode()
def test_order_matters(text):
    one, other = text(["a red circle left of a blue square", "a blue circle left of a red square"])["byt5"]
    assert not torch.allclose(one[1], other[6], atol=0.1), "red is another where it stands elsewhere"


@torch.inference_mode()
def test_transformers_loads_what_was_saved(text, directory):
    loaded = TextEncoders.load(TextConfig(byt5="words", max_length=512), directory.parent)
    torch.testing.assert_close(loaded(CAPTIONS[:5])["byt5"], text(CAPTIONS[:5])["byt5"])
    loaded.byt5.set_attn_implementation("eager")  # as in training; the fused one rounds otherwise
    assert torch.equal(loaded(CAPTIONS[:5])["byt5"], text(CAPTIONS[:5])["byt5"])
    assert loaded.byt5.pooler is None
    _, info = AutoModelForTextEncoding.from_pretrained(directory, add_pooling_layer=False, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert loaded.config.max_length == SIZE.max_length, "there are no further positions"
    long = loaded.tokenize(["red" + " red" * 22, "red" + " red" * 23])
    assert long.truncated == (False, True) and long.ids.shape[1] == SIZE.max_length
    assert loaded.states(long.ids, long.mask).isfinite().all()
    small = TextEncoders.load(TextConfig(byt5=directory.as_uri()), load_in_8bit=True)
    assert torch.cosine_similarity(small(["red"])["byt5"], text(["red"])["byt5"], dim=-1).min() > 0.99


def test_a_loaded_encoder_is_trained_and_travels_in_the_bundle(config, tmp_path):
    model = TextToTokens(config)
    torch.nn.init.normal_(model.unet.clf[1].weight)
    tokens, words = torch.randint(32, (4, 8, 8)), model.text.tokenize(CAPTIONS[:4])
    draws = draw_noise(tokens, 32, 0, range(4), NoiseConfig(drop_caption=0.0))
    losses, _ = model.losses(tokens, draws.noised, draws.t, words.ids, words.mask, draws.keep, label_smoothing=0.0)
    losses.mean().backward()
    for name, value in model.text.named_parameters():
        assert value.grad is not None and (value.grad.any() or "key.bias" in name), name  # to which softmax is deaf
    with torch.no_grad():
        for value in model.text.parameters():
            value.add_(0.1 * torch.randn_like(value))
    with pytest.raises(ValueError, match="cannot be dropped"):
        model.text.free()
    weights = {"unet": model.unet.state_dict(), "vqgan": VQModel(config.vqgan).state_dict()}
    save_bundle(tmp_path / "bundle", config, weights, "card", model.text)
    shutil.rmtree(config.text.byt5)
    bundle = load_bundle(str(tmp_path / "bundle"))
    assert bundle.config.text == dataclasses.replace(config.text, byt5="encoders/byt5")
    bundle.text.byt5.set_attn_implementation("eager")
    assert torch.equal(bundle.text(CAPTIONS[:3])["byt5"], model.text(CAPTIONS[:3])["byt5"])


def test_without_train_it_stays_frozen(config):
    frozen = TextToTokens(dataclasses.replace(config, text=dataclasses.replace(config.text, train=False)))
    assert not any(name.startswith("text.") for name, _ in frozen.named_parameters())
    assert not any(value.requires_grad for value in frozen.text.parameters())


def test_memory_counts_it(config):
    size = memory.sizes(config)
    assert size.trained == count_parameters(TextToTokens(config)) and size.frozen == 0
    frozen = memory.sizes(dataclasses.replace(config, text=dataclasses.replace(config.text, train=False)))
    assert frozen.frozen == size.text and frozen.trained == size.unet
    assert memory._kept_of_text(config, torch.float32) > 4 * memory.TEXT_TOKENS * SIZE.d_model


def test_tokens_lose_what_their_cells_say(text):
    assert cells_of(4, 4, 2).tolist() == [0, 0, 1, 1] * 2 + [2, 2, 3, 3] * 2
    sizes = cells_of(7, 5, 3).bincount()
    assert len(sizes) == 9 and sizes.sum() == 35 and sizes.max() == 6 and sizes.min() == 2
    torch.manual_seed(0)
    logits, tokens = torch.randn(2, 9, 32), torch.randint(32, (2, 7, 5))
    each = logits[:, cells_of(7, 5, 3)].transpose(1, 2)  # (B,K,H·W)
    expected = torch.nn.functional.cross_entropy(each, tokens.flatten(1), reduction="none").mean(1)
    torch.testing.assert_close(layout_loss(logits, tokens), expected)
    model = TextToLayout(text, 32, cells=3, layers=1).eval()
    short, long = text.tokenize(["red"]), text.tokenize(["red", CAPTIONS[0]])
    assert model.logits(long.ids, long.mask).shape == (2, 9, 32)
    torch.testing.assert_close(model.logits(long.ids, long.mask)[:1], model.logits(short.ids, short.mask), atol=1e-5, rtol=0)
    losses = model(long.ids, long.mask, tokens)
    torch.testing.assert_close(losses, layout_loss(model.logits(long.ids, long.mask), tokens))


@pytest.mark.parametrize("field, value", [("vocab_size", 257), ("num_heads", 3), ("num_layers", 0), ("max_length", 1)])
def test_sizes_that_cannot_be(field, value):
    with pytest.raises(ValueError, match=f"{field}={value} is not allowed"):
        NewWords(**{field: value})


def test_what_is_new_is_not_loaded():
    with pytest.raises(ValueError, match="train=True is not allowed: new_byt5"):
        dataclasses.replace(small_config().text, train=True)
