"""What a pipeline is called with: languages for each text, containers of texts, and what transformers 4 took."""

import enum
import itertools
import sys
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset, IterableDataset
from transformers.pipelines.pt_utils import KeyDataset

from hf_moe_ted import ZCodeM3Config, ZCodeM3ForConditionalGeneration, ZCodeM3Tokenizer, ZCodeM3TranslationPipeline
from hf_moe_ted.models import language_detection

LANGUAGES = ["en", "de", "fr", "hi"]
TEXTS = [
    "Close all tabs. Save!",
    "Alle Fenster schließen und den Rechner ausschalten",
    "Fermer tous les onglets",
    "Save!",
]
SOURCES, TARGETS = ["en", "de", "fr", "en"], ["de", "en", "hi", "fr"]
BEAMS = {"num_beams": 3, "num_return_sequences": 2}


@pytest.fixture(scope="module")
def model() -> ZCodeM3ForConditionalGeneration:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        **dict.fromkeys(("encoder_layers", "decoder_layers", "encoder_attention_heads", "decoder_attention_heads"), 2),
        **{"d_model": 16, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 64},
    }
    vocab_size = len(ZCodeM3Tokenizer(languages=LANGUAGES))
    config = ZCodeM3Config(vocab_size=vocab_size, num_experts=4, init_std=0.5, tie_word_embeddings=False, **sizes)
    return ZCodeM3ForConditionalGeneration(config).eval()


@pytest.fixture
def pipe(model: ZCodeM3ForConditionalGeneration) -> ZCodeM3TranslationPipeline:
    tokenizer = ZCodeM3Tokenizer(languages=LANGUAGES)
    return ZCodeM3TranslationPipeline(model=model, tokenizer=tokenizer, device="cpu", max_new_tokens=6)


def one_by_one(pipe: ZCodeM3TranslationPipeline, **options: Any) -> list[Any]:
    """The slow reference: a call for each text."""
    each = [
        pipe(text, src_lang=src, tgt_lang=tgt, **options)
        for text, src, tgt in zip(TEXTS, SOURCES, TARGETS, strict=True)
    ]
    return each if len(each[0]) > 1 else [item for [item] in each]


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, BEAMS, {**BEAMS, "return_scores": True}])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_languages_for_each_text(pipe: ZCodeM3TranslationPipeline, options: dict[str, Any], batch_size: int) -> None:
    expected = one_by_one(pipe, **options)
    found = pipe(TEXTS, src_lang=SOURCES, tgt_lang=[*TARGETS], batch_size=batch_size, **options)
    for many, one in zip(np.ravel(found), np.ravel(expected), strict=True):
        assert many["translation_text"] == one["translation_text"]
        assert many.get("score") == pytest.approx(one.get("score"), abs=1e-5)
    assert len({str(item) for item in found}) == len(TEXTS)


def test_a_batch_of_targets_equals_generate(pipe: ZCodeM3TranslationPipeline) -> None:
    ids = [pipe.tokenizer.get_lang_id(code) for code in TARGETS]
    for sentence, src in (("Save!", "en"), ("Nein", "de")):
        inputs = pipe.tokenizer(sentence, src_lang=src, return_tensors="pt")
        each = [pipe.model.generate(**inputs, forced_bos_token_id=i, num_beams=3, max_new_tokens=6)[0] for i in ids]
        texts = [pipe.tokenizer.decode(row, skip_special_tokens=True) for row in each]
        found = pipe([sentence] * 4, src_lang=src, tgt_lang=TARGETS, num_beams=3, batch_size=4)
        assert [item["translation_text"] for item in found] == texts
    assert len(set(texts)) > 1


