"""What a compression leaves in its folder for a reader, for every operation, and what is added to it later."""

import dataclasses
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from hf_moe_ted import (
    ExpertStatistics,
    ZCodeM3Tokenizer,
    aggregate_experts,
    collect_expert_statistics,
    merge_experts,
    prune_experts,
    quantize_experts,
    trim_vocabulary,
    write_compression_report,
    write_translation_card,
)
from hf_moe_ted.compression.report.compression_report import report_from_dict
from hf_moe_ted.compression.report.markdown_text import as_code, as_text
from hf_moe_ted.compression.report.report_pictures import PICTURES
from hf_moe_ted.routing.routing_similarity import nearest_languages

MakeQuality = Any
OPERATIONS = ("prune", "merge", "aggregate", "quantize", "trim")
TEXT = "# A model\n\nIt translates, and it is ours.\n"
PAIRS = {("en", "de"): 50.0, ("de", "en"): 60.0, ("en", "fr"): 40.0, ("fr", "en"): 45.0}
AFTER = {("en", "de"): 20.0, ("de", "en"): 59.0, ("en", "fr"): 41.0, ("fr", "en"): 40.0}


@pytest.fixture
def source(make_model: Callable[..., Any], tokenizer: ZCodeM3Tokenizer, tmp_path: Path) -> Path:
    folder = tmp_path / "full"
    make_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(f"---\nlicense: mit\n---\n\n{TEXT}")
    return folder


@pytest.fixture
def statistics(make_model: Callable[..., Any], tokenizer: ZCodeM3Tokenizer, rows: Any) -> ExpertStatistics:
    return collect_expert_statistics(make_model(), tokenizer, rows)


def compress(operation: str, source: Path, statistics: ExpertStatistics) -> Path:
    folder = source.with_name(operation)
    if operation == "prune":
        prune_experts(source, statistics, keep=2, output_dir=folder)
    elif operation == "merge":
        merge_experts(source, statistics, keep=2, output_dir=folder)
    elif operation == "aggregate":
        aggregate_experts([source, source], folder)
    elif operation == "trim":
        trim_vocabulary(source, dataset=["close all tabs"], languages=["en", "de"], output_dir=folder)
    else:
        quantize_experts(source, output_dir=folder)
    return folder


def pictures_of(folder: Path) -> set[str]:
    return {path.name for path in (folder / "compression_report").glob("*")}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_operation(operation: str, source: Path, statistics: ExpertStatistics) -> None:
    folder = compress(operation, source, statistics)
    fields = json.loads((folder / "compression_report.json").read_text())
    report = report_from_dict(fields)
    assert json.loads(json.dumps(report.to_dict())).items() <= fields.items()
    text, card = (folder / "report.md").read_text(), ModelCard.load(folder / "README.md")
    for part in (f"# Compression report: {report.title.lower()}\n", f"| {report.num_parameters_after:,} |", "`full`"):
        assert part in text
    assert f"## {report.title}\n" in card.text and "hf-moe-ted evaluate SOURCE TEXT" in card.text
    assert card.data.license == "mit" and card.text.endswith(TEXT.partition("\n\n")[2])
    assert str(source.parent) not in text + card.text and "[viz]" not in text
    expected = {
        "prune": "| encoder 1 | 4 | 2 | ",
        "merge": "| encoder 1 | 4 | 2 |\n",
        "aggregate": "| encoder 1 | 4 + 4 | 8 |",
        "quantize": "| encoder 1 | 0.",
        "trim": "| text | 1 | 14 -> 14 | 0.00% -> 0.00% | 0 |",
    }
    assert expected[operation] in text
    drawn = {"experts_per_layer.png", "routing_by_language.png", "language_similarity.png"}
    assert pictures_of(folder) == (drawn if operation in ("prune", "merge") else set())
    for name in pictures_of(folder):
        assert (folder / "compression_report" / name).read_bytes().startswith(b"\x89PNG")
        assert f"(compression_report/{name})" in text and f"(compression_report/{name})" in card.text
    assert ("encoder: nearest" in text) == (operation in ("prune", "merge"))


