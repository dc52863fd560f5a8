"""NLLB-MoE checkpoints load as ZCodeM3 and give the numbers of transformers 4.57.6 (tests/fixtures/README.md)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForPreTraining,
    AutoModelForSeq2SeqLM,
    NllbMoeForConditionalGeneration,
    pipeline,
)

from hf_moe_ted import (
    ZCodeM3Config,
    ZCodeM3ForConditionalGeneration,
    ZCodeM3Model,
    ZCodeM3Tokenizer,
    ZCodeM3TranslationPipeline,
)
from hf_moe_ted.testing import TINY_SIZES, tiny_config

GOLDENS = sorted((Path(__file__).parents[1] / "fixtures" / "nllb_moe").glob("*/golden.pt"))
NLLB_CONFIG = {
    "model_type": "nllb-moe",
    "architectures": ["NllbMoeForConditionalGeneration"],
    **TINY_SIZES,
    "encoder_sparse_step": 2,
    "decoder_sparse_step": 2,
    "encoder_layerdrop": 0.05,
    "num_experts": 4,
    "expert_capacity": 64,
    "normalize_router_prob_before_dropping": True,
    "moe_token_dropout": 0.2,
    "router_ignore_padding_tokens": False,
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}


def nllb_moe_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors under the names of NLLB-MoE, one tensor per expert."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        name = name.replace("encoder_attn", "cross_attention").replace("ffn.router.", "ffn.router.classifier.")
        if "layers" in name:
            name = name.replace("final_layer_norm", "ff_layer_norm")
        prefix, is_expert, last = name.partition(".experts.")
        if not is_expert:
            renamed[name] = tensor
            continue
        linear = "fc1" if last.startswith("up") else "fc2"
        for expert, part in enumerate(tensor):
            kind = "bias" if last.endswith("bias") else "weight"
            renamed[f"{prefix}.experts.expert_{expert}.{linear}.{kind}"] = part.clone()
    return renamed


@pytest.fixture
def ours() -> ZCodeM3ForConditionalGeneration:
    torch.manual_seed(0)
    options = {"num_experts_per_tok": 2, "normalize_router_weights": "before_dropping", "moe_token_dropout": 0.2}
    return ZCodeM3ForConditionalGeneration(tiny_config(init_std=0.2, **options)).eval()


@pytest.fixture
def nllb_moe(tmp_path: Path, ours: ZCodeM3ForConditionalGeneration) -> Path:
    """The weights of `ours` as an NLLB-MoE checkpoint."""
    ours.save_pretrained(tmp_path / "ours")
    folder = tmp_path / "nllb_moe"
    folder.mkdir()
    tensors = nllb_moe_tensors(load_file(tmp_path / "ours" / "model.safetensors"))
    assert "model.encoder.layers.1.ffn.experts.expert_3.fc2.bias" in tensors
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(NLLB_CONFIG))
    return folder


def test_there_are_goldens() -> None:
    assert len(GOLDENS) == 2


def test_checkpoint_loads_with_every_tensor(nllb_moe: Path, ours: ZCodeM3ForConditionalGeneration) -> None:
    loaded, info = ZCodeM3ForConditionalGeneration.from_pretrained(nllb_moe, output_loading_info=True)
    assert not any(info.values()), info
    expected = ours.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    inputs = {"input_ids": torch.randint(3, 96, (2, 7)), "decoder_input_ids": torch.randint(3, 96, (2, 5))}
    torch.testing.assert_close(loaded(**inputs).logits, ours(**inputs).logits, rtol=1e-6, atol=1e-6)


def test_loaded_checkpoint_is_saved_under_our_names(nllb_moe: Path, tmp_path: Path) -> None:
    ZCodeM3ForConditionalGeneration.from_pretrained(nllb_moe).save_pretrained(tmp_path / "again")
    again, first = (load_file(tmp_path / name / "model.safetensors") for name in ("again", "ours"))
    assert again.keys() == first.keys()
    assert all(torch.equal(again[name], first[name]) for name in first)
    assert json.loads((tmp_path / "again" / "config.json").read_text())["model_type"] == "zcode_m3"


@pytest.mark.parametrize(
    ("auto_class", "model_class"),
    [
        (AutoModel, ZCodeM3Model),
        (AutoModelForPreTraining, ZCodeM3ForConditionalGeneration),
        (AutoModelForSeq2SeqLM, ZCodeM3ForConditionalGeneration),
    ],
)
def test_auto_classes_give_the_class_that_routes(
    nllb_moe: Path, ours: ZCodeM3ForConditionalGeneration, auto_class, model_class
) -> None:
    """And not transformers' own, whose experts are not those that the router chose."""
    config = AutoConfig.from_pretrained(nllb_moe, dropout=0.3)
    options = {"dtype": torch.float64, "attn_implementation": "eager", "experts_implementation": "eager"}
    for loaded in (
        auto_class.from_pretrained(nllb_moe, dropout=0.3, **options),
        auto_class.from_pretrained(nllb_moe, config=config, **options),
        auto_class.from_config(config, **options),
    ):
        assert type(loaded) is model_class and loaded.dtype == torch.float64
        assert (loaded.config.num_experts_per_tok, loaded.config.dropout) == (2, 0.3)
        assert loaded.config._attn_implementation == loaded.config._experts_implementation == "eager"
    loaded, info = auto_class.from_pretrained(nllb_moe, output_loading_info=True)
    assert not any(info.values()), info
    inputs = {"input_ids": torch.randint(3, 96, (2, 7)), "decoder_input_ids": torch.randint(3, 96, (2, 5))}
    expected = ours.model if model_class is ZCodeM3Model else ours
    torch.testing.assert_close(loaded(**inputs)[0], expected(**inputs)[0], rtol=1e-6, atol=1e-6)


