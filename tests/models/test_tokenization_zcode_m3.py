"""The tokenizer: what it encodes, its languages, training, and every way to save and load it."""

import copy
import os
import pickle
import subprocess
import sys
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, DataCollatorForSeq2Seq

from hf_moe_ted import ZCodeM3Config, ZCodeM3ForConditionalGeneration, ZCodeM3Tokenizer
from hf_moe_ted.models import tokenization_zcode_m3

LANGUAGES = ["en", "de", "hi", "zh-Hant"]
SENTENCES = [
    "Hello world, how are you? It's 2024!",
    "Die Größe des Hauses überrascht niemanden.",
    "नमस्ते दुनिया, आप कैसे हैं?",
    "สวัสดีชาวโลก วันนี้อากาศดี",
    "今天天氣很好。我們去公園吧。",
    "می‌خواهم به خانه بروم.",
    "Xin chào thế giới",
]
HARD_TEXTS = [
    *SENTENCES,
    "",
    " ",
    "  two  spaces \n\n\ttabs\r\n end ",
    "cafe\u0301 A\u030a \u1100\u1161",  # changed by NFC
    "👩‍💻🏳️‍🌈 𝔘𐍈 \x00\x7f \ufeff \u200b\u2028 \U0010ffff",
    "ශ්‍රී ٣٤ ½ x²",
    "a <mask> b <s> __en__",
]


@pytest.fixture(scope="module")
def trained() -> ZCodeM3Tokenizer:
    return ZCodeM3Tokenizer(languages=LANGUAGES).train_new_from_iterator(SENTENCES * 3, 400, show_progress=False)


@pytest.fixture
def tokenizer(trained: ZCodeM3Tokenizer) -> ZCodeM3Tokenizer:
    tokenizer = pickle.loads(pickle.dumps(trained))
    tokenizer.src_lang, tokenizer.tgt_lang = "en", "de"
    return tokenizer


def assert_same(tokenizer: ZCodeM3Tokenizer, expected: ZCodeM3Tokenizer) -> None:
    assert type(tokenizer) is ZCodeM3Tokenizer
    assert tokenizer.get_vocab() == expected.get_vocab()
    assert tokenizer.lang_code_to_id == expected.lang_code_to_id
    assert tokenizer.extra_special_tokens == expected.extra_special_tokens
    assert (tokenizer.src_lang, tokenizer.tgt_lang) == (expected.src_lang, expected.tgt_lang)
    target = SENTENCES if expected.tgt_lang else None
    assert dict(tokenizer(SENTENCES, text_target=target)) == dict(expected(SENTENCES, text_target=target))


def test_special_ids() -> None:
    tokenizer = ZCodeM3Tokenizer(languages=LANGUAGES)
    special_tokens = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "__en__", "__de__", "__hi__", "__zh-Hant__"]
    assert tokenizer.convert_ids_to_tokens(list(range(9))) == special_tokens
    assert tokenizer.convert_tokens_to_ids(special_tokens) == list(range(9))
    assert sorted(tokenizer.all_special_ids) == list(range(9))
    assert len(tokenizer) == 9 + 256
    assert tokenizer.lang_code_to_id == {"en": 5, "de": 6, "hi": 7, "zh-Hant": 8}


def test_source_and_target_form(tokenizer: ZCodeM3Tokenizer) -> None:
    batch = tokenizer("a", text_target="b")
    assert tokenizer.convert_ids_to_tokens(batch["input_ids"]) == ["__en__", "a", "</s>"]
    assert tokenizer.convert_ids_to_tokens(batch["labels"]) == ["__de__", "b", "</s>"]
    assert tokenizer.convert_ids_to_tokens(tokenizer(text_target="b")["input_ids"]) == ["__de__", "b", "</s>"]
    assert tokenizer.tokenize("a", add_special_tokens=True) == ["__en__", "a", "</s>"]
    assert tokenizer.convert_ids_to_tokens(tokenizer("a", "b")["input_ids"]) == ["__en__", "a", "b", "</s>"]
    tokenizer.src_lang = "hi"
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("a")) == ["__hi__", "a", "</s>"]
    tokenizer.src_lang = None
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("a")) == ["a", "</s>"]


