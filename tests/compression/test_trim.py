"""A trimmed model computes what the full one does with the columns of removed tokens at minus infinity."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, NllbTokenizer
from translation_cases import TEXTS, parallel_rows, tiny_model
from trimming_cases import (
    CORPUS,
    OTHER,
    TOKENIZERS,
    m2m100_tokenizer,
    nllb_tokenizer,
    rows_for,
    size_of,
    zcode_tokenizer,
)

from hf_moe_ted import ZCodeM3ForConditionalGeneration, ZCodeM3Tokenizer, merge_experts, prune_experts, quantize_experts
from hf_moe_ted.compression.report.compression_report import TrimmingReport, report_from_dict
from hf_moe_ted.compression.trim import TrimmingResult, trim_vocabulary
from hf_moe_ted.routing.statistics_collection import collect_expert_statistics
from hf_moe_ted.tensors.lazy_tensors import TensorFile

PAD = 1


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return TOKENIZERS[request.param](tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def zcode(tmp_path: Path) -> ZCodeM3Tokenizer:
    return zcode_tokenizer(tmp_path)


def saved(folder: Path, model: Any, tokenizer: Any) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def without_columns(model: Any, kept: tuple[int, ...]) -> Any:
    """The full model, which never generates another token."""
    model = copy.deepcopy(model)
    is_removed = torch.ones(model.config.vocab_size, dtype=torch.bool)
    is_removed[[*kept]] = False
    model.lm_head.register_forward_hook(lambda _module, _args, logits: logits.masked_fill(is_removed, -torch.inf))
    return model


@torch.no_grad()
def assert_same(trimmed: Any, full: Any, kept: tuple[int, ...]) -> None:
    """Logits of what is kept, and beam search, on random texts of kept tokens."""
    generator = torch.Generator().manual_seed(2)
    source = torch.randint(4, len(kept), (3, 9), generator=generator)
    target = torch.randint(4, len(kept), (3, 7), generator=generator)
    source[1, 5:] = target[2, 3:] = PAD
    old_ids = torch.tensor(kept)

    def run(model: Any, renamed: Callable[[Tensor], Tensor], kept: Any) -> Tensor:
        inputs = {"input_ids": renamed(source), "attention_mask": source.ne(PAD).long()}
        return model(**inputs, decoder_input_ids=renamed(target)).logits[..., kept][target.ne(PAD)]

    expected = run(full, lambda ids: old_ids[ids], old_ids)
    torch.testing.assert_close(run(trimmed, lambda ids: ids, slice(None)), expected, rtol=1e-6, atol=1e-6)
    masked = without_columns(full, kept)
    options = {"num_beams": 4, "do_sample": False, "max_new_tokens": 6, "attention_mask": source.ne(PAD).long()}
    assert torch.equal(old_ids[trimmed.generate(source, **options)], masked.generate(old_ids[source], **options))


def encoded(tokenizer: Any, texts: list[str], language: str) -> list[list[int]]:
    """With the tag of the language."""
    tokenizer.src_lang = language
    return tokenizer(texts)["input_ids"]


# --- what is the same


def test_same_encodings_logits_and_translations(tokenizer: Any, tmp_path: Path) -> None:
    """Two of three languages, from a folder in shards; everything that is translated is of kept tokens."""
    model, rows = tiny_model(vocab_size=size_of(tokenizer) + 2), rows_for(tokenizer)
    english, german, french = dict.fromkeys(row["src_lang"] for row in rows)
    folder = tmp_path / "full"
    model.save_pretrained(folder, max_shard_size="60KB")
    tokenizer.save_pretrained(folder)
    result = trim_vocabulary(
        folder, dataset=rows, languages=[english, german], output_dir=tmp_path / "small", max_shard_size="60KB"
    )
    trimmed, kept = ZCodeM3ForConditionalGeneration.from_pretrained(tmp_path / "small"), result.kept_tokens
    smaller = AutoTokenizer.from_pretrained(tmp_path / "small")
    assert type(smaller) is type(tokenizer) and len(kept) < size_of(tokenizer)
    assert len(kept) == trimmed.config.vocab_size == trimmed.lm_head.out_features == size_of(smaller) == len(smaller)
    assert len([*(tmp_path / "small").glob("*.safetensors")]) > 1
    assert_same(trimmed, model, kept)

    # every text of the two languages has the same tokens, tag included, and no other text has new unknown ones
    for language, texts in ((english, TEXTS["en"]), (german, TEXTS["de"])):
        before, after = (encoded(each, [*texts], language) for each in (tokenizer, smaller))
        is_known = [tokenizer.unk_token_id not in ids for ids in before]
        assert sum(is_known) >= 2
        for known, old, new in zip(is_known, before, after, strict=True):
            assert ([kept[index] for index in new] == old) or not known
            assert smaller.decode(new) == tokenizer.decode(old) or not known
    num_unknown = [
        sum(ids.count(each.unk_token_id) for ids in each(OTHER, add_special_tokens=False)["input_ids"])
        for each in (tokenizer, smaller)
    ]
    assert num_unknown[0] >= num_unknown[1]
    assert (french in smaller.get_vocab()) is False
    assert {*result.report.texts} == {english, german}
    for of_language in result.report.texts.values():
        assert of_language["num_texts"] == 16
        assert of_language["num_changed"] <= of_language["num_unknown_before"]
        if not of_language["num_unknown_before"]:
            assert of_language["num_tokens_before"] == of_language["num_tokens_after"] > 0


def test_what_other_text_becomes(tokenizer: Any, tmp_path: Path) -> None:
    """It is taken apart into kept pieces, and reads the same, but for what was unknown and is known now."""
    saved(tmp_path / "full", tiny_model(vocab_size=size_of(tokenizer)), tokenizer)
    rows = [row for row in rows_for(tokenizer) if row["source"] == "yes"]
    result = trim_vocabulary(tmp_path / "full", dataset=rows, output_dir=tmp_path / "small")
    before, after = (each(CORPUS, add_special_tokens=False)["input_ids"] for each in (tokenizer, result.tokenizer))
    texts = [each.batch_decode(ids) for each, ids in ((tokenizer, before), (result.tokenizer, after))]
    unknown = str(tokenizer.unk_token)
    assert [text for text in texts[0] if unknown not in text] == [
        new for old, new in zip(*texts, strict=True) if unknown not in old
    ]
    assert sum(text.count(unknown) for text in texts[1]) <= sum(text.count(unknown) for text in texts[0])
    assert sum(map(len, after)) > sum(map(len, before))


def zcode_result(model: Any, zcode: ZCodeM3Tokenizer, **options: Any) -> TrimmingResult:
    return trim_vocabulary(model, zcode, dataset=parallel_rows(), languages=["en", "de"], **options)


@pytest.mark.parametrize(
    "options",
    [
        {"tie_word_embeddings": False, "position_embedding_type": "learned"},
        {"position_embedding_type": "tupe", "num_experts_per_tok": 2, "use_residual": True},
        {"pad_token_id": 11},
    ],
    ids=str,
)
def test_every_architecture_in_memory_and_from_a_folder(
    options: dict[str, Any], zcode: ZCodeM3Tokenizer, tmp_path: Path
) -> None:
    model = tiny_model(vocab_size=size_of(zcode), **options)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    in_memory = zcode_result(model, zcode)
    assert in_memory.model is not None and in_memory.output_dir is None
    assert_same(in_memory.model, model, in_memory.kept_tokens)
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    assert model.config.vocab_size == size_of(zcode)
    assert in_memory.model.config.pad_token_id == model.config.pad_token_id
    embeddings = {id(module.weight) for module in in_memory.model.modules() if hasattr(module, "embed_scale")}
    assert len(embeddings) == (3 if options.get("tie_word_embeddings") is False else 1)

    on_disk = zcode_result(model, zcode, output_dir=tmp_path / "small")
    loaded = ZCodeM3ForConditionalGeneration.from_pretrained(tmp_path / "small")
    for name, weight in in_memory.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
    assert on_disk.report.to_dict() == in_memory.report.to_dict()
    assert on_disk.tokenizer.get_vocab() == in_memory.tokenizer.get_vocab()


@pytest.mark.parametrize("operation", ["prune", "merge", "dense"])
def test_pruned_and_merged_models(operation: str, zcode: ZCodeM3Tokenizer) -> None:
    model = tiny_model(vocab_size=size_of(zcode))
    statistics = collect_expert_statistics(model, zcode, parallel_rows())
    if operation == "merge":
        smaller = merge_experts(model, statistics, keep=2).model
    else:
        smaller = prune_experts(model, statistics, keep=1 if operation == "dense" else 2).model
    result = zcode_result(smaller, zcode)
    assert_same(result.model, smaller, result.kept_tokens)
    assert report_from_dict(result.report.to_dict() | {"warnings": [*result.report.warnings]}) == result.report


def test_dtype_stays_and_the_rest_trains(zcode: ZCodeM3Tokenizer, tmp_path: Path) -> None:
    model = tiny_model(vocab_size=size_of(zcode)).to(torch.bfloat16)
    saved(tmp_path / "full", model, zcode)
    zcode_result(tmp_path / "full", zcode, output_dir=tmp_path / "small")
    file = TensorFile(tmp_path / "small" / "model.safetensors")
    assert {spec.dtype for spec in file.specs.values()} == {torch.bfloat16}
    trimmed = ZCodeM3ForConditionalGeneration.from_pretrained(tmp_path / "small", dtype="auto").float()
    smaller = AutoTokenizer.from_pretrained(tmp_path / "small", src_lang="en", tgt_lang="de")
    trimmed.train()(**smaller(["save"], text_target=["speichern"], return_tensors="pt")).loss.backward()
    assert trimmed.model.shared.weight.grad.shape[0] == len(smaller)


# --- what decides


def test_min_count_is_over_all_languages(zcode: ZCodeM3Tokenizer) -> None:
    model = tiny_model(vocab_size=size_of(zcode))
    rows = [
        {"translation": {"en": "close all tabs", "de": "close all tabs"}},
        {"translation": {"en": "the disk is full", "de": "voll"}},
    ]
    all_of_it = trim_vocabulary(model, zcode, dataset=rows)
    frequent = trim_vocabulary(model, zcode, dataset=rows, min_count=2)
    assert len(frequent.kept_tokens) < len(all_of_it.kept_tokens)
    for token in zcode("close all tabs", add_special_tokens=False)["input_ids"]:
        assert token in frequent.kept_tokens
    texts = frequent.report.texts
    assert texts["en"]["num_changed"] == texts["de"]["num_changed"] == 1
    assert texts["en"]["num_tokens_after"] > texts["en"]["num_tokens_before"]
    assert "less often than min_count" in frequent.report.warnings[0] and "en, de" in frequent.report.warnings[0]
    with pytest.raises(ValueError, match=r"min_count \(0\)"):
        trim_vocabulary(model, zcode, dataset=rows, min_count=0)


def test_texts_without_a_language(zcode: ZCodeM3Tokenizer) -> None:
    model = tiny_model(vocab_size=size_of(zcode))
    result = trim_vocabulary(model, zcode, dataset=[*TEXTS["en"]], languages=["EN", "deu_Latn"])
    assert result.tokenizer.languages == ["en", "de"] and {*result.report.texts} == {"text"}
    with pytest.raises(ValueError, match="languages are required"):
        trim_vocabulary(model, zcode, dataset=["yes"])


def test_text_of_a_language_counts_beside_any_other(zcode: ZCodeM3Tokenizer) -> None:
    """The German of a row German-French is German."""
    model = tiny_model(vocab_size=size_of(zcode))
    rows = [
        {"source": "speichern", "target": "enregistrer", "src_lang": "de", "tgt_lang": "fr"},
        {"source": "save", "target": "x", "src_lang": "en", "tgt_lang": "tlh"},
    ]
    result = trim_vocabulary(model, zcode, dataset=rows, languages=["en", "de"])
    assert {name: text["num_texts"] for name, text in result.report.texts.items()} == {"en": 1, "de": 1}
    with pytest.raises(ValueError, match="unknown language 'tlh'"):
        trim_vocabulary(model, zcode, dataset=rows)


def test_tokens_that_generation_names(zcode: ZCodeM3Tokenizer, tmp_path: Path) -> None:
    model = tiny_model(vocab_size=size_of(zcode))
    kept = zcode_result(model, zcode).kept_tokens
    removed = [index for index in range(10, size_of(zcode)) if index not in kept][:2]
    there = [index for index in kept if index > removed[0]][:2]
    generation = model.generation_config
    generation.forced_bos_token_id = zcode.get_lang_id("de")
    generation.eos_token_id = [2, there[0]]
    generation.suppress_tokens = [removed[0], there[1]]
    generation.bad_words_ids = [[removed[0], there[0]], [there[0], there[1]]]
    generation.sequence_bias = [[[removed[1]], 1.0], [[there[1]], -2.0]]
    result = zcode_result(model, zcode, output_dir=tmp_path / "small")
    new_of_old = {old: new for new, old in enumerate(result.kept_tokens)}
    loaded = ZCodeM3ForConditionalGeneration.from_pretrained(tmp_path / "small").generation_config
    new = [new_of_old[index] for index in there]
    assert loaded.forced_bos_token_id == result.tokenizer.get_lang_id("de")
    assert loaded.eos_token_id == [2, new[0]] and loaded.suppress_tokens == [new[1]]
    assert loaded.bad_words_ids == [new] and loaded.sequence_bias == [[[new[1]], -2.0]]
    assert generation.suppress_tokens == [removed[0], there[1]]

    generation.bad_words_ids = [[removed[0]]]
    assert zcode_result(model, zcode).model.generation_config.bad_words_ids is None
    generation.forced_bos_token_id = zcode.get_lang_id("fr")
    with pytest.raises(ValueError, match=r"generation_config.forced_bos_token_id names fr, whose tag would be"):
        zcode_result(model, zcode)


def test_card_and_report(zcode: ZCodeM3Tokenizer, tmp_path: Path) -> None:
    saved(tmp_path / "full", tiny_model(vocab_size=size_of(zcode)), zcode)
    (tmp_path / "full" / "README.md").write_text("---\nlicense: mit\n---\n\n# Mine\n\nIt translates.\n")
    result = zcode_result(tmp_path / "full", zcode, output_dir=tmp_path / "small")
    card, report = ((tmp_path / "small" / name).read_text() for name in ("README.md", "report.md"))
    assert "## Trimmed vocabulary" in card and "It translates." in card and "license: mit" in card
    num_tokens = f"| tokens | {size_of(zcode)} | {len(result.kept_tokens)} |"
    assert num_tokens in card and num_tokens in report
    assert "| de | 16 |" in report and "| 0.00% -> 0.00% | 0 |" in report
    assert f"{len(result.kept_tokens)} of {size_of(zcode)} tokens kept" in str(result.report)
    assert result.report.num_bytes_after < result.report.num_bytes_before
    assert isinstance(result.report, TrimmingReport)


# --- tokenizers


def test_default_and_last_languages_are_no_wish(tmp_path: Path) -> None:
    """NLLB's default source is English."""
    nllb = nllb_tokenizer(tmp_path)
    nllb.tgt_lang = "eng_Latn"
    model = tiny_model(vocab_size=size_of(nllb))
    rows = [row for row in rows_for(nllb) if "eng_Latn" not in row.values()]
    result = trim_vocabulary(model, nllb, dataset=rows, output_dir=tmp_path / "small")
    for each in (result.tokenizer, NllbTokenizer.from_pretrained(tmp_path / "small")):
        assert (each.src_lang, each.tgt_lang) == ("deu_Latn", None)
        assert each("ja")["input_ids"][0] == each.convert_tokens_to_ids("deu_Latn") != each.unk_token_id
        assert "eng_Latn" not in each.get_vocab()
    wished = NllbTokenizer.from_pretrained(saved(tmp_path / "full", model, nllb), src_lang="eng_Latn")
    with pytest.raises(ValueError, match="src_lang of the tokenizer names eng_Latn"):
        trim_vocabulary(model, wished, dataset=rows)