def test_auto_classes_take_fields_that_nllb_moe_has_not(nllb_moe: Path) -> None:
    fields = {"num_experts_per_tok": 1, "router_jitter_noise": 0.2, "dropout": 0.3}
    config = AutoModelForSeq2SeqLM.from_pretrained(nllb_moe, **fields).config
    assert {name: getattr(config, name) for name in fields} == fields and config.router_noise_policy == "jitter"
    with pytest.raises(ValueError, match=r"config \(NllbMoeConfig\) must be a ZCodeM3Config"):
        ZCodeM3ForConditionalGeneration.from_pretrained(nllb_moe, config=AutoConfig.from_pretrained(nllb_moe))


def test_pipeline_loads_the_class_that_routes(nllb_moe: Path) -> None:
    ZCodeM3Tokenizer(languages=["en", "de"]).save_pretrained(nllb_moe)
    translator = pipeline("zcode-m3-translation", model=str(nllb_moe), device="cpu")
    assert type(translator.model) is ZCodeM3ForConditionalGeneration
    # where ours cannot be loaded, `pipeline` goes on with the class that the config names
    (nllb_moe / "config.json").write_text(json.dumps(NLLB_CONFIG | {"num_experts": 5}))
    with pytest.raises(ValueError, match=r"load the checkpoint with ZCodeM3ForCond|Could not load model"):
        pipeline("zcode-m3-translation", model=str(nllb_moe), device="cpu")


def test_own_class_of_transformers_is_given_to_who_asks_for_it(nllb_moe: Path) -> None:
    model = NllbMoeForConditionalGeneration.from_pretrained(nllb_moe)
    assert type(model) is NllbMoeForConditionalGeneration
    with pytest.raises(ValueError, match="load the checkpoint with ZCodeM3ForConditionalGeneration"):
        ZCodeM3TranslationPipeline(model=model, tokenizer=ZCodeM3Tokenizer(languages=["en"]))


def test_missing_expert_is_refused(nllb_moe: Path) -> None:
    tensors = load_file(nllb_moe / "model.safetensors")
    for name in [name for name in tensors if "encoder.layers.1.ffn.experts" in name and ".fc1.bias" in name]:
        del tensors[name]
    save_file(tensors, nllb_moe / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing: model\.encoder\.layers\.1\.ffn\.experts\.up_proj_bias"):
        ZCodeM3ForConditionalGeneration.from_pretrained(nllb_moe)


def test_config(nllb_moe: Path) -> None:
    config = ZCodeM3Config.from_pretrained(nllb_moe)
    expected = tiny_config(
        num_experts_per_tok=2,
        normalize_router_weights="before_dropping",
        token_drop_policy="position",
        moe_token_dropout=0.2,
        dropout=0.1,
        attention_dropout=0.1,
    )
    assert config.to_diff_dict() == expected.to_diff_dict() | {
        name: value for name, value in config.to_diff_dict().items() if name in ("architectures", "_name_or_path")
    }


@pytest.mark.parametrize(("fraction", "factor"), [(1.0, None), (0.25, 0.5), (-1.0, None)])
def test_capacity_of_evaluation(nllb_moe: Path, fraction: float, factor: float | None) -> None:
    """A quarter of all tokens per expert is, with 4 experts and 2 per token, half of an even share."""
    (nllb_moe / "config.json").write_text(json.dumps({**NLLB_CONFIG, "moe_eval_capacity_token_fraction": fraction}))
    assert ZCodeM3Config.from_pretrained(nllb_moe).eval_capacity_factor == factor


@pytest.mark.parametrize("path", GOLDENS, ids=lambda path: path.parent.name)
def test_golden_numbers(path: Path) -> None:
    """Logits and encoder states to 1e-5, greedy and beam output identical."""
    golden = torch.load(path, weights_only=True)
    model = ZCodeM3ForConditionalGeneration.from_pretrained(path.parent).eval()
    close = {"rtol": 1e-5, "atol": 1e-5}
    batch = {name: golden[name] for name in ("input_ids", "attention_mask", "decoder_input_ids")}
    first = {name: tensor[:1, golden["attention_mask"][0].bool()] for name, tensor in batch.items() if "in" in name[:2]}
    output = model(**first, decoder_input_ids=batch["decoder_input_ids"][:1])
    torch.testing.assert_close(output.logits, golden["logits_unpadded_first"], **close)
    torch.testing.assert_close(output.encoder_last_hidden_state, golden["encoder_last_hidden_state_first"], **close)
    torch.testing.assert_close(model(**batch).logits, golden["logits_padded_batch"], **close)
    for name, num_beams in (("greedy_first", 1), ("beam4_first", 4)):
        generated = model.generate(**first, num_beams=num_beams, max_new_tokens=golden[name].shape[1] - 1)
        assert generated.tolist() == golden[name].tolist()
