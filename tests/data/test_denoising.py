"""Noise of denoising: what it keeps, how much it changes, and that seeds decide it."""

import math
import re
from statistics import mean

import numpy as np
import pytest

from hf_moe_ted import DenoisingNoise
from hf_moe_ted.data.denoising import drop_words, mask_spans, shuffle_sentences, split_sentences, split_words

WORDS = [" " * (number > 0) + f"w{number}" for number in range(40)]
TEXT = "".join(WORDS)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Close  all\ttabs.", ["Close", "  all", "\ttabs."]),
        ("タブを閉じる", list("タブを閉じる")),
        ("打开 Chrome 设置", ["打", "开", " Chrome", " 设", "置"]),
        ("ปิดที่นี่", ["ปิ", "ด", "ที่", "นี่"]),
        ("모든 탭 닫기", ["모든", " 탭", " 닫기"]),
        ("", []),
        ("  \n", []),
    ],
)
def test_words(text: str, words: list[str]) -> None:
    assert split_words(text) == words


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("One. Two!  Three?", ["One.", "Two!", "Three?"]),
        ("Version 1.5 is out. Get it", ["Version 1.5 is out.", "Get it"]),
        ("一。二。三", ["一。", "二。", "三"]),
        ("क। ख।", ["क।", "ख।"]),
        ("a\n\nb", ["a", "b"]),
    ],
)
def test_sentences(text: str, sentences: list[str]) -> None:
    assert split_sentences(text) == sentences


def test_equal_seeds_make_equal_noise() -> None:
    noise = DenoisingNoise(sentence_distance=2, word_dropout=0.1)
    noised = [noise(TEXT + ". More. And more.", seed=seed, mask_token="<mask>") for seed in (0, 0, 1, 2, 3)]
    assert noised[0] == noised[1]
    assert len({*noised}) == 4


@pytest.mark.parametrize("ratio", [0.0, 0.35, 0.8])
def test_masked_share_and_length_of_spans(ratio: float) -> None:
    kept, masks = [], []
    for seed in range(400):
        noised = mask_spans(WORDS, ratio, 3.5, "<mask>", np.random.default_rng(seed))
        kept.append(sum("mask" not in word for word in noised))
        masks.append(sum("mask" in word for word in noised))
        in_order = [word for word in noised if "mask" not in word]
        assert in_order == sorted(in_order, key=WORDS.index)  # nothing else is changed
        assert all(word in (" <mask>", "<mask>") for word in noised if word not in WORDS)
    assert mean(kept) == pytest.approx(40 * (1 - ratio), abs=0.1)
    # spans of 3.5 words, but for the last one, which is cut: one every 3.5 words, and half a one more
    assert mean(masks) == pytest.approx(math.ceil(40 * ratio / 3.5) if ratio else 0, abs=0.8)


def test_every_place_but_the_ends_is_masked_as_often() -> None:
    is_masked = np.zeros(40)
    for seed in range(2000):
        noised = {*mask_spans(WORDS, 0.35, 3.5, "<mask>", np.random.default_rng(seed))}
        is_masked += [word not in noised for word in WORDS]
    middle = is_masked[6:-6] / 2000
    assert middle.max() - middle.min() < 0.07
    assert is_masked.mean() / 2000 == pytest.approx(0.35, abs=0.01)
    assert is_masked[0] / 2000 > 0.1  # a span starts there or not, while it may cover others


def test_spans_have_poisson_lengths() -> None:
    long = [f" w{number}" for number in range(4000)]
    noised = "".join(mask_spans(long, 0.5, 3.5, "<mask>", np.random.default_rng(0)))
    numbers = [int(number) for number in re.findall(r"w(\d+)", noised)]
    num_masks = noised.count("<mask>")
    assert num_masks == pytest.approx(2000 / 3.5, rel=0.1)
    assert len(numbers) == 2000


def test_a_short_text_is_masked_sometimes() -> None:
    noise = DenoisingNoise(mask_ratio=0.3)
    noised = [noise("tab", seed=seed, mask_token="<mask>") for seed in range(200)]
    assert 30 < sum("<mask>" in text for text in noised) < 90
    assert all(noised)


