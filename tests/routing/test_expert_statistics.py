"""Statistics add up, and come back from disk as they were or not at all."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_moe_ted.models.layer_names import moe_layers
from hf_moe_ted.routing import expert_statistics
from hf_moe_ted.routing.expert_statistics import ExpertStatistics, LayerStatistics, ModelFingerprint
from hf_moe_ted.testing import tiny_config

LAYERS = {"model.encoder.layers.1.ffn": 2, "model.decoder.layers.1.ffn": 3}
NAMES = tuple(LayerStatistics.__annotations__)
TENSORS, METADATA = "expert_statistics.safetensors", "expert_statistics.json"
FINGERPRINT = ModelFingerprint(LAYERS, num_experts_per_tok=2, d_model=5, router_hash="0" * 64)


def statistics_of(*pairs: tuple[str, str], seed: int = 0) -> ExpertStatistics:
    """50 tokens per pair and layer; experts put out ones, with weights of a half, and are as sure as chosen."""
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for layer, num_experts in LAYERS.items():
        chosen = torch.randint(num_experts, (len(pairs), 2, 50), generator=generator)
        num_routed = torch.nn.functional.one_hot(chosen, num_experts).sum(dim=2)
        num_dropped = torch.minimum(num_routed.sum(dim=1), torch.tensor(1))
        num_computed = (num_routed.sum(dim=1) - num_dropped).double()
        layers[layer] = LayerStatistics(
            num_routed=num_routed,
            num_dropped=num_dropped,
            gate_mass=num_routed[:, 0].double(),
            confidence=num_routed[:, 0].double() * 0.75,
            gated_norm=num_computed / 2,
            output_sum=num_computed.sum(dim=0).unsqueeze(-1).expand(-1, 5).clone(),
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
        (lambda folder: (folder / METADATA).write_bytes(b'{"format": "\xff'), rf"{METADATA}\) is not a text in UTF-8"),
        (lambda folder: (folder / METADATA).write_text("[]"), rf"{METADATA}\) must be a JSON object"),
        (lambda folder: (folder / METADATA).write_text("{}"), f"{METADATA} is not a file of expert statistics"),
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
            "does not hold complete expert statistics: .*num_sentences",
        ),
        (
            _change_metadata(lambda metadata: metadata.update(pairs=[["en", "de", "fr"]])),
            r"pairs has \['en', 'de', 'fr'\], which is not a pair",
        ),
        (_change_metadata(lambda metadata: metadata.update(pairs=[["en", 5]])), r"pairs has \['en', 5\]"),
        (_change_metadata(lambda metadata: metadata.update(pairs=7)), "does not hold complete expert statistics"),
        (_change_metadata(lambda metadata: metadata.update(num_sentences=["1"])), r"num_sentences \(\['1'\]\)"),
        (_change_metadata(lambda metadata: metadata.update(num_sentences=[-1])), r"num_sentences \(\[-1\]\)"),
        (_change_metadata(lambda metadata: metadata.update(fingerprint=[1])), "does not hold complete expert statis"),
        (
            _change_metadata(lambda metadata: metadata["fingerprint"].update(num_experts=[2, 3])),
            r"num_experts \(\[2, 3\]\) must map",
        ),
        (
            _change_metadata(lambda metadata: metadata["fingerprint"].update(num_experts_per_tok="2")),
            r"num_experts_per_tok \('2'\) must be an integer",
        ),
        (_change_metadata(lambda metadata: metadata["fingerprint"].update(d_model=5.0)), r"d_model \(5.0\) must be"),
        (lambda folder: (folder / METADATA).write_text("[" * 100_000), rf"{METADATA}\) is not JSON: maximum recursion"),
    ],
)
def test_corrupted_files(corrupt: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    statistics_of(("en", "de")).save(tmp_path / "statistics")
    corrupt(tmp_path / "statistics")
    with pytest.raises(ValueError, match=message):
        ExpertStatistics.load(tmp_path / "statistics")


def _changed(name: str, change: Callable[[torch.Tensor], Any]) -> ExpertStatistics:
    """Statistics of two pairs in which the tensor of the decoder's layer is another one."""
    statistics = statistics_of(("en", "de"), ("de", "en"))
    layer = "model.decoder.layers.1.ffn"
    changed = dataclasses.replace(statistics.layers[layer], **{name: change(getattr(statistics.layers[layer], name))})
    return dataclasses.replace(statistics, layers={**statistics.layers, layer: changed})


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("num_routed", lambda t: -t, "negative number"),
        ("num_routed", lambda t: t.float(), r"is torch.float32, but must be torch.int64"),
        ("num_routed", lambda t: t[:, :1], "must have the shape"),
        ("num_routed", lambda t: t * torch.tensor([1, 2])[None, :, None], "more later choices than tokens"),
        ("num_routed", torch.zeros_like, "num_dropped is more than num_routed"),
        ("num_dropped", lambda t: t + 1000, "num_dropped is more than num_routed"),
        ("gate_mass", lambda t: t * torch.inf, "gate_mass has NaN or infinity"),
        ("gate_mass", lambda t: t * 1.5, "gate_mass does not sum to the number of tokens"),
        ("gate_mass", lambda t: t.roll(1, 1) * 0 + 25, "confidence is more than gate_mass|does not sum"),
        ("confidence", lambda t: t * 2, "confidence is more than the number of first choices"),
        ("confidence", lambda t: t * torch.nan, "confidence has NaN or infinity"),
        ("gated_norm", lambda t: -t, "gated_norm has the negative number"),
        ("output_sum", lambda t: t * torch.nan, "output_sum has NaN or infinity"),
        ("output_sum", lambda t: t.float(), "must be torch.float64"),
    ],
)
def test_what_cannot_be_is_not_loaded(name: str, change: Any, message: str, tmp_path: Path) -> None:
    _changed(name, change).save(tmp_path / "statistics")
    with pytest.raises(ValueError, match=message):
        ExpertStatistics.load(tmp_path / "statistics")


def test_without_a_token(tmp_path: Path) -> None:
    statistics = statistics_of(("en", "de"), ("de", "en"))
    empty = {
        layer: LayerStatistics(**{name: tensor * 0 for name, tensor in vars(of_layer).items()})
        for layer, of_layer in statistics.layers.items()
    }
    dataclasses.replace(statistics, layers=empty).save(tmp_path / "empty")
    with pytest.raises(ValueError, match="has no token of en-de, de-en"):
        ExpertStatistics.load(tmp_path / "empty")


def test_layers_that_saw_different_text() -> None:
    layer, other = "model.encoder.layers.1.ffn", "model.encoder.layers.3.ffn"
    statistics = statistics_of(("en", "de"))
    doubled = LayerStatistics(**{name: 2 * tensor for name, tensor in vars(statistics.layers[layer]).items()})
    with pytest.raises(
        ValueError, match=rf"{other} has first choices of \[100\] tokens by pair, but {layer} of \[50\]"
    ):
        dataclasses.replace(statistics, layers={**statistics.layers, other: doubled}).check()