def test_quality(source: Path, statistics: ExpertStatistics, make_quality: MakeQuality) -> None:
    folder = compress("prune", source, statistics)
    readme = folder / "README.md"
    readme.write_text(readme.read_text() + "\n## More\n\nWritten by hand.\n")
    before = make_quality(PAIRS, model="/models/full", peak_memory_bytes=3_000_000)
    lengths = {("en", "de"): 1.3, ("de", "en"): 1.12}
    after = make_quality(
        AFTER, model="/models/prune", length_ratio=lengths, off_target={("en", "de"): 0.25}, num_cut=2, batch_size=8
    )
    assert write_compression_report(folder, before=before, after=after) == folder / "report.md"
    text, card = (folder / "report.md").read_text(), readme.read_text()
    for shared in (
        "| mean, en to X | 20 | 45.0 → 30.5 | 22.5 → 15.2 | 1.00 → 1.15 | 0.0% → 12.5% |",
        "| mean, X to en | 20 | 52.5 → 49.5 | 26.2 → 24.8 | 1.00 → 1.06 | 0.0% → 0.0% |",
        "| sentences per second | 20.0 | 20.0 |",
        "| most memory of the GPU, MB | 3.0 |  |",
        "**Translations are more than 10% longer than the references in 2 of 4 directions; before, in 0**",
        "**8 of 40 translations, before 0, did not end within 128 tokens and were cut;",
        "Speed and memory were not measured in the same way (cpu, float32, batches of 32; cpu, float32, batches of 8)",
        "| en-de | 10 | 50.0 → 20.0 | 25.0 → 10.0 | 1.00 → 1.30 | 0.0% → 25.0% |",
    ):
        assert shared in text and shared in card
    every = text.split("## Every direction")[1].split("## Experts")[0]
    for part in (card.split("with the largest loss")[1], every):
        rows = [line.split(" | ")[0][2:] for line in part.splitlines() if line.startswith("| ") and " → " in line]
        assert rows == ["mean, en to X", "mean, X to en", "en-de", "fr-en", "de-en", "en-fr"]
    assert "## Every direction" not in card and "/models/" not in text + card
    assert card.count("hf_moe_ted: begin") == 1 and card.endswith("Written by hand.\n") and "it is ours" in card
    assert "quality.png" in pictures_of(folder) and len(pictures_of(folder)) == 4

    # what is there stays, and comes again when only something else is given
    write_compression_report(folder, trained=make_quality(PAIRS, model="trained"))
    again = (folder / "report.md").read_text()
    assert "|  | before | after | after training |" in again
    assert "| en-de | 10 | 50.0 → 20.0 → 50.0 |" in again
    assert (
        "10% longer than the references in 2 of 4 directions; before, in 0" in again
    )  # of the model in the folder, not of the trained one
    assert all(f"({name})" in again for name in [f"compression_report/{name}" for name in pictures_of(folder)])
    assert "encoder: nearest" in again


def test_directions_without_bleu(source: Path, statistics: ExpertStatistics, make_quality: MakeQuality) -> None:
    folder = compress("prune", source, statistics)
    some = make_quality(PAIRS, bleu={("en", "de"): None})
    write_compression_report(folder, before=some, after=some)
    assert "| en-de | 10 | 50.0 → 50.0 |  | 1.00 → 1.00 |" in (folder / "report.md").read_text()
    none = make_quality(PAIRS, bleu=None)
    write_compression_report(folder, before=none, after=none)
    assert "| direction | sentences | chrF | length ratio |" in (folder / "report.md").read_text()