def test_languages_of_one_call(tokenizer: ZCodeM3Tokenizer) -> None:
    batch = tokenizer(["a"], text_target=["b"], src_lang="de", tgt_lang="hi")
    assert [batch["input_ids"][0][0], batch["labels"][0][0]] == tokenizer.convert_tokens_to_ids(["__de__", "__hi__"])
    assert (tokenizer.src_lang, tokenizer.tgt_lang) == ("en", "de")
    with pytest.raises(ValueError):
        tokenizer("a", text_target=5, tgt_lang="hi")
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("a")) == ["__en__", "a", "</s>"]


ENCODERS = {
    "call": lambda tokenizer, **kwargs: tokenizer("a", **kwargs)["input_ids"],
    "batch": lambda tokenizer, **kwargs: tokenizer(["a"], **kwargs)["input_ids"][0],
    "encode": lambda tokenizer, **kwargs: tokenizer.encode("a", **kwargs),
    "encode padded": lambda tokenizer, **kwargs: tokenizer.encode(
        "a", padding="max_length", truncation=True, max_length=3, **kwargs
    ),
    "tokenize": lambda tokenizer, **kwargs: tokenizer.convert_tokens_to_ids(
        tokenizer.tokenize("a", add_special_tokens=True, **kwargs)
    ),
}


@pytest.mark.parametrize("encode", ENCODERS.values(), ids=ENCODERS)
def test_every_method_that_encodes_takes_languages(tokenizer: ZCodeM3Tokenizer, encode) -> None:
    expected = {lang: [tokenizer.get_lang_id(lang), *tokenizer("a").input_ids[1:]] for lang in LANGUAGES}
    assert {lang: encode(tokenizer, src_lang=lang) for lang in LANGUAGES} == expected
    assert encode(tokenizer, src_lang="ZH", tgt_lang="deu_Latn") == expected["zh-Hant"]
    assert encode(tokenizer) == expected["en"] and tokenizer.src_lang == "en"
    for wrong in ({"src_lang": "xx"}, {"tgt_lang": "xx"}, {"lang": "de"}, {"source_lang": "de"}):
        with pytest.raises(ValueError, match=r"xx|not an argument here"):
            encode(tokenizer, **wrong)
    assert encode(tokenizer) == expected["en"]


def test_target_text_is_an_argument_of_calls_only(tokenizer: ZCodeM3Tokenizer) -> None:
    with pytest.raises(ValueError, match="text_target: not an argument here"):
        tokenizer.encode("a", text_target="b")


def test_threads_get_what_they_ask_for(tokenizer: ZCodeM3Tokenizer) -> None:
    """Each its language, and its truncation, for the backend holds one of both at a time."""
    interval = sys.getswitchinterval()

    def wrong_answers(lang: str) -> list[str]:
        max_length, other = LANGUAGES.index(lang) + 3, LANGUAGES[LANGUAGES.index(lang) - 1]
        source, target = tokenizer.get_lang_token(lang), tokenizer.get_lang_token(other)
        wrong = []
        for _ in range(200):
            kwargs = {"src_lang": lang, "truncation": True, "max_length": max_length}
            called = tokenizer("abcdefgh", text_target="abcdefgh", tgt_lang=other, **kwargs)
            encoded = tokenizer.encode("abcdefgh", **kwargs)
            for ids, tag in ((called["input_ids"], source), (called["labels"], target), (encoded, source)):
                tokens = tokenizer.convert_ids_to_tokens(ids)
                if (tokens[0], len(tokens)) != (tag, max_length):
                    wrong.append(f"{tag} {max_length}: {tokens}")
            if tokenizer.src_lang != "en" or tokenizer.num_special_tokens_to_add() != 2:
                wrong.append(f"attributes in {lang}")
        return wrong

    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(len(LANGUAGES)) as threads:
            assert [wrong for found in threads.map(wrong_answers, LANGUAGES) for wrong in found] == []
    finally:
        sys.setswitchinterval(interval)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_process_forked_while_a_thread_encodes(tokenizer: ZCodeM3Tokenizer) -> None:
    """As a worker of a DataLoader is: the turn of the thread is not there."""
    with tokenizer._encoding("de", None):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                # another thread than the one that held the lock
                ids = ThreadPoolExecutor(1).submit(tokenizer.encode, "a").result(timeout=20)
                status = int(ids[0] != tokenizer.get_lang_id("en"))
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda tokenizer: pickle.loads(pickle.dumps(tokenizer))])
def test_copies_have_languages_of_their_own(tokenizer: ZCodeM3Tokenizer, copied) -> None:
    other = copied(tokenizer)
    assert_same(other, tokenizer)
    other.src_lang = "hi"
    assert other.encode("a")[0] == other.get_lang_id("hi") and tokenizer.encode("a")[0] == tokenizer.get_lang_id("en")
    assert other.add_languages(["uk"]) == 1 and "uk" not in tokenizer.languages


