"""Codes of languages in the forms that people type, against languages in the forms that tokenizers have."""

from typing import Any

import pytest
from transformers.models.nllb.tokenization_nllb import FAIRSEQ_LANGUAGE_CODES

from hf_moe_ted import (
    DataCollatorForMultitaskSeq2Seq,
    TextTranslator,
    ZCodeM3ForConditionalGeneration,
    ZCodeM3Tokenizer,
    ZCodeM3TranslationPipeline,
    collect_expert_statistics,
    evaluate_translation,
    prune_experts,
    score_translations,
)
from hf_moe_ted.evaluation.corpus_metrics import off_target
from hf_moe_ted.models.language_codes import (
    LanguageCode,
    find_language,
    is_right_to_left,
    language_ids,
    parse_language,
    parse_languages,
    resolve_language,
    sacrebleu_tokenizer,
)
from hf_moe_ted.testing import tiny_config

SHORT = ["en", "de", "pt", "zh", "he", "no", "tl", "ar", "sr", "xx"]


@pytest.mark.parametrize(
    ("languages", "typed"),
    [
        (
            SHORT,
            {
                **dict.fromkeys(["zh", "ZH", "zh-CN", "zh_CN", "zh-Hant", "zho_Hans", "zho", "cmn", " zh "], "zh"),
                **dict.fromkeys(["pt-BR", "PT", "por", "por_Latn"], "pt"),
                **{"eng_Latn": "en", "en_XX": "en", "iw": "he", "heb": "he", "nb": "no", "nob_Latn": "no"},
                **{"fil": "tl", "tgl": "tl", "arb_Arab": "ar", "XX": "xx", "xx": "xx", "sr-Cyrl": "sr"},
            },
        ),
        (
            FAIRSEQ_LANGUAGE_CODES,
            {
                **{"zh-CN": "zho_Hans", "zh_TW": "zho_Hant", "zh-hant": "zho_Hant", "zh-yue": "yue_Hant"},
                **{"en": "eng_Latn", "no": "nob_Latn", "nb": "nob_Latn", "nn": "nno_Latn", "he": "heb_Hebr"},
                **{"iw": "heb_Hebr", "tl": "tgl_Latn", "fil": "tgl_Latn", "fa": "pes_Arab", "prs": "prs_Arab"},
                **{"ar": "arb_Arab", "arz": "arz_Arab", "ku": "kmr_Latn", "ckb": "ckb_Arab", "sw": "swh_Latn"},
            },
        ),
        (["zh", "zh_Hant", "pt", "pt_BR"], {"zh-CN": "zh", "zh-TW": "zh_Hant", "pt-PT": "pt", "pt-br": "pt_BR"}),
        (["de_DE", "en_XX", "zh_CN"], {"de": "de_DE", "en": "en_XX", "en-GB": "en_XX", "cmn_Hans": "zh_CN"}),
    ],
)
def test_typed_forms_resolve_to_the_language_of_the_tokenizer(languages: list[str], typed: dict[str, str]) -> None:
    assert {code: resolve_language(code, languages) for code in typed} == typed


def test_every_language_of_nllb_is_known() -> None:
    for language in FAIRSEQ_LANGUAGE_CODES:
        assert resolve_language(language.lower().replace("_", "-"), FAIRSEQ_LANGUAGE_CODES) == language
        parse_language(language)


@pytest.mark.parametrize(
    ("code", "languages", "message"),
    [
        ("zh", FAIRSEQ_LANGUAGE_CODES, "ambiguous src_lang 'zh': it may be zho_Hans, zho_Hant"),
        ("sr", ["sr_Latn", "sr_Cyrl"], "ambiguous src_lang 'sr': it may be sr_Latn, sr_Cyrl"),
        ("EN", ["En", "eN"], "ambiguous"),
        ("zh-Hant", ["zh_Hans"], "unknown src_lang 'zh-Hant', the tokenizer knows: zh_Hans; did you mean zh_Hans?"),
        ("pt-BR", ["pt_PT", "en"], "did you mean pt_PT"),
        ("deu_Lat", FAIRSEQ_LANGUAGE_CODES, "; did you mean deu_Latn"),
        ("german", ["en", "de"], "did you mean de"),
        ("jp", ["en", "ja"], "did you mean ja"),
        ("fr", ["en", "de"], "unknown src_lang 'fr', the tokenizer knows: en, de"),
        ("", ["en", "de"], "unknown src_lang '', the tokenizer knows: en, de"),
        (None, ["en", "de"], "unknown src_lang None"),
        ("fr", [], "knows: none"),
    ],
)
def test_what_is_unknown_or_ambiguous_is_an_error(code: str, languages: list[str], message: str) -> None:
    with pytest.raises(ValueError) as error:
        resolve_language(code, languages, name="src_lang")
    assert message in str(error.value)


def test_find_language_is_none_only_for_what_is_unknown() -> None:
    assert (find_language("DE", SHORT), find_language("fr", SHORT)) == ("de", None)
    with pytest.raises(ValueError, match="ambiguous"):
        find_language("zh", FAIRSEQ_LANGUAGE_CODES)