def test_sampling_in_several_languages(pipe: ZCodeM3TranslationPipeline) -> None:
    """Rows of one sentence stand together there, too, and a processor of the user's still has its say."""
    seen = []

    def watch(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen.append(input_ids[:, 1:2].flatten().tolist())
        return scores

    options = {"do_sample": True, "num_return_sequences": 2, "logits_processor": [watch]}
    pipe(["Save!"] * 3, src_lang="en", tgt_lang=["de", "hi", "de"], batch_size=3, **options)
    german, hindi = pipe.tokenizer.get_lang_id("de"), pipe.tokenizer.get_lang_id("hi")
    assert seen[0] == []
    assert seen[1] == [german, german, hindi, hindi, german, german]


@pytest.mark.parametrize("container", [tuple, np.array, pd.Series, lambda texts: Dataset.from_dict({"a": texts})["a"]])
def test_containers(pipe: ZCodeM3TranslationPipeline, container: Any) -> None:
    expected = one_by_one(pipe)
    codes = Dataset.from_dict({"src": SOURCES, "tgt": TARGETS})
    assert pipe(container(TEXTS), src_lang=codes["src"], tgt_lang=codes["tgt"], batch_size=3) == expected
    assert pipe(container(["Save!", ""]), src_lang="en", tgt_lang="fr") == [expected[3], {"translation_text": ""}]


@pytest.mark.parametrize(
    "container",
    [
        iter,
        lambda texts: (text for text in texts),
        lambda texts: map(str, texts),
        lambda texts: KeyDataset(Dataset.from_dict({"a": texts}), "a"),
        lambda texts: IterableDataset.from_generator(lambda: ({"a": text} for text in texts))["a"],
    ],
)
def test_iterators(pipe: ZCodeM3TranslationPipeline, container: Any) -> None:
    expected = [[item] for item in one_by_one(pipe)]
    assert list(pipe(container(TEXTS), src_lang=SOURCES, tgt_lang=TARGETS, batch_size=3)) == expected
    assert list(pipe(container(["Save!"]), src_lang="en", tgt_lang="fr")) == expected[3:]


def test_an_iterator_without_end(pipe: ZCodeM3TranslationPipeline) -> None:
    translations = pipe(itertools.cycle(["Save!"]), src_lang="en", tgt_lang="fr", batch_size=2)
    assert [next(iter(translations)) for _ in range(3)] == [[one_by_one(pipe)[3]]] * 3


def test_another_number_of_languages(pipe: ZCodeM3TranslationPipeline) -> None:
    for texts in (TEXTS, KeyDataset([{"a": text} for text in TEXTS], "a")):
        with pytest.raises(ValueError, match="tgt_lang has 2 languages for 4 texts: give one for all, or one for each"):
            pipe(texts, src_lang="en", tgt_lang=["de", "fr"])
    with pytest.raises(ValueError, match="src_lang has 2 languages for 1 texts"):
        pipe("Save!", src_lang=["en", "de"], tgt_lang="fr")
    for number in (3, 5):
        with pytest.raises(ValueError, match=f"src_lang has {number} languages for 4 texts"):
            list(pipe(iter(TEXTS), src_lang=["en"] * number, tgt_lang="fr"))
    with pytest.raises(ValueError, match="unknown tgt_lang 'xx'"):
        pipe(TEXTS, src_lang="en", tgt_lang=["de", "fr", "de", "xx"])
    with pytest.raises(ValueError, match=r"tgt_lang \(\['de'\]\) has one language per text: give it to the call"):
        ZCodeM3TranslationPipeline(model=pipe.model, tokenizer=pipe.tokenizer, tgt_lang=["de"])


def test_detected_source(pipe: ZCodeM3TranslationPipeline) -> None:
    options = {"src_lang": "auto", "split": False}
    assert pipe(TEXTS[:3], tgt_lang=TARGETS[:3], **options) == one_by_one(pipe, split=False)[:3]
    assert pipe(TEXTS[:3], src_lang=["en", "auto", "auto"], tgt_lang=TARGETS[:3]) == one_by_one(pipe)[:3]
    with pytest.raises(ValueError, match="unknown tgt_lang 'auto'"):
        pipe("Save!", src_lang="en", tgt_lang="auto")


def test_detected_source_of_what_has_no_letters(pipe: ZCodeM3TranslationPipeline) -> None:
    assert pipe("42 %", src_lang="auto", tgt_lang="de") == pipe("42 %", src_lang="en", tgt_lang="de")
    assert pipe(" ", src_lang="auto", tgt_lang="de") == [{"translation_text": ""}]


def test_auto_without_py3langid(pipe: ZCodeM3TranslationPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    language_detection._identifier.cache_clear()
    language_detection.language_finder.cache_clear()
    monkeypatch.setitem(sys.modules, "py3langid.langid", None)
    with pytest.raises(ValueError, match="needs py3langid: `pip install py3langid`"):
        pipe("Save!", src_lang="auto", tgt_lang="de")
    assert pipe("Save!", src_lang="en", tgt_lang="de")


def test_scores(pipe: ZCodeM3TranslationPipeline) -> None:
    """Those of beam search, of a text the mean of its sentences'."""
    ranked = []
    for sentence in ("Close all tabs.", "Save!"):
        inputs = pipe.tokenizer(sentence, src_lang="en", return_tensors="pt")
        german = pipe.tokenizer.get_lang_id("de")
        outputs = pipe.model.generate(
            **inputs, forced_bos_token_id=german, max_new_tokens=6, return_dict_in_generate=True, output_scores=True,
            **BEAMS,
        )  # fmt: skip
        ranked.append(outputs.sequences_scores)
    options = {"src_lang": "en", "tgt_lang": "de", "return_scores": True, **BEAMS}
    scores = [item["score"] for item in pipe(TEXTS[0], **options)]
    assert scores == pytest.approx(torch.stack(ranked).mean(dim=0).tolist(), abs=1e-6)
    assert [item["translation_text"] for item in pipe(TEXTS[0], **options)] == [
        item["translation_text"] for item in pipe(TEXTS[0], **{**options, "return_scores": False})
    ]
    with pytest.raises(ValueError, match=r"return_scores needs beam search.* num_beams above 1"):
        pipe("Save!", src_lang="en", tgt_lang="de", return_scores=True)


@pytest.mark.parametrize("options", [{}, {"batch_size": 2}, {"num_beams": 2}, {"split": False}, {"src_lang": "auto"}])
def test_stream(pipe: ZCodeM3TranslationPipeline, options: dict[str, Any]) -> None:
    text = " Close the file. Save all tabs!\r\n\r\n\tThe third, which is longer?  \n"
    options = {"src_lang": "en", "tgt_lang": "de", **options}
    pieces = list(pipe.stream(text, **options))
    assert "".join(pieces) == pipe(text, **options)[0]["translation_text"]
    assert len(pieces) == (1 if "split" in options else 3)
    assert list(pipe.stream(" \n", **options)) == []
    with pytest.raises(ValueError, match=r"num_return_sequences \(2\) must be 1 to stream a text"):
        list(pipe.stream(text, **{**options, **BEAMS}))


def test_a_stream_begins_before_its_end(pipe: ZCodeM3TranslationPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    generate = pipe.model.generate
    monkeypatch.setattr(pipe.model, "generate", lambda **options: calls.append(1) or generate(**options))
    next(pipe.stream("One. Two! Three? Four.", src_lang="en", tgt_lang="de"))
    assert len(calls) == 1


class _ReturnType(enum.Enum):
    """As transformers 4 had it."""

    TENSORS = 0
    TEXT = 1


@pytest.mark.parametrize(
    "options",
    [
        {"truncation": True},
        {"truncation": "longest_first", "clean_up_tokenization_spaces": False},
        {"return_tensors": False, "return_text": True, "return_type": _ReturnType.TEXT, "framework": "pt"},
        {"batch_size": 8, "num_workers": 0},
    ],
)
def test_arguments_that_change_nothing(pipe: ZCodeM3TranslationPipeline, options: dict[str, Any]) -> None:
    languages = {"src_lang": "en", "tgt_lang": "de"}
    assert pipe("Save!", **languages, **options) == pipe("Save!", **languages)
    built = ZCodeM3TranslationPipeline(
        model=pipe.model, tokenizer=pipe.tokenizer, device=-1, max_new_tokens=6, modelcard=None, **languages, **options
    )
    assert built("Save!") == pipe("Save!", **languages)


def test_lengths(pipe: ZCodeM3TranslationPipeline) -> None:
    """`max_length` counts the token that decoding begins with, `max_new_tokens` does not."""
    languages = {"src_lang": "en", "tgt_lang": "de"}
    built = ZCodeM3TranslationPipeline(model=pipe.model, tokenizer=pipe.tokenizer, device="cpu", **languages)
    assert built("Save!", max_length=7) == built("Save!", max_new_tokens=6) == pipe("Save!", **languages)
    assert built("Save!", max_length=5) != pipe("Save!", **languages)
    assert built("Save!", max_length=64, min_length=60) != pipe("Save!", **languages)


def test_stop_strings(pipe: ZCodeM3TranslationPipeline) -> None:
    languages = {"src_lang": "en", "tgt_lang": "de"}
    [whole] = pipe("Save!", **languages)
    stop = whole["translation_text"][1]
    [stopped] = pipe("Save!", stop_strings=[stop], **languages)
    assert stopped["translation_text"] == whole["translation_text"][: whole["translation_text"].index(stop) + 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"return_tensors": True}, r"return_tensors \(True\) .* use model.generate for tokens"),
        ({"return_type": _ReturnType.TENSORS}, "return_type .* use model.generate for tokens"),
        ({"return_text": False}, r"return_text \(False\) .* always returns text; leave it out"),
        ({"stop_sequence": "."}, r"stop_sequence \('.'\) .* use stop_strings=\[...\]"),
        ({"framework": "tf"}, r"framework \('tf'\) .* PyTorch"),
        ({"forced_bos_token_id": 5}, r"forced_bos_token_id \(5\) .* name the language instead, with tgt_lang"),
    ],
)
def test_arguments_that_ask_for_something_else(
    pipe: ZCodeM3TranslationPipeline, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        pipe("Save!", src_lang="en", tgt_lang="de", **options)
    with pytest.raises(ValueError, match=message):
        ZCodeM3TranslationPipeline(model=pipe.model, tokenizer=pipe.tokenizer, **options)


def test_languages_of_the_task(pipe: ZCodeM3TranslationPipeline) -> None:
    parts = {"model": pipe.model, "tokenizer": pipe.tokenizer, "device": "cpu", "max_new_tokens": 6}
    named = ZCodeM3TranslationPipeline(**parts, task="translation_en_to_de")
    assert named("Save!") == pipe("Save!", src_lang="en", tgt_lang="de")
    assert named("Save!", tgt_lang="fr") == pipe("Save!", src_lang="en", tgt_lang="fr")
    given = ZCodeM3TranslationPipeline(**parts, task="translation_en_to_de", src_lang="hi", tgt_lang=None)
    assert given("Save!") == pipe("Save!", src_lang="hi", tgt_lang="de")
    with pytest.raises(ValueError, match="unknown tgt_lang 'xx'"):
        ZCodeM3TranslationPipeline(**parts, task="translation_en_to_xx")


def test_what_is_no_text(pipe: ZCodeM3TranslationPipeline) -> None:
    languages = {"src_lang": "en", "tgt_lang": "de"}
    with pytest.raises(ValueError, match="2 positional arguments: give several texts as one list"):
        pipe("Save!", "Close", **languages)
    rows = {"en": ["Save!"], "id": ["1"]}
    for table in (Dataset.from_dict(rows), pd.DataFrame(rows)):
        with pytest.raises(
            ValueError, match=r"has rows, not texts: give one of its columns \(en, id\), such as dataset"
        ):
            pipe(table, **languages)
    with pytest.raises(ValueError, match=r"got dict: .* give a column, KeyDataset\(dataset, 'text'\)"):
        pipe([{"en": "Save!"}], **languages)