@pytest.mark.parametrize(
    "add",
    [
        lambda tokenizer: tokenizer.add_special_tokens({"additional_special_tokens": ["<term>"]}),
        lambda tokenizer: tokenizer.add_special_tokens({"extra_special_tokens": ["<term>"]}),
        lambda tokenizer: tokenizer.add_special_tokens(
            {"extra_special_tokens": ["<term>"]}, replace_extra_special_tokens=False
        ),
        lambda tokenizer: [setattr(tokenizer, "extra_special_tokens", ["<term>"]), tokenizer.add_tokens(["<term>"])],
    ],
)
def test_other_special_tokens_leave_the_languages(tokenizer: ZCodeM3Tokenizer, tmp_path: Path, add) -> None:
    before, ids = tokenizer.lang_code_to_id, tokenizer.all_special_ids
    add(tokenizer)
    term = tokenizer.convert_tokens_to_ids("<term>")
    assert tokenizer.lang_code_to_id == before
    assert tokenizer.all_special_ids == [*ids, term]
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("a")) == ["__en__", "a", "</s>"]
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("a"), skip_special_tokens=True) == ["a"]
    tokenizer.save_pretrained(tmp_path)
    assert_same(ZCodeM3Tokenizer.from_pretrained(tmp_path), tokenizer)
    assert ZCodeM3Tokenizer.from_pretrained(tmp_path, extra_special_tokens=["<2>"]).lang_code_to_id == before


def test_named_special_tokens_are_no_languages() -> None:
    tokenizer = ZCodeM3Tokenizer(languages=["en"], mask_token="__mask__")
    assert tokenizer.add_special_tokens({"cls_token": "__cls__"}) == 1
    assert tokenizer.languages == ["en"]


def test_padding_and_collator(tokenizer: ZCodeM3Tokenizer) -> None:
    batch = tokenizer(["a", "Hello world"], padding=True, return_tensors="pt", padding_side="left")
    assert batch["input_ids"][0, 0] == tokenizer.pad_token_id == 1
    assert batch["input_ids"][0].tolist()[-3:] == tokenizer.encode("a")
    assert batch["attention_mask"][0].sum() == 3
    examples = [tokenizer(text, text_target=text + text) for text in ("a", "Hello world")]
    collated = DataCollatorForSeq2Seq(tokenizer)(examples)
    assert collated["input_ids"].shape == collated["attention_mask"].shape
    assert collated["labels"][0].tolist()[:4] == [*examples[0]["labels"]]
    assert (collated["labels"][0, 4:] == -100).all()


def test_truncation_keeps_tag_and_eos(tokenizer: ZCodeM3Tokenizer) -> None:
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(SENTENCES[0], truncation=True, max_length=5)["input_ids"])
    assert len(tokens) == 5 and tokens[0] == "__en__" and tokens[-1] == "</s>"


def test_decode_drops_tags(tokenizer: ZCodeM3Tokenizer) -> None:
    ids = tokenizer(SENTENCES, text_target=SENTENCES, padding=True)
    assert tokenizer.batch_decode(ids["input_ids"], skip_special_tokens=True) == SENTENCES
    assert tokenizer.batch_decode(ids["labels"], skip_special_tokens=True) == SENTENCES


