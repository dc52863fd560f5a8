"""Small tokenizers of every kind that can be trimmed, and rows of text in their languages."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import M2M100Tokenizer, NllbTokenizer
from translation_cases import TEXTS, parallel_rows

from hf_moe_ted import ZCodeM3Tokenizer

LANGUAGES = ["en", "de", "fr"]
NLLB = {"en": "eng_Latn", "de": "deu_Latn", "fr": "fra_Latn"}
CORPUS = [text for texts in TEXTS.values() for text in texts] * 4 + ["Überall Ähren", "où êtes-vous", "quick brown fox"]
OTHER = ["closed tabs, saved twice", "die Platten sind voll: nichts", "brown disques", "日本語 and Ω", "a\tb\nc"]


def zcode_tokenizer(folder: Path) -> ZCodeM3Tokenizer:
    return ZCodeM3Tokenizer(languages=LANGUAGES).train_new_from_iterator(CORPUS, vocab_size=340)


def nllb_tokenizer(folder: Path) -> NllbTokenizer:
    """With tags at the end and rows without a token behind them, as in the published checkpoints."""
    tags = [*NLLB.values()]
    trained = NllbTokenizer(extra_special_tokens=tags).train_new_from_iterator(CORPUS, vocab_size=150)
    content = json.loads(trained.backend_tokenizer.to_str())["model"]
    pieces = sorted({*content["vocab"]} - {*tags}, key=content["vocab"].__getitem__)
    vocab = {piece: index for index, piece in enumerate(pieces)}
    merges = [tuple(pair) for pair in content["merges"]]
    return NllbTokenizer(vocab=vocab, merges=merges, extra_special_tokens=tags)


def m2m100_tokenizer(folder: Path, kind: str = "bpe") -> M2M100Tokenizer:
    """Whose ids are in another order than the pieces of SentencePiece, of which one has no id."""
    sentencepiece = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    folder.mkdir(exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_prefix=str(folder / "sp"),
        vocab_size=150,
        model_type=kind,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "sp.model"))
    names = sorted(pieces.id_to_piece(index) for index in range(3, pieces.get_piece_size()) if index != 20)
    vocab = ["<s>", "<pad>", "</s>", "<unk>", *names]
    (folder / "vocab.json").write_text(json.dumps({piece: number for number, piece in enumerate(vocab)}))
    files = str(folder / "vocab.json"), str(folder / "sp.model")
    tags = [*M2M100Tokenizer(*files).lang_token_to_id]
    return M2M100Tokenizer(*files, additional_special_tokens=tags)


def unigram_tokenizer(folder: Path) -> ZCodeM3Tokenizer:
    """Of the *tokenizers* library."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = ["<s>", "<pad>", "</s>", "<unk>", *(f"__{language}__" for language in LANGUAGES)]
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=special, unk_token="<unk>", show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    return ZCodeM3Tokenizer(tokenizer_object=backend, languages=LANGUAGES)


TOKENIZERS: dict[str, Callable[[Path], Any]] = {
    "zcode": zcode_tokenizer,
    "nllb": nllb_tokenizer,
    "m2m100-bpe": m2m100_tokenizer,
    "unigram": unigram_tokenizer,
    "m2m100-unigram": lambda folder: m2m100_tokenizer(folder, "unigram"),
}


def rows_for(tokenizer: Any) -> list[dict[str, str]]:
    codes = NLLB if isinstance(tokenizer, NllbTokenizer) else {code: code for code in LANGUAGES}
    return [row | {name: codes[row[name]] for name in ("src_lang", "tgt_lang")} for row in parallel_rows()]


def size_of(tokenizer: Any) -> int:
    return max(tokenizer.get_vocab().values()) + 1
