"""Every model of the family, however it is stored and loaded, translates as its `generate` does by hand."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForPreTraining,
    AutoModelForSeq2SeqLM,
    M2M100Config,
    M2M100ForConditionalGeneration,
    M2M100Tokenizer,
    MarianConfig,
    MarianMTModel,
    MBartConfig,
    MBartForConditionalGeneration,
    NllbMoeForConditionalGeneration,
    NllbTokenizer,
    T5Config,
    T5ForConditionalGeneration,
    TorchAoConfig,
    pipeline,
)
from translation_cases import MakeModel, tiny_model

from hf_moe_ted import (
    TextTranslator,
    ZCodeM3ForConditionalGeneration,
    ZCodeM3Model,
    ZCodeM3Tokenizer,
    ZCodeM3TranslationPipeline,
    evaluate_translation,
    load_model_and_tokenizer,
    quantize_experts,
    translate_file,
)

NLLB_MOE = Path(__file__).parents[1] / "fixtures" / "nllb_moe" / "tiny_a"
TEXTS = ["save the file", "close all"]
SIZES: dict[str, Any] = {
    **dict.fromkeys(("encoder_layers", "decoder_layers", "encoder_attention_heads", "decoder_attention_heads"), 2),
    **{"d_model": 16, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 64},
}
SIDES = ("encoder", "decoder")
TASK = "zcode-m3-translation"
Make = Callable[[Path], Any]


def save_zcode_m3(folder: Path) -> None:
    tiny_model(tie_word_embeddings=False).save_pretrained(folder)
    ZCodeM3Tokenizer(languages=["en", "de", "zh"]).save_pretrained(folder)


def save_quantized(folder: Path) -> None:
    before = folder.with_name("before")
    save_zcode_m3(before)
    quantize_experts(before, bits=4, output_dir=folder)


def nllb_tokenizer() -> NllbTokenizer:
    tokens = ["<s>", "<pad>", "</s>", "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz"]
    vocab = {token: number for number, token in enumerate(tokens)}
    return NllbTokenizer(vocab=vocab, merges=[], extra_special_tokens=["eng_Latn", "deu_Latn", "zho_Hans"])


def save_nllb_moe(folder: Path) -> None:
    """With weights so large, and a head of its own, that a translation depends on its source."""
    folder.mkdir(exist_ok=True)
    config = json.loads((NLLB_MOE / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    tensors = load_file(NLLB_MOE / "model.safetensors")
    tensors = {name: tensor if "norm" in name else 20 * tensor for name, tensor in tensors.items()}
    torch.manual_seed(0)
    head = torch.randn(config["vocab_size"], config["d_model"])
    untied = {f"model.{side}.embed_tokens.weight": tensors["model.shared.weight"].clone() for side in SIDES}
    save_file({**tensors, **untied, "lm_head.weight": head}, folder / "model.safetensors", metadata={"format": "pt"})
    nllb_tokenizer().save_pretrained(folder)


def m2m100(vocab_size: int) -> M2M100ForConditionalGeneration:
    torch.manual_seed(0)
    tokens = {"pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    config = M2M100Config(vocab_size=vocab_size, init_std=0.4, tie_word_embeddings=False, **tokens, **SIZES)
    return M2M100ForConditionalGeneration(config).eval()


def save_nllb(folder: Path) -> None:
    m2m100(vocab_size=40).save_pretrained(folder)
    nllb_tokenizer().save_pretrained(folder)


def save_m2m100(folder: Path) -> None:
    """With transformers' tokenizer of M2M100, whose languages come after 60 pieces of sentencepiece."""
    sentencepiece = pytest.importorskip("sentencepiece")
    lines = [f"{word} {other}" for word in TEXTS for other in ("a tab", "the window", "files", "quickly")]
    folder.mkdir(exist_ok=True)
    spm = folder / "trained"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(spm), vocab_size=60, hard_vocab_limit=False, minloglevel=2
    )
    pieces = sentencepiece.SentencePieceProcessor(model_file=f"{spm}.model")
    vocab = ["<s>", "<pad>", "</s>", "<unk>", *(pieces.id_to_piece(i) for i in range(3, pieces.get_piece_size()))]
    (folder / "vocab.json").write_text(json.dumps({piece: number for number, piece in enumerate(vocab)}))
    files = str(folder / "vocab.json"), f"{spm}.model"
    tags = [*M2M100Tokenizer(*files).lang_token_to_id]  # special tokens, as in the published checkpoints
    tokenizer = M2M100Tokenizer(*files, additional_special_tokens=tags)
    m2m100(vocab_size=max(tokenizer.lang_code_to_id.values()) + 1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


MEMBERS = {
    "zcode_m3": save_zcode_m3,
    "quantized": save_quantized,
    "nllb_moe": save_nllb_moe,
    "nllb": save_nllb,
    "m2m100": save_m2m100,
}
each_member = pytest.mark.parametrize("folder", MEMBERS, indirect=True)


@pytest.fixture
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    MEMBERS[request.param](tmp_path / "model")
    return tmp_path / "model"


def by_hand(model: Any, tokenizer: Any, **options: Any) -> list[str]:
    """English to German, a sentence at a time."""
    if isinstance(tokenizer, ZCodeM3Tokenizer | M2M100Tokenizer):
        english, german = "en", tokenizer.get_lang_id("de")
    else:
        english, german = "eng_Latn", tokenizer.convert_tokens_to_ids("deu_Latn")
    tokenizer.src_lang = english
    outputs = [
        model.generate(**tokenizer(text, return_tensors="pt"), forced_bos_token_id=german, max_new_tokens=8, **options)
        for text in TEXTS
    ]
    return [tokenizer.decode(output[0], skip_special_tokens=True) for output in outputs]


def texts_of(pipe: Any, **options: Any) -> list[str]:
    found = pipe(TEXTS, src_lang="eng", tgt_lang="de-DE", max_new_tokens=8, batch_size=2, **options)
    return [item["translation_text"] for item in found]


def translator_of(model: Any, tokenizer: Any, num_beams: int = 3) -> TextTranslator:
    return TextTranslator(model, tokenizer, num_beams=num_beams, max_new_tokens=8)


@each_member
def test_every_way_translates_as_generate(folder: Path) -> None:
    model, tokenizer = load_model_and_tokenizer(folder, device="cpu")
    expected = by_hand(model, tokenizer, num_beams=3)
    assert len(set(expected)) == 2
    assert not any("__" in text or "_Latn" in text for text in expected)  # no tags of languages
    translated = translator_of(model, tokenizer).translate(TEXTS, "eng_Latn", "DE")
    assert [text.text for text in translated] == expected
    assert texts_of(pipeline(TASK, model=str(folder), device="cpu"), num_beams=3) == expected
    assert texts_of(ZCodeM3TranslationPipeline(model=model, tokenizer=tokenizer, device="cpu")) == by_hand(
        model, tokenizer, num_beams=1
    )
    source, output = folder.parent / "in.txt", folder.parent / "out.txt"
    source.write_text("".join(f"{text}\n" for text in TEXTS))
    translate_file(translator_of(model, tokenizer), source, output, src_lang="en", tgt_lang="de")
    assert output.read_text() == "".join(f"{text}\n" for text in expected)


@each_member
def test_offloaded_to_disk(folder: Path, tmp_path: Path) -> None:
    model, tokenizer = load_model_and_tokenizer(folder, device="cpu")
    expected = by_hand(model, tokenizer, num_beams=3)
    offloaded = accelerate.disk_offload(model, tmp_path / "weights", execution_device=torch.device("cpu"))
    assert offloaded.device.type == "meta"
    assert [text.text for text in translator_of(offloaded, tokenizer).translate(TEXTS, "en", "de")] == expected
    pipe = ZCodeM3TranslationPipeline(model=offloaded, tokenizer=tokenizer)
    assert pipe.device.type == "cpu"
    assert texts_of(pipe, num_beams=3) == expected


@pytest.mark.parametrize("member", ["zcode_m3", "nllb"])
def test_device_map(member: str, tmp_path: Path) -> None:
    """Some layers on disk, the others in memory; and all of them on disk."""
    folder = tmp_path / "model"
    MEMBERS[member](folder)
    model, tokenizer = load_model_and_tokenizer(folder, device="cpu")
    expected = by_hand(model, tokenizer, num_beams=3)
    names = ["model.shared", "lm_head", "model.encoder", "model.decoder.embed_tokens", "model.decoder.embed_positions"]
    device_map = {**dict.fromkeys([*names, "model.decoder.layer_norm"], "cpu"), "model.decoder.layers": "disk"}
    pipe = pipeline(TASK, model=str(folder), device_map=device_map)
    assert {parameter.device.type for parameter in pipe.model.parameters()} == {"cpu", "meta"}
    assert texts_of(pipe, num_beams=3) == expected
    assert [text.text for text in translator_of(pipe.model, tokenizer).translate(TEXTS, "en", "de")] == expected
    on_disk = type(model).from_pretrained(folder, device_map={"": "disk"}, offload_folder=tmp_path / "weights")
    assert [text.text for text in translator_of(on_disk, tokenizer).translate(TEXTS, "en", "de")] == expected
    with pytest.raises(ValueError, match=r"first weights of the model are on disk .* keep model.shared in memory"):
        ZCodeM3TranslationPipeline(model=on_disk, tokenizer=tokenizer)


def test_device_that_is_chosen_by_size(tmp_path: Path) -> None:
    save_zcode_m3(tmp_path)
    model, tokenizer = load_model_and_tokenizer(tmp_path, device="auto")
    assert by_hand(model, tokenizer) == by_hand(*load_model_and_tokenizer(tmp_path, device="cpu"))


def test_model_on_the_meta_device(make_model: MakeModel) -> None:
    model = make_model().to("meta")
    with pytest.raises(ValueError, match=r"ZCodeM3ForConditionalGeneration is on the meta device, .* load it first"):
        translator_of(model, ZCodeM3Tokenizer(languages=["en", "de"])).translate(TEXTS, "en", "de")


@pytest.mark.parametrize("member", ["zcode_m3", "nllb", "nllb_moe"])
def test_quantized_by_torchao(member: str, tmp_path: Path) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    MEMBERS[member](tmp_path / "model")
    config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "model", quantization_config=config)
    _, tokenizer = load_model_and_tokenizer(tmp_path / "model", device="cpu")
    expected = by_hand(model, tokenizer, num_beams=3)
    assert [text.text for text in translator_of(model, tokenizer).translate(TEXTS, "en", "de")] == expected
    assert texts_of(ZCodeM3TranslationPipeline(model=model, tokenizer=tokenizer), num_beams=3) == expected


