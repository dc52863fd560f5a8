"""Qualities by direction: means, files, and which ones can be compared."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from hf_moe_ted import DirectionQuality, TranslationQuality

MakeQuality = Any


def _with_copied(fields: dict[str, Any], copied: Any) -> dict[str, Any]:
    return {**fields, "directions": [{**fields["directions"][0], "copied": copied}]}


def test_means(make_quality: MakeQuality) -> None:
    pairs = {("en", "de"): 40.0, ("en", "fr"): 60.0, ("fr", "en"): 20.0}
    quality: TranslationQuality = make_quality(pairs, off_target={("en", "fr"): None, ("fr", "en"): 0.5})
    assert quality.groups() == {
        "all directions": [*pairs],
        "en to X": [("en", "de"), ("en", "fr")],
        "X to en": [("fr", "en")],
    }
    mean = quality.mean([*pairs])
    assert (mean.bleu, mean.chrf, mean.length_ratio, mean.off_target) == (20.0, 40.0, 1.0, 0.25)
    assert quality.mean([("en", "fr")]).off_target is None
    assert quality.num_sentences == 30 and quality.sentences_per_s == 30 / (3 * 0.5)
    lines = str(quality).splitlines()
    assert lines[0] == "all directions: BLEU 20.0, chrF 40.0, length ratio 1.00, off target 25.0%"
    assert lines[-1] == "20.0 sentences/s" and len(lines) == 4


def test_directions_without_bleu(make_quality: MakeQuality, tmp_path: Path) -> None:
    pairs = {("en", "de"): 40.0, ("en", "fr"): 60.0}
    quality: TranslationQuality = make_quality(pairs, bleu={("en", "de"): None})
    assert quality.mean([*pairs]).bleu == 30.0 and str(quality).startswith("all directions: BLEU 30.0, chrF 50.0,")
    none: TranslationQuality = make_quality(pairs, bleu=None)
    assert none.mean([*pairs]).bleu is None and str(none).startswith("all directions: chrF 50.0, length")
    quality.save(tmp_path / "quality.json")
    assert [row["bleu"] for row in json.loads((tmp_path / "quality.json").read_text())["directions"]] == [None, 30.0]
    assert TranslationQuality.load(tmp_path / "quality.json") == quality


def test_shares_of_what_is_copied_are_those_of_all_directions_together(make_quality: MakeQuality) -> None:
    pairs = {("en", "de"): 40.0, ("de", "en"): 60.0}
    copied = {("en", "de"): {"numbers": (8, 6), "names": (0, 0)}, ("de", "en"): {"numbers": (2, 1), "names": (0, 0)}}
    other = make_quality(pairs, repeating=1.0)
    quality = make_quality(pairs, copied=copied, repeating={("en", "de"): 0.5, ("de", "en"): 0.0}, also=other)
    mean = quality.mean([*pairs])
    assert mean.copied == {"numbers": 0.7} and mean.repeating == 0.25
    lines = str(quality).splitlines()
    assert lines[0].endswith(", off target 0.0%, numbers copied 70.0%, repeating 25.0%")
    assert lines[1] == lines[-1].removeprefix("other text: ") == "20.0 sentences/s"
    assert lines[-2].startswith("other text: all") and lines[-2].endswith("off target 0.0%, repeating 100.0%")


@pytest.mark.parametrize("pairs", [[("en", "de")], [("en", "de"), ("fr", "es")], [("en", "de"), ("en", "fr")]])
def test_one_group_if_there_is_nothing_to_set_apart(make_quality: MakeQuality, pairs: list[Any]) -> None:
    assert [*make_quality(dict.fromkeys(pairs, 1.0)).groups()] == ["all directions"]


def test_files(make_quality: MakeQuality, tmp_path: Path) -> None:
    pairs = {("en", "de"): 40.0, ("zh-Hant", "en"): 60.5}
    quality = make_quality(pairs, copied={"numbers": (3, 2)}, repeating=0.1, also=make_quality(pairs))
    path = tmp_path / "new" / "quality.json"
    quality.save(path)
    assert TranslationQuality.load(path) == quality
    assert isinstance(TranslationQuality.load(path).directions["zh-Hant", "en"], DirectionQuality)
    with pytest.raises(ValueError, match=r"quality.json exists; choose another name or overwrite it"):
        quality.save(path)
    other = make_quality({("en", "de"): 1.0})
    other.save(path, overwrite=True)
    assert TranslationQuality.load(path) == other
    with pytest.raises(ValueError, match="is a folder"):
        quality.save(tmp_path, overwrite=True)
    assert [entry.name for entry in path.parent.iterdir()] == ["quality.json"]


def test_files_of_versions_that_did_not_count_what_is_copied(make_quality: MakeQuality, tmp_path: Path) -> None:
    quality = make_quality({("en", "de"): 40.0})
    path = tmp_path / "quality.json"
    quality.save(path)
    fields = json.loads(path.read_text())
    assert fields.pop("also") is None
    (direction,) = fields["directions"]
    assert [direction.pop(name) for name in ("copied", "repeating", "reference_repeating")] == [{}, None, None]
    path.write_text(json.dumps(fields))
    assert TranslationQuality.load(path) == quality
    quality.require_comparable(make_quality({("en", "de"): 30.0}, copied={"numbers": (3, 2)}, repeating=0.1))


def test_nothing_half_written(make_quality: MakeQuality, tmp_path: Path) -> None:
    path = tmp_path / "quality.json"
    make_quality({("en", "de"): 1.0}).save(path)
    before = path.read_bytes()
    with pytest.raises(UnicodeEncodeError):
        make_quality({("en", "\ud800"): 1.0}).save(path, overwrite=True)
    assert path.read_bytes() == before and len([*tmp_path.iterdir()]) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda fields: fields | {"format": "x"}, "is not a file of translation quality"),
        (lambda fields: fields | {"format_version": 9}, "has format_version 9, this version of hf_moe_ted reads 1"),
        (lambda fields: {**fields, "directions": [{"src_lang": "en"}]}, r"is corrupted: tgt_lang \(None\) must be str"),
        (lambda fields: {**fields, "directions": []}, "is corrupted: it has no direction"),
        (lambda fields: {**fields, "directions": 2 * fields["directions"]}, "is corrupted: .* en-de occurs twice"),
        (lambda fields: {**fields, "directions": None}, r"is corrupted: directions \(None\) must be list"),
        (lambda fields: {**fields, "seed": 1}, "is corrupted: it has seed, which this version"),
        (lambda fields: {**fields, "model": None}, r"is corrupted: model \(None\) must be str"),
        (lambda fields: {**fields, "num_bytes": True}, r"is corrupted: num_bytes \(True\) must be int"),
        (lambda fields: {**fields, "num_bytes": 10**30}, "is corrupted: num_bytes"),
        (lambda fields: {**fields, "peak_memory_bytes": []}, r"is corrupted: peak_memory_bytes \(\[\]\) must be int"),
        (lambda fields: {**fields, "also": []}, r"is corrupted: also \(\[\]\) must be dict"),
        (lambda fields: {**fields, "also": {}}, r"is corrupted: directions \(None\) must be list"),
        (
            lambda fields: {**fields, "also": {**fields, "also": fields}},
            "is corrupted: also must not have a second text",
        ),
        (lambda fields: _with_copied(fields, {"numbers": [1]}), r"copied of numbers \(\[1\]\) must be tuple"),
        (lambda fields: _with_copied(fields, None), r"is corrupted: copied \(None\) must be dict"),
        (lambda fields: [], "must be a JSON object"),
        (lambda fields: math.nan, "is not JSON: NaN"),
    ],
)
def test_corrupted_files(make_quality: MakeQuality, tmp_path: Path, change: Any, message: str) -> None:
    path = tmp_path / "quality.json"
    with pytest.raises(ValueError, match="does not exist; `hf-moe-ted evaluate`"):
        TranslationQuality.load(path)
    make_quality({("en", "de"): 1.0}).save(path)
    text = path.read_text()
    path.write_text(json.dumps(change(json.loads(text))))
    with pytest.raises(ValueError, match=message):
        TranslationQuality.load(path)
    path.write_text(text[:40])
    with pytest.raises(ValueError, match="is not JSON"):
        TranslationQuality.load(path)


def test_comparable(make_quality: MakeQuality) -> None:
    first = make_quality({("en", "de"): 40.0, ("en", "fr"): 1.0})
    first.require_comparable(make_quality({("en", "de"): 1.0, ("en", "fr"): 2.0}, model="b", batch_size=2))
    with pytest.raises(
        ValueError,
        match=r"of a and b cannot be compared: num_beams is 1 in one and 5 in the other; en-fr is only in one of",
    ):
        first.require_comparable(make_quality({("en", "de"): 40.0}, model="b", num_beams=5))
    with pytest.raises(ValueError, match="en-de has other sentences; en-fr has other sentences"):
        first.require_comparable(make_quality({("en", "de"): 40.0, ("en", "fr"): 1.0}, text_sha256="y"))
    of_both = [
        make_quality({("en", "de"): 40.0}, also=make_quality({pair: 1.0})) for pair in (("en", "de"), ("de", "en"))
    ]
    of_both[0].require_comparable(of_both[0])
    with pytest.raises(ValueError, match="cannot be compared: de-en is only in one of them; en-de is only in one"):
        of_both[0].require_comparable(of_both[1])
    with pytest.raises(ValueError, match=r"only one of them has a second text \(also\)"):
        of_both[0].require_comparable(make_quality({("en", "de"): 40.0}))