def test_what_is_copied_and_another_text(source: Path, statistics: ExpertStatistics, make_quality: MakeQuality) -> None:
    """Columns and warnings of what chrF hides, and of a text in which more is lost."""
    folder = compress("prune", source, statistics)
    numbers = [{pair: {"numbers": (50, copied), "names": (0, 0)} for pair in PAIRS} for copied in (50, 40)]
    others = [make_quality({("de", "en"): chrf}, copied=numbers[0], repeating=0.02) for chrf in (40.0, 20.0)]
    before = make_quality(PAIRS, copied=numbers[0], repeating=0.0, reference_repeating=0.04, also=others[0])
    repeating = {**dict.fromkeys(PAIRS, 0.0), ("en", "de"): 0.2}
    after = make_quality(PAIRS, copied=numbers[1], repeating=repeating, reference_repeating=0.04, also=others[1])
    write_compression_report(folder, before=before, after=after)
    text, card = (folder / "report.md").read_text(), (folder / "README.md").read_text()
    for shared in (
        "**Of the numbers that must not change in a translation, 80.0% are copied, before 100.0%**",
        "**5.0% of the translations repeat themselves, before 0.0%**",
        "**The other text: 50% of the chrF before are left, but 100% in the first text: quality that holds in one",
        "| length ratio | off target | numbers copied | repeating |",
        "| en-de | 10 | 50.0 → 50.0 | 25.0 → 25.0 | 1.00 → 1.00 | 0.0% → 0.0% | 100.0% → 80.0% | 0.0% → 20.0% |",
        "| de-en | 10 | 40.0 → 20.0 | 20.0 → 10.0 | 1.00 → 1.00 | 0.0% → 0.0% | 100.0% → 100.0% | 2.0% → 2.0% |",
    ):
        assert shared in text and shared in card
    assert "names copied" not in text and "three times in a row, as 4.0% of the references do." in text
    assert "with the largest loss in the other text" in card
    assert text.index("## Every direction") < text.index("## The other text") < text.index("## Experts")

    # less than a point, or one or two in all, is no difference; the other text has warnings of its own
    others.append(make_quality({("de", "en"): 39.0}, copied={"numbers": (50, 48)}, num_cut=1))
    copied = {**numbers[0], ("en", "de"): {"numbers": (50, 49)}}
    after = make_quality(PAIRS, copied=copied, repeating=0.009, also=others[2])
    write_compression_report(folder, before=before, after=after)
    text = (folder / "report.md").read_text()
    assert [line for line in text.splitlines() if line.startswith("- **")] == [
        "- **The other text: 1 of 10 translations, before 0, did not end within 128 tokens and were cut; their real "
        "length is greater**"
    ]
    # a text that the model never translated has nothing to lose
    others = [make_quality({("de", "en"): chrf}) for chrf in (7.9, 1.0)]
    write_compression_report(
        folder, before=make_quality(PAIRS, also=others[0]), after=make_quality(PAIRS, also=others[1])
    )
    text = (folder / "report.md").read_text()
    assert (
        "**The other text: the model before has a chrF of 7.9, a copy of the source has 3.0: the model does not" in text
    )
    assert "of the chrF before are left" not in text
    # without it again
    write_compression_report(folder, before=make_quality(PAIRS), after=make_quality(AFTER))
    text = (folder / "report.md").read_text()
    assert "other text" not in text.lower() and "numbers copied" not in text


def test_statistics_later(source: Path, statistics: ExpertStatistics) -> None:
    folder = compress("quantize", source, statistics)
    assert "`hf-moe-ted report MODEL --statistics STATISTICS` adds them" in (folder / "report.md").read_text()
    write_compression_report(folder, statistics=statistics)
    assert pictures_of(folder) == {"routing_by_language.png", "language_similarity.png"}
    text = (folder / "report.md").read_text()
    rows = dict(line.strip("| ").split(" | ", 1) for line in text.split("## Languages")[1].splitlines() if "|" in line)
    assert rows["language"] == "encoder: nearest | decoder: nearest" and [*rows][2:] == ["de", "en", "fr"]
    for side, languages in enumerate(nearest_languages(statistics).values()):
        for language, (neighbour, overlap) in languages.items():
            assert rows[language].split(" | ")[side] == f"{neighbour} {overlap:.1%}"