# NLLB-MoE: transformers' own class sends all tokens to two experts, and no way leads to it once the package is imported


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForSeq2SeqLM, AutoModelForPreTraining])
def test_auto_classes_of_nllb_moe(auto_class: Any) -> None:
    expected = ZCodeM3Model if auto_class is AutoModel else ZCodeM3ForConditionalGeneration
    assert type(auto_class.from_pretrained(NLLB_MOE)) is expected
    assert type(auto_class.from_config(AutoModelForSeq2SeqLM.from_pretrained(NLLB_MOE).config)) is expected


def test_pipelines_of_nllb_moe(tmp_path: Path) -> None:
    save_nllb_moe(tmp_path)
    named: dict[str, Any] = {"pipeline_class": ZCodeM3TranslationPipeline}
    for task, options in ((TASK, {}), ("feature-extraction", {}), (TASK, named)):
        pipe = pipeline(task, model=str(tmp_path), device="cpu", **options)
        assert type(pipe.model).__module__ == "hf_moe_ted.models.modeling_zcode_m3"
    own = NllbMoeForConditionalGeneration.from_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"NllbMoeForConditionalGeneration \(nllb-moe\) does not belong to .* two experts"
    ):
        pipeline(TASK, model=own, tokenizer=nllb_tokenizer())
    with pytest.raises(
        ValueError, match=r"NllbMoeForConditionalGeneration \(nllb-moe\) does not belong to .* two experts"
    ):
        translator_of(own, nllb_tokenizer())


