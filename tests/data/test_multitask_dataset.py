"""Examples of rows: forms, directions, order, what is left out, and errors that name a row."""

import json
import logging
import tracemalloc
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from hf_moe_ted import MultitaskDataset
from hf_moe_ted.data.multitask_dataset import Draw

PAIRS = [
    {"source": "Open", "target": "Öffnen", "src_lang": "en", "tgt_lang": "de"},
    {"source": "Close", "target": "Funga", "src_lang": "en", "tgt_lang": "sw"},
]
TEXTS = [{"text": "Fungua dirisha", "lang": "sw"}]


def summary(example: dict[str, Any]) -> tuple[str, ...]:
    return tuple(example[name] for name in ("task", "src_lang", "source", "tgt_lang", "target"))


@pytest.mark.parametrize("make", [list, datasets.Dataset.from_list])
def test_examples_of_all_tasks_both_ways(make: Any) -> None:
    dataset = MultitaskDataset(make(PAIRS), make(TEXTS), both_directions=True)
    assert [summary(dataset[number]) for number in range(len(dataset))] == [
        ("translation", "en", "Open", "de", "Öffnen"),
        ("translation", "de", "Öffnen", "en", "Open"),
        ("translation", "en", "Close", "sw", "Funga"),
        ("translation", "sw", "Funga", "en", "Close"),
        ("denoising", "sw", "Fungua dirisha", "sw", "Fungua dirisha"),
    ]
    assert [str(component) for component in dataset.components] == [
        "translation en-de",
        "translation de-en",
        "translation en-sw",
        "translation sw-en",
        "denoising sw-sw",
    ]
    assert dataset.sizes.tolist() == [1] * 5


def test_rows_of_many_languages() -> None:
    rows = [{"translation": {"en": "Open", "de": "Öffnen", "sw": "Fungua"}}]
    forwards = MultitaskDataset(datasets.Dataset.from_list(rows))
    assert [(c.src_lang, c.tgt_lang) for c in forwards.components] == [("en", "de"), ("en", "sw"), ("de", "sw")]
    both = MultitaskDataset(rows, both_directions=True)
    assert {(c.src_lang, c.tgt_lang) for c in both.components} == {
        (a, b) for a in ("en", "de", "sw") for b in ("en", "de", "sw") if a != b
    }


ROWS_WITH_GAPS = [
    {"translation": {"en": "Open", "de": "Öffnen"}},
    {"translation": {"en": "Close", "de": "Schließen", "sw": "Funga"}},
    {"translation": {"de": "Sichern", "en": "Save"}},
    {"translation": {}},
    {"translation": {"en": "Print", "sw": " "}},
    {"translation": {"sw": "Tafuta"}},
    {"translation": {"de": "Suchen", "sw": "Tafuta"}},
]


