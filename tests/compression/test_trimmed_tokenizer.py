"""A text of kept tokens is encoded as before, and nothing becomes unknown."""

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models
from transformers import ByT5Tokenizer
from trimming_cases import CORPUS, LANGUAGES, NLLB, OTHER, TOKENIZERS, zcode_tokenizer

from hf_moe_ted import ZCodeM3Tokenizer
from hf_moe_ted.compression.trimmed_tokenizer import tags_that_go, trimming_of


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return TOKENIZERS[request.param](tmp_path_factory.mktemp("tokenizer"))


def ids_of(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("index", range(0, 12, 3))
def test_trimmed_to_one_text(tokenizer: Any, index: int, tmp_path: Path) -> None:
    text = CORPUS[index]
    codes = NLLB.values() if "eng_Latn" in tokenizer.get_vocab() else LANGUAGES
    language = next(iter(codes))
    used = {*ids_of(tokenizer, [text])[0]}
    gone = {*tags_that_go(tokenizer, [language]).values()}
    kept = used | trimming_of(tokenizer).needed(used) | {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
    new_of_old = {old: new for new, old in enumerate(sorted(kept - gone))}
    trimming_of(tokenizer).write(tmp_path, new_of_old, [language])
    smaller = type(tokenizer).from_pretrained(tmp_path)

    assert {*smaller.get_vocab().values()} == {*new_of_old.values()}
    for old, new in new_of_old.items():
        assert smaller.convert_ids_to_tokens(new) == tokenizer.convert_ids_to_tokens(old)
    if tokenizer.unk_token_id not in used:
        assert ids_of(smaller, [text])[0] == [new_of_old[old] for old in ids_of(tokenizer, [text])[0]]
    for before, after in zip(ids_of(tokenizer, OTHER + CORPUS), ids_of(smaller, OTHER + CORPUS), strict=True):
        assert after.count(smaller.unk_token_id) <= before.count(tokenizer.unk_token_id)
        if tokenizer.unk_token_id not in before:
            assert smaller.decode(after) == tokenizer.decode(before)
            if {*before} <= new_of_old.keys():
                assert after == [new_of_old[old] for old in before]


def test_tags(tokenizer: Any) -> None:
    codes = [*NLLB.values()] if "eng_Latn" in tokenizer.get_vocab() else LANGUAGES
    gone = tags_that_go(tokenizer, codes[:2])
    assert [*gone] == ([] if hasattr(tokenizer, "sp_model") else codes[2:])


def test_what_is_refused(tmp_path: Path) -> None:
    bpe = zcode_tokenizer(tmp_path)
    bpe.backend_tokenizer.model.dropout = 0.5
    with pytest.raises(ValueError, match=r"has dropout \(0.5\)"):
        trimming_of(bpe)
    words = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    with pytest.raises(ValueError, match="has a model of type 'WordLevel'"):
        trimming_of(ZCodeM3Tokenizer(tokenizer_object=words))
    with pytest.raises(ValueError, match=r"tokenizer \(ByT5Tokenizer\) cannot be trimmed"):
        trimming_of(ByT5Tokenizer())