# Other families

OTHERS: dict[str, tuple[Callable[[], Any], str]] = {
    "t5": (
        lambda: T5ForConditionalGeneration(
            T5Config(vocab_size=120, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        ),
        "T5ForConditionalGeneration (t5) does not belong to the models that translate here, ZCodeM3, NLLB-MoE, M2M100 "
        "and NLLB: its task is given in words before the text; use its own generate",
    ),
    "marian": (
        lambda: MarianMTModel(MarianConfig(vocab_size=120, pad_token_id=1, **SIZES)),
        "MarianMTModel (marian) does not belong to the models that translate here, ZCodeM3, NLLB-MoE, M2M100 and NLLB: "
        "it translates one language pair and has no language tokens; use its own generate",
    ),
    "mbart": (
        lambda: MBartForConditionalGeneration(MBartConfig(vocab_size=120, **SIZES)),
        "MBartForConditionalGeneration (mbart) does not belong to the models that translate here, ZCodeM3, NLLB-MoE, "
        "M2M100 and NLLB: in some of these models the source language stands at the end of the source; use its own "
        "generate",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_families_are_refused(name: str, tmp_path: Path) -> None:
    make, message = OTHERS[name]
    model, tokenizer = make(), nllb_tokenizer()
    for build in (translator_of, lambda m, t: ZCodeM3TranslationPipeline(model=m, tokenizer=t)):
        with pytest.raises(ValueError) as error:
            build(model, tokenizer)
        assert str(error.value) == message
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"model \(.*\) \({name}\) does not belong to the models that translate here"):
        load_model_and_tokenizer(tmp_path)


def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused() -> None:
    """As where a language was added to the tokenizer alone."""
    tokenizer = ZCodeM3Tokenizer(languages=["en", "de"])
    model = tiny_model(vocab_size=len(tokenizer))
    tokenizer.add_languages(["uk"])
    row = {"src_lang": "en", "tgt_lang": "de", "source": "a", "target": "b"}
    for translates in (
        lambda: TextTranslator(model, tokenizer),
        lambda: ZCodeM3TranslationPipeline(model=model, tokenizer=tokenizer)("a", src_lang="en", tgt_lang="de"),
        lambda: evaluate_translation(model, tokenizer, [row]),
    ):
        with pytest.raises(ValueError, match=r"embeddings for \d+; call model.resize_token_embeddings"):
            translates()
    model.resize_token_embeddings(len(tokenizer))
    assert TextTranslator(model, tokenizer).languages == ["en", "de", "uk"]
