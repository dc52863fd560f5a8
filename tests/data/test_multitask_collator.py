"""Batches against the tokenizer called sentence by sentence."""

import copy
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import NllbTokenizer, PreTrainedTokenizerFast

from hf_moe_ted import (
    DataCollatorForMultitaskSeq2Seq,
    DenoisingNoise,
    ZCodeM3ForConditionalGeneration,
    ZCodeM3Tokenizer,
)
from hf_moe_ted.data.multitask_rows import PADDING_ROW
from hf_moe_ted.testing import tiny_config

PAIR = {"source": "Open", "target": "Öffnen", "src_lang": "en", "tgt_lang": "de"}
TEXT = {"text": "Fungua dirisha sasa hivi", "lang": "sw"}


def test_translation_is_what_the_tokenizer_makes(tokenizer: Any) -> None:
    pairs = [PAIR, {"source": "Funga dirisha", "target": "Close", "src_lang": "sw", "tgt_lang": "en"}]
    batch = DataCollatorForMultitaskSeq2Seq(tokenizer, pad_to_multiple_of=8)(pairs)
    assert batch["input_ids"].shape == (2, 16)
    for row, pair in enumerate(pairs):
        expected = tokenizer(
            pair["source"], text_target=pair["target"], src_lang=pair["src_lang"], tgt_lang=pair["tgt_lang"]
        )
        is_text = batch["attention_mask"][row].bool()
        assert batch["input_ids"][row][is_text].tolist() == expected["input_ids"]
        assert batch["labels"][row][batch["labels"][row] != -100].tolist() == expected["labels"]
        assert (batch["input_ids"][row][~is_text] == tokenizer.pad_token_id).all()
    assert (tokenizer.src_lang, tokenizer.tgt_lang) == (None, None)


def test_tags_of_another_tokenizer() -> None:
    nllb = NllbTokenizer(extra_special_tokens=["eng_Latn", "deu_Latn"])
    nllb = nllb.train_new_from_iterator(["Open the tab", "Öffnen"] * 20, vocab_size=80)
    pair = {**PAIR, "src_lang": "eng_Latn", "tgt_lang": "deu_Latn"}
    batch = DataCollatorForMultitaskSeq2Seq(nllb)([pair])
    nllb.src_lang, nllb.tgt_lang = "eng_Latn", "deu_Latn"
    expected = nllb(pair["source"], text_target=pair["target"])
    assert batch["input_ids"][0].tolist() == expected["input_ids"]
    assert batch["labels"][0].tolist() == expected["labels"]


def test_languages_of_another_tokenizer(nllb_tokenizer: Any) -> None:
    """One that it does not have would be `<unk>` there; other special tokens are no languages."""
    nllb_tokenizer.add_special_tokens({"additional_special_tokens": ["<term>"]})
    collator = DataCollatorForMultitaskSeq2Seq(nllb_tokenizer)
    batch = collator([{**PAIR, "src_lang": "en", "tgt_lang": "zh-TW"}])
    tags = nllb_tokenizer.convert_tokens_to_ids(["eng_Latn", "zho_Hant"])
    assert [batch["input_ids"][0, 0], batch["labels"][0, 0]] == tags
    for wrong in ("deu_Lat", "<term>", "zh"):
        with pytest.raises(ValueError, match=r"unknown language|ambiguous language 'zh'"):
            collator([{**PAIR, "src_lang": "eng_Latn", "tgt_lang": wrong}])


def test_threads_share_a_tokenizer(tokenizer: Any, nllb_tokenizer: Any) -> None:
    """A collator looks at the tags of each language; nobody else sees them, and the tokenizer keeps its own."""
    tokenizer = copy.copy(tokenizer)
    tokenizer.src_lang = "en"
    for shared, codes in ((tokenizer, ["de", "sw"]), (nllb_tokenizer, ["deu_Latn", "zho_Hans"])):
        shared.src_lang = own = shared.src_lang
        tags = dict(zip([own, *codes], shared.convert_tokens_to_ids(_tags(shared, [own, *codes])), strict=True))

        def wrong(number: int, shared: Any = shared, codes: Any = codes, own: Any = own, tags: Any = tags) -> int:
            lang = codes[number % len(codes)]
            if shared is tokenizer and number % 3 == 0:  # calls of others; transformers' tokenizers have no turn
                return int(shared("a")["input_ids"][0] != tags[own])
            rows = [{**PAIR, "src_lang": lang, "tgt_lang": codes[0]}]
            return int(DataCollatorForMultitaskSeq2Seq(shared)(rows)["input_ids"][0, 0] != tags[lang])

        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-5)
        try:
            with ThreadPoolExecutor(8) as threads:
                assert sum(threads.map(wrong, range(400))) == 0
        finally:
            sys.setswitchinterval(interval)
        assert shared.src_lang == own