def test_translation_inputs(tokenizer: ZCodeM3Tokenizer) -> None:
    inputs = tokenizer._build_translation_inputs("a", return_tensors="pt", src_lang="hi", tgt_lang="en")
    assert inputs["input_ids"][0, 0] == tokenizer.get_lang_id("hi")
    assert inputs["forced_bos_token_id"] == tokenizer.get_lang_id("en")
    assert tokenizer.src_lang == "en"
    with pytest.raises(ValueError, match=r"needs `src_lang` and `tgt_lang`, got 'hi' and None"):
        tokenizer._build_translation_inputs("a", return_tensors="pt", src_lang="hi", tgt_lang=None)


@pytest.mark.parametrize(
    "use",
    [
        lambda tokenizer: ZCodeM3Tokenizer(languages=LANGUAGES, src_lang="xx"),
        lambda tokenizer: ZCodeM3Tokenizer(languages=LANGUAGES, tgt_lang="xx"),
        lambda tokenizer: setattr(tokenizer, "src_lang", "xx"),
        lambda tokenizer: setattr(tokenizer, "tgt_lang", "xx"),
        lambda tokenizer: tokenizer("a", src_lang="xx"),
        lambda tokenizer: tokenizer.encode("a", src_lang="xx"),
        lambda tokenizer: tokenizer(text_target="a", tgt_lang="xx"),
        lambda tokenizer: tokenizer.get_lang_id("xx"),
        lambda tokenizer: tokenizer.get_lang_token("xx"),
        lambda tokenizer: tokenizer._build_translation_inputs("a", return_tensors="pt", src_lang="en", tgt_lang="xx"),
    ],
)
def test_unknown_language(tokenizer: ZCodeM3Tokenizer, use) -> None:
    with pytest.raises(ValueError, match="unknown language 'xx', this tokenizer knows: en, de, hi, zh-Hant"):
        use(tokenizer)
    assert (tokenizer.src_lang, tokenizer.tgt_lang) == ("en", "de")


