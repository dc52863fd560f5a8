"""Counts by language against those of the routings of the same forwards, sentence by sentence."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from callback_cases import LAYERS, SETTLED, Reporter, settled_trainer
from transformers import Trainer

from hf_moe_ted import LanguageRoutingCallback, ZCodeM3Tokenizer
from hf_moe_ted.routing.language_routing import distance_from_all, expert_shares, mutual_information_bits

TOKENIZER = ZCodeM3Tokenizer(languages=["en", "de", "sw", "th"])
DIRECTIONS = [("en", "de"), ("de", "en"), ("sw", "en"), ("en", "sw"), (None, "de"), ("sw", "de")]


def rows() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for src_lang, tgt_lang in DIRECTIONS:
        source, target = torch.randint(20, 96, (2, 8), generator=generator)
        target[0] = TOKENIZER.get_lang_id(tgt_lang)
        if src_lang is not None:
            source[0] = TOKENIZER.get_lang_id(src_lang)
        source[6:] = TOKENIZER.pad_token_id
        made.append({"input_ids": source, "attention_mask": (source != 1).long(), "labels": target})
    return made


def trainer_of(tmp_path: Path, reporter: Reporter | None = None, config: Any = None, **options: Any) -> Trainer:
    return settled_trainer(tmp_path, rows(), {**SETTLED, **(config or {})}, reporter, **options)


def expected_counts(model: Any) -> dict[str, torch.Tensor]:
    """One token at a time."""
    batch = {name: torch.stack([row[name] for row in rows()]) for name in rows()[0]}
    output = model.train()(**batch, output_routings=True)
    counts = {layer: torch.zeros(4, 4, dtype=torch.float64) for layer in LAYERS}
    for layer, routing in zip(LAYERS, (*output.encoder_routings, *output.decoder_routings), strict=True):
        for token, experts in enumerate(routing.expert_ids.tolist()):
            language = DIRECTIONS[token // 8][layer.startswith("decoder")]
            for expert in experts:
                if language is not None and expert < 4:
                    counts[layer][TOKENIZER.languages.index(language), expert] += 1
    return counts


@pytest.mark.parametrize("options", [{}, {"max_steps": 3, "logging_steps": 2}, {"gradient_checkpointing": True}])
def test_numbers_are_those_of_the_routings(options: dict[str, Any], tmp_path: Path) -> None:
    reporter = Reporter()
    trainer = trainer_of(tmp_path, reporter, **options)
    LanguageRoutingCallback(TOKENIZER).add_to(trainer)
    trainer.train()
    counts = expected_counts(trainer.model)
    log = next(log for log in reporter.logs if "loss" in log)
    for layer in LAYERS:
        assert log[f"routing/{layer}/language_bits"] == pytest.approx(mutual_information_bits(counts[layer]))
    distances = {layer: distance_from_all(counts[layer]).tolist() for layer in LAYERS}
    for number, language in enumerate(["en", "de", "sw"]):
        mean = (distances["encoder.1"][number] + distances["encoder.3"][number]) / 2
        assert log[f"routing/encoder/{language}"] == pytest.approx(mean)
        assert log[f"routing/decoder/{language}"] == pytest.approx(distances["decoder.1"][number])
    assert not any("/th" in name for name in log)  # no sentence was in it

    step = trainer.state.global_step
    written = json.loads((tmp_path / "routing" / f"step_{step}.json").read_text())
    assert (written["step"], written["languages"]) == (step, ["en", "de", "sw"])
    for layer in LAYERS:
        expected = expert_shares(counts[layer])[:3]
        assert torch.tensor(written["expert_shares"][layer], dtype=torch.float64) == pytest.approx(expected)
    picture = (tmp_path / "routing" / f"step_{step}.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert {path.name for path in (tmp_path / "routing").iterdir()} == {f"step_{step}.json", f"step_{step}.png"}


def test_a_picture_at_every_evaluation_and_evaluation_is_not_counted(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, max_steps=5, eval_strategy="steps", eval_steps=2, logging_steps=5)
    callback = LanguageRoutingCallback(TOKENIZER).add_to(trainer)
    trainer.train()
    steps = sorted(path.stem for path in (tmp_path / "routing").glob("*.png"))
    assert steps == ["step_2", "step_4", "step_5"]
    assert all(counts.since_picture.sum() == 0 for counts in callback._counts.values())
    before = (tmp_path / "routing" / "step_5.json").read_text()
    trainer.evaluate()
    assert (tmp_path / "routing" / "step_5.json").read_text() == before
    assert not any("routing" in name for log in trainer.state.log_history if "eval_loss" in log for name in log)


def test_no_hook_is_left_and_training_is_not_changed(tmp_path: Path) -> None:
    weights = []
    for watch in (False, True):
        trainer = trainer_of(tmp_path, max_steps=3, learning_rate=0.1)
        if watch:
            LanguageRoutingCallback(TOKENIZER).add_to(trainer)
        trainer.train()
        weights.append(trainer.model.state_dict())
        hooks = [hook for module in trainer.model.modules() for hook in module._forward_hooks.values()]
        hooks += list(trainer.model._forward_pre_hooks.values())
        assert not any(hook.__module__.startswith("hf_moe_ted.training") for hook in hooks)
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_without_matplotlib_there_are_numbers_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    trainer = trainer_of(tmp_path)
    LanguageRoutingCallback(TOKENIZER).add_to(trainer)
    trainer.train()
    assert [path.name for path in (tmp_path / "routing").iterdir()] == ["step_1.json"]


def test_information_of_known_tables() -> None:
    apart = torch.tensor([[5.0, 0.0], [0.0, 5.0]])
    alike = torch.tensor([[1.0, 3.0], [2.0, 6.0], [0.0, 0.0]])
    assert mutual_information_bits(apart) == pytest.approx(1.0)
    assert mutual_information_bits(alike) == pytest.approx(0.0, abs=1e-6)
    assert mutual_information_bits(torch.zeros(2, 2)) == 0.0
    assert distance_from_all(apart).tolist() == [0.5, 0.5]
    assert distance_from_all(alike)[:2].tolist() == pytest.approx([0.0, 0.0])
    assert math.isnan(distance_from_all(alike)[2])
    assert expert_shares(alike).tolist() == [[0.25, 0.75], [0.25, 0.75], [0.0, 0.0]]


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj"], "modules_to_save": ["router"]},
        {"target_modules": [], "target_parameters": ["ffn.router.weight"]},
    ],
)
def test_routers_that_peft_trains(options: dict[str, Any], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    logs = []
    for is_adapted in (False, True):
        trainer = trainer_of(tmp_path)
        if is_adapted:
            model = peft.get_peft_model(trainer.model, peft.LoraConfig(r=2, **options))
            trainer.model = trainer.model_wrapped = trainer.callback_handler.model = model
        LanguageRoutingCallback(TOKENIZER).add_to(trainer)
        trainer.train()
        logs.append({k: v for k, v in trainer.state.log_history[0].items() if k.startswith("routing/")})
    assert "routing/encoder/sw" in logs[0] and logs[1] == pytest.approx(logs[0])


def test_languages_of_nllb_beside_other_special_tokens(nllb_tokenizer: Any) -> None:
    nllb_tokenizer.add_special_tokens({"additional_special_tokens": ["<term>"]})
    callback = LanguageRoutingCallback(nllb_tokenizer)
    assert len(callback.languages) == 202
    ids = torch.tensor([nllb_tokenizer("open").input_ids])
    assert [callback.languages[number] for number in callback._languages_of(ids)] == ["eng_Latn"]


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ZCodeM3Tokenizer has no languages"):
        LanguageRoutingCallback(ZCodeM3Tokenizer())
    trainer = trainer_of(tmp_path, config={"encoder_sparse_step": 0, "decoder_sparse_step": 0})
    LanguageRoutingCallback(TOKENIZER).add_to(trainer)
    with pytest.raises(ValueError, match="ZCodeM3ForConditionalGeneration has no sparse layer"):
        trainer.train()
