"""Statistics add up, and come back from disk as they were or not at all."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_moe_ted.compression import expert_statistics
from hf_moe_ted.compression.expert_statistics import ExpertStatistics, LayerStatistics, ModelFingerprint, moe_layers
from hf_moe_ted.testing import tiny_config

LAYERS = {"model.encoder.layers.1.ffn": 2, "model.decoder.layers.1.ffn": 3}
NAMES = tuple(LayerStatistics.__annotations__)
TENSORS, METADATA = "expert_statistics.safetensors", "expert_statistics.json"
FINGERPRINT = ModelFingerprint(LAYERS, num_experts_per_tok=2, d_model=5, router_hash="0" * 64)


def statistics_of(*pairs: tuple[str, str], seed: int = 0) -> ExpertStatistics:
    generator = torch.Generator().manual_seed(seed)

    def counts(*shape: int) -> torch.Tensor:
        return torch.randint(1, 100, shape, generator=generator)

    layers = {}
    for layer, num_experts in LAYERS.items():
        shape = (len(pairs), num_experts)
        sums = {name: counts(*shape).double() / 7 for name in ("gate_mass", "confidence", "gated_norm")}
        layers[layer] = LayerStatistics(
            num_routed=counts(len(pairs), 2, num_experts),
            num_dropped=torch.ones(shape, dtype=torch.int64),
            **sums,
            output_sum=counts(num_experts, 5).double() / 7,
        )
    return ExpertStatistics(FINGERPRINT, pairs, tuple(range(1, len(pairs) + 1)), layers)


def assert_equal(found: ExpertStatistics, expected: ExpertStatistics) -> None:
    assert (found.fingerprint, found.pairs, found.num_sentences) == (
        expected.fingerprint,
        expected.pairs,
        expected.num_sentences,
    )
    assert [*found.layers] == [*expected.layers]
    for layer in LAYERS:
        for name in NAMES:
            a, b = getattr(found.layers[layer], name), getattr(expected.layers[layer], name)
            assert a.dtype == b.dtype and torch.equal(a, b), name


# --- numbers


def test_derived_numbers() -> None:
    layer = LayerStatistics(
        num_routed=torch.tensor([[[3, 1], [1, 3]], [[2, 0], [0, 0]]]),
        num_dropped=torch.tensor([[1, 2], [0, 0]]),
        gate_mass=torch.ones(2, 2).double(),
        confidence=torch.ones(2, 2).double(),
        gated_norm=torch.ones(2, 2).double(),
        output_sum=torch.tensor([[10.0, 5.0], [4.0, 8.0]]).double(),
    )
    assert layer.num_computed.tolist() == [[3, 2], [2, 0]]
    assert layer.centroids.tolist() == [[2.0, 1.0], [2.0, 4.0]]
    assert layer.of_pairs([1]).num_computed.tolist() == [[2, 0]]


def test_sum() -> None:
    a = statistics_of(("en", "de"), ("de", "en"), seed=1)
    b = statistics_of(("fr", "en"), ("en", "de"), seed=2)
    total = a + b
    assert total.pairs == (("en", "de"), ("de", "en"), ("fr", "en"))
    assert total.num_sentences == (1 + 2, 2, 1)
    for layer in LAYERS:
        for name in NAMES:
            x, y = getattr(a.layers[layer], name), getattr(b.layers[layer], name)
            expected = x + y if name == "output_sum" else torch.stack([x[0] + y[1], x[1], y[0]])
            assert torch.equal(getattr(total.layers[layer], name), expected)
    assert a.num_sentences == (1, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_model": 6}, "d_model 5 and 6"),
        ({"num_experts_per_tok": 1}, "num_experts_per_tok 2 and 1"),
        ({"router_hash": "1" * 64}, "router_hash 0+ and 1+"),
        ({"num_experts": {"model.encoder.layers.1.ffn": 4}}, "num_experts .* and .*4"),
    ],
)
def test_sum_of_different_models(change: dict[str, Any], message: str) -> None:
    other = dataclasses.replace(statistics_of(("en", "de")), fingerprint=dataclasses.replace(FINGERPRINT, **change))
    with pytest.raises(ValueError, match=f"are of different models: {message}"):
        statistics_of(("en", "de")) + other


def test_fingerprint_knows_weights_but_not_dtype() -> None:
    config = tiny_config()
    weights = {layer: torch.randn(4, 32, generator=torch.Generator().manual_seed(0)) for layer in moe_layers(config)}
    fingerprint = ModelFingerprint.of(config, weights)
    assert fingerprint == ModelFingerprint.of(config, {layer: w.bfloat16() for layer, w in weights.items()})
    weights["model.decoder.layers.1.ffn"][3, 31] += 0.1
    assert fingerprint.router_hash != ModelFingerprint.of(config, weights).router_hash


# --- on disk


def test_save_and_load(tmp_path: Path) -> None:
    statistics = statistics_of(("en", "zh-Hant"), ("中", "en"))
    statistics.save(tmp_path / "statistics")
    assert_equal(ExpertStatistics.load(tmp_path / "statistics"), statistics)
    with pytest.raises(ValueError, match="is not empty"):
        statistics.save(tmp_path / "statistics")
    other = statistics_of(("en", "de"), seed=3)
    other.save(tmp_path / "statistics", overwrite=True)
    assert_equal(ExpertStatistics.load(tmp_path / "statistics"), other)


def test_interrupted_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(tensors: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(expert_statistics, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        statistics_of(("en", "de")).save(tmp_path / "statistics")
    assert list(tmp_path.iterdir()) == []


def _truncate(folder: Path) -> None:
    path = folder / TENSORS
    path.write_bytes(path.read_bytes()[:-8])


def _flip_a_bit(folder: Path) -> None:
    content = bytearray((folder / TENSORS).read_bytes())
    content[-1] ^= 1
    (folder / TENSORS).write_bytes(content)


def _change_metadata(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def corrupt(folder: Path) -> None:
        metadata = json.loads((folder / METADATA).read_text())
        change(metadata)
        (folder / METADATA).write_text(json.dumps(metadata))

    return corrupt


@pytest.mark.parametrize(
    ("corrupt", "message"),
    [
        (_truncate, f"{TENSORS} is corrupted"),
        (_flip_a_bit, f"{TENSORS} is corrupted"),
        (lambda folder: (folder / TENSORS).unlink(), f"{TENSORS} does not exist"),
        (lambda folder: (folder / METADATA).unlink(), f"{METADATA} does not exist"),
        (lambda folder: (folder / METADATA).write_bytes(b'{"format": "hf_\xff'), f"{METADATA} is corrupted"),
        (lambda folder: (folder / METADATA).write_text("[]"), f"{METADATA} is no file of expert statistics"),
        (_change_metadata(lambda metadata: metadata.pop("pairs")), f"{METADATA} is corrupted: it has no pairs"),
        (_change_metadata(lambda metadata: metadata.update(format_version=2)), "format_version 2.* reads 1"),
        (
            _change_metadata(lambda metadata: metadata["fingerprint"]["num_experts"].update({"model.x": 3})),
            "does not hold complete expert statistics: .*model.x",
        ),
        (
            _change_metadata(lambda metadata: metadata["fingerprint"].pop("d_model")),
            "does not hold complete expert statistics: .*d_model",
        ),
        (
            _change_metadata(lambda metadata: metadata["pairs"].append(["en", "fr"])),
            "does not hold complete expert statistics: .*pairs",
        ),
    ],
)
def test_corrupted_files(corrupt: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    statistics_of(("en", "de")).save(tmp_path / "statistics")
    corrupt(tmp_path / "statistics")
    with pytest.raises(ValueError, match=message):
        ExpertStatistics.load(tmp_path / "statistics")
