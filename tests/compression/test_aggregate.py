"""One model of several: what they share is the mean, their experts and router rows stand side by side."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig

from hf_moe_ted import ZCodeM3ForConditionalGeneration, ZCodeM3Tokenizer
from hf_moe_ted.compression.aggregate import aggregate_experts
from hf_moe_ted.tensors import safetensors_io

MakeModel = Callable[..., ZCodeM3ForConditionalGeneration]
Save = Callable[..., Path]
LAYERS = ("model.encoder.layers.1.ffn", "model.encoder.layers.3.ffn", "model.decoder.layers.1.ffn")


@pytest.fixture
def save(make_model: MakeModel, tokenizer: ZCodeM3Tokenizer, tmp_path: Path) -> Save:
    """Saves a model whose weights depend on the seed, with a tokenizer."""

    def save_model(name: str, seed: int, dtype: torch.dtype = torch.float32, **overrides: Any) -> Path:
        model = make_model(**overrides)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        model.generation_config = GenerationConfig(num_beams=3, pad_token_id=1, decoder_start_token_id=2)
        model.to(dtype).save_pretrained(tmp_path / name, max_shard_size="60KB")
        tokenizer.save_pretrained(tmp_path / name)
        return tmp_path / name

    return save_model


def load(folder: Path) -> Any:
    model, info = ZCodeM3ForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model


OPTIONS: dict[str, dict[str, Any]] = {
    "top1": {},
    "top2": {"num_experts_per_tok": 2, "normalize_router_weights": "after_dropping"},
    "bias-residual": {"router_bias": True, "use_residual": True},
    "untied": {"tie_word_embeddings": False, "position_embedding_type": "tupe"},
    "bfloat16": {"dtype": torch.bfloat16},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_weights(options: dict[str, Any], save: Save, tmp_path: Path) -> None:
    """Experts and router rows bit for bit those of the parents, all else their mean."""
    folders = [save(f"m{seed}", seed, num_experts=count, **options) for seed, count in enumerate((4, [3, 4, 5], 4))]
    report = aggregate_experts(folders, tmp_path / "all", max_shard_size="100KB")
    parents, model = [load(folder).state_dict() for folder in folders], load(tmp_path / "all")
    assert model.config.num_experts == [11, 12, 13]
    for name, found in model.state_dict().items():
        weights = [parent[name] for parent in parents]
        if ".router." in name or ".experts." in name:
            assert torch.equal(found, torch.cat(weights)), name
        else:
            assert torch.equal(found, torch.stack(weights).double().mean(dim=0).to(found.dtype)), name
    assert report.num_experts == dict(zip(LAYERS, [[4, 3, 4], [4, 4, 4], [4, 5, 4]], strict=True))
    assert report.num_parameters_after == model.num_parameters()


@torch.no_grad()
@pytest.mark.parametrize("name", ["top1", "top2", "bias-residual"])
def test_routing_among_the_experts_of_a_parent(name: str, save: Save, tmp_path: Path) -> None:
    """With the other parents' logits at minus infinity, a layer routes and computes as that of the parent does."""
    options = OPTIONS[name]
    folders = [save("a", 0, **options), save("b", 1, **options)]
    aggregate_experts(folders, tmp_path / "all")
    both, second = load(tmp_path / "all").eval(), load(folders[1]).eval()
    tokens = torch.randn(2, 20, 32, generator=torch.Generator().manual_seed(2))
    for layer in LAYERS:
        full, expected = both.get_submodule(layer), second.get_submodule(layer)
        full.residual = expected.residual  # averaged weights are compared above

        def logits(hidden_TD: Tensor, router: Any = full.router, original: Any = full.router._logits) -> Tensor:
            return original(hidden_TD).masked_fill(torch.arange(router.num_experts) < 4, -torch.inf)

        full.router._logits = logits
        routings = [module.router(tokens.flatten(0, 1))[1] for module in (full, expected)]
        assert torch.equal(routings[0].expert_ids, routings[1].expert_ids + 4)
        torch.testing.assert_close(routings[0].weights, routings[1].weights)
        torch.testing.assert_close(full(tokens)[0], expected(tokens)[0])


