"""The translation pipeline: the same translations as `generate()`, its errors, and every way to build and save it."""

import copy
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    M2M100Config,
    M2M100ForConditionalGeneration,
    NllbTokenizer,
    PreTrainedTokenizerFast,
    pipeline,
)
from transformers.pipelines import PIPELINE_REGISTRY

from hf_moe_ted import (
    ZCodeM3Config,
    ZCodeM3ForConditionalGeneration,
    ZCodeM3Tokenizer,
    ZCodeM3TranslationPipeline,
    quantize_experts,
)

TASK = "zcode-m3-translation"
SENTENCES = ["Hello", "Good night, see you tomorrow!", "नमस्ते", "a"]
SIZES = {
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 40,
    "init_std": 0.5,  # with untied embeddings: a translation depends on its source
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    if TASK not in PIPELINE_REGISTRY.supported_tasks:
        PIPELINE_REGISTRY.register_pipeline(TASK, ZCodeM3TranslationPipeline, AutoModelForSeq2SeqLM, type="text")
    yield


@pytest.fixture(scope="module")
def model() -> ZCodeM3ForConditionalGeneration:
    torch.manual_seed(0)
    config = ZCodeM3Config(vocab_size=len(ZCodeM3Tokenizer(languages=["en", "de", "hi"])), num_experts=4, **SIZES)
    return ZCodeM3ForConditionalGeneration(config).eval()


@pytest.fixture
def translator(model: ZCodeM3ForConditionalGeneration) -> ZCodeM3TranslationPipeline:
    tokenizer = ZCodeM3Tokenizer(languages=["en", "de", "hi"])
    return ZCodeM3TranslationPipeline(
        model=model, tokenizer=tokenizer, device="cpu", src_lang="en", tgt_lang="de", max_new_tokens=6
    )


def translate(translator: ZCodeM3TranslationPipeline, text: str, src_lang: str, tgt_lang: str, **kwargs) -> list[str]:
    """What the pipeline does, by hand."""
    inputs = translator.tokenizer(text, src_lang=src_lang, return_tensors="pt")
    forced_bos_token_id = translator.tokenizer.get_lang_id(tgt_lang)
    output_ids = translator.model.generate(**inputs, forced_bos_token_id=forced_bos_token_id, **kwargs)
    assert (output_ids[:, 1] == forced_bos_token_id).all()
    return translator.tokenizer.batch_decode(output_ids, skip_special_tokens=True)


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_equals_generate(translator: ZCodeM3TranslationPipeline, batch_size: int, padding_side: str) -> None:
    translator.tokenizer.padding_side = padding_side
    expected = [translate(translator, sentence, "en", "de", max_new_tokens=6)[0] for sentence in SENTENCES]
    assert len(set(expected)) == len(expected)
    assert translator(SENTENCES, batch_size=batch_size) == [{"translation_text": text} for text in expected]
    assert translator(SENTENCES[0]) == [{"translation_text": expected[0]}]


def test_languages_and_generate_arguments_of_a_call(translator: ZCodeM3TranslationPipeline) -> None:
    expected = translate(translator, "Hello", "hi", "en", num_beams=3, max_new_tokens=4)
    assert translator("Hello", src_lang="hi", tgt_lang="en", num_beams=3, max_new_tokens=4) == [
        {"translation_text": expected[0]}
    ]
    default = translate(translator, "Hello", "en", "de", max_new_tokens=6)
    assert translator("Hello") == [{"translation_text": default[0]}] != [{"translation_text": expected[0]}]


def test_several_translations(translator: ZCodeM3TranslationPipeline) -> None:
    beams = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 4}
    expected = [
        [{"translation_text": text} for text in translate(translator, sentence, "en", "de", **beams)]
        for sentence in SENTENCES
    ]
    assert translator(SENTENCES[0], **beams) == expected[0]
    assert translator(SENTENCES, batch_size=3, **beams) == expected