def _tags(tokenizer: Any, codes: list[str]) -> list[str]:
    return [tokenizer.get_lang_token(code) if hasattr(tokenizer, "get_lang_token") else code for code in codes]


def test_denoising_reads_noise_and_writes_the_text(tokenizer: Any) -> None:
    noise = DenoisingNoise(mask_ratio=0.5)
    collator = DataCollatorForMultitaskSeq2Seq(tokenizer, noise=noise)
    example = {"task": "denoising", "source": TEXT["text"], "target": TEXT["text"], "src_lang": "sw", "tgt_lang": "sw"}
    batches = [collator([{**example, "noise_seed": seed}]) for seed in (5, 5, 7)]
    assert batches[0]["input_ids"].tolist() == batches[1]["input_ids"].tolist()
    assert batches[0]["input_ids"].tolist() != batches[2]["input_ids"].tolist()
    noised = noise(TEXT["text"], seed=5, mask_token="<mask>")
    assert batches[0]["input_ids"][0].tolist() == tokenizer(noised, src_lang="sw")["input_ids"]
    assert tokenizer.mask_token_id in batches[0]["input_ids"][0]
    assert batches[0]["labels"][0].tolist() == tokenizer(TEXT["text"], src_lang="sw")["input_ids"]


def test_noise_makes_no_text_longer(tokenizer: Any) -> None:
    collator = DataCollatorForMultitaskSeq2Seq(tokenizer, noise=DenoisingNoise(mask_ratio=0.9, poisson_lambda=0.1))
    examples = [collator._example({"text": text, "lang": "sw"}, 0) for text in ("a b c d", "a", "sasa hivi")]
    for seed in range(50):
        encoded = collator.encode([{**example, "noise_seed": seed} for example in examples])
        lengths = [(len(example["input_ids"]), len(example["labels"])) for example in encoded]
        for (source, target), (longest_source, clean_target) in zip(lengths, collator.lengths(examples), strict=True):
            assert source <= longest_source
            assert target == clean_target


def test_long_texts_keep_their_tags(tokenizer: Any) -> None:
    collator = DataCollatorForMultitaskSeq2Seq(tokenizer, max_length=10)
    long = {**PAIR, "source": "x" * 50, "target": "y" * 9}
    batch = collator([long, {"text": "z" * 30, "lang": "sw"}])
    assert batch["input_ids"].shape == batch["labels"].shape == (2, 10)
    tags = tokenizer.lang_code_to_id
    assert batch["input_ids"][:, 0].tolist() == [tags["en"], tags["sw"]]
    assert batch["labels"][:, 0].tolist() == [tags["de"], tags["sw"]]
    assert batch["labels"][:, -1].tolist() == [tokenizer.eos_token_id] * 2
    assert collator.lengths([collator._example(long, 0)]) == [(10, 10)]


def test_limits_of_tokenizer_and_model(tokenizer: Any) -> None:
    model = ZCodeM3ForConditionalGeneration(tiny_config(vocab_size=len(tokenizer), max_position_embeddings=32))
    assert DataCollatorForMultitaskSeq2Seq(tokenizer).max_length == 64
    assert DataCollatorForMultitaskSeq2Seq(tokenizer, model).max_length == 32
    assert DataCollatorForMultitaskSeq2Seq(tokenizer, model, pad_to_multiple_of=12).max_length == 24
    for max_length, multiple, positions in ((33, None, 32), (25, 12, 24)):
        with pytest.raises(ValueError, match=rf"max_length \({max_length}\) must be at most {positions}"):
            DataCollatorForMultitaskSeq2Seq(tokenizer, model, max_length=max_length, pad_to_multiple_of=multiple)
    with pytest.raises(ValueError, match=r"max_length \(2\) leaves no token besides the 2 special ones"):
        DataCollatorForMultitaskSeq2Seq(tokenizer, max_length=2)([PAIR])