def test_without_matplotlib(source: Path, statistics: ExpertStatistics, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    folder = compress("prune", source, statistics)
    assert not (folder / "compression_report").exists()
    text = (folder / "report.md").read_text()
    assert "pip install 'hf-moe-ted[viz]'" in text and "![" not in text + (folder / "README.md").read_text()
    monkeypatch.undo()
    write_compression_report(folder)
    assert (
        pictures_of(folder) == {"experts_per_layer.png"} and "hf-moe-ted[viz]" not in (folder / "report.md").read_text()
    )


def test_dense_layers_and_ranges(source: Path) -> None:
    prune_experts(source, None, keep=3, criterion="random", output_dir=source.with_name("three"))
    text = (source.with_name("three") / "report.md").read_text()
    kept = json.loads((source.with_name("three") / "compression_report.json").read_text())["kept_experts"]
    shown = {(0, 1, 2): "0-2", (1, 2, 3): "1-3", (0, 2, 3): "0, 2-3", (0, 1, 3): "0-1, 3"}
    assert f"| encoder 1 | 4 | 3 | {shown[tuple(kept['model.encoder.layers.1.ffn'])]} |" in text
    prune_experts(source, None, keep=1, criterion="random", output_dir=source.with_name("one"))
    assert "| encoder 1 | 4 | 1 | dense |" in (source.with_name("one") / "report.md").read_text()


def test_card_is_read_before_anything_is_written(source: Path, statistics: ExpertStatistics) -> None:
    (source / "README.md").write_text("---\nlicense: [\n---\n")
    for operation in OPERATIONS:
        with pytest.raises(ValueError, match=r"README.md cannot be read"):
            compress(operation, source, statistics)
    assert [path.name for path in source.parent.iterdir()] == ["full"]


def test_model_in_memory(make_model: Callable[..., Any], tmp_path: Path) -> None:
    prune_experts(make_model(), None, keep=2, criterion="random", output_dir=tmp_path / "pruned")
    card = ModelCard.load(tmp_path / "pruned" / "README.md")
    assert card.data.pipeline_tag == "translation" and "base_model" not in card.data.to_dict()
    model = make_model()
    model.name_or_path = "org/model"
    quantize_experts(model, output_dir=tmp_path / "int8")
    card = ModelCard.load(tmp_path / "int8" / "README.md")
    assert (card.data.base_model, card.data.base_model_relation) == ("org/model", "quantized")


BROKEN: tuple[dict[str, Any], ...] = (
    {"operation": []},
    {"source": None},
    {"arguments": []},
    {"num_bytes_after": "x"},
    {"num_parameters_before": 10**400},
    {"warnings": [None]},
    {"num_experts_before": {}, "num_experts_after": {}},
    {"num_experts_after": {"x": 1}},
    {"kept_experts": {}},
    {"routed_share_kept": {"encoder": {"en": None}}},
    {"quality": 1},
    {"quality": {"before": {}}},
    {"nearest_languages": {"encoder": {"en": ["de"]}}},
    {"nearest_languages": {"encoder": {"en": [1, 0.5]}}},
)


def test_bad_input(
    source: Path,
    statistics: ExpertStatistics,
    make_quality: MakeQuality,
    make_model: Callable[..., Any],
    tokenizer: Any,
) -> None:
    with pytest.raises(ValueError, match=r"full/compression_report.json does not exist; output_dir must be"):
        write_compression_report(source)
    folder = compress("prune", source, statistics)
    files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    quality = make_quality(PAIRS)
    row = {"source": "a", "target": "b", "src_lang": "en", "tgt_lang": "de"}
    other = collect_expert_statistics(make_model(num_experts=3), tokenizer, [row])
    for arguments, message in (
        ({"before": quality}, "the quality after is missing"),
        ({"trained": quality}, "the quality after and before is missing"),
        ({"before": quality, "after": make_quality(PAIRS, text_sha256="y")}, "de-en has other sentences"),
        ({"statistics": other}, "the statistics are of another model than this report"),
    ):
        with pytest.raises(ValueError, match=message):
            write_compression_report(folder, **arguments)
    assert files == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    path = folder / "compression_report.json"
    fields = json.loads(path.read_text())
    for broken in (
        "{",
        "[]",
        "{}",
        '{"operation": "prune_experts"}',
        *(json.dumps(fields | change) for change in BROKEN),
    ):
        path.write_text(broken)
        with pytest.raises(ValueError, match=r"compression_report.json\)? (is corrupted|is not JSON|must be a JSON)"):
            write_compression_report(folder)


def test_names_are_no_markup(source: Path, statistics: ExpertStatistics, make_quality: MakeQuality) -> None:
    hostile = "<script>a(1)</script>|`b`\n$x_{$ ![c](d) \x1b[31m"
    full = source.rename(source.with_name("m`x` <img src=q>|$y$\n---\nz: ]("))
    (full / "README.md").unlink()
    names = {"de": hostile, "fr": "a|b"}
    pairs = tuple((names.get(a, a), names.get(b, b)) for a, b in statistics.pairs)
    renamed = dataclasses.replace(statistics, pairs=pairs)
    folder = full.with_name("small")
    result = prune_experts(full, renamed, keep=2, languages=[("en", hostile)], output_dir=folder)
    qualities = [make_quality({("en", hostile): 5.0, ("en", "a|b"): 6.0}, model=hostile, device=hostile)] * 2
    write_compression_report(folder, before=qualities[0], after=qualities[1], statistics=renamed)
    assert {*pictures_of(folder)} == {*PICTURES}  # in which $ begins no formula
    assert ModelCard.load(folder / "README.md").data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "translation",
        "language": ["en"],  # the other name is no code of a language
    }
    for name in ("report.md", "README.md"):
        text = (folder / name).read_text()
        for wrong in ("<script", "<img", "a|b", "\x1b", "![c]", "$x", "$y", "`b`", "\nz:", "]("):
            assert wrong not in re.sub(r"\]\((report\.md|compression_report/\w+\.png)\)", "", text), wrong
        tables = [line for line in text.splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in tables if "en-" in line}) == 1
    assert "\x1b" not in str(result.report) and len(str(result.report).splitlines()) == len(result.report.lines())