def test_other_containers(translator: ZCodeM3TranslationPipeline) -> None:
    expected = translator(SENTENCES)
    assert translator(tuple(SENTENCES)) == expected
    assert list(translator(sentence for sentence in SENTENCES)) == [[translation] for translation in expected]
    assert translator([]) == []


def test_languages_of_the_tokenizer(model: ZCodeM3ForConditionalGeneration) -> None:
    tokenizer = ZCodeM3Tokenizer(languages=["en", "de", "hi"], src_lang="hi", tgt_lang="en")
    translator = ZCodeM3TranslationPipeline(model=model, tokenizer=tokenizer, max_new_tokens=4)
    expected = translate(translator, "Hello", "hi", "en", max_new_tokens=4)
    assert translator("Hello") == [{"translation_text": expected[0]}]
    assert translator.languages == ["en", "de", "hi"]


def test_blank_sentences(translator: ZCodeM3TranslationPipeline) -> None:
    translations = translator(["", "Hello", " \n"], batch_size=3)
    assert [translation["translation_text"] for translation in translations] == [
        "",
        translator("Hello")[0]["translation_text"],
        "",
    ]
    assert translator("") == [{"translation_text": ""}]


@pytest.mark.parametrize("model_max_length", [None, 20])
def test_long_sentences_are_translated_in_parts(
    translator: ZCodeM3TranslationPipeline, model_max_length: int | None
) -> None:
    kept = model_max_length or translator.model.config.max_position_embeddings
    if model_max_length is not None:
        translator.tokenizer.model_max_length = model_max_length
    clauses = ["a" * (kept - 4) + ",", "b" * (kept - 4) + ";", "c" * (kept - 3)]
    parts = [translator(clause)[0]["translation_text"] for clause in clauses]
    assert translator(" ".join(clauses)) == [{"translation_text": " ".join(parts)}]


TEXT = " One. Two!\r\n\r\n\tThree?  \n"


@pytest.mark.parametrize("options", [{}, {"batch_size": 2}, {"num_beams": 3, "num_return_sequences": 2}])
def test_texts(translator: ZCodeM3TranslationPipeline, options: dict[str, int]) -> None:
    each = [translator(sentence, **options) for sentence in ("One.", "Two!", "Three?")]
    ranked = [[item["translation_text"] for item in of_sentence] for of_sentence in each]
    whole = [{"translation_text": " {} {}\r\n\r\n\t{}  \n".format(*texts)} for texts in zip(*ranked, strict=True)]
    assert translator(TEXT, **options) == whole
    is_one = len(whole) == 1
    assert translator([TEXT, "One.", " ", TEXT], **options) == [
        whole[0] if is_one else whole,
        each[0][0] if is_one else each[0],
        {"translation_text": ""} if is_one else [{"translation_text": ""}] * 2,
        whole[0] if is_one else whole,
    ]


def test_text_as_one_sentence(translator: ZCodeM3TranslationPipeline) -> None:
    assert translator("One. Two.", split=False) == [
        {"translation_text": translate(translator, "One. Two.", "en", "de", max_new_tokens=6)[0]}
    ]
    assert translator("One. Two.", split=False) != translator("One. Two.")


