"""Converted NLLB-MoE checkpoints equal those that `from_pretrained` reads directly, and the goldens of 4.57.6."""

import json
import runpy
import shutil
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GenerationConfig,
    NllbMoeConfig,
    NllbMoeForConditionalGeneration,
    NllbTokenizer,
)

from hf_moe_ted import (
    ZCodeM3Config,
    ZCodeM3ForConditionalGeneration,
    ZCodeM3TranslationPipeline,
    convert_nllb_moe_checkpoint,
)
from hf_moe_ted.tensors import lazy_tensors

REPOSITORY = Path(__file__).parents[2]
GOLDENS = [REPOSITORY / "tests" / "fixtures" / "nllb_moe" / name for name in ("tiny_a", "tiny_b")]
EXPERT = "model.encoder.layers.1.ffn.experts.expert_3.fc1.weight"


@pytest.fixture
def nllb_moe(tmp_path: Path) -> Path:
    """A copy of a checkpoint that tests may change."""
    shutil.copytree(GOLDENS[0], tmp_path / "nllb_moe")
    return tmp_path / "nllb_moe"


def change(folder: Path, change_tensors) -> None:
    tensors = load_file(folder / "model.safetensors")
    change_tensors(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def weights(folder: Path) -> dict[str, Tensor]:
    return ZCodeM3ForConditionalGeneration.from_pretrained(folder).state_dict()


def assert_same_weights(folder: Path, expected: dict[str, Tensor]) -> None:
    found = weights(folder)
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize("source", GOLDENS, ids=lambda path: path.name)
def test_golden_numbers(source: Path, tmp_path: Path) -> None:
    report = convert_nllb_moe_checkpoint(source, tmp_path / "ours")
    golden = torch.load(source / "golden.pt", weights_only=True)
    model, info = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert isinstance(model, ZCodeM3ForConditionalGeneration)
    assert not any(info.values()), info
    inputs = {name: golden[name] for name in ("input_ids", "attention_mask", "decoder_input_ids")}
    torch.testing.assert_close(model.eval()(**inputs).logits, golden["logits_padded_batch"], rtol=1e-5, atol=1e-5)
    first = golden["input_ids"][:1, golden["attention_mask"][0].bool()]
    for name, num_beams in (("greedy_first", 1), ("beam4_first", 4)):
        generated = model.generate(first, num_beams=num_beams, max_new_tokens=golden[name].shape[1] - 1)
        assert generated.tolist() == golden[name].tolist()
    assert report.num_parameters == model.num_parameters()
    assert report.num_experts == {"tiny_a": (8, 8, 8, 8), "tiny_b": (8, 8)}[source.name]
    assert str(report.output_dir) in str(report)


def test_config_and_weights_are_those_of_direct_loading(tmp_path: Path) -> None:
    convert_nllb_moe_checkpoint(GOLDENS[0], tmp_path / "ours")
    assert_same_weights(tmp_path / "ours", weights(GOLDENS[0]))
    expected = ZCodeM3Config.from_pretrained(GOLDENS[0]).to_dict()
    found = ZCodeM3Config.from_pretrained(tmp_path / "ours").to_dict()
    differing = {name for name in expected | found if expected.get(name) != found.get(name)}
    assert differing <= {"_name_or_path", "architectures", "transformers_version", "dtype"}
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["model_type"] == "zcode_m3"


def test_source_is_left_alone(nllb_moe: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in nllb_moe.iterdir()}
    convert_nllb_moe_checkpoint(nllb_moe, tmp_path / "ours")
    assert {path.name: path.read_bytes() for path in nllb_moe.iterdir()} == before


def store_in_shards(folder: Path, tensors: dict[str, Tensor], suffix: str) -> None:
    """Two shards with an index; experts of one layer are spread over both."""
    names = list(tensors)
    files = {f"weights-{i}{suffix}": names[i::2] for i in range(2)}
    for file, part in files.items():
        content = {name: tensors[name] for name in part}
        save_file(content, folder / file) if suffix == ".safetensors" else torch.save(content, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, part in files.items() for name in part}}
    index_name = "model.safetensors.index.json" if suffix == ".safetensors" else "pytorch_model.bin.index.json"
    (folder / index_name).write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()