def test_source_language_of_a_zcode_tokenizer_stays(zcode: ZCodeM3Tokenizer, tmp_path: Path) -> None:
    saved(tmp_path / "full", tiny_model(vocab_size=size_of(zcode)), zcode)
    german = ZCodeM3Tokenizer.from_pretrained(tmp_path / "full", src_lang="de")
    result = zcode_result(tmp_path / "full", german, output_dir=tmp_path / "small")
    again = AutoTokenizer.from_pretrained(tmp_path / "small")
    assert result.tokenizer.src_lang == again.src_lang == "de"
    assert again("ja")["input_ids"][0] == again.get_lang_id("de")


# --- what is refused


def test_wrong_input(zcode: ZCodeM3Tokenizer, tmp_path: Path) -> None:
    model = tiny_model(vocab_size=size_of(zcode))
    folder = saved(tmp_path / "full", model, zcode)
    rows = parallel_rows()

    def refused(match: str, *arguments: Any, **options: Any) -> None:
        with pytest.raises(ValueError, match=match):
            trim_vocabulary(*arguments, **{"dataset": rows, **options})

    refused("output_dir is required to trim the vocabulary of a folder", folder)
    refused("tokenizer is required", model)
    refused("no text in fr", model, zcode, dataset=rows[:1], languages=["en", "de", "fr"])
    refused("unknown languages 'xx'", model, zcode, languages=["en", "xx"])
    refused("languages .*must be a list", model, zcode, languages="en")
    refused("dataset has no text", model, zcode, dataset=[])
    refused("can be read only once", model, zcode, dataset=(row for row in rows))
    refused(r"dataset \('full.jsonl'\)", model, zcode, dataset="full.jsonl")
    refused("row 1 of the dataset must have", model, zcode, dataset=[rows[0], {"text": "yes"}])
    refused(r"has a token \d+, but vocab_size of .* is 96", tiny_model(vocab_size=96), zcode)
    refused("tokenizer \\(str\\) must be a tokenizer", model, "full")
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "notes.txt").write_text("mine")
    refused("is not empty", folder, output_dir=tmp_path / "small")
    assert {path.name for path in tmp_path.iterdir()} == {"full", "small"}