@pytest.mark.parametrize("distance", [1, 2, 5])
def test_sentences_move_by_the_distance_at_most(distance: int) -> None:
    moved = set()
    for seed in range(300):
        text = shuffle_sentences("A. B. C. D. E. F. G. H.", distance, np.random.default_rng(seed))
        places = [abs("ABCDEFGH".index(sentence[0]) - place) for place, sentence in enumerate(text.split(" "))]
        assert len(places) == 8
        moved |= {*places}
    assert {0, 1} <= moved <= {*range(distance + 1)}
    assert distance in moved or distance == 5  # which takes luck


def test_sentences_of_writing_without_spaces_are_joined_without() -> None:
    texts = {shuffle_sentences("一。二。", 1, np.random.default_rng(seed)) for seed in range(20)}
    assert texts == {"一。二。", "二。一。"}


def test_words_are_dropped_and_one_stays() -> None:
    kept = [len(drop_words(WORDS, 0.25, np.random.default_rng(seed))) for seed in range(300)]
    assert mean(kept) == pytest.approx(30, abs=0.6)
    assert {len(drop_words(["a"], 0.99, np.random.default_rng(seed))) for seed in range(20)} == {1}
    assert drop_words([], 0.5, np.random.default_rng(0)) == []


def test_no_noise_is_the_text() -> None:
    assert DenoisingNoise(mask_ratio=0.0)(TEXT, seed=0, mask_token="<mask>") == TEXT
    assert DenoisingNoise()("", seed=0, mask_token="<mask>") == ""


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("mask_ratio", 1.0, r"mask_ratio \(1.0\) must be at least 0 and less than 1"),
        ("word_dropout", -0.1, r"word_dropout \(-0.1\) must be at least 0"),
        ("poisson_lambda", 0.0, r"poisson_lambda \(0.0\) must be positive"),
        ("poisson_lambda", math.nan, r"poisson_lambda \(nan\) must be a number"),
        ("poisson_lambda", math.inf, r"poisson_lambda \(inf\) must be positive and finite"),
        ("mask_ratio", math.nan, r"mask_ratio \(nan\) must be a number"),
        ("mask_ratio", "0.35", r"mask_ratio \('0.35'\) must be a number"),
        ("word_dropout", None, r"word_dropout \(None\) must be a number"),
        ("word_dropout", 1, r"word_dropout \(1\) must be at least 0 and less than 1"),
        ("sentence_distance", -1, r"sentence_distance \(-1\) must be 0 or more"),
        ("sentence_distance", 1.5, r"sentence_distance \(1.5\) must be an integer"),
        ("sentence_distance", math.nan, r"sentence_distance \(nan\) must be an integer"),
    ],
)
def test_bad_numbers(field: str, value: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DenoisingNoise(**{field: value})


def test_what_holds_for_all_parameters() -> None:
    """Words are kept, masked or dropped, nothing else appears, and there are at most two masks per masked word."""
    random = np.random.default_rng(0)
    for seed in range(400):
        noise = DenoisingNoise(
            mask_ratio=random.choice([0.0, 1e-9, random.random(), 0.999999]),
            poisson_lambda=10.0 ** int(random.integers(-300, 300)) if seed % 2 else 10 * random.random() + 1e-3,
            sentence_distance=int(random.choice([0, 1, 10**9])),
            word_dropout=random.choice([0.0, random.random(), 0.999999]),
        )
        words = [f"w{number}" + "." * int(random.random() < 0.2) for number in range(random.integers(0, 30))]
        # a mask before the first word takes its place after no space
        noised = noise(" ".join(words), seed=seed, mask_token="<mask>").replace("<mask>", " <mask> ").split()
        num_masks = noised.count("<mask>")
        kept = [word for word in noised if word != "<mask>"]
        assert {*kept} <= {*words} and len({*kept}) == len(kept), noise
        num_masked_at_most = int(len(words) * noise.mask_ratio + 1)
        assert num_masks <= 2 * num_masked_at_most, noise
        assert bool("".join(noised)) == bool(words), noise


def test_a_tiny_mean_makes_masks_of_one_word_and_as_many_between_words() -> None:
    noised = [mask_spans(WORDS[:10], 0.5, 1e-3, "<mask>", np.random.default_rng(seed)) for seed in range(20)]
    assert {sum("mask" in word for word in words) for words in noised} == {10}
    assert {sum("mask" not in word for word in words) for words in noised} == {5}


def test_a_long_text_takes_its_length() -> None:
    words = ["a "] * 400_000
    noised = mask_spans(words, 0.35, 3.5, "<mask>", np.random.default_rng(0))  # not with its square
    assert sum("mask" in word for word in noised) == pytest.approx(40_000, rel=0.05)
