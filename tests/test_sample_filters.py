"""Filters: what is turned down, for which reason, and what is not."""

import pytest

from pipelines.sample_filters import FilterConfig

GOOD = {"width": 512, "height": 700, "aesthetic": 6.2, "similarity": 0.3, "punsafe": 0.1, "pwatermark": 0.2}
CAPTION = "A red barn in the snow, seen from the road."


@pytest.mark.parametrize(
    ("filters", "changes", "reason"),
    [
        ({}, {}, None),
        ({"min_size": 512, "min_aesthetic": 6.2, "min_similarity": 0.3, "max_punsafe": 0.1, "max_pwatermark": 0.2}, {}, None),
        ({"min_size": 512}, {"width": 511}, "min-size"),
        ({"min_size": 512}, {"height": 511}, "min-size"),
        ({"min_size": 512}, {"height": None}, None),  # known once the image is read
        ({"min_aesthetic": 6.3}, {}, "min-aesthetic"),
        ({"min_aesthetic": 5}, {"aesthetic": None}, "no-aesthetic"),
        ({"min_aesthetic": 5}, {"aesthetic": float("nan")}, "min-aesthetic"),
        ({"min_similarity": 0.31}, {}, "min-similarity"),
        ({"max_punsafe": 0.05}, {}, "max-punsafe"),
        ({"max_punsafe": 0.05}, {"punsafe": None}, "no-punsafe"),
        ({"max_pwatermark": 0.1}, {}, "max-pwatermark"),
        ({"min_caption_length": 43, "max_caption_length": 43}, {}, None),
        ({"min_caption_length": 44}, {}, "min-caption-length"),
        ({"max_caption_length": 42}, {}, "max-caption-length"),
        ({"caption_characters": "a-zA-Z ,."}, {}, None),
        ({"caption_characters": "a-zA-Z ,"}, {}, "caption-characters"),
        ({"forbidden_words": ("BARN",)}, {}, "forbidden-words"),
        ({"forbidden_words": ("bar", "arn", "snow seen")}, {}, None),  # whole words only
        ({"forbidden_words": ("the snow", "x")}, {}, "forbidden-words"),
        ({"forbidden_words": ("road.",)}, {}, "forbidden-words"),
    ],
)
def test_reasons(filters, changes, reason):
    meta = {name: value for name, value in (GOOD | changes).items() if value is not None}
    assert FilterConfig(**filters).turned_down(CAPTION, meta) == reason


def test_size_of_a_read_image():
    filters = FilterConfig(min_size=100)
    assert filters.too_small(99, 300) and filters.too_small(300, 99) and not filters.too_small(100, 100)
    assert not FilterConfig().too_small(1, 1)


@pytest.mark.parametrize(
    "mistake", [{"min_size": -1}, {"max_punsafe": 1.5}, {"min_similarity": -2}, {"caption_characters": "z-a"}]
)
def test_mistakes_are_named(mistake):
    ((name, value),) = mistake.items()
    with pytest.raises(ValueError, match=f"{name}={value!r} is not allowed"):
        FilterConfig(**mistake)