def test_without_sentencex(translator: ZCodeM3TranslationPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [translator(line, split=False)[0]["translation_text"] for line in ("One. Two.", "Three.")]
    monkeypatch.setitem(sys.modules, "sentencex", None)
    monkeypatch.setattr("hf_moe_ted.models.pipeline_translation.is_installed", lambda: False)
    assert translator("One. Two.\nThree.") == [{"translation_text": "\n".join(lines)}]
    with pytest.raises(ValueError, match="pip install sentencex"):
        translator("One. Two.", split=True)


def test_default_length_fits_the_positions(model: ZCodeM3ForConditionalGeneration) -> None:
    tokenizer = ZCodeM3Tokenizer(languages=["en", "de", "hi"])
    # as many tokens as positions: by the length that the model has, or, if it has none, that of the pipeline
    for max_length, num_new in ((40, 39), (None, 40)):
        model.generation_config.max_length = max_length
        translator = ZCodeM3TranslationPipeline(model=model, tokenizer=tokenizer, min_new_tokens=num_new)
        expected = translate(translator, "Hello", "en", "de", max_new_tokens=num_new, min_new_tokens=num_new)
        assert translator("Hello", src_lang="en", tgt_lang="de") == [{"translation_text": expected[0]}]


@pytest.mark.parametrize("sentence", [5, None, {"text": "a"}, ["a", None], [["a"]]])
def test_sentences_must_be_strings(translator: ZCodeM3TranslationPipeline, sentence) -> None:
    with pytest.raises(ValueError, match="must be a string, got"):
        translator(sentence)


def test_unknown_language(translator: ZCodeM3TranslationPipeline) -> None:
    with pytest.raises(ValueError, match="unknown tgt_lang 'xx', the tokenizer knows: en, de, hi"):
        translator("Hello", tgt_lang="xx")
    with pytest.raises(ValueError, match="unknown src_lang 'xx', the tokenizer knows: en, de, hi"):
        ZCodeM3TranslationPipeline(model=translator.model, tokenizer=translator.tokenizer, src_lang="xx")


def test_missing_language(translator: ZCodeM3TranslationPipeline) -> None:
    untold = ZCodeM3TranslationPipeline(model=translator.model, tokenizer=translator.tokenizer)
    with pytest.raises(ValueError, match="missing tgt_lang: pass `tgt_lang=`, one of: en, de, hi"):
        untold("Hello", src_lang="en")
    with pytest.raises(ValueError, match="missing src_lang: pass `src_lang=`, one of: en, de, hi"):
        untold("Hello", tgt_lang="de")


def test_tokenizer_without_languages(translator: ZCodeM3TranslationPipeline) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=translator.tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match="has no languages: use a ZCodeM3Tokenizer"):
        ZCodeM3TranslationPipeline(model=translator.model, tokenizer=tokenizer)("Hello")


def test_misspelled_argument(translator: ZCodeM3TranslationPipeline) -> None:
    with pytest.raises(ValueError, match="num_beam"):
        translator("Hello", num_beam=2)


def test_nllb_tokenizer() -> None:
    untrained = NllbTokenizer(extra_special_tokens=["eng_Latn", "deu_Latn"])
    tokenizer = untrained.train_new_from_iterator(["Hello world"], 60, show_progress=False)
    torch.manual_seed(0)
    config = M2M100Config(vocab_size=len(tokenizer), pad_token_id=1, eos_token_id=2, decoder_start_token_id=2, **SIZES)
    model = M2M100ForConditionalGeneration(config).eval()
    translator = ZCodeM3TranslationPipeline(model=model, tokenizer=tokenizer, src_lang="eng_Latn", max_new_tokens=4)
    inputs = tokenizer(["Hello"], return_tensors="pt")
    german = tokenizer.convert_tokens_to_ids("deu_Latn")
    expected = tokenizer.batch_decode(
        model.generate(**inputs, forced_bos_token_id=german, max_new_tokens=4), skip_special_tokens=True
    )
    assert translator(["Hello", "world"], tgt_lang="deu_Latn", batch_size=2)[0] == {"translation_text": expected[0]}
    assert translator("Hello", tgt_lang="de") == [{"translation_text": expected[0]}]
    with pytest.raises(ValueError, match="unknown tgt_lang 'fr', the tokenizer knows: eng_Latn, deu_Latn"):
        translator("Hello", tgt_lang="fr")
    assert (tokenizer.src_lang, tokenizer.tgt_lang) == ("eng_Latn", None)