def test_parts_of_a_code() -> None:
    assert parse_language("zh-cn") == LanguageCode("zh", "Hans", "CN")
    assert parse_language("SRP_latn-RS") == LanguageCode("sr", "Latn", "RS")
    assert parse_language("ca-valencia") == LanguageCode("ca", variant="valencia")
    for code in ("Klingon", "en de", "zz", "deu_", "", None):
        with pytest.raises(ValueError, match="unknown language"):
            parse_language(code)  # type: ignore[arg-type]


def test_list_that_was_typed() -> None:
    assert parse_languages("en, de ,zh-CN,en") == ["en", "de", "zh-CN"]
    for text in ("", "en,,de", "en,"):
        with pytest.raises(ValueError, match="commas"):
            parse_languages(text)


@pytest.mark.parametrize(
    ("tokenizer", "codes"),
    [
        ("zh", ["zh", "ZH", "zh-CN", "zh_TW", "zho_Hans", "cmn", "yue_Hant", "zh-yue", "wuu", "chi"]),
        ("char", ["ja", "ja-JP", "JA", "jpn_Jpan", "th-TH", "tha", "my", "km-KH", "lo", "bo", "dzo_Tibt", "shn_Mymr"]),
        ("13a", ["en", "de-AT", "PT", "kor_Hang", "zh-Latn", "vi"]),
    ],
)
def test_tokenizer_of_bleu(tokenizer: str, codes: list[str]) -> None:
    assert {code: sacrebleu_tokenizer(code) for code in codes} == dict.fromkeys(codes, tokenizer)


def test_languages_of_a_tokenizer_beside_other_special_tokens(nllb_tokenizer) -> None:
    before = language_ids(nllb_tokenizer)
    nllb_tokenizer.add_special_tokens({"additional_special_tokens": ["<term>", "<en_XXL>"]})
    assert language_ids(nllb_tokenizer) == before and list(before) == FAIRSEQ_LANGUAGE_CODES
    assert before["deu_Latn"] == nllb_tokenizer.convert_tokens_to_ids("deu_Latn")
    with pytest.raises(ValueError, match="str has no languages"):
        language_ids("en")


# Everywhere a language is named, a code that means none is an error that lists near ones.

ROW = {"source": "save", "target": "speichern", "src_lang": "en", "tgt_lang": "germn"}


def _statistics_of(languages: list[str], model: Any, tokenizer: Any) -> Any:
    statistics = collect_expert_statistics(model, tokenizer, [{**ROW, "tgt_lang": "de"}])
    return prune_experts(model, statistics, keep=0.5, languages=languages)


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda m, t: t("save", src_lang="germn"), "did you mean de"),
        (lambda m, t: _pipeline(m, t)("save", src_lang="en", tgt_lang="germn"), "did you mean de"),
        (lambda m, t: _pipeline(m, t)(["save"], src_lang=["germn"], tgt_lang="en"), "did you mean de"),
        (lambda m, t: _pipeline(m, t, task="translation_germn_to_en"), "did you mean de"),
        (lambda m, t: TextTranslator(m, t).translate(["save"], "en", "germn"), "did you mean de"),
        (lambda m, t: TextTranslator(m, t).translate(["save"], "germn", "en"), "did you mean de"),
        (lambda m, t: evaluate_translation(m, t, [ROW]), r"does not know the languages germn \(de\?\)"),
        (lambda m, t: evaluate_translation(m, t, [ROW], languages=["germn"]), "did you mean de"),
        (lambda m, t: collect_expert_statistics(m, t, [ROW]), "did you mean de"),
        (lambda m, t: collect_expert_statistics(m, t, [ROW], languages=["en", "germn"]), "did you mean de"),
        (lambda m, t: _statistics_of(["en", "germn"], m, t), r"no sentences in germn \(de\?\)"),
        (lambda m, t: DataCollatorForMultitaskSeq2Seq(t)([ROW]), "did you mean de"),
        (lambda m, t: score_translations(["a"], ["b"], ["c"], tgt_lang="germn"), "did you mean"),
        (lambda m, t: off_target(["a"], ["b"], language="germn"), "did you mean"),
    ],
)
def test_unknown_languages_are_errors_that_list_near_ones(use: Any, message: str) -> None:
    tokenizer = ZCodeM3Tokenizer(languages=["en", "de", "fr"])
    model = ZCodeM3ForConditionalGeneration(tiny_config(vocab_size=len(tokenizer))).eval()
    with pytest.raises(ValueError, match=message):
        use(model, tokenizer)


def _pipeline(model: Any, tokenizer: Any, **options: Any) -> ZCodeM3TranslationPipeline:
    return ZCodeM3TranslationPipeline(model=model, tokenizer=tokenizer, device="cpu", **options)


def test_right_to_left() -> None:
    assert [code for code in SHORT if is_right_to_left(code)] == ["he", "ar"]
    of_nllb = {code for code in FAIRSEQ_LANGUAGE_CODES if is_right_to_left(code)}
    assert of_nllb == {code for code in FAIRSEQ_LANGUAGE_CODES if code[-4:] in ("Arab", "Hebr")}
    # without a script, a language is written as NLLB has it, where it has it in one script only
    only_one = [code for code in FAIRSEQ_LANGUAGE_CODES if sum(c[:3] == code[:3] for c in FAIRSEQ_LANGUAGE_CODES) == 1]
    assert [code for code in only_one if is_right_to_left(code[:3]) != is_right_to_left(code)] == []
    assert is_right_to_left("fa-IR") and is_right_to_left("uz-Arab") and not is_right_to_left("ur-Latn")
