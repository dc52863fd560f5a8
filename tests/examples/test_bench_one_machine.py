"""The benchmark of experts that are not all on the device runs, on a tiny model."""

import json
import statistics
import sys
from argparse import Namespace
from pathlib import Path

import bench_one_machine
import pytest
import torch
from accelerate.utils import check_device_map
from transformers import NllbMoeConfig, NllbMoeForConditionalGeneration
from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeSparseMLP

SIZES = (
    *("--device", "cpu", "--layers", "2", "--sparse_step", "2", "--d_model", "64", "--ffn_dim", "128"),
    *("--num_experts", "8", "--vocab_size", "120", "--source_length", "9", "--new_tokens", "5", "--rounds", "2"),
    *("--batch_sizes", "1", "3", "--shares", "0.5", "--threads", "1", "--no-isolate"),
)
ROWS = ("dense", "resident", "memory 0.5", "memory-all 0.5", "accelerate")


@pytest.mark.parametrize("bits", [("--bits", "4", "--group_size", "32"), ("--bits", "8")])
def test_rows(
    bits: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", [bench_one_machine.__file__, "--output", str(output), *SIZES, *bits])
    bench_one_machine.main()
    written = json.loads(output.read_text())
    results = {(result["row"], result["batch_size"]): result for result in written["results"]}
    assert [*results] == [(row, size) for row in ROWS for size in (1, 3)]
    for (row, _), result in results.items():
        assert len(result["seconds"]["1"]) == len(result["seconds"]["5"]) == 2
        assert (result["hit_rate"] is None) == (not row.startswith("memory"))
        assert result["step_ms"] * 4 == pytest.approx(
            1000 * (statistics.median(result["seconds"]["5"]) - statistics.median(result["seconds"]["1"]))
        )
    for row in ("memory 0.5", "memory-all 0.5"):
        assert results[row, 3]["bytes_copied_per_prefill"] > 0
    assert written["bytes_of_experts"]["all"] == written["bytes_of_experts"]["experts"]
    assert written["bytes_of_all_else"]["all"] < 0.8 * written["bytes_of_all_else"]["experts"]
    assert "MB copied/step" in capsys.readouterr().out


def test_layers_of_transformers_get_the_experts_of_their_routers() -> None:
    torch.manual_seed(0)
    config = NllbMoeConfig(d_model=16, num_experts=8, router_bias=True)
    layer = NllbMoeSparseMLP(config, ffn_dim=32).eval()
    torch.nn.init.normal_(layer.router.classifier.weight)
    rows = [0] * 8
    for number in range(8):
        layer.experts[f"expert_{number}"].register_forward_hook(
            lambda module, inputs, output, number=number: rows.__setitem__(number, len(inputs[0]))
        )
    hidden = torch.randn(1, 40, 16)
    layer(hidden)
    assert rows == [280, 40, 0, 0, 0, 0, 0, 0]  # why the hook is there
    rows[:] = [0] * 8
    layer.experts.register_forward_pre_hook(bench_one_machine.with_chosen_experts)
    output = layer(hidden)[0]
    assert sum(rows) == 80
    assert min(rows) > 0
    _, weights, _ = layer.router(hidden[0])
    assert (weights > 0).sum(1).eq(2).all()
    experts = torch.stack([layer.experts[f"expert_{number}"](hidden[0]) for number in range(8)], dim=1)
    expected = (weights.unsqueeze(-1) * experts).sum(1) * (1 - config.moe_token_dropout)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)


def test_experts_that_a_device_map_by_hand_puts_on_the_gpu() -> None:
    with torch.device("meta"):
        config = NllbMoeConfig(
            vocab_size=50, d_model=16, encoder_layers=4, decoder_layers=4, encoder_ffn_dim=32, decoder_ffn_dim=32,
            num_experts=4, encoder_sparse_step=2, decoder_sparse_step=2,
        )  # fmt: skip
        model = NllbMoeForConditionalGeneration(config)
    model.tie_weights()
    sizes = {name: tensor.nbytes for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    rest = sum(size for name, size in sizes.items() if ".expert_" not in name)
    expert = sum(size for name, size in sizes.items() if "decoder.layers.1.ffn.experts.expert_0." in name)
    device_map = bench_one_machine.map_of_experts(model, rest + 5 * expert + 1)
    check_device_map(model, device_map)
    on_gpu = {name for name, device in device_map.items() if device == 0 and ".expert_" in name}
    assert on_gpu == {
        *(f"model.decoder.layers.1.ffn.experts.expert_{number}" for number in range(4)),
        "model.decoder.layers.3.ffn.experts.expert_0",
    }
    for name, _ in model.named_parameters():
        is_on_gpu = ".expert_" not in name or any(name.startswith(f"{expert}.") for expert in on_gpu)
        assert bench_one_machine.device_of(name, device_map) == (0 if is_on_gpu else "cpu")


def test_a_batch_that_needs_too_much_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(row: str, model: object, batch_size: int, arguments: Namespace) -> dict[str, object]:
        if batch_size == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7.94 GiB. GPU 0 has")
        return {"row": row, "batch_size": batch_size}

    monkeypatch.setattr(bench_one_machine, "load", lambda row, arguments: None)
    monkeypatch.setattr(bench_one_machine, "measure_batches", measured)
    results = list(bench_one_machine.measure("dense", Namespace(batch_sizes=[1, 3, 4], device="cpu")))
    assert [result["batch_size"] for result in results] == [1, 3, 4]
    assert results[1]["failed"] == "CUDA out of memory. Tried to allocate 7.94 GiB"


@pytest.mark.parametrize(
    ("end", "failed"),
    [("sys.exit('no memory')", "no memory"), ("time.sleep(600)", "ended after 8 s"), ("sys.exit(0)", None)],
)
def test_what_a_row_measured_before_its_process_ended(
    end: str, failed: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = tmp_path / "row.py"
    script.write_text(f'import sys, time\nprint(\'{{"row": "dense"}}\', flush=True)\n{end}\n')
    monkeypatch.setattr(sys, "argv", [str(script)])
    arguments = Namespace(isolate=True, folder=tmp_path, max_seconds=8)
    results = bench_one_machine.results_of("dense", arguments)
    assert results[0] == {"row": "dense"}
    assert [result["failed"] for result in results[1:]] == ([] if failed is None else [failed])