def test_a_source_without_a_tag_is_not_silent(trained: ZCodeM3Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    messages: list[str] = []
    monkeypatch.setattr(tokenization_zcode_m3.logger, "warning_once", messages.append)
    assert trained.src_lang is None
    for quiet in (
        lambda: trained("a", src_lang="en"),
        lambda: trained.encode("a", src_lang="en"),
        lambda: trained(text_target="a", tgt_lang="de"),
        lambda: trained("a", add_special_tokens=False),
        lambda: trained.tokenize("a"),
        lambda: ZCodeM3Tokenizer()("a"),
    ):
        quiet()
        assert messages == []
    for number, untagged in enumerate((lambda: trained("a"), lambda: trained.encode("a")), start=1):
        untagged()
        assert len(messages) == number and "set `tokenizer.src_lang` or pass `src_lang=`" in messages[-1]


def test_target_needs_a_language(tokenizer: ZCodeM3Tokenizer) -> None:
    tokenizer.tgt_lang = None
    with pytest.raises(ValueError, match=r"set `tokenizer.tgt_lang` or pass `tgt_lang=`, one of: en, de"):
        tokenizer("a", text_target="b")
    assert tokenizer.encode("a")[0] == tokenizer.get_lang_id("en")


@pytest.mark.parametrize("languages", ["en", ["en", ""], ["e n"], [5]])
def test_language_codes_are_checked(languages) -> None:
    with pytest.raises(ValueError, match="code"):
        ZCodeM3Tokenizer(languages=languages)


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_lossless(trained: ZCodeM3Tokenizer, text: str) -> None:
    untrained = ZCodeM3Tokenizer(languages=LANGUAGES)
    for tokenizer in (trained, untrained):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == unicodedata.normalize("NFC", text)


def test_lossless_for_every_character(trained: ZCodeM3Tokenizer) -> None:
    normalizer = trained.backend_tokenizer.normalizer  # NFC, but of another version of Unicode than Python's
    assert normalizer.normalize_str("cafe\u0301") == "caf\u00e9"
    blocks = [range(start, start + 512) for start in [*range(0, 0x20000, 512), 0x2F800, 0xE0000, 0x10FE00]]
    texts = ["".join(chr(code) for code in block if not 0xD800 <= code < 0xE000) for block in blocks]
    for text, ids in zip(texts, trained(texts, add_special_tokens=False)["input_ids"], strict=True):
        assert trained.decode(ids) == normalizer.normalize_str(text)


def test_pre_tokenizer() -> None:
    pre_tokenizer = ZCodeM3Tokenizer().backend_tokenizer.pre_tokenizer[0]
    text = "नमस्ते दुनिया, สวัสดี 123 می‌خواهم l'homme!?"
    pieces = [piece for piece, _ in pre_tokenizer.pre_tokenize_str(text)]
    assert "|".join(pieces) == "नमस्ते| दुनिया|,| สวัสดี| |1|2|3| می‌خواهم| l|'|homme|!?"


def test_training(trained: ZCodeM3Tokenizer) -> None:
    assert type(trained) is ZCodeM3Tokenizer
    assert len(trained) == trained.vocab_size == 400
    assert trained.languages == LANGUAGES
    assert set(pre_tokenizers.ByteLevel.alphabet()) <= set(trained.get_vocab())
    assert trained.convert_ids_to_tokens(list(range(9))) == ZCodeM3Tokenizer(LANGUAGES).convert_ids_to_tokens(range(9))
    assert len(trained.encode(SENTENCES[0])) < len(SENTENCES[0])


def test_training_keeps_languages() -> None:
    tokenizer = ZCodeM3Tokenizer(languages=["en"], extra_special_tokens=["<2>"], padding_side="left")
    tokenizer.add_languages(["uk"])
    tokenizer.src_lang, tokenizer.tgt_lang = "uk", "en"
    trained = tokenizer.train_new_from_iterator([SENTENCES], 300, show_progress=False)
    assert trained.languages == ["en", "uk"]
    assert (trained.src_lang, trained.tgt_lang, trained.padding_side) == ("uk", "en", "left")
    assert trained.extra_special_tokens == ["<2>", "__en__", "__uk__"]
    assert trained.tokenize("a<2>", add_special_tokens=True) == ["__uk__", "a", "<2>", "</s>"]


def test_add_languages(tokenizer: ZCodeM3Tokenizer, tmp_path: Path) -> None:
    assert tokenizer.add_languages(["uk", "en", "uk"]) == 1
    assert tokenizer.add_languages(["uk"]) == 0
    assert tokenizer.languages == [*LANGUAGES, "uk"]
    assert tokenizer.get_lang_id("uk") == 400 and len(tokenizer) == 401
    tokenizer.src_lang = "uk"
    tokenizer.save_pretrained(tmp_path)
    assert_same(ZCodeM3Tokenizer.from_pretrained(tmp_path), tokenizer)
    assert ZCodeM3Tokenizer.from_pretrained(tmp_path, languages=["uk", "is"]).languages == [*LANGUAGES, "uk", "is"]


def test_new_language_in_a_model(tokenizer: ZCodeM3Tokenizer) -> None:
    config = ZCodeM3Config(
        vocab_size=len(tokenizer),
        d_model=8,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
    )
    model = ZCodeM3ForConditionalGeneration(config).eval()
    tokenizer.add_languages(["uk"])
    model.resize_token_embeddings(len(tokenizer))
    inputs = tokenizer._build_translation_inputs("a", return_tensors="pt", src_lang="en", tgt_lang="uk")
    output_ids = model.generate(**inputs, max_new_tokens=3)
    assert output_ids[0, :2].tolist() == [tokenizer.eos_token_id, tokenizer.get_lang_id("uk")]


def test_save_and_load(tokenizer: ZCodeM3Tokenizer, tmp_path: Path) -> None:
    tokenizer.model_max_length = 64
    for folder in (tmp_path / "first", tmp_path / "second"):
        tokenizer.save_pretrained(folder)
        assert sorted(os.listdir(folder)) == ["tokenizer.json", "tokenizer_config.json"]
        for cls in (ZCodeM3Tokenizer, AutoTokenizer):
            loaded = cls.from_pretrained(folder)
            assert_same(loaded, tokenizer)
            assert loaded.model_max_length == 64
        tokenizer = loaded
    texts = [(tmp_path / name / "tokenizer_config.json").read_text() for name in ("first", "second")]
    assert texts[0].count("__en__") == texts[1].count("__en__") == 1
    overridden = AutoTokenizer.from_pretrained(tmp_path / "first", src_lang="hi", tgt_lang="en", padding_side="left")
    assert (overridden.src_lang, overridden.tgt_lang, overridden.padding_side) == ("hi", "en", "left")


def test_load_from_a_folder_with_a_model_config(tokenizer: ZCodeM3Tokenizer, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    ZCodeM3Config(vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    assert_same(AutoTokenizer.from_pretrained(tmp_path), tokenizer)


def test_load_from_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"no tokenizer.json"):
        ZCodeM3Tokenizer.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="instantiate the backend"):
        ZCodeM3Tokenizer(tokenizer_file=str(tmp_path / "tokenizer.json"))


def test_pickle(tokenizer: ZCodeM3Tokenizer) -> None:
    assert_same(pickle.loads(pickle.dumps(tokenizer)), tokenizer)


def test_other_backend(tmp_path: Path) -> None:
    words = ["<s>", "<pad>", "</s>", "<unk>", "hello", "world"]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["__en__"])
    tokenizer = ZCodeM3Tokenizer(tokenizer_object=backend, languages=["de"], src_lang="en", tgt_lang="de")
    assert tokenizer.languages == ["en", "de"]
    assert tokenizer("hello there")["input_ids"] == [tokenizer.get_lang_id("en"), 4, 3, 2]
    tokenizer.save_pretrained(tmp_path)
    assert_same(ZCodeM3Tokenizer.from_pretrained(tmp_path), tokenizer)
    from_file = ZCodeM3Tokenizer(tokenizer_file=str(tmp_path / "tokenizer.json"), src_lang="de", tgt_lang="en")
    assert from_file.lang_code_to_id == tokenizer.lang_code_to_id
    assert from_file("world")["input_ids"] == [tokenizer.get_lang_id("de"), 5, 2]