def test_text() -> None:
    assert as_text("m2m_100: a") == "m2m_100: a"
    assert as_text("__init__") == "&#95;&#95;init&#95;&#95;"
    assert as_text("_x_ https://x.y") == "&#95;x&#95; https&#58;//x.y"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("demo_8.x-y/z", "`demo_8.x-y/z`"),
        ("a`b", "<code>a&#96;b</code>"),
        ("a<b>|c&d", "<code>a&#60;b>&#124;c&#38;d</code>"),
        ("a\nb", "`a b`"),
        ("x" * 400, f"<code>{'x' * 299}…</code>"),
    ],
)
def test_code(name: str, expected: str) -> None:
    assert as_code(name) == expected


def test_quality_of_another_folder(
    source: Path, statistics: ExpertStatistics, make_quality: MakeQuality, caplog: pytest.LogCaptureFixture
) -> None:
    """Folders that exist show that a file of scores was given in the place of another one."""
    folder = compress("prune", source, statistics)
    of = {path: make_quality(PAIRS, model=str(path)) for path in (source, folder)}
    write_compression_report(folder, before=of[source], after=of[folder])
    write_compression_report(folder, before=of[source], after=make_quality(PAIRS, model="/moved/away"))
    assert not caplog.messages
    write_compression_report(folder, before=of[folder], after=of[source])
    assert [f"measured with {source}, not with the model in {folder}" in text for text in caplog.messages] == [
        True,
        False,
    ]
    assert "before was measured with the model in" in caplog.messages[1]
    caplog.clear()
    write_translation_card(folder, of[source])
    assert "is written into the card of" in caplog.text
