"""transformers' M2M100 and CTranslate2 compute with an exported folder what the model itself does."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    M2M100ForConditionalGeneration,
    M2M100Tokenizer,
    NllbTokenizer,
)

from hf_moe_ted import (
    ZCodeM3ForConditionalGeneration,
    ZCodeM3Tokenizer,
    merge_experts,
    prune_experts,
    quantize_experts,
    trim_vocabulary,
    upcycle_dense_checkpoint,
)
from hf_moe_ted.conversion.m2m100_export import export_m2m100
from hf_moe_ted.testing import tiny_config

PAD = 1
DENSE = {"encoder_sparse_step": 0, "decoder_sparse_step": 0}
TEXTS = ["close all tabs", "the disk is full, so nothing was saved", "save", "alle Tabs schließen"]


def make_model(**overrides: Any) -> ZCodeM3ForConditionalGeneration:
    """Weights, biases and norms that all matter, and translations that depend on their source."""
    fields = {"vocab_size": 272, "num_experts": 1, "tie_word_embeddings": False}
    model = ZCodeM3ForConditionalGeneration(tiny_config(**{**fields, **overrides}))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean = 1.0 if name.endswith("layer_norm.weight") else 0.0
            parameter.copy_(mean + 0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    source = torch.randint(4, 272, (3, 9), generator=generator)
    target = torch.randint(4, 272, (3, 6), generator=generator)
    source[1, 5:] = target[2, 3:] = PAD
    return {"input_ids": source, "attention_mask": source.ne(PAD).long(), "decoder_input_ids": target}


@torch.no_grad()
def assert_same(exported: Any, model: Any) -> None:
    inputs = batch()
    is_token = inputs["decoder_input_ids"].ne(PAD)
    ours, theirs = (each(**inputs).logits[is_token] for each in (model, exported))
    torch.testing.assert_close(theirs, ours, rtol=0.0, atol=1e-5)
    del inputs["decoder_input_ids"]
    # the experts skip padding, should one be generated
    options: dict[str, Any] = {"num_beams": 3, "max_new_tokens": 5, "suppress_tokens": [PAD]}
    assert torch.equal(exported.generate(**inputs, **options), model.generate(**inputs, **options))


def load(folder: Path) -> M2M100ForConditionalGeneration:
    model, info = AutoModelForSeq2SeqLM.from_pretrained(folder, output_loading_info=True)
    assert type(model) is M2M100ForConditionalGeneration
    assert not any(info.values()), info
    return model.eval()


# --- what M2M100 computes

OPTIONS: dict[str, dict[str, Any]] = {
    "one-side": {"encoder_sparse_step": 0, "router_bias": True},
    "before-dropping": {"normalize_router_weights": "before_dropping", "tie_word_embeddings": True},
    "after-dropping": {"normalize_router_weights": "after_dropping", "eval_capacity_factor": 1.0},
    "masked-outputs": {"moe_token_dropout": 0.2},
    "dense-of-other-heads-and-widths": {**DENSE, "decoder_attention_heads": 8, "decoder_ffn_dim": 48},
    "padding-is-routed": {
        "router_ignore_padding_tokens": False,
        "router_dtype": "bfloat16",
        "scale_embedding": False,
        "activation_function": "gelu",
    },
    "merged": {"expert_map": [[0, 0, 0]] * 3, "normalize_router_weights": "before_dropping", "moe_token_dropout": 0.1},
    "merged-top2": {
        "expert_map": [[0, 0, 0]] * 3,
        "num_experts_per_tok": 2,
        "normalize_router_weights": "after_dropping",
        "second_expert_policy": "random",
    },
    "merged-all-rows": {"expert_map": [[0, 0]] * 3, "num_experts_per_tok": 2},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_same_logits_and_translations(options: dict[str, Any], tmp_path: Path) -> None:
    model = make_model(**options)
    model.save_pretrained(tmp_path / "full", max_shard_size="60KB")
    report = export_m2m100(tmp_path / "full", tmp_path / "a", max_shard_size="60KB")
    assert len(report.weight_files) > 2 and report.num_experts == ()
    assert report.num_parameters == load(tmp_path / "a").num_parameters()
    assert_same(load(tmp_path / "a"), model)
    export_m2m100(model, tmp_path / "b")
    exported, in_memory = load(tmp_path / "a").state_dict(), load(tmp_path / "b").state_dict()
    assert all(torch.equal(weight, in_memory[name]) for name, weight in exported.items())


def test_there_and_back(tmp_path: Path) -> None:
    """Exported, upcycled to experts, merged to one, exported again."""
    model = make_model(**DENSE)
    model.save_pretrained(tmp_path / "ours")
    export_m2m100(tmp_path / "ours", tmp_path / "dense")
    upcycle_dense_checkpoint(tmp_path / "dense", tmp_path / "experts", num_experts=4)
    prune_experts(tmp_path / "experts", None, keep=2, criterion="random", output_dir=tmp_path / "two")
    with pytest.raises(ValueError, match=r"has several experts in 3 layers \(model.encoder.layers.1.ffn: 2"):
        export_m2m100(tmp_path / "two", tmp_path / "again")
    fields = json.loads((tmp_path / "two" / "config.json").read_text())
    (tmp_path / "two" / "config.json").write_text(json.dumps(fields | {"num_experts_per_tok": 1}))
    prune_experts(tmp_path / "two", None, keep=1, criterion="random", output_dir=tmp_path / "one")
    export_m2m100(tmp_path / "one", tmp_path / "again")
    assert_same(load(tmp_path / "again"), model)


def test_dtypes(tmp_path: Path) -> None:
    """Weights keep theirs, and that in which they are loaded; a factor is rounded once."""
    model = make_model(moe_token_dropout=0.2)
    export_m2m100(model, tmp_path / "bfloat16", dtype="bfloat16")
    exported = M2M100ForConditionalGeneration.from_pretrained(tmp_path / "bfloat16", dtype="auto")
    assert exported.dtype == torch.bfloat16
    down = model.model.encoder.layers[1].ffn.experts.down_proj[0]
    expected = (down.double() * 0.8).to(torch.bfloat16)
    assert torch.equal(exported.model.encoder.layers[1].fc2.weight, expected)

    make_model().to(torch.bfloat16).save_pretrained(tmp_path / "full")
    fields = json.loads((tmp_path / "full" / "config.json").read_text())
    (tmp_path / "full" / "config.json").write_text(json.dumps(fields | {"dtype": "float32"}))
    report = export_m2m100(tmp_path / "full", tmp_path / "small")
    assert report.dtypes == (torch.bfloat16,)
    assert M2M100ForConditionalGeneration.from_pretrained(tmp_path / "small", dtype="auto").dtype == torch.float32


def test_generation_config(tmp_path: Path) -> None:
    """M2M100 would stop after 20 tokens."""
    model = make_model(max_position_embeddings=40)
    model.generation_config.max_length = None
    export_m2m100(model, tmp_path / "a")
    assert load(tmp_path / "a").generation_config.max_length == 40
    model.generation_config.max_new_tokens = 7
    model.generation_config.num_beams = 3
    export_m2m100(model, tmp_path / "b")
    found = load(tmp_path / "b").generation_config
    assert (found.max_new_tokens, found.num_beams, found.max_length) == (7, 3, None)
    model.save_pretrained(tmp_path / "full")
    (tmp_path / "full" / "generation_config.json").unlink()
    export_m2m100(tmp_path / "full", tmp_path / "c")
    assert load(tmp_path / "c").generation_config.max_length == 40


# --- what it cannot compute


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_experts": 4}, r"several experts in 3 layers .*prune --keep 1"),
        ({"num_experts": [1, 1, 2]}, r"several experts in 1 layers \(model.decoder.layers.1.ffn: 2\)"),
        ({"num_experts": 4, "num_experts_per_tok": 2}, "with num_experts_per_tok set to 1"),
        (
            {"num_experts": 4, "num_experts_per_tok": 2, "normalize_router_weights": "after_dropping"},
            "merge them to one per layer",
        ),
        ({"position_embedding_type": "learned", **DENSE}, "position_embedding_type='learned'"),
        ({"position_embedding_type": "tupe"}, "position_embedding_type='tupe'"),
        ({"use_residual": True}, "use_residual adds a dense branch"),
        ({"eval_capacity_factor": 0.5}, r"eval_capacity_factor=0.5 drops tokens"),
        ({"expert_map": [[0, 0]] * 3}, "share the router's probability .*prune --keep 1"),
        ({"expert_map": [[0, 1]] * 3, "normalize_router_weights": "before_dropping"}, "removed experts share"),
        (
            {"expert_map": [[0, 0]] * 3, "num_experts_per_tok": 2, "second_expert_policy": "random"},
            "second_expert_policy='random' leaves second experts out",
        ),
    ],
)
def test_what_is_not_dense_is_refused(options: dict[str, Any], match: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=match):
        export_m2m100(make_model(**options), tmp_path / "small")
    assert not any(tmp_path.iterdir())


def test_merged_to_one_expert(tmp_path: Path) -> None:
    """As `merge_experts` leaves it, with and without normalized weights."""
    from hf_moe_ted import collect_expert_statistics

    tokenizer = ZCodeM3Tokenizer(languages=["en", "de"])
    rows = [{"translation": {"en": text, "de": text}} for text in TEXTS]
    for normalized in ("before_dropping", None):
        model = make_model(num_experts=4, normalize_router_weights=normalized)
        merged = merge_experts(model, collect_expert_statistics(model, tokenizer, rows), keep=1).model
        if normalized:
            export_m2m100(merged, tmp_path / "small")
            assert_same(load(tmp_path / "small"), merged)
        else:
            with pytest.raises(ValueError, match="share the router's probability"):
                export_m2m100(merged, tmp_path / "other")


def test_wrong_input(tmp_path: Path) -> None:
    model = make_model()
    with pytest.raises(ValueError, match="is quantized"):
        export_m2m100(quantize_experts(model), tmp_path / "small")
    model.save_pretrained(tmp_path / "full")
    quantize_experts(tmp_path / "full", output_dir=tmp_path / "int8")
    with pytest.raises(ValueError, match="int8 is quantized"):
        export_m2m100(tmp_path / "int8", tmp_path / "small")
    with pytest.raises(ValueError, match="must be a ZCodeM3ForConditionalGeneration or the folder of one, got dict"):
        export_m2m100({}, tmp_path / "small")
    (tmp_path / "full" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="an adapter of PEFT"):
        export_m2m100(tmp_path / "full", tmp_path / "small")
    model.model.decoder.layers[0].ffn.fc1.weight.data[2, 3] = torch.inf
    with pytest.raises(ValueError, match="NaN or infinite"):
        export_m2m100(model, tmp_path / "small")
    assert {path.name for path in tmp_path.iterdir()} == {"full", "int8"}


def test_only_an_earlier_export_is_replaced(tmp_path: Path) -> None:
    """A checkpoint of M2M100 that somebody downloaded is not."""
    export_m2m100(make_model(), tmp_path / "small")
    with pytest.raises(ValueError, match="is not empty"):
        export_m2m100(make_model(), tmp_path / "small")
    export_m2m100(make_model(), tmp_path / "small", overwrite=True)
    fields = json.loads((tmp_path / "small" / "config.json").read_text())
    del fields["exported_from"]
    (tmp_path / "small" / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="is not replaced"):
        export_m2m100(make_model(), tmp_path / "small", overwrite=True)


def test_warns_of_what_ctranslate2_takes_for_granted(tmp_path: Path) -> None:
    report = export_m2m100(make_model(pad_token_id=4), tmp_path / "a")
    assert [word in str(report) for word in ("pad_token_id is 4", "no tokenizer was saved")] == [True, True]
    report = export_m2m100(make_model(decoder_attention_heads=8), tmp_path / "b", tokenizer=ZCodeM3Tokenizer(["en"]))
    assert "decoder_attention_heads (8) differ" in report.warnings[0] and len(report.warnings) == 1


# --- tokenizers


def test_tokenizer_without_this_package(tmp_path: Path) -> None:
    """The tags are part of the text there."""
    tokenizer = ZCodeM3Tokenizer(languages=["en", "de"])
    export_m2m100(make_model(), tmp_path / "small", tokenizer=tokenizer)
    script = """
        import json, sys
        from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
        folder, texts = sys.argv[1], json.loads(sys.argv[2])
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForSeq2SeqLM.from_pretrained(folder)
        inputs = tokenizer(["__en__" + text for text in texts], padding=True, return_tensors="pt")
        german = tokenizer.convert_tokens_to_ids("__de__")
        output = model.generate(**inputs, forced_bos_token_id=german, max_new_tokens=8)
        assert not any(name.startswith("hf_moe_ted") for name in sys.modules)
        print(json.dumps([inputs["input_ids"].tolist(), tokenizer.batch_decode(output, skip_special_tokens=True)]))
    """
    code = "\n".join(line.removeprefix("        ") for line in script.splitlines())
    command = [sys.executable, "-c", code, str(tmp_path / "small"), json.dumps(TEXTS)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ids, texts = json.loads(done.stdout)
    inputs = tokenizer(TEXTS, src_lang="en", padding=True, return_tensors="pt")
    assert ids == inputs["input_ids"].tolist()
    output = load(tmp_path / "small").generate(**inputs, forced_bos_token_id=6, max_new_tokens=8)
    assert texts == tokenizer.batch_decode(output, skip_special_tokens=True)


def test_code_does_not_come_along(tmp_path: Path) -> None:
    ZCodeM3Tokenizer.register_for_auto_class()
    try:
        ZCodeM3Tokenizer(languages=["en", "de"]).save_pretrained(tmp_path / "full")
    finally:
        ZCodeM3Tokenizer._auto_class = None
    assert "auto_map" in json.loads((tmp_path / "full" / "tokenizer_config.json").read_text())
    make_model().save_pretrained(tmp_path / "full")
    export_m2m100(tmp_path / "full", tmp_path / "small")
    assert not [*(tmp_path / "small").glob("*.py")]
    assert "auto_map" not in json.loads((tmp_path / "small" / "tokenizer_config.json").read_text())
    assert type(AutoTokenizer.from_pretrained(tmp_path / "small")) is ZCodeM3Tokenizer


# --- CTranslate2


def m2m100_tokenizer(folder: Path) -> M2M100Tokenizer:
    sentencepiece = pytest.importorskip("sentencepiece")
    folder.mkdir()
    options = {"vocab_size": 60, "hard_vocab_limit": False, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 4), model_prefix=str(folder / "sp"), **options
    )
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "sp.model"))
    vocab = ["<s>", "<pad>", "</s>", "<unk>", *(pieces.id_to_piece(i) for i in range(3, pieces.get_piece_size()))]
    (folder / "vocab.json").write_text(json.dumps({piece: number for number, piece in enumerate(vocab)}))
    files = str(folder / "vocab.json"), str(folder / "sp.model")
    return M2M100Tokenizer(*files, additional_special_tokens=[*M2M100Tokenizer(*files).lang_token_to_id])


def nllb_tokenizer(folder: Path) -> NllbTokenizer:
    letters = sorted({*"".join(TEXTS)} - {" "})
    vocab = {token: number for number, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", "▁", *letters])}
    return NllbTokenizer(vocab=vocab, merges=[], extra_special_tokens=["eng_Latn", "deu_Latn"])


TOKENIZERS = {
    "zcode": (lambda folder: ZCodeM3Tokenizer(languages=["en", "de"]), "en", "de", "__de__"),
    "nllb": (nllb_tokenizer, "eng_Latn", "deu_Latn", "deu_Latn"),
    "m2m100": (m2m100_tokenizer, "en", "de", "__de__"),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("is_trimmed", [False, True], ids=["whole", "trimmed"])
def test_same_translations_by_ctranslate2(kind: str, is_trimmed: bool, tmp_path: Path) -> None:
    """Greedy, and with beams that stop when there are as many sentences as beams, which CTranslate2 always does."""
    ctranslate2 = pytest.importorskip("ctranslate2")
    from ctranslate2.converters import TransformersConverter

    make_tokenizer, source_language, target_language, tag = TOKENIZERS[kind]
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    # rows without a token behind the others, as published checkpoints have them
    model = make_model(vocab_size=max(tokenizer.get_vocab().values()) + 5, moe_token_dropout=0.1)
    folder = tmp_path / "full"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if is_trimmed:
        languages = [source_language, target_language]
        trim_vocabulary(folder, dataset=TEXTS[:2], languages=languages, output_dir=tmp_path / "trimmed")
        folder = tmp_path / "trimmed"
    export_m2m100(folder, tmp_path / "m2m100")
    TransformersConverter(str(tmp_path / "m2m100")).convert(str(tmp_path / "ct2"))
    translator = ctranslate2.Translator(str(tmp_path / "ct2"), compute_type="float32", intra_threads=1)

    exported, ours = load(tmp_path / "m2m100"), ZCodeM3ForConditionalGeneration.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, src_lang=source_language)
    inputs = tokenizer(TEXTS, padding=True, return_tensors="pt")
    tokens = [tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"]) for text in TEXTS]
    first = tokenizer.convert_tokens_to_ids(tag)
    for num_beams in (1, 4):
        options = {"num_beams": num_beams, "max_new_tokens": 9, "forced_bos_token_id": first}
        if num_beams > 1:
            options["early_stopping"] = True
        expected = [each.generate(**inputs, **options) for each in (exported, ours)]
        assert torch.equal(*expected)
        results = translator.translate_batch(
            tokens, target_prefix=[[tag]] * len(TEXTS), beam_size=num_beams, max_decoding_length=9
        )
        found = [tokenizer.convert_tokens_to_ids(result.hypotheses[0]) for result in results]
        special, known = {tokenizer.pad_token_id, tokenizer.eos_token_id}, {*tokenizer.get_vocab().values()}
        for ids, row in zip(found, expected[0].tolist(), strict=True):
            rest = [index for index in row if index not in special]
            assert ids == [index if index in known else tokenizer.unk_token_id for index in rest]