def test_a_model_makes_decoder_inputs_and_a_loss(tokenizer: Any) -> None:
    torch.manual_seed(0)
    model = ZCodeM3ForConditionalGeneration(tiny_config(vocab_size=len(tokenizer)))
    collator = DataCollatorForMultitaskSeq2Seq(tokenizer, model)
    batch = collator([PAIR, TEXT])
    expected = model.prepare_decoder_input_ids_from_labels(batch["labels"])
    assert torch.equal(batch["decoder_input_ids"], expected)
    assert torch.isfinite(model(**batch).loss)
    encoded = collator.encode([PAIR, TEXT])
    assert all(torch.equal(collator(encoded)[name], batch[name]) for name in batch)


def test_a_model_needs_embeddings_for_all_tokens() -> None:
    """A language may be added at any time."""
    tokenizer = ZCodeM3Tokenizer(languages=["en", "de"])
    size = len(tokenizer)
    model = ZCodeM3ForConditionalGeneration(tiny_config(vocab_size=size))
    collator, without_model = (
        DataCollatorForMultitaskSeq2Seq(tokenizer, model),
        DataCollatorForMultitaskSeq2Seq(tokenizer),
    )
    for number, lang in enumerate(("uk", "sw")):
        collator([PAIR])
        tokenizer.add_languages([lang])
        rows = [{**PAIR, "tgt_lang": lang}]
        for batch in (rows, without_model.encode(rows)):
            with pytest.raises(
                ValueError, match=rf"has {size + number + 1} tokens.* for {size + number}; call model.resi"
            ):
                collator(batch)
        assert without_model(rows)["labels"].max() == size + number
        model.resize_token_embeddings(len(tokenizer))
        assert torch.isfinite(model(**collator(rows)).loss)


def test_a_model_may_have_more_embeddings_than_tokens(tokenizer: Any) -> None:
    """Those of the config count where a rank has some of them, those of the module where the config is older."""
    size = len(tokenizer)
    padded = ZCodeM3ForConditionalGeneration(tiny_config(vocab_size=size + 5))
    old_config = ZCodeM3ForConditionalGeneration(tiny_config(vocab_size=size))
    old_config.config.vocab_size = size - 1
    sharded = ZCodeM3ForConditionalGeneration(tiny_config(vocab_size=size))
    sharded.get_input_embeddings().num_embeddings = size // 2
    wrapped = torch.nn.ModuleList([ZCodeM3ForConditionalGeneration(tiny_config(vocab_size=size - 1))])
    for model in (padded, old_config, sharded, wrapped, None):
        assert DataCollatorForMultitaskSeq2Seq(tokenizer, model)([PAIR])["labels"].max() < size
    too_small = ZCodeM3ForConditionalGeneration(tiny_config(vocab_size=size - 1))
    with pytest.raises(
        ValueError, match=rf"the tokenizer has {size} tokens, but the model has embeddings for {size - 1};"
    ):
        DataCollatorForMultitaskSeq2Seq(tokenizer, too_small)([PAIR])


def test_empty_texts_are_only_tags(tokenizer: Any) -> None:
    batch = DataCollatorForMultitaskSeq2Seq(tokenizer)([{"text": "", "lang": "sw"}])
    assert batch["input_ids"].tolist() == [[tokenizer.get_lang_id("sw"), tokenizer.eos_token_id]]