def test_models_that_are_refused(zcode: ZCodeM3Tokenizer, tmp_path: Path) -> None:
    """As by every compression: see test_model_source.py."""
    model = tiny_model(vocab_size=size_of(zcode))
    with pytest.raises(ValueError, match="is quantized already"):
        zcode_result(quantize_experts(model), zcode)
    saved(tmp_path / "full", model, zcode)
    quantize_experts(tmp_path / "full", output_dir=tmp_path / "int8")
    with pytest.raises(ValueError, match="is quantized already"):
        zcode_result(tmp_path / "int8", zcode, output_dir=tmp_path / "small")
    offloaded = copy.deepcopy(model)
    offloaded.model.encoder.to("meta")
    with pytest.raises(ValueError, match="is not completely in the memory"):
        zcode_result(offloaded, zcode)
    broken = copy.deepcopy(model)
    broken.model.shared.weight.data[7, 3] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        zcode_result(broken, zcode)


def test_trimmed_and_quantized(zcode: ZCodeM3Tokenizer, tmp_path: Path) -> None:
    saved(tmp_path / "full", tiny_model(vocab_size=size_of(zcode)), zcode)
    zcode_result(tmp_path / "full", zcode, output_dir=tmp_path / "small")
    quantize_experts(tmp_path / "small", output_dir=tmp_path / "int8")
    model = ZCodeM3ForConditionalGeneration.from_pretrained(tmp_path / "int8")
    smaller = AutoTokenizer.from_pretrained(tmp_path / "int8", src_lang="en")
    assert model.config.vocab_size == len(smaller) < size_of(zcode)
    assert model.generate(**smaller("yes", return_tensors="pt"), max_new_tokens=3).shape[1] <= 4


def test_m2m100_needs_a_folder(tmp_path: Path) -> None:
    m2m100 = m2m100_tokenizer(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match="output_dir is required to trim an M2M100Tokenizer"):
        trim_vocabulary(tiny_model(vocab_size=size_of(m2m100)), m2m100, dataset=parallel_rows())