def store_bin(folder: Path, tensors: dict[str, Tensor]) -> None:
    """As old versions of transformers: tied tensors several times, sharing memory, and the sinusoids."""
    shared = {f"model.{side}.embed_tokens.weight": tensors["model.shared.weight"] for side in ("encoder", "decoder")}
    sinusoids = {"model.encoder.embed_positions.weights": torch.zeros(66, 32)}
    content = {**tensors, **shared, "lm_head.weight": tensors["model.shared.weight"], **sinusoids}
    torch.save(content, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def store_stacked(folder: Path, tensors: dict[str, Tensor]) -> None:
    """The experts of a layer as one tensor, under the names of transformers' experts contract."""
    stacked = {name: tensor for name, tensor in tensors.items() if ".expert_" not in name}
    for name in tensors:
        if ".expert_0." in name:
            prefix, last = name.split("expert_0.")
            kind = last.replace("fc1.weight", "up_proj").replace("fc1.bias", "up_proj_bias")
            kind = kind.replace("fc2.weight", "down_proj").replace("fc2.bias", "down_proj_bias")
            experts = [name.replace("expert_0.", f"expert_{e}.") for e in range(len(tensors))]
            stacked[prefix + kind] = torch.stack([tensors[expert] for expert in experts if expert in tensors])
    save_file(stacked, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    "store",
    [
        lambda folder, tensors: store_in_shards(folder, tensors, ".safetensors"),
        lambda folder, tensors: store_in_shards(folder, tensors, ".bin"),
        store_bin,
        store_stacked,
    ],
    ids=["sharded", "sharded-bin", "bin-with-tied-copies", "stacked-experts"],
)
def test_every_layout_gives_the_same_weights(store, nllb_moe: Path, tmp_path: Path) -> None:
    expected = weights(nllb_moe)
    store(nllb_moe, load_file(nllb_moe / "model.safetensors"))
    convert_nllb_moe_checkpoint(nllb_moe, tmp_path / "ours")
    assert_same_weights(tmp_path / "ours", expected)


def test_stacked_experts_load_without_conversion(nllb_moe: Path) -> None:
    expected = weights(nllb_moe)
    store_stacked(nllb_moe, load_file(nllb_moe / "model.safetensors"))
    assert_same_weights(nllb_moe, expected)


def test_experts_are_stacked_by_number(nllb_moe: Path, tmp_path: Path) -> None:
    """Of 12 experts, number 2 comes before 10."""
    config = json.loads((nllb_moe / "config.json").read_text()) | {"num_experts": 12}
    (nllb_moe / "config.json").write_text(json.dumps(config))

    def more_experts(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            if ".expert_0." in name:
                for expert in range(12):
                    tensors[name.replace("expert_0.", f"expert_{expert}.")] = torch.full_like(tensors[name], expert)
            elif name.endswith("classifier.weight"):
                tensors[name] = torch.zeros(12, tensors[name].shape[1])

    change(nllb_moe, more_experts)
    convert_nllb_moe_checkpoint(nllb_moe, tmp_path / "ours")
    up_proj = load_file(tmp_path / "ours" / "model.safetensors")["model.encoder.layers.1.ffn.experts.up_proj"]
    assert up_proj[:, 0, 0].tolist() == list(range(12))


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16])
def test_dtype(dtype: str | torch.dtype, tmp_path: Path) -> None:
    report = convert_nllb_moe_checkpoint(GOLDENS[0], tmp_path / "ours", dtype=dtype)
    model = ZCodeM3ForConditionalGeneration.from_pretrained(tmp_path / "ours", dtype="auto")
    expected = ZCodeM3ForConditionalGeneration.from_pretrained(GOLDENS[0])
    assert str(model.dtype).endswith(str(dtype).removeprefix("torch."))
    assert report.dtypes == (model.dtype,)
    for name, parameter in load_file(tmp_path / "ours" / "model.safetensors").items():
        assert torch.equal(parameter, expected.state_dict()[name].to(model.dtype)), name