def test_large_vocabulary(tmp_path: Path) -> None:
    """Above 100,000 tokens the base class looks for a wrong regex of another model family."""
    words = ["<s>", "<pad>", "</s>", "<unk>", *(f"w{index}" for index in range(100_000))]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    ZCodeM3Tokenizer(tokenizer_object=backend, languages=["en"], src_lang="en").save_pretrained(tmp_path)
    tokenizer = ZCodeM3Tokenizer.from_pretrained(tmp_path)
    assert tokenizer.tokenize("w7 w8", add_special_tokens=True) == ["__en__", "w7", "w8", "</s>"]


def test_remote_code_without_the_package(
    tokenizer: ZCodeM3Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ZCodeM3Tokenizer, "_auto_class", None)
    ZCodeM3Tokenizer.register_for_auto_class()
    tokenizer.save_pretrained(tmp_path / "model")
    script = """
import sys
sys.modules["hf_moe_ted"] = None
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("model", trust_remote_code=True)
tokenizer.add_languages(["uk"])
tokenizer.save_pretrained("again")
tokenizer = AutoTokenizer.from_pretrained("again", trust_remote_code=True)
print(type(tokenizer).__name__, tokenizer.languages[-1], *tokenizer.tokenize("a", add_special_tokens=True))
"""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    run = subprocess.run(
        [sys.executable, "-c", script], env=env, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["ZCodeM3Tokenizer", "uk", "__en__", "a", "</s>"]


def test_tensors(tokenizer: ZCodeM3Tokenizer) -> None:
    batch = tokenizer(SENTENCES, text_target=SENTENCES, padding=True, truncation=True, return_tensors="pt")
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.long
    assert (batch["input_ids"][:, 0] == tokenizer.get_lang_id("en")).all()
    assert (batch["labels"][:, 0] == tokenizer.get_lang_id("de")).all()
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