def test_equal_parents_with_normalized_weights(save: Save, tmp_path: Path) -> None:
    """Of a model with itself, each pair of top-2 experts is an expert and its copy."""
    folder = save("a", 0, num_experts_per_tok=1, normalize_router_weights="after_dropping")
    aggregate_experts([folder, folder], tmp_path / "twice")
    tokens = torch.randint(4, 270, (3, 9), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        logits = [load(f)(input_ids=tokens, decoder_input_ids=tokens).logits for f in (folder, tmp_path / "twice")]
    torch.testing.assert_close(*logits)


def test_what_comes_along(save: Save, tmp_path: Path) -> None:
    folders = [save("a", 0), save("b", 1, dropout=0.3)]
    config = json.loads((folders[1] / "tokenizer_config.json").read_text())
    config |= {"src_lang": "de", "is_local": True, "local_files_only": False}  # of one that was loaded and saved
    (folders[1] / "tokenizer_config.json").write_text(json.dumps(config))
    report = aggregate_experts(folders, tmp_path / "both")
    assert ZCodeM3Tokenizer.from_pretrained(tmp_path / "both").languages == ["en", "de", "fr"]
    assert load(tmp_path / "both").generation_config.num_beams == 3
    assert load(tmp_path / "both").config.dropout == 0.0
    assert "dropout is 0.0 in" in report.warnings[0] and "train the model further" in report.warnings[1]
    written = json.loads((tmp_path / "both" / "compression_report.json").read_text())
    assert written["operation"] == "aggregate_experts"
    assert written["num_experts"] == {layer: [4, 4] for layer in LAYERS}
    assert "2 checkpoints -> one" in str(report) and "8, 8, 8" in str(report)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_experts_per_tok": 2}, r"num_experts_per_tok is 1 in .* and 2 in "),
        ({"encoder_ffn_dim": 48}, r"encoder_ffn_dim is 64 in .* and 48 in "),
        ({"encoder_sparse_layers": [0, 1]}, r"encoder_sparse_layers is \[1, 3\] in .* and \[0, 1\] in "),
        ({"router_bias": True}, r"router_bias is False in .* and True in "),
        (
            {"dtype": torch.bfloat16},
            r"\d\d tensors, such as [\w.]+, are torch.float32 in .*a and torch.bfloat16 in .*b; load one of [^\n]*$",
        ),
    ],
)
def test_mismatches(overrides: dict[str, Any], message: str, save: Save, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        aggregate_experts([save("a", 0), save("b", 1, **overrides)], tmp_path / "both")
    assert not (tmp_path / "both").exists()


def test_other_tokenizers(save: Save, tmp_path: Path) -> None:
    folders = [save("a", 0), save("b", 1)]
    ZCodeM3Tokenizer(languages=["en", "fr", "de"]).save_pretrained(folders[1])
    with pytest.raises(ValueError, match=r"tokenizer\.json is not the same in"):
        aggregate_experts(folders, tmp_path / "both")
    (folders[1] / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"tokenizer\.json is not the same in"):
        aggregate_experts(folders, tmp_path / "both")


def test_wrong_input(save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save("a", 0)
    dense = save("dense", 0, encoder_sparse_step=0, decoder_sparse_step=0)
    for checkpoints, message in (
        ([folder], "must be a list of at least two folders"),
        (str(folder), "must be a list of at least two folders"),
        ([folder, tmp_path / "none"], "must be a folder with config.json"),
        ([dense, dense], "has no MoE layer"),
    ):
        with pytest.raises(ValueError, match=message):
            aggregate_experts(checkpoints, tmp_path / "both")
    with pytest.raises(ValueError, match="is not empty"):
        aggregate_experts([folder, folder], folder)

    def full_disk(*args: Any) -> None:
        raise OSError("No space left on device")

    before = {*tmp_path.rglob("*")}
    monkeypatch.setattr(safetensors_io, "create_safetensors_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        aggregate_experts([folder, folder], tmp_path / "both")
    assert {*tmp_path.rglob("*")} == before