def test_shards(tmp_path: Path) -> None:
    report = convert_nllb_moe_checkpoint(GOLDENS[0], tmp_path / "ours", max_shard_size="200KB")
    files = sorted(path.name for path in (tmp_path / "ours").glob("*.safetensors"))
    assert len(files) > 3
    assert sorted(report.weight_files) == [*files, "model.safetensors.index.json"]
    assert all((tmp_path / "ours" / file).stat().st_size < 250_000 for file in files)
    assert_same_weights(tmp_path / "ours", weights(GOLDENS[0]))


def test_files_are_opened_again_after_so_many_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lazy_tensors, "MAX_MAPPED_BYTES", 10_000)
    convert_nllb_moe_checkpoint(GOLDENS[0], tmp_path / "ours")
    assert_same_weights(tmp_path / "ours", weights(GOLDENS[0]))


def test_tokenizer_and_generation_config_come_along(nllb_moe: Path, tmp_path: Path) -> None:
    tokenizer = NllbTokenizer(extra_special_tokens=["eng_Latn", "deu_Latn"], src_lang="eng_Latn", tgt_lang="deu_Latn")
    tokenizer = tokenizer.train_new_from_iterator(["guten morgen", "good morning"] * 20, 90)
    tokenizer.save_pretrained(nllb_moe)
    GenerationConfig(max_length=17, num_beams=3, decoder_start_token_id=2).save_pretrained(nllb_moe)
    report = convert_nllb_moe_checkpoint(nllb_moe, tmp_path / "ours")
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= set(report.other_files)
    model = ZCodeM3ForConditionalGeneration.from_pretrained(tmp_path / "ours")
    assert (model.generation_config.max_length, model.generation_config.num_beams) == (17, 3)
    for loaded in (
        NllbTokenizer.from_pretrained(tmp_path / "ours", src_lang="eng_Latn", tgt_lang="deu_Latn"),
        AutoTokenizer.from_pretrained(tmp_path / "ours", src_lang="eng_Latn", tgt_lang="deu_Latn"),
    ):
        assert type(loaded) is NllbTokenizer
        assert dict(loaded("good", text_target="guten")) == dict(
            NllbTokenizer.from_pretrained(nllb_moe, src_lang="eng_Latn", tgt_lang="deu_Latn")(
                "good", text_target="guten"
            )
        )
    translator = ZCodeM3TranslationPipeline(model=model, tokenizer=loaded)
    translation = translator("good morning", src_lang="eng_Latn", tgt_lang="deu_Latn", max_new_tokens=5)
    assert isinstance(translation[0]["translation_text"], str)


def test_layout_of_the_published_model_has_its_number_of_parameters() -> None:
    """facebook/nllb-moe-54b, on the meta device."""
    fields = {
        "vocab_size": 256206,
        "d_model": 2048,
        "encoder_layers": 24,
        "decoder_layers": 24,
        "encoder_ffn_dim": 8192,
        "decoder_ffn_dim": 8192,
        "encoder_sparse_step": 4,
        "decoder_sparse_step": 4,
        "num_experts": 128,
    }
    with torch.device("meta"):
        ours = ZCodeM3ForConditionalGeneration(ZCodeM3Config.from_dict({"model_type": "nllb-moe", **fields}))
        theirs = NllbMoeForConditionalGeneration(NllbMoeConfig(**fields))
    assert ours.num_parameters() == theirs.num_parameters() == 54_500_569_088