@pytest.mark.parametrize("first", [0, 1, 3], ids=["first lacks one", "first has all", "first has none"])
def test_each_row_of_a_file_has_its_own_languages(first: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its column has the type `Json`, so other rows tell nothing about this one."""
    monkeypatch.setattr("hf_moe_ted.data.multitask_dataset._CHUNK", 3)
    rows = ROWS_WITH_GAPS[first:] + ROWS_WITH_GAPS[:first]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    table = datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=str(tmp_path / "cache"))
    assert [row["translation"] for row in table] == [row["translation"] for row in rows]
    for both_directions, languages, size in ((False, None, 6), (True, None, 12), (True, ["en", "de"], 6)):
        options: dict[str, Any] = {"both_directions": both_directions, "languages": languages}
        of_rows, of_table = MultitaskDataset(rows, **options), MultitaskDataset(table, **options)
        assert len(of_table) == size
        assert of_table.components == of_rows.components
        assert of_table[:] == of_rows[:]
        drawn = [(example["src_lang"], example["tgt_lang"]) for example in of_table]
        assert drawn == [of_table.components[number][1:] for number in of_table.component_numbers]


@pytest.mark.parametrize("make", [list, datasets.Dataset.from_list])
def test_none_is_no_text(make: Any) -> None:
    """`datasets` fills a column of dictionaries with it, where a row lacks a language of others."""
    in_order = [{"translation": dict(sorted(row["translation"].items()))} for row in ROWS_WITH_GAPS]
    filled = [{"translation": {"de": None, "en": None, "sw": None, **row["translation"]}} for row in in_order]
    of_gaps, of_rows = (MultitaskDataset(rows, both_directions=True) for rows in (make(filled), in_order))
    assert of_gaps.components == of_rows.components
    assert of_gaps[:] == of_rows[:]


FLAT = [
    {
        "source": f"text {number}" if number % 7 else " \n\u3000",
        "target": f"Text {number}" if number % 11 else "\x1c",
        "src_lang": "en" if number % 3 else "sw",
        "tgt_lang": ("de", "xh")[number % 2],
        "note": number,
    }
    for number in range(1300)
]
BY_LANGUAGE = [{"translation": {"en": row["source"], "de": row["target"], "sw": "maandishi"}} for row in FLAT]
BOTH_FORMS = [{**row, **other, "target": None} for row, other in zip(FLAT, BY_LANGUAGE, strict=True)]


def backwards_twice(rows: list[Any]) -> datasets.Dataset:
    return datasets.Dataset.from_list(rows[::-1]).select(range(len(rows))[::-1])


@pytest.mark.parametrize("both_directions", [False, True])
@pytest.mark.parametrize("languages", [None, ["en", "de"]])
@pytest.mark.parametrize("rows", [FLAT, BY_LANGUAGE, BOTH_FORMS], ids=["flat", "by language", "both forms"])
def test_columns_make_the_examples_that_rows_make(rows: Any, languages: Any, both_directions: bool) -> None:
    texts = [{"text": row["source"], "lang": row["tgt_lang"]} for row in FLAT if languages is None]
    of_rows, of_columns, of_indices = (
        MultitaskDataset(
            make(rows), make(texts) if texts else None, both_directions=both_directions, languages=languages
        )
        for make in (list, datasets.Dataset.from_list, backwards_twice)
    )
    assert of_columns.components == of_indices.components == of_rows.components
    assert of_columns[:] == of_indices[:] == of_rows[:]


def test_formats_and_transforms_are_kept() -> None:
    table = datasets.Dataset.from_list(FLAT)
    expected = MultitaskDataset(FLAT)[:]
    assert MultitaskDataset(table.with_format("numpy"))[:] == expected
    swapped = MultitaskDataset(
        table.with_transform(lambda columns: {**columns, "source": columns["target"], "target": columns["source"]})
    )
    assert [(example["target"], example["source"]) for example in swapped] == [
        (example["source"], example["target"]) for example in expected
    ]


def test_an_example_takes_a_few_bytes() -> None:
    table = datasets.Dataset.from_dict({"text": ["Fungua dirisha"] * 70_000, "lang": ["sw"] * 70_000})
    tracemalloc.start()
    dataset = MultitaskDataset(denoising=table)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(dataset) == 70_000
    assert kept < 8 * len(dataset)  # 4 of the row, 1 of its place, 1 of the component
    assert peak < 40 * len(dataset)


def test_batches_of_draws_are_those_one_by_one() -> None:
    dataset = MultitaskDataset(datasets.Dataset.from_list(PAIRS), TEXTS, both_directions=True)
    draws = [Draw(4, 7), Draw(1, 8), Draw(0, 9), Draw(1, 10)]
    batch = dataset.__getitems__(draws)
    assert batch == [dataset[draw] for draw in draws]
    assert [example["noise_seed"] for example in batch] == [7, 8, 9, 10]
    assert dataset[3]["noise_seed"] == 3  # without a draw equal noise each time


def test_empty_texts_are_left_out_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    rows = [*PAIRS, {**PAIRS[0], "target": " \n"}, {**PAIRS[0], "source": ""}]
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)  # which does not propagate
    dataset = MultitaskDataset(rows, [{"text": "", "lang": "de"}, *TEXTS])
    logger.removeHandler(caplog.handler)
    assert len(dataset) == 3
    assert dataset[2]["source"] == "Fungua dirisha"
    assert "3 examples without text on one side are left out" in caplog.text


def test_languages_are_selected() -> None:
    dataset = MultitaskDataset(PAIRS, TEXTS, languages=["en", "de"])
    assert [str(component) for component in dataset.components] == ["translation en-de"]


LISTS = datasets.Dataset.from_list(
    ROWS_WITH_GAPS[:3],
    features=datasets.Features({"translation": datasets.TranslationVariableLanguages(["de", "en", "sw"])}),
)


def test_lists_become_dictionaries_as_their_error_says() -> None:
    def with_dictionary(row: Any) -> Any:
        texts = row["translation"]
        return {"translation": dict(zip(texts["language"], texts["translation"], strict=True))}

    of_lists = MultitaskDataset(LISTS.map(with_dictionary), both_directions=True)
    of_rows = MultitaskDataset(ROWS_WITH_GAPS[:3], both_directions=True)
    assert sorted(map(summary, of_lists)) == sorted(map(summary, of_rows))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "at least one of translation and denoising"),
        ({"translation": []}, "no example in translation"),
        ({"denoising": [{"text": " ", "lang": "de"}]}, "no example in denoising"),
        (
            {"translation": PAIRS, "languages": ["en", "de", "xh"]},
            r"no example in \['xh'\] .* text in \['de', 'en', 'sw'\]",
        ),
        ({"translation": PAIRS, "languages": ["de", "sw"]}, r"no example in \['de', 'sw'\] with the other languages"),
        ({"translation": [PAIRS[0], {"source": "Open", "src_lang": "en"}]}, "row 1 of the translation dataset must"),
        ({"translation": [{**PAIRS[0], "target": None}]}, "row 0 of the translation dataset must"),
        ({"translation": [{"translation": {"en": "Open", "de": None}}]}, "no example in translation"),
        ({"translation": [{"translation": {"en": "Open", "de": 1}}]}, "row 0 of the translation dataset must"),
        ({"translation": [{"translation": None}]}, "row 0 of the translation dataset must"),
        ({"translation": LISTS}, "row 0 of the translation dataset must .* make a dictionary: dict"),
        (
            {"translation": datasets.Dataset.from_list([*FLAT, *[{**PAIRS[0], "target": None}] * 2])},
            "row 1300 of the translation dataset must",
        ),
        ({"translation": datasets.Dataset.from_dict({"note": [1]})}, "row 0 of the translation dataset must"),
        ({"translation": datasets.Dataset.from_list([{"translation": {"en": "a"}}])}, "no example in translation"),
        ({"denoising": datasets.Dataset.from_list(PAIRS)}, "row 0 of the denoising dataset must have the strings"),
        ({"denoising": PAIRS}, "row 0 of the denoising dataset must have the strings text and lang"),
        ({"denoising": {"text": ["a", "b"], "lang": ["de"]}}, r"columns of the lengths {'text': 2, 'lang': 1}"),
        (
            {"denoising": (row for row in TEXTS)},
            "generator is not a map-style dataset; use MultitaskStream for streams",
        ),
    ],
)
def test_bad_datasets(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MultitaskDataset(**arguments)


def test_examples_by_every_kind_of_number() -> None:
    rows = [{"text": f"text {number}", "lang": "de"} for number in range(5)]
    dataset = MultitaskDataset(denoising=rows)
    examples = [dataset[number] for number in range(5)]
    assert [example["noise_seed"] for example in examples] == [0, 1, 2, 3, 4]
    assert dataset[-1] == examples[4] and dataset[-5] == examples[0]
    assert dataset[np.int64(3)] == dataset[np.uint8(3)] == examples[3]
    assert dataset[1:4] == examples[1:4] and dataset[::-2] == examples[::-2] and dataset[5:] == []
    assert list(dataset) == examples
    assert dataset[Draw(-1, 7)] == {**examples[4], "noise_seed": 7}
    for number in (5, -6, np.int64(5), Draw(5, 0), 2**70):
        with pytest.raises(IndexError, match=r"there is no example .*: the dataset has 5"):
            dataset[number]
    for number in (1.0, "1", None):
        with pytest.raises(TypeError):
            dataset[number]


def test_draws_carry_the_lengths_of_their_batch() -> None:
    dataset = MultitaskDataset([{"source": "Open", "target": "Öffnen", "src_lang": "en", "tgt_lang": "de"}])
    drawn = dataset.__getitems__([Draw(0, 7, (16, 32)), Draw(None, 0, (16, 32)), Draw(0, 3)])
    assert [example["source"] for example in drawn] == ["Open", "", "Open"]
    assert [example["task"] for example in drawn] == ["translation", "padding", "translation"]
    assert [example.get("padded_lengths") for example in drawn] == [(16, 32), (16, 32), None]
    assert [example.get("noise_seed") for example in drawn] == [7, None, 3]
