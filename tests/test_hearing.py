"""What models hear and bind is measured right: of one that knows nothing, one that knows words only, one that knows the truth."""

import dataclasses

import numpy as np
import pytest
import torch

from paella.bundle import load_bundle
from pipelines.hearing import Listener, NoisyImages, model_of
from pipelines.word_sets import WordSets

COLOURS = ("red", "green", "blue", "yellow")
SIDE, CODES = 4, 8
BACKGROUND = 7  # of the picture's upper half; below it are the two colours


def caption_of(first: str, relation: str, second: str) -> str:
    return f"a {first} box {relation} of a {second} box"


def picture_of(caption: str) -> np.ndarray:
    words = caption.split()
    left, right = (COLOURS.index(words[place]) for place in ((1, 6) if words[3] == "left" else (6, 1)))
    grid = np.full((SIDE, SIDE), BACKGROUND)
    grid[2:, :2], grid[2:, 2:] = left, right
    return grid


def logits_of(codes: np.ndarray, certainty: float = 3.0) -> torch.Tensor:
    """Logits (B,K,H,W) that prefer codes (B,H,W)."""
    return torch.nn.functional.one_hot(torch.from_numpy(codes), CODES).permute(0, 3, 1, 2) * certainty


def knows_the_truth(captions):
    return lambda tokens, t: logits_of(np.stack([picture_of(caption) for caption in captions]))


def bag_of_words(captions):
    """Both colours everywhere, whichever comes first, whatever the relation."""
    words = [sorted(set(caption.split()) & set(COLOURS)) for caption in captions]
    both = [sum(logits_of(np.full((1, SIDE, SIDE), COLOURS.index(word))) for word in found) for found in words]
    return lambda tokens, t: torch.cat(both)


def deaf(captions):
    return lambda tokens, t: logits_of(tokens.numpy())


@pytest.fixture(scope="module")
def listened():
    rng = np.random.default_rng(0)
    pairs = [rng.choice(COLOURS, 2, replace=False) for _ in range(90)]
    captions = [caption_of(first, rng.choice(["left", "right"]), second) for first, second in pairs]
    images = NoisyImages.of(np.stack([picture_of(caption) for caption in captions]), CODES)
    return lambda model: Listener(model, images, captions, WordSets(captions), batch_size=32)


def by_words(found):
    return {frozenset(each.words): each for each in found}


def test_a_bag_of_words_binds_nothing_and_the_truth_everything(listened):
    for bound in listened(bag_of_words).binds((0.9, 1.0)):
        assert bound.nats == (0.0, 0.0) and bound.share == (0.5, 0.5)
    (bound,) = listened(knows_the_truth).binds((0.9, 1.0))
    assert set(bound.words) == set(COLOURS) and bound.captions == 90
    assert bound.share == (1.0, 1.0)
    # an exchange makes every token of the lower half wrong: the certainty of 3 goes to another code
    assert bound.nats[1] == pytest.approx(3 / 2)


def test_a_word_is_heard_as_far_as_it_changes_what_is_predicted(listened):
    sets, words = (by_words(found) for found in listened(bag_of_words).hears((0.5, 1.0), captions_per_word=20))
    colours, relation = sets[frozenset(COLOURS)], sets[frozenset(("left", "right"))]
    assert min(colours.nats) > 0.1 and relation.nats == (0.0, 0.0)
    assert words[frozenset(("red",))].captions == 20 and colours.captions == 80
    known, _ = (by_words(found) for found in listened(knows_the_truth).hears((1.0,)))
    assert known[frozenset(("left", "right"))].nats == (pytest.approx(3 / 2),)
    assert known[frozenset(("left", "right"))].nats_rare == (pytest.approx(3),), "rare codes are those of the lower half"
    for heard in listened(deaf).hears((0.3, 1.0))[0]:
        assert heard.nats == heard.nats_rare == (0.0, 0.0)


def test_results_do_not_depend_on_batches(listened):
    whole = listened(knows_the_truth)
    small = dataclasses.replace(whole, batch_size=7)
    assert whole.hears((0.3, 1.0)) == small.hears((0.3, 1.0))
    assert whole.binds((1.0,)) == small.binds((1.0,))


def test_noise_is_nested_counted_and_each_images_own():
    tokens = np.random.default_rng(0).integers(CODES, size=(6, 8, 8))
    noisy = NoisyImages.of(tokens, CODES)
    (some, few), (most, many) = noisy.noised(0.3, [4, 1]), noisy.noised(0.8, [4, 1])
    assert torch.equal(few[:, 0] & many[:, 0], few[:, 0]), "what is noised at a level is noised at those above"
    assert torch.equal(some[few[:, 0]], most[few[:, 0]])
    assert torch.equal(some[~few[:, 0]], noisy.tokens[[4, 1]][~few[:, 0]])
    assert noisy.noised(1.0, range(6))[1][:, 0].all()
    assert torch.equal(noisy.counts((0.3, 0.8), [4, 1])[:, 1], many.sum((2, 3)))
    assert torch.equal(NoisyImages.of(tokens[:3], CODES).noised(0.8, [1])[0], most[1:])


def test_rare_codes_are_what_the_most_frequent_leave():
    tokens = np.repeat([0, 1, 2, 3], [40, 35, 15, 10]).reshape(1, 10, 10)
    assert NoisyImages.of(tokens, 8).rare.numpy().tolist() == (tokens >= 2).tolist(), "0 and 1 are 70 % and more"


def test_a_bundle_hears_as_in_sampling_by_its_text_encoder_and_clip(clip_bundle):
    captions = ["a red circle", "a somewhat longer caption of a blue square"]
    bundle, tokens = load_bundle(str(clip_bundle)), torch.randint(32, (2, 16, 16), generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.4, 1.0])
    with torch.inference_mode():
        logits = model_of(bundle)(captions)(tokens, t)
        for image, caption in enumerate(captions):
            alone = slice(image, image + 1)
            expected = bundle.unet(tokens[alone], t[alone], **bundle.conditions(caption))
            torch.testing.assert_close(logits[alone], expected, atol=1e-4, rtol=1e-4)
        rounded = load_bundle(str(clip_bundle), dtype=torch.bfloat16)  # as the probe has it where the processor can
        assert model_of(rounded)(captions)(tokens, t).isfinite().all()