def test_nllb_tokenizer_with_other_special_tokens(nllb_tokenizer: NllbTokenizer) -> None:
    nllb_tokenizer.add_special_tokens({"additional_special_tokens": ["<term>"]})
    torch.manual_seed(0)
    model = ZCodeM3ForConditionalGeneration(ZCodeM3Config(vocab_size=len(nllb_tokenizer), num_experts=2, **SIZES))
    translator = ZCodeM3TranslationPipeline(model=model.eval(), tokenizer=nllb_tokenizer, device="cpu")
    assert len(translator.languages) == 202 and "<term>" not in translator.languages
    [inputs] = translator.preprocess("open", src_lang="fra_Latn", tgt_lang="zh-TW")
    ids = nllb_tokenizer.convert_tokens_to_ids(["fra_Latn", "zho_Hant"])
    assert [inputs["input_ids"][0, 0].item(), inputs["forced_bos_token_id"]] == ids
    assert nllb_tokenizer.src_lang == "eng_Latn"
    for code, message in (
        ("deu_Lat", "did you mean deu_Latn"),
        ("<term>", "unknown"),
        ("zh", "ambiguous tgt_lang 'zh'"),
    ):
        with pytest.raises(ValueError, match=message):
            translator("open", src_lang="en", tgt_lang=code)


def test_threads_that_share_a_tokenizer_of_transformers(
    model: ZCodeM3ForConditionalGeneration, nllb_tokenizer: NllbTokenizer
) -> None:
    translators = [
        ZCodeM3TranslationPipeline(model=model, tokenizer=nllb_tokenizer, src_lang=code, tgt_lang="deu_Latn")
        for code in ("eng_Latn", "fra_Latn", "spa_Latn")
    ]

    def sources(translator: ZCodeM3TranslationPipeline) -> set[int]:
        return {
            inputs["input_ids"][0, 0].item()
            for _ in range(99)
            for inputs in translator.preprocess("open", **translator._preprocess_params)
        }

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(3) as threads:
            found = list(threads.map(sources, translators))
    finally:
        sys.setswitchinterval(interval)
    assert found == [{nllb_tokenizer.convert_tokens_to_ids(code)} for code in ("eng_Latn", "fra_Latn", "spa_Latn")]


def test_typed_codes(translator: ZCodeM3TranslationPipeline) -> None:
    expected = translator("Hello", src_lang="hi", tgt_lang="de")
    assert translator("Hello", src_lang="hin_Deva", tgt_lang="DE") == expected
    assert translator("Hello", src_lang="hi-IN", tgt_lang="ger") == expected


def test_sequences_of_the_generation_config(translator: ZCodeM3TranslationPipeline) -> None:
    beams = {"num_beams": 3, "num_return_sequences": 2}
    expected = translator(SENTENCES, batch_size=3, **beams)
    model = copy.deepcopy(translator.model)
    model.generation_config.update(**beams, return_dict_in_generate=True)
    other = ZCodeM3TranslationPipeline(
        model=model, tokenizer=translator.tokenizer, device="cpu", src_lang="en", tgt_lang="de", max_new_tokens=6
    )
    assert other(SENTENCES, batch_size=3) == expected and len(expected[0]) == 2


def test_save_and_load(translator: ZCodeM3TranslationPipeline, tmp_path: Path) -> None:
    expected = translator("Hello")
    translator.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["custom_pipelines"] == {
        "translation": {
            "impl": "pipeline_translation.ZCodeM3TranslationPipeline",
            "pt": ["AutoModelForSeq2SeqLM"],
            "type": "text",
        }
    }
    options = {"src_lang": "en", "tgt_lang": "de", "max_new_tokens": 6}
    by_task = pipeline(TASK, model=str(tmp_path), **options)
    by_class = pipeline("translation", model=str(tmp_path), pipeline_class=ZCodeM3TranslationPipeline, **options)
    for loaded in (by_task, by_class):
        assert type(loaded) is ZCodeM3TranslationPipeline
        assert type(loaded.model) is ZCodeM3ForConditionalGeneration
        assert type(loaded.tokenizer) is ZCodeM3Tokenizer
        assert loaded("Hello") == expected