def test_bad_input(tokenizer: Any) -> None:
    collator = DataCollatorForMultitaskSeq2Seq(tokenizer)
    with pytest.raises(ValueError, match="unknown language 'fr', this tokenizer knows: en, de, sw") as error:
        collator([{**PAIR, "tgt_lang": "fr"}])
    assert str(error.value).endswith(
        "; to train it: tokenizer.add_languages(['fr']), then model.resize_token_embeddings(len(tokenizer))"
    )
    for code in ("", "it it", "__it__"):  # which add_languages refuses, or would take for another language
        with pytest.raises(ValueError, match="unknown language") as error:
            collator([{**PAIR, "tgt_lang": code}])
        assert "add_languages" not in str(error.value)
    with pytest.raises(ValueError, match="row 1 of the batch must have the strings source"):
        collator([PAIR, {"source": "Open"}])
    with pytest.raises(ValueError, match="row 0 of the batch has 3 directions"):
        collator([{"translation": {"en": "a", "de": "b", "sw": "c"}}])
    plain = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), pad_token="<pad>")
    with pytest.raises(ValueError, match="has no src_lang and tgt_lang, so it has no language tags"):
        DataCollatorForMultitaskSeq2Seq(plain)


@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_lengths_that_a_sampler_has_drawn(padding_side: str, tokenizer: Any) -> None:
    tokenizer = copy.copy(tokenizer)
    tokenizer.padding_side = padding_side
    model = ZCodeM3ForConditionalGeneration(tiny_config(vocab_size=len(tokenizer)))
    collator = DataCollatorForMultitaskSeq2Seq(tokenizer, model)
    alone = collator([PAIR])
    rows = [{**collator.encode([PAIR])[0], "padded_lengths": [12, 20]}, PADDING_ROW | {"padded_lengths": (12, 20)}]
    assert collator.encode([rows[1]]) == [
        {"input_ids": [], "attention_mask": [], "labels": [], "padded_lengths": [12, 20]}
    ]
    batch = collator([rows[0], *collator.encode([rows[1]])])
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, 12)
    assert batch["labels"].shape == batch["decoder_input_ids"].shape == (2, 20)
    assert batch["input_ids"][0][batch["attention_mask"][0].bool()].tolist() == alone["input_ids"][0].tolist()
    assert batch["labels"][0][batch["labels"][0] != -100].tolist() == alone["labels"][0].tolist()
    assert batch["attention_mask"][0, 0 if padding_side == "left" else -1] == 0
    # a row of padding has no token at all, not even the one that decoding starts from
    assert not batch["attention_mask"][1].any() and (batch["labels"][1] == -100).all()
    assert (batch["input_ids"][1] == tokenizer.pad_token_id).all()
    assert (batch["decoder_input_ids"][1] == tokenizer.pad_token_id).all()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_rows_of_padding_change_nothing(attention: str, tokenizer: Any) -> None:
    """Not the losses, nor the gradients, nor what the routers count."""
    torch.manual_seed(0)
    config = tiny_config(vocab_size=len(tokenizer), dropout=0.0, capacity_factor=None, attn_implementation=attention)
    model = ZCodeM3ForConditionalGeneration(config).train()
    collator = DataCollatorForMultitaskSeq2Seq(tokenizer, model)
    lengths = {"padded_lengths": (16, 16)}
    rows = [{"task": "translation", **PAIR, **lengths}, {"task": "translation", **PAIR, "target": "Auf", **lengths}]
    seen = []
    for batch in (collator(rows), collator([*rows, PADDING_ROW | lengths, PADDING_ROW | lengths])):
        model.zero_grad()
        num_items = (batch["labels"] != -100).sum()
        outputs = model(**batch, num_items_in_batch=num_items, output_router_logits=True, output_routings=True)
        outputs.loss.backward()
        gradients = torch.cat([weight.grad.flatten() for weight in model.parameters()])
        losses = [outputs.loss, outputs.encoder_aux_loss, outputs.decoder_aux_loss, outputs.decoder_z_loss]
        routed = [each.token_mask.sum() for each in outputs.encoder_routings + outputs.decoder_routings]
        seen.append((torch.stack(losses).detach(), gradients, torch.stack(routed)))
    torch.testing.assert_close(seen[0][0], seen[1][0], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(seen[0][1], seen[1][1], rtol=1e-5, atol=1e-7)
    assert torch.equal(seen[0][2], seen[1][2])
    only_padding = model(**collator([PADDING_ROW | lengths] * 2), num_items_in_batch=torch.tensor(5))
    only_padding.loss.backward()
    assert only_padding.loss.item() == 0
    assert all(torch.isfinite(weight.grad).all() for weight in model.parameters())
