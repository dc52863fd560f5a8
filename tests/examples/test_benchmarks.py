"""The benchmarks of experts, generation and training run, on tiny models."""

import json
import multiprocessing
import multiprocessing.dummy
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import bench_beams_gpu
import bench_experts_cpu
import bench_generation
import bench_predict
import bench_shipped_model
import bench_training
import bench_translate
import count_experts
import pytest
import translation_ways

from hf_moe_ted.models import generation

CHECKPOINT = Path(__file__).parents[2] / "examples" / "checkpoints" / "zcode_m3_demo"
CPU_PEERS = {"eager", "grouped_mm", "zcode_grouped", "zcode_cpu", "int8", "int8_zcode_cpu", "dense"}


def run(monkeypatch: pytest.MonkeyPatch, benchmark: Any, output: Path, *arguments: str) -> dict[str, Any]:
    command = [benchmark.__file__, "--threads", "1", "--output", str(output), *arguments]
    monkeypatch.setattr(sys, "argv", command)
    benchmark.main()
    return json.loads(output.read_text())


def test_generation_with_random_weights(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ("--base", "tiny", "--batch_sizes", "3", "--num_beams", "1", "2", "--rounds", "2", "--new_tokens", "5")
    written = run(monkeypatch, bench_generation, tmp_path / "out.json", "--device", "cpu", *sizes)
    results = written["results"]
    assert {(r["peer"], r["num_beams"]) for r in results} == {(peer, beams) for peer in CPU_PEERS for beams in (1, 2)}
    for result in results:
        assert (result["num_sentences"], result["num_new_tokens"], len(result["seconds"])) == (3, 15, 2)
        assert (result["experts_per_step"] is None) == (result["peer"] == "dense")
        if not result["peer"].startswith(("int8", "dense")):
            assert result["equal_tokens"] == 1.0
    assert written["parameters"]["dense"] < written["parameters"]["eager"]
    assert "time / dense" in capsys.readouterr().out


def test_translation_decodes_as_long_as_the_model_does(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    arguments = ("--model", str(CHECKPOINT), "--device", "cpu", "--batch_sizes", "2", "--num_beams", "2")
    arguments += ("--num_sentences", "3", "--rounds", "1", "--peers", "eager", "dense", "--clock", "cpu")
    results = run(monkeypatch, bench_generation, tmp_path / "out.json", *arguments)["results"]
    assert [result["num_sentences"] for result in results] == [3, 3]
    assert results[0]["num_new_tokens"] == results[1]["num_new_tokens"] > 3


def test_generation_refuses_unknown_peers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--peers fast: not known here; there are eager"):
        run(monkeypatch, bench_generation, tmp_path / "out.json", "--base", "tiny", "--peers", "eager", "fast")


def test_experts_on_cpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sizes = ("--tokens", "1", "20", "--num_experts", "4", "--d_model", "64", "--ffn_dim", "128", "--seconds", "0")
    arguments = (*sizes, "--min_turns", "2", "--num_experts_per_tok", "2")
    results = run(monkeypatch, bench_experts_cpu, tmp_path / "out.json", *arguments)["results"]
    errors = {(result["peer"], result["num_tokens"]): result["error"] for result in results}
    assert all(len(result["milliseconds"]) == 2 for result in results)
    for num_tokens in (1, 20):
        assert errors["zcode_cpu", num_tokens] < 1e-5
        assert 1e-4 < errors["bf16 zcode_cpu", num_tokens] < 2e-2
        assert 1e-3 < errors["int8 zcode_cpu", num_tokens] < 5e-2
        assert errors["dense", num_tokens] is None
    assert ("batched_mm", 1) in errors and ("batched_mm", 20) not in errors


def test_training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out.json"
    sizes = ["--base", "tiny", "--num_experts", "4", "--batch_size", "2", "--length", "8", "--steps", "2"]
    peers = ["--peers", "dense", "grouped_mm", "grouped_mm tiled"]
    monkeypatch.setattr(sys, "argv", [bench_training.__file__, *sizes, *peers, "--output", str(output)])
    bench_training.main()
    results = json.loads(output.read_text())["results"]
    assert [result["peer"] for result in results] == peers[1:]
    for result in results:
        assert result["tokens_per_s"] == pytest.approx(2e3 * 2 * 8 / result["step_ms"])
    assert "ms/step" in capsys.readouterr().out


def test_ways_to_translate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sentences = tmp_path / "sentences.txt"
    sentences.write_text("Save the file.\nClose all tabs.\nThe disk is full.\n", encoding="utf-8")
    options = ["--device", "cpu", "--max-new-tokens", "6", "--max-sentences", "2"]
    monkeypatch.setattr(sys, "argv", [bench_translate.__file__, str(CHECKPOINT), str(sentences), *options])
    bench_translate.main()
    printed = capsys.readouterr().out
    assert printed.startswith("2 lines, ")
    rows = [line for line in printed.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 4
    assert all(row.endswith("| 100.0% |") for row in rows)


def test_beams_on_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The script; on a CPU nothing is captured."""
    text = tmp_path / "text.txt"
    text.write_text("Close all tabs.\n\nThe disk is full.\n")
    sizes = ("--base", "tiny", "--batch_sizes", "2", "--short", "2", "--long", "4", "--rounds", "1", "--device", "cpu")
    sizes += ("--nllb_moe_layers", "0", "--text", str(text), "--translation_length", "3", "--num_experts", "4")
    output = tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", [bench_beams_gpu.__file__, "--output", str(output), *sizes])
    bench_beams_gpu.main()
    results = json.loads(output.read_text())["results"]
    assert len(results) == 8
    assert all(("ms_per_step" in r) != ("sentences_per_s" in r) for r in results)
    assert {r["num_sentences"] for r in results if "num_sentences" in r} == {2}


def test_experts_of_steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sizes = ("--batch_sizes", "3", "--num_beams", "2", "--first", "2", "--last", "5")
    random = ("--bases", "tiny", "--source_length", "4")
    [row] = run(monkeypatch, count_experts, tmp_path / "out.json", *sizes, *random)["results"]
    assert (row["num_experts"], row["top_k"], row["num_rounds"], set(row["by_layer"])) == (16, 1, 1, {"1"})
    assert 1 <= row["experts"] <= 6 and 1 < row["evenly"] < 6
    shipped = ("--model", str(CHECKPOINT), "--rounds", "2")
    [row] = run(monkeypatch, count_experts, tmp_path / "out.json", *sizes, *shipped)["results"]
    assert (row["num_experts"], row["num_rounds"]) == (8, 2)
    assert 1 <= row["experts"] < row["evenly"] and row["zipf"] > 0


def test_experts_of_random_models_take_the_memory_of_one() -> None:
    config = bench_generation.random_config(Namespace(base="small", num_experts=16, num_experts_per_tok=1))
    experts = count_experts.random_model(config, 0).model.decoder.layers[1].ffn.experts
    assert experts.up_proj.shape == (16, 2048, 512)
    assert experts.up_proj.untyped_storage().nbytes() < 2 * 4 * 2048 * 512
    assert not experts.up_proj[0, :99].eq(experts.up_proj[1, :99]).any()


def test_ways_of_the_shipped_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows_of = bench_shipped_model.rows_of
    monkeypatch.setattr(bench_shipped_model, "rows_of", lambda split, language: rows_of("test", language))  # fewer
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: multiprocessing.dummy)  # threads are quicker
    sizes = ("--num_sentences", "2", "--num_rounds", "1", "--num_beams", "2", "--ways", "trimmed")
    rows = run(monkeypatch, bench_shipped_model, tmp_path / "out.json", *sizes)["results"]
    assert [row["way"] for row in rows] == ["float32", "trimmed"]
    whole, trimmed = rows
    assert whole["num_equal"] == trimmed["num_equal_restricted"] == 4
    assert 30 < trimmed["weights_mb"] < whole["weights_mb"] < 40
    for row in rows:
        assert row["sentences_per_s"] == pytest.approx(4 / row["seconds"][0])
        assert 100 < row["libraries_mb"] <= row["peak_mb"]
        assert {name: 0 < scores["chrf"] <= 100 for name, scores in row["scores"].items()} == {
            "en-de": True, "de-en": True
        }  # fmt: skip
    assert bench_shipped_model.remark(whole, whole) == ""
    worse = {**trimmed, "num_equal_restricted": 3, "scores": {"en-de": {"chrf": 0.0}}}
    assert "MORE THAN 0.3 FROM FLOAT32; NOT THE TRANSLATIONS" in bench_shipped_model.remark(worse, whole)


def test_ways_of_few_bits_in_one_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench_shipped_model, "WayProcess", None)
    sizes = ("--in_one_process", "--num_sentences", "3", "--num_rounds", "0", "--num_beams", "2")
    rows = run(monkeypatch, bench_shipped_model, tmp_path / "out.json", *sizes)["results"]
    whole, int8, int4, int4_memory, int4_all, int4_all_memory = rows
    assert [row["way"] for row in rows] == [bench_shipped_model.BFLOAT16, *bench_shipped_model.WITH_SMALL_EXPERTS]
    assert whole["num_equal"] == 6
    assert whole["weights_mb"] > int8["weights_mb"] > int4["weights_mb"] > int4_all["weights_mb"]
    assert int4_memory["scores"] == int4["scores"]
    assert int4_all_memory["scores"] == int4_all["scores"]
    for row in rows:
        assert all(0 < scores["chrf"] <= 100 for scores in row["scores"].values())
    far = {**int4, "scores": {"en-de": {"chrf": 0.0}}}
    assert bench_shipped_model.remark(far, whole).endswith("MORE THAN 0.3 FROM BFLOAT16")


def test_a_way_that_fails(tmp_path: Path) -> None:
    way = translation_ways.Way("broken", tmp_path / "none", is_ctranslate2=True)
    process = translation_ways.WayProcess(way, translation_ways.Settings(1, 1, 1, "cpu"))
    with pytest.raises(RuntimeError, match="the process of 'broken' has ended"):
        process.round([])


def test_predict_of_a_trainer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    searches = []
    search = generation.beam_search
    monkeypatch.setattr(generation, "beam_search", lambda *a, **k: searches.append(1) or search(*a, **k))
    output = tmp_path / "out.json"
    sizes = ("--num_sentences", "6", "--num_beams", "2", "--rounds", "1", "--batch_size", "6")
    monkeypatch.setattr(sys, "argv", [bench_predict.__file__, "--output", str(output), *sizes])
    bench_predict.main()
    results = json.loads(output.read_text())["results"]
    assert [(r["search"], r["num_beams"], len(r["seconds"])) for r in results] == [
        ("transformers", 2, 1),
        ("hf_moe_ted", 2, 1),
    ]
    assert len(searches) == 2  # one batch in each round
    assert all(result["chrF"] > 30 for result in results)