def test_load_a_folder_of_model_and_tokenizer(translator: ZCodeM3TranslationPipeline, tmp_path: Path) -> None:
    expected = translator("Hello")
    model_type = type(translator.model)
    model_type.from_pretrained(_saved(translator, tmp_path / "pipeline")).save_pretrained(tmp_path / "model")
    translator.tokenizer.save_pretrained(tmp_path / "model")
    loaded = pipeline(TASK, model=str(tmp_path / "model"), src_lang="en", tgt_lang="de", max_new_tokens=6)
    assert loaded("Hello") == expected


def _saved(translator: ZCodeM3TranslationPipeline, folder: Path) -> Path:
    translator.save_pretrained(folder)
    return folder


CODE_OF_AUTO_CLASSES = {
    "AutoConfig": "configuration_zcode_m3.ZCodeM3Config",
    "AutoModelForSeq2SeqLM": "modeling_zcode_m3.ZCodeM3ForConditionalGeneration",
}


def test_saved_code_stays_with_what_is_loaded(translator: ZCodeM3TranslationPipeline, tmp_path: Path) -> None:
    """A model that was saved with its code is saved with it again, by itself and without a registration."""
    folder, again = _saved(translator, tmp_path / "first"), tmp_path / "again"
    code = {path.name for path in folder.glob("*.py")}
    assert {"modeling_zcode_m3.py", "tokenization_zcode_m3.py", "language_codes.py", "pipeline_translation.py"} <= code
    AutoModelForSeq2SeqLM.from_pretrained(folder).save_pretrained(again)
    AutoTokenizer.from_pretrained(folder).save_pretrained(again)
    assert {path.name for path in again.glob("*.py")} == code
    assert json.loads((again / "config.json").read_text())["auto_map"] == CODE_OF_AUTO_CLASSES
    tokenizer_config = json.loads((again / "tokenizer_config.json").read_text())
    assert tokenizer_config["auto_map"] == {"AutoTokenizer": ["tokenization_zcode_m3.ZCodeM3Tokenizer", None]}


def test_languages_of_the_pipeline_are_saved(translator: ZCodeM3TranslationPipeline, tmp_path: Path) -> None:
    before = translator.tokenizer.src_lang, translator.tokenizer.tgt_lang
    translator.save_pretrained(tmp_path)
    assert (translator.tokenizer.src_lang, translator.tokenizer.tgt_lang) == before == (None, None)
    loaded = pipeline(TASK, model=str(tmp_path), max_new_tokens=6)
    assert loaded("Hello") == translator("Hello")


def test_quantized_model_says_that_it_needs_the_package(
    translator: ZCodeM3TranslationPipeline, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    quantized = quantize_experts(translator.model, bits=8, group_size=None)
    with caplog.at_level(logging.WARNING):
        ZCodeM3TranslationPipeline(model=quantized, tokenizer=translator.tokenizer).save_pretrained(tmp_path)
    assert any("this model is quantized" in record.message for record in caplog.records)


def test_remote_code_without_the_package(translator: ZCodeM3TranslationPipeline, tmp_path: Path) -> None:
    translator.save_pretrained(tmp_path / "model")
    script = """
import json, sys
sys.modules["hf_moe_ted"] = None
from transformers import pipeline
translator = pipeline("translation", model="model", trust_remote_code=True)
translator.save_pretrained("again")
options = {"src_lang": "en", "tgt_lang": "de", "max_new_tokens": 6}
again = pipeline(model="again", trust_remote_code=True, **options)
print(json.dumps([type(again).__name__, translator("Hello", **options), again("Hello")]))
"""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    run = subprocess.run(
        [sys.executable, "-c", script], env=env, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    expected = translator("Hello")
    assert json.loads(run.stdout) == ["ZCodeM3TranslationPipeline", expected, expected]
