"""Datasets of the examples: directions, token ids, temperature sampling."""

import pytest
from datasets import Dataset
from translation_data import Direction, first_rows, load_directions, mix, tokenize

from hf_moe_ted import ZCodeM3Tokenizer


def test_directions_hold_the_same_pairs_both_ways() -> None:
    directions = load_directions("test", ["de", "uk"])
    assert [str(direction) for direction in directions] == ["en-de", "de-en", "en-uk", "uk-en"]
    there, back = directions[Direction("en", "de")], directions[Direction("de", "en")]
    assert there["source"][:] == back["target"][:] and there["target"][:] == back["source"][:]
    assert len(there) > 300 and all(there["source"]) and all(there["target"])


def test_directions_from_english_only() -> None:
    assert list(load_directions("test", ["th"], to_english=False)) == [Direction("en", "th")]


@pytest.mark.parametrize(("split", "languages", "message"), [("dev", None, "'validation'"), ("test", ["xx"], "'xx'")])
def test_unknown_split_or_language(split: str, languages: list[str] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_directions(split, languages)


def test_first_rows_name_their_languages() -> None:
    data = Dataset.from_dict({"source": ["a", "b", "c"], "target": ["x", "y", "z"]})
    directions = {Direction("en", "de"): data, Direction("de", "en"): data.select(range(1))}
    rows = first_rows(directions, max_samples=2)
    assert [tuple(row.values()) for row in rows] == [
        ("a", "x", "en", "de"),
        ("b", "y", "en", "de"),
        ("a", "x", "de", "en"),
    ]
    assert len(first_rows(directions)) == 4


def test_tokenize_tags_both_sides_and_truncates() -> None:
    tokenizer = ZCodeM3Tokenizer(languages=["en", "de"])
    data = Dataset.from_dict({"source": ["Hi", "a" * 50], "target": ["Hallo", "b"]})
    tokenized = tokenize(data, tokenizer, Direction("en", "de"), max_length=10)
    assert tokenized[0]["input_ids"] == tokenizer("Hi", src_lang="en").input_ids
    assert tokenized[0]["labels"] == tokenizer(text_target="Hallo", tgt_lang="de").input_ids
    assert tokenized["length"][:] == [7, 10]
    assert tokenized[1]["input_ids"][-1] == tokenizer.eos_token_id


@pytest.mark.parametrize(("temperature", "share"), [(1.0, 0.1), (2.0, 0.25), (100.0, 0.497)])
def test_mix_draws_with_temperature(temperature: float, share: float) -> None:
    """Sizes 100 and 900: the small one's share is 100^(1/T) / (100^(1/T) + 900^(1/T))."""
    small, large = (Dataset.from_dict({"of": [name] * size}) for name, size in (("small", 100), ("large", 900)))
    drawn = mix([small, large], temperature)["of"][:]
    assert len(drawn) >= 900
    assert drawn.count("small") / len(drawn) == pytest.approx(share, abs=0.05)


def test_mix_refuses_a_temperature_that_is_not_positive() -> None:
    with pytest.raises(ValueError, match=r"temperature \(0\)"):
        mix([Dataset.from_dict({"of": ["x"]})], 0)