@pytest.mark.parametrize(
    ("change_tensors", "message"),
    [
        (
            lambda tensors: tensors.pop(EXPERT),
            r"expert 3 of model\.encoder\.layers\.1\.ffn\.experts\.up_proj is missing",
        ),
        (
            lambda tensors: (
                tensors.pop("model.decoder.layers.0.fc1.weight", None)
                or tensors.pop("model.encoder.layers.0.self_attn.q_proj.weight")
            ),
            r"missing: model\.",
        ),
        (lambda tensors: tensors.update({"model.extra": torch.zeros(2)}), r"unknown: model\.extra"),
        (lambda tensors: tensors.update({EXPERT: torch.zeros(3, 3)}), r"expert_3\.fc1\.weight is .* of shape \(3, 3\)"),
        (
            lambda tensors: tensors.update({"model.encoder.layer_norm.bias": torch.zeros(5)}),
            r"model\.encoder\.layer_norm\.bias has the shape \(5,\), but the config needs \(32,\)",
        ),
        (
            lambda tensors: tensors.update({"lm_head.weight": torch.ones_like(tensors["model.shared.weight"])}),
            r"lm_head\.weight and model\.shared\.weight differ",
        ),
        (
            lambda tensors: tensors.update({EXPERT.replace("expert_3", "expert_99"): tensors[EXPERT].clone()}),
            r"expert 8 of .* is missing",
        ),
    ],
)
def test_wrong_tensors_are_named(change_tensors, message: str, nllb_moe: Path, tmp_path: Path) -> None:
    change(nllb_moe, change_tensors)
    with pytest.raises(ValueError, match=message):
        convert_nllb_moe_checkpoint(nllb_moe, tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["nllb_moe"]


def test_wrong_sources_are_named(nllb_moe: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere\) must be a folder with config.json"):
        convert_nllb_moe_checkpoint(tmp_path / "nowhere", tmp_path / "ours")
    (nllb_moe / "model.safetensors").write_bytes((nllb_moe / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model.safetensors cannot be read; it may be truncated"):
        convert_nllb_moe_checkpoint(nllb_moe, tmp_path / "ours")
    (nllb_moe / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has none of model.safetensors"):
        convert_nllb_moe_checkpoint(nllb_moe, tmp_path / "ours")
    (nllb_moe / "config.json").write_text(json.dumps({"model_type": "m2m_100"}))
    with pytest.raises(ValueError, match=r"has model_type 'm2m_100', an NLLB-MoE checkpoint has 'nllb-moe'"):
        convert_nllb_moe_checkpoint(nllb_moe, tmp_path / "ours")


def test_missing_shard_is_named(nllb_moe: Path, tmp_path: Path) -> None:
    store_in_shards(nllb_moe, load_file(nllb_moe / "model.safetensors"), ".safetensors")
    (nllb_moe / "weights-1.safetensors").unlink()
    with pytest.raises(ValueError, match=r"weights-1.safetensors does not exist"):
        convert_nllb_moe_checkpoint(nllb_moe, tmp_path / "ours")


def test_pickled_code_is_refused(nllb_moe: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    (nllb_moe / "model.safetensors").unlink()
    torch.save({"model.shared.weight": Evil()}, nllb_moe / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model.bin names getattr, .*nothing in the file was executed"):
        convert_nllb_moe_checkpoint(nllb_moe, tmp_path / "ours")
    assert not (tmp_path / "executed").exists()


def test_dtype_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"dtype \(int8\) must be a floating-point one"):
        convert_nllb_moe_checkpoint(GOLDENS[0], tmp_path / "ours", dtype="int8")


def test_existing_folder_is_replaced_only_if_asked(tmp_path: Path) -> None:
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "precious.txt").write_text("text")
    with pytest.raises(ValueError, match=r"ours\) is not empty"):
        convert_nllb_moe_checkpoint(GOLDENS[0], tmp_path / "ours")
    assert (tmp_path / "ours" / "precious.txt").read_text() == "text"
    with pytest.raises(ValueError, match=r"ours\) is not replaced: it has precious\.txt"):
        convert_nllb_moe_checkpoint(GOLDENS[0], tmp_path / "ours", overwrite=True)
    (tmp_path / "ours" / "precious.txt").unlink()
    for golden in (GOLDENS[1], GOLDENS[0]):
        convert_nllb_moe_checkpoint(golden, tmp_path / "ours", overwrite=True)
    assert_same_weights(tmp_path / "ours", weights(GOLDENS[0]))


def test_script_converts(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    script = str(REPOSITORY / "convert" / "nllb_moe_to_hf.py")
    monkeypatch.setattr(sys, "argv", [script, str(GOLDENS[1]), str(tmp_path / "ours"), "--dtype", "bfloat16"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(script, run_name="__main__")
    assert not end.value.code
    assert "bfloat16" in capsys.readouterr().out
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ZCodeM3ForConditionalGeneration.from_pretrained(tmp_path / "ours", dtype="auto").dtype == torch.bfloat16
