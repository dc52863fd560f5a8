"""Experiments on token ids: batches equal those of the text, held-out losses, pilots, going on from a time limit."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import experiment_report
import numpy as np
import prepare_tokens
import pytest
import torch
import train_multitask
from multitask_data import backwards, read_pairs
from multitask_recipe import DataArguments
from safetensors.torch import load_file
from tiny_sizes import SIZES
from tiny_tokens import prepare
from token_noise import TokenNoise
from token_pairs import TokenArrays, TokenPairs
from token_trainer import held_out_nats

from hf_moe_ted import (
    DataCollatorForMultitaskSeq2Seq,
    MultitaskDataset,
    ZCodeM3Config,
    ZCodeM3ForConditionalGeneration,
    ZCodeM3Tokenizer,
)

RECIPE: dict[str, Any] = {
    "config": {**SIZES, "max_position_embeddings": 64, "capacity_factor": 1.25, "eval_capacity_factor": 2.0},
    "router_init_scale": 0.1,
    "max_length": 48,
    "max_tokens_per_batch": 512,
    "length_buckets": [24, 48],
    "max_eval_samples": 4,
    "max_steps": 4,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "logging_steps": 1,
    "save_strategy": "no",
    "save_model": True,
    "report_to": "none",
    "disable_tqdm": True,
    "bf16": True,
    "cuda_graphs": True,
    "tiers": {"german": ["de"], "icelandic": ["is"]},
    "seeds": [3],
    "pilot": {"learning_rate": [1e-6, 0.01], "max_steps": 2},
    "variants": {
        "sparse": {},
        "dense": {"config": {"encoder_sparse_step": 0, "decoder_sparse_step": 0}},
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("token_pairs")
    fields = {**RECIPE, **prepare(folder)}
    (folder / "recipe.json").write_text(json.dumps(fields))
    return folder


def run(folder: Path, monkeypatch: pytest.MonkeyPatch, output: str, *more: str) -> None:
    argv = ["train_multitask.py", str(folder / "recipe.json"), "--output_dir", str(folder / output), *more]
    monkeypatch.setattr(sys, "argv", argv)
    train_multitask.main()


def result_of(folder: Path, output: str, variant: str, name: str = "seed_3") -> dict[str, Any]:
    return json.loads((folder / output / variant / name / "result.json").read_text())


def test_segmentations_are_other_ids_of_the_same_text(folder: Path, tmp_path: Path) -> None:
    """Each pair several times: first as the tokenizer cuts it, then with merges that are left out."""
    argv = ["prepare_tokens.py", *(str(folder / f"{name}.tsv") for name in ("train", "valid")), "--max_length", "256"]
    argv += ["--tokenizer", str(folder / "tokenizer"), "--output_dir", str(tmp_path)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [*argv, "--segmentations", "3", "--bpe_dropout", "0.5", "--languages", "is"])
        prepare_tokens.main()
    tokenizer = ZCodeM3Tokenizer.from_pretrained(folder / "tokenizer")
    rows = read_pairs(folder / "train.tsv", ["is"])
    whole = TokenArrays.of(rows, tokenizer, 256)
    arrays, of_validation = (TokenArrays.load(tmp_path / f"{name}.npz.xz") for name in ("train", "valid"))
    texts = [(arrays.text(arrays.english[pair], tokenizer), arrays.text(arrays.num_english + pair, tokenizer))
             for pair in range(len(arrays.english))]  # fmt: skip
    assert texts == [(row["source"], row["target"]) for row in rows] * 3
    assert arrays.num_english == 3 * whole.num_english
    end = whole.starts[whole.num_english]
    assert np.array_equal(arrays.ids[:end], whole.ids[:end])
    num_tokens = np.add.reduceat(np.diff(arrays.starts)[arrays.num_english :], np.arange(3) * len(rows))
    assert num_tokens[0] == len(whole.ids) - whole.starts[whole.num_english]
    assert (num_tokens[1:] > 1.2 * num_tokens[0]).all()
    assert len(of_validation.english) == len(read_pairs(folder / "valid.tsv", ["is"]))
    with pytest.raises(ValueError, match=r"other languages or tokenizers: they differ in {'tags': \[\('de', \d+\)\]}"):
        TokenArrays.joined([arrays, TokenArrays.load(folder / "train.npz.xz")])


def test_batches_are_those_of_the_text(folder: Path) -> None:
    tokenizer = ZCodeM3Tokenizer.from_pretrained(folder / "tokenizer")
    arrays = TokenArrays.load(folder / "train.npz.xz")
    tokens = TokenPairs(arrays, "cpu")
    rows = read_pairs(folder / "train.tsv")[:-1]  # the last one is too long
    text = MultitaskDataset(rows, both_directions=True)
    collator = DataCollatorForMultitaskSeq2Seq(tokenizer, max_length=48)
    assert len(tokens) == len(text) == 96 and arrays.num_english == 24
    assert sorted(map(str, tokens.components)) == sorted(map(str, text.components))

    numbers = np.array([0, 1, 30, 47, 48, 95])
    of_text = collator([text[2 * (n % 48) + n // 48] for n in numbers.tolist()])
    assert tokens.lengths[numbers].tolist() == [list(pair) for pair in zip(
        of_text["attention_mask"].sum(1).tolist(), (of_text["labels"] != -100).sum(1).tolist(), strict=True
    )]  # fmt: skip
    shape = (of_text["input_ids"].shape[1], of_text["labels"].shape[1])
    batch = tokens.batch(numbers, shape)
    assert all(torch.equal(batch[name], of_text[name]) for name in ("input_ids", "attention_mask", "labels"))
    wider = tokens.batch(numbers, (shape[0] + 3, shape[1] + 5))
    assert torch.equal(wider["labels"][:, : shape[1]], batch["labels"]) and bool(
        (wider["labels"][:, -5:] == -100).all()
    )

    assert arrays.first_pairs(2).tolist() == [0, 1, 2, 3]
    assert arrays.first_pairs(None, ["is"]).tolist() == list(range(1, 48, 2))
    assert tokens.first_rows(tokenizer, 3) == rows[:6] + backwards(rows[:6])
    few = TokenPairs(arrays, "cpu", arrays.first_pairs(2, ["is"]))
    assert few.first_rows(tokenizer, 3) == rows[1:4:2] + backwards(rows[1:4:2])
    assert few.directions == ["en-is", "is-en"] and few.component_numbers.tolist() == [0, 0, 1, 1]
    assert torch.equal(few.batch(np.array([1]), shape)["labels"], tokens.batch(np.array([3]), shape)["labels"])


def test_pivots_are_two_other_languages_of_one_english_text() -> None:
    english = np.array([0, 0, 0, 1, 2, 2, 0, 2, 3, 3])
    languages = np.array([1, 2, 3, 1, 2, 1, 4, 4, 3, 2])
    tags = {lang: number for number, lang in enumerate(("en", "de", "fr", "is", "ja"))}
    arrays = TokenArrays(
        np.arange(14, dtype=np.uint16), np.arange(15), english, languages, tags, {"eos": 2, "pad": 1}, 99
    )
    pairs = np.array([0, 1, 2, 3, 4, 5, 6, 7])  # of the last two texts nothing
    drawn = [arrays.pivoted(pairs, 7, seed) for seed in range(20)]
    for pivots in drawn:
        assert sorted(pivots[:, 0]) == [0, 1, 2, 4, 5, 6, 7]  # pair 3 is alone with its English text
        assert (english[pivots[:, 0]] == english[pivots[:, 1]]).all()
        assert (languages[pivots[:, 0]] != languages[pivots[:, 1]]).all()
    assert {target for pivots in drawn for source, target in pivots if source == 0} == {1, 2, 6}
    assert np.array_equal(arrays.pivoted(pairs, 7), arrays.pivoted(pairs, 7))
    assert len(arrays.pivoted(pairs, 3)) == 3
    with pytest.raises(ValueError, match=r"8 pivoted examples are wanted, but only 7 texts.* lower pivoted_share"):
        arrays.pivoted(pairs, 8)
    twice = replace(arrays, languages=np.array([1, 1, 1, 1, 2, 1, 1, 4, 3, 2]))  # the first text has one language
    assert {source for source, _ in twice.pivoted(pairs, 2)} <= {4, 5, 7}
    with pytest.raises(ValueError, match="but only 3 texts"):
        replace(arrays, languages=np.array([1, 1, 1, 1, 2, 3, 1, 4, 3, 2])).pivoted(pairs, 4)


def test_batches_of_pivots_are_those_of_their_texts(folder: Path) -> None:
    tokenizer = ZCodeM3Tokenizer.from_pretrained(folder / "tokenizer")
    arrays = TokenArrays.load(folder / "train.npz.xz")
    pivots = arrays.pivoted(np.arange(48), 48)
    data = TokenPairs(arrays, "cpu", pivots=pivots)
    names = ["en-de", "en-is", "de-en", "is-en", "de-is", "is-de"]
    assert data.directions == names and {component.task for component in data.components} == {"translation"}
    assert np.bincount(data.component_numbers).tolist() == [24] * 6
    rows = read_pairs(folder / "train.tsv")
    texts = [
        {
            **{"src_lang": rows[source]["tgt_lang"], "source": rows[source]["target"]},
            **{"tgt_lang": rows[target]["tgt_lang"], "target": rows[target]["target"]},
        }
        for source, target in pivots.tolist()
    ]
    collator = DataCollatorForMultitaskSeq2Seq(tokenizer, max_length=48)
    of_text = collator([{**row, "task": "translation", "noise_seed": 0} for row in texts])
    shape = (of_text["input_ids"].shape[1], of_text["labels"].shape[1])
    batch = data.batch(np.arange(96, 144), shape)
    assert all(torch.equal(batch[name], of_text[name]) for name in ("input_ids", "attention_mask", "labels"))
    assert np.array_equal(data.batch(np.arange(96), (48, 48))["labels"], TokenPairs(arrays, "cpu").batch(
        np.arange(96), (48, 48))["labels"])  # fmt: skip


def test_a_share_of_a_run_is_pivoted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--output_dir", str(folder / "pivoted"), "--pivoted_share", "0.25"]
    [one] = train_multitask.command_of([str(folder / "recipe.json"), "--variants", "dense", *options]).runs
    directions = np.array(train_multitask.Tokens(one).dataset.directions)
    of_examples = directions[train_multitask.Tokens(one).dataset.component_numbers]
    assert len(of_examples) == 96 + 32 and np.isin(of_examples, ["de-is", "is-de"]).sum() == 32
    run(folder, monkeypatch, "pivoted", "--variants", "dense", "--pivoted_share", "0.25")
    last = result_of(folder, "pivoted", "dense")["log_history"][-2:]
    assert {*last[0].get("direction_losses", last[1].get("direction_losses"))} == {"en-de", "en-is", "de-en", "is-en"}
    for share in ("0.5", "-0.1"):
        with pytest.raises(ValueError, match=rf"pivoted_share \({share}\) must be between 0 and 1/3"):
            train_multitask.command_of([str(folder / "recipe.json"), "--pivoted_share", share])
    with pytest.raises(ValueError, match=r"pivoted_share \(0.2\) needs a sampling_temperature of 1, not 5.0"):
        command = [str(folder / "recipe.json"), "--pivoted_share", "0.2", "--sampling_temperature", "5"]
        train_multitask.command_of(command)
    with pytest.raises(ValueError, match="needs token ids: give train_tokens"):
        DataArguments(train_file="train.tsv", validation_file="valid.tsv", pivoted_share=0.1)


def test_ids_of_another_tokenizer_are_refused(folder: Path, tmp_path: Path) -> None:
    tokenizer = ZCodeM3Tokenizer.from_pretrained(folder / "tokenizer")
    arrays = TokenArrays.load(folder / "train.npz.xz")
    assert arrays.differences_to(tokenizer) == {}
    other = tokenizer.train_new_from_iterator(["other words, other merges"] * 9, len(tokenizer))
    assert "vocabulary" in arrays.differences_to(other)
    assert replace(arrays, vocabulary=None).differences_to(tokenizer) == {}  # a file of before
    other.save_pretrained(tmp_path)
    command = train_multitask.command_of([str(folder / "recipe.json"), "--tokenizer_name_or_path", str(tmp_path)])
    with pytest.raises(ValueError, match=r"was made with another tokenizer than .*'vocabulary'"):
        train_multitask.Tokens(command.runs[0])


def test_validation_may_lack_a_language(folder: Path) -> None:
    arrays = TokenArrays.load(folder / "train.npz.xz")
    fewer = replace(arrays, tags={lang: arrays.tags[lang] for lang in ("en", "de")})
    assert fewer.differences(arrays) == {}
    assert [*arrays.differences(fewer)["tags"]] == [("is", arrays.tags["is"])]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max_length", "4"], r"has texts of \d+ tokens, more than max_length \(4\)"),
        (["--train_file", "train.tsv"], "stands for train_file .*: give one"),
        (["--train_tokens", "RECIPE"], "is no file of prepare_tokens.py"),
        (["--test_file", "RECIPE", "--max_test_samples", "1"], r"line 1 of .* has 1 columns"),
    ],
)
def test_what_token_ids_do_not_have_is_refused(folder: Path, options: list[str], message: str) -> None:
    options = [str(folder / "recipe.json") if option == "RECIPE" else option for option in options]
    with pytest.raises(ValueError, match=message):
        train_multitask.Tokens(train_multitask.command_of([str(folder / "recipe.json"), *options]).runs[0])


def test_prepared_files_need_names_of_their_own(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "train.tsv").write_text((folder / "valid.tsv").read_text())
    argv = ["prepare_tokens.py", str(folder / "train.tsv"), str(tmp_path / "train.tsv"), "--output_dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(ValueError, match="need different names"):
        prepare_tokens.main()
    monkeypatch.setattr(sys, "argv", [*argv[:2], *argv[3:], "--vocab_size", "100"])
    with pytest.raises(ValueError, match=r"--vocab_size \(100\) must be at least \d+"):
        prepare_tokens.main()


def test_a_pilot_belongs_to_the_settings_of_its_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = ["--variants", "dense", "--max_seconds", "0.1"]
    run(folder, monkeypatch, "rates", "--variants", "dense")
    (folder / "rates" / "dense" / "seed_3" / "result.json").unlink()
    run(folder, monkeypatch, "rates", *stopped)  # the same command goes on
    (folder / "rates" / "dense" / "seed_3" / "result.json").unlink(missing_ok=True)
    with pytest.raises(ValueError, match="was begun with learning_rate"):
        run(folder, monkeypatch, "rates", *stopped, "--learning_rate", "0.01")


def test_a_share_that_is_dropped_needs_a_capacity_in_evaluation() -> None:
    result = {"held_out_tokens": {}, "config": {"eval_capacity_factor": None}}
    assert experiment_report.drops_none(result)
    assert not experiment_report.drops_none({**result, "config": {"eval_capacity_factor": 2.0}})
    assert not experiment_report.drops_none({"config": {}})


def test_texts_are_denoised_beside_few_pairs(folder: Path) -> None:
    arrays = TokenArrays.load(folder / "train.npz.xz")
    all_pairs = arrays.first_pairs(None)
    few = arrays.with_few(all_pairs, ["is"], 2)
    assert [int((arrays.languages[few] == number).sum()) for number in (1, 2)] == [24, 2]
    mask = ZCodeM3Tokenizer.from_pretrained(folder / "tokenizer").mask_token_id
    data = TokenPairs(arrays, "cpu", few, denoised_pairs=all_pairs, noise=TokenNoise(0.35, 3.0, mask))
    assert [str(component) for component in data.components] == [
        "translation en-de", "translation en-is", "translation de-en", "translation is-en",
        "denoising en-en", "denoising de-de", "denoising is-is",
    ]  # fmt: skip
    assert data.sizes.tolist() == [24, 2, 24, 2, 24, 24, 24]

    plain = TokenPairs(arrays, "cpu", few)
    numbers, shape = np.arange(len(data)), tuple(data.lengths.max(axis=0).tolist())
    batch, again = (data.batch(numbers, shape, noise_seed=4) for _ in range(2))
    assert all(torch.equal(batch[name], again[name]) for name in batch)
    assert not torch.equal(batch["input_ids"], data.batch(numbers, shape, noise_seed=5)["input_ids"])
    translated = plain.batch(np.arange(52), shape)
    assert all(torch.equal(batch[name][:52], translated[name]) for name in batch)
    eos, tags = arrays.special_ids["eos"], {*arrays.tags.values()}
    num_masked = 0
    for source, label in zip(batch["input_ids"][52:].tolist(), batch["labels"][52:].tolist(), strict=True):
        ids = [token for token in source if token != arrays.special_ids["pad"]]
        text = [token for token in label if token != -100]
        assert ids[0] == text[0] and ids[0] in tags and ids[-1] == text[-1] == eos
        rest = iter(text)
        assert all(token in rest for token in ids if token != mask)  # a part of the text, in its order
        num_masked += mask in ids
    assert 36 < num_masked < 72 and not (batch["input_ids"][:52] == mask).any()


def test_held_out_loss_is_that_of_each_example_alone(folder: Path) -> None:
    tokens = TokenPairs(TokenArrays.load(folder / "valid.npz.xz"), "cpu")
    torch.manual_seed(0)
    model = ZCodeM3ForConditionalGeneration(
        ZCodeM3Config(vocab_size=tokens.arrays.vocab_size, **SIZES, label_smoothing=0.1, router_aux_loss_coef=0.01)
    ).train()
    nats_G, tokens_G = held_out_nats(model, tokens, max_tokens=200)
    assert model.training
    model.eval()
    expected = np.zeros(len(tokens.components))
    for number, component in enumerate(tokens.component_numbers.tolist()):
        source, target = tokens.lengths[number].tolist()
        batch = tokens.batch(np.array([number]), (source, target))
        labels = batch.pop("labels")
        start = torch.cat([torch.tensor([[model.config.decoder_start_token_id]]), labels[:, :-1]], dim=1)
        with torch.no_grad():
            log_probs = model(**batch, decoder_input_ids=start).logits.log_softmax(-1)
        expected[component] -= float(log_probs.gather(-1, labels[..., None]).sum())
    np.testing.assert_allclose(nats_G, expected, rtol=1e-5)
    assert tokens_G.tolist() == np.bincount(tokens.component_numbers, weights=tokens.lengths[:, 1]).tolist()


def test_an_experiment_goes_on_exactly_from_its_time_limit(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(folder, monkeypatch, "whole", "--variants", "sparse")
    run(folder, monkeypatch, "whole", "--variants", "dense", "--learning_rate", "0.01")
    assert {path.name for path in (folder / "whole" / "sparse").iterdir()} == {"pilot_1e-06", "pilot_0.01", "seed_3"}
    whole = result_of(folder, "whole", "sparse")
    pilots = {rate: result_of(folder, "whole", "sparse", f"pilot_{rate}") for rate in ("1e-06", "0.01")}
    losses = {rate: pilot["log_history"][-2]["eval_loss"] for rate, pilot in pilots.items()}
    assert whole["pilot_losses"] == losses and whole["learning_rate"] == 0.01 and losses["0.01"] < losses["1e-06"]
    assert [pilot["log_history"][-1]["step"] for pilot in pilots.values()] == [2, 2]
    kept = {path.parent.name for path in (folder / "whole" / "sparse").glob("*/model.safetensors")}
    assert kept == {"seed_3"}  # pilots keep no model

    limited = ["--max_seconds", "0.001", "--variants", "sparse", "--learning_rate", "0.01"]
    for step in (1, 2):  # a step in each piece
        run(folder, monkeypatch, "pieces", *limited)
        piece = result_of(folder, "pieces", "sparse")
        assert not piece["is_done"] and piece["log_history"][-1]["step"] == step
    assert capsys.readouterr().out.count("the same command goes on from here") == 2
    run(folder, monkeypatch, "pieces", "--variants", "sparse", "--learning_rate", "0.01")
    pieces = result_of(folder, "pieces", "sparse")
    assert pieces["is_done"] and not pieces["pilot_losses"]
    names = ("step", "loss", "grad_norm")
    logs = [[[e[name] for name in names] for e in each["log_history"] if "loss" in e] for each in (whole, pieces)]
    assert logs[0] == logs[1] and len(logs[0]) == 4
    losses_of = [
        {entry["step"]: entry["direction_losses"] for entry in each["log_history"] if "direction_losses" in entry}
        for each in (whole, pieces)
    ]
    assert {step: losses_of[1][step] for step in (2, 4)} == losses_of[0] and [*losses_of[1]] == [1, 2, 4]
    weights = [load_file(folder / name / "sparse" / "seed_3" / "model.safetensors") for name in ("whole", "pieces")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])

    monkeypatch.setattr(experiment_report, "draw_curves", lambda runs, path: None)  # as of every experiment
    text = experiment_report.write_report(folder / "whole", "Few steps", "dense")
    assert "german loss" in text and "en-X loss" in text and "ms per step" in text
    tokens = whole["held_out_tokens"]
    last = whole["log_history"][-2]
    assert last["eval_loss"] == pytest.approx(
        sum(last["direction_losses"][name] * tokens[name] for name in tokens) / sum(tokens.values())
    )
    load = last["expert_load"]
    assert {*load} == {"encoder.1", "decoder.1"} and all(
        sum(of_layer) == pytest.approx(4) for of_layer in load.values()
    )
    assert last["router/load_max"] == pytest.approx(sum(max(of_layer) for of_layer in load.values()) / 2)
    assert 0 <= last["router/dropped"] < 1
    assert experiment_report.curves_of(whole)["held-out"][-1][2] == pytest.approx(last["eval_loss"])


def test_the_router_starts_at_a_tenth(folder: Path) -> None:
    tokenizer = ZCodeM3Tokenizer.from_pretrained(folder / "tokenizer")
    deviations = []
    for scale in ("1.0", "0.1"):
        command = train_multitask.command_of([str(folder / "recipe.json"), "--router_init_scale", scale])
        train_multitask.set_seed(0)
        model = train_multitask.model_of(command.runs[0], tokenizer)
        deviations.append(model.model.encoder.layers[1].ffn.router.weight.std().item())
    assert deviations[1] == pytest.approx(deviations[0] / 10)


def test_what_does_not_go_together(folder: Path) -> None:
    recipe = str(folder / "recipe.json")
    with pytest.raises(ValueError, match="sentence_distance and word_dropout need text"):
        train_multitask.command_of([recipe, "--denoising", "--word_dropout", "0.1"])
    (folder / "none.json").write_text(json.dumps({"output_dir": str(folder), "report_to": "none"}))
    with pytest.raises(ValueError, match="give train_file, or train_tokens and validation_tokens"):
        train_multitask.command_of([str(folder / "none.json")])
    with pytest.raises(ValueError, match="needs train_tokens, which is not given"):
        train_multitask.command_of([str(folder / "none.json"), "--train_file", "a", "--validation_tokens", "b"])
    command = train_multitask.command_of([recipe])
    with pytest.raises(ValueError, match=r"has no pairs in \['fr'\]"):
        command.runs[0].data.languages = ["fr"]
        train_multitask.Tokens(command.runs[0])
    tokenizer = ZCodeM3Tokenizer.from_pretrained(folder / "tokenizer")
    with pytest.raises(ValueError, match=r"none of 48 pairs has at most max_length \(4\) tokens"):
        TokenArrays.of(read_pairs(folder / "train.tsv")[:-1], tokenizer, max_length=4)


def test_a_run_that_ended_before_its_result_makes_no_more_steps(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = ["--variants", "dense", "--learning_rate", "0.01", "--save_strategy", "steps", "--save_steps", "2"]
    run(folder, monkeypatch, "ended", *saved)
    whole = result_of(folder, "ended", "dense")
    of_run = folder / "ended" / "dense" / "seed_3"
    weights = (of_run / "model.safetensors").read_bytes()
    for name in ("result.json", "model.safetensors"):
        (of_run / name).unlink()
    run(folder, monkeypatch, "ended", *saved)
    again = result_of(folder, "ended", "dense")
    assert again["is_done"] and again["log_history"][-1]["step"] == whole["log_history"][-1]["step"] == 4
    assert (of_run / "model.safetensors").read_bytes() == weights
    assert {path.name for path in of_run.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    losses = [[e["eval_loss"] for e in each["log_history"] if "eval_loss" in e] for each in (whole, again)]
    assert losses[0] == losses[1] and len(losses[0]) == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"seeds": []}, r"seeds of .* \(\[\]\) must be a list"),
        ({"variants": {}}, r"variants of .* must be fields by name"),
        ({"variants": {"a": None}}, r"variants of .* must be fields by name"),
        ({"variants": {"a/b": {}}}, "without /"),
        ({"max_steps": 0}, r"max_steps \(0\) and share_of_steps \(1.0\) of sparse must be more than 0"),
        ({"share_of_steps": 0}, r"share_of_steps \(0.0\) of sparse must be more than 0"),
        ({"max_step": 5}, "max_step"),  # no abbreviation of max_steps
        ({"tiers": {"some": ["de", "frr"]}}, r"tiers have languages \['frr'\] without pairs; there are \['de', 'is'\]"),
    ],
)
def test_recipes_that_are_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], message: str
) -> None:
    recipe = json.loads((folder / "recipe.json").read_text()) | fields
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(recipe))
    monkeypatch.setattr(sys, "argv", ["train_multitask.py", str(path), "--output_dir", str(tmp_path / "runs")])
    with pytest.raises(ValueError, match=message):
        train_multitask.main()
    assert not [*tmp_path.rglob("result.json")]


def test_a_pilot_is_evaluated_at_its_end(folder: Path, tmp_path: Path) -> None:
    recipe = json.loads((folder / "recipe.json").read_text()) | {"eval_steps": 100}
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(recipe))
    [run, *_] = train_multitask.command_of([str(path), "--variants", "dense"]).runs
    assert [(each.training.max_steps, each.training.eval_steps) for each in run.pilots] == [(2, 2), (2, 2)]
    assert run.training.eval_steps == 100
    text = {"train_file": "a", "validation_file": "b", "low_resource_languages": ["is"]}
    tokens = {"train_tokens", "validation_tokens", "tokenizer_name_or_path"}
    path.write_text(json.dumps({k: v for k, v in recipe.items() if k not in tokens} | text))
    with pytest.raises(ValueError, match=r"chooses by one held-out loss, and text with low_resource_languages"):
        train_multitask.command_of([str(path)])


def test_tiers_of_languages_with_a_hyphen() -> None:
    result = {"held_out_tokens": dict.fromkeys(("en-zh-CN", "zh-CN-en", "en-de"), 1), "tiers": {"a": ["zh-CN"]}}
    assert experiment_report.groups_of(result)["a"] == ["en-zh-CN", "zh-CN-en"]


def test_ratios_of_steps_and_seconds() -> None:
    dense = [(100, 10.0, 4.0), (200, 20.0, 3.0), (300, 30.0, 3.5), (400, 40.0, 2.0)]
    sparse = [(100, 20.0, 3.5), (200, 40.0, 2.5)]
    assert experiment_report.reached(sparse, 3.0) == (150.0, 30.0)
    # 4.0 is above what the run starts with, 3.5 is behind something better, 2.0 is not reached
    assert experiment_report.ratios_to(sparse, dense) == [(200, 200 / 150, 20 / 30), (400, 0.0, 0.0)]


def test_ratios_of_parts_of_the_held_out_text() -> None:
    def run(losses: dict[int, tuple[float, float]]) -> dict[str, Any]:
        history = [
            {"step": step, "seconds": step / 10, "direction_losses": {"en-de": out, "de-en": into}}
            for step, (out, into) in losses.items()
        ]
        logs = [{"step": step, "seconds": step / 10, "loss": 1.0} for step in (50, 100)]
        tokens = {"en-de": 300, "de-en": 100}
        return {"seed": 0, "tiers": {}, "held_out_tokens": tokens, "log_history": [*history, *logs]}

    dense = run({100: (4.0, 4.0), 200: (3.0, 3.0), 300: (2.0, 3.5)})
    sparse = run({50: (3.5, 3.5), 100: (2.5, 3.2), 150: (2.0, 3.2)})
    title, _, *lines = experiment_report.ratio_lines({"dense": [dense], "sparse": [sparse]}, "dense")[1:]
    assert title.endswith("| steps, en-X | steps, X-en |")
    # 3.0 in the mean is a mean of 3.5 and 2.675; into English it is not reached, and at step 300 not better than before
    assert [line.split(" | ")[2:4] + line.removesuffix(" |").split(" | ")[-2:] for line in lines] == [
        ["200", f"{200 / (50 + 50 * 0.5 / 0.825):.2f}", f"{200 / 75:.2f}", "never"],
        ["300", f"{300 / (100 + 50 * 0.3 / 0.375):.2f}", f"{300 / 150:.2f}", "-"],
    ]


def test_the_training_loss_is_a_mean_over_steps() -> None:
    """Whose last log may be of one step, where time was over."""
    logs = [{"step": step, "loss": loss} for step, loss in ((50, 9.0), (100, 4.0), (250, 3.0), (300, 2.0), (301, 1.0))]
    expected = (1 * 1.0 + 50 * 2.0 + 150 * 3.0) / 201
    assert experiment_report.last_training_loss({"log_history": logs}) == pytest.approx(expected)
    assert experiment_report.last_training_loss({"log_history": logs[:1]}) == 9.0
    assert experiment_report.last_training_loss({"log_history": []}) == math.inf


def test_report_of_runs_with_other_measurements() -> None:
    """The first seed of the reference has the loss without a capacity, the second has not."""

    def run(seed: int, names: tuple[str, ...]) -> dict[str, Any]:
        evaluation = {"step": 2, "seconds": 2.0, "direction_losses": {"en-de": 2.0}} | dict.fromkeys(names, 1.5)
        logs = [{"step": step, "seconds": float(step), "loss": 3.0} for step in (1, 2)]
        about = {"seed": seed, "tiers": {}, "held_out_tokens": {"en-de": 3}, "num_parameters": 1, "config": {}}
        return about | {"log_history": [*logs, evaluation]}

    runs = {name: [run(0, ("eval_no_capacity_loss",)), run(1, ())] for name in ("dense", "sparse")}
    dense, sparse = experiment_report.rows_of(runs, "dense")
    assert dense["held-out loss"] == "2.000 ± 0.000" and not any("capacity" in name for name in {*dense, *sparse})
    assert sparse["held-out loss"] == "2.000 ± 0.000 (0.000 ± 0.000)"
    for result in runs["sparse"]:
        result["held_out_tokens"] = {"en-de": 2}  # other text
    _, sparse = experiment_report.rows_of(runs, "dense")
    assert (sparse["held-out loss"], sparse["steps to 2.000"]) == ("2.000 ± 0.000", "-")
    assert experiment_report.ratio_lines(runs, "dense") == []


def test_report_leaves_out_runs_that_are_not_done(tmp_path: Path) -> None:
    runs = {("dense", 0): True, ("dense", 1): False, ("sparse", 0): False, ("old", 0): None}
    for (variant, seed), is_done in runs.items():
        path = tmp_path / variant / f"seed_{seed}" / "result.json"
        path.parent.mkdir(parents=True)
        result = {"variant": variant, "seed": seed} | ({} if is_done is None else {"is_done": is_done})
        path.write_text(json.dumps(result), encoding="utf-8")
    found = {
        (run["variant"], run["seed"])
        for of_variant in experiment_report.read_runs(tmp_path).values()
        for run in of_variant
    }
    assert found == {("dense", 0), ("sparse", 0), ("old", 0)}


def test_a_share_of_each_language() -> None:
    """At least one pair of each, whatever the share; all of them in their order; none for 0."""
    languages = np.array([1] * 100 + [2] * 2 + [3] * 50)
    ids, starts = np.arange(304, dtype=np.uint16), np.arange(305)
    tags = {lang: number for number, lang in enumerate(("en", "de", "sw", "is"))}
    arrays = TokenArrays(ids, starts, np.arange(152), languages, tags, {"eos": 2, "pad": 1}, 99)
    pairs = np.arange(150)  # the last two are not taken
    for share, counts in ((0.5, [50, 1, 24]), (0.001, [1, 1, 1]), (1.0, [100, 2, 48]), (0.0, [0, 0, 0])):
        drawn = arrays.share_of_each_language(pairs, share)
        assert np.bincount(languages[drawn], minlength=4)[1:].tolist() == counts
        assert (np.diff(drawn) > 0).all() and np.isin(drawn, pairs).all()
        assert np.array_equal(drawn, arrays.share_of_each_language(pairs, share))
    assert not np.array_equal(arrays.share_of_each_language(pairs, 0.5), arrays.share_of_each_language(pairs, 0.5, 1))


def into_english(folder: Path, share: str, *options: str) -> TokenPairs:
    """The training data of a run with `into_english_share`."""
    command = [str(folder / "recipe.json"), "--variants", "dense", "--output_dir", str(folder / "into"), *options]
    [one] = train_multitask.command_of([*command, "--into_english_share", share]).runs
    dataset = train_multitask.Tokens(one).dataset
    assert isinstance(dataset, TokenPairs)
    return dataset


def test_a_share_of_a_run_is_translated_into_english(folder: Path) -> None:
    """All pairs from English, and the texts into English are those that they have when all are."""
    few = into_english(folder, "0.25", "--pivoted_share", "0.25")
    of_examples = np.array(few.directions)[few.component_numbers]
    assert np.isin(of_examples, ["en-de", "en-is"]).tolist() == [True] * 48 + [False] * 32
    assert np.isin(of_examples, ["de-en", "is-en"]).tolist() == [False] * 48 + [True] * 12 + [False] * 20
    whole = TokenPairs(TokenArrays.load(folder / "train.npz.xz"), "cpu")
    shape = (48, 48)
    rows = {name: whole.batch(np.arange(48, 96), shape)[name].tolist() for name in ("input_ids", "labels")}
    batch = few.batch(np.arange(48, 60), shape)
    numbers = [rows["input_ids"].index(row) for row in batch["input_ids"].tolist()]
    assert numbers == sorted({*numbers}) and [rows["labels"][number] for number in numbers] == batch["labels"].tolist()
    tokenizer = ZCodeM3Tokenizer.from_pretrained(folder / "tokenizer")
    assert len(few.first_rows(tokenizer, 1000)) == 60
    none = into_english(folder, "0")
    assert {*none.directions} == {"en-de", "en-is"} and len(none) == 48
    assert {row["src_lang"] for row in none.first_rows(tokenizer, 2)} == {"en"}
    denoised = into_english(folder, "0.25", "--denoising", "true")
    assert denoised.num_translated == 60 and denoised.components[-1].task == "denoising"


def test_each_english_text_is_a_target_once(folder: Path) -> None:
    """All pairs from English, and one into it for each English text, in languages that are drawn."""
    dataset = into_english(folder, "1", "--english_once", "true")
    arrays = TokenArrays.load(folder / "train.npz.xz")
    num_english = len({*arrays.english.tolist()})
    of_examples = np.array(dataset.directions)[dataset.component_numbers]
    into = np.flatnonzero(np.isin(of_examples, ["de-en", "is-en"]))
    assert len(dataset) == 48 + num_english and len(into) == num_english < 48
    labels = dataset.batch(into, (48, 48))["labels"].tolist()
    assert len({*map(tuple, labels)}) == num_english and {*of_examples[into]} == {"de-en", "is-en"}
    pairs = arrays.first_pairs(None)
    assert np.array_equal(arrays.one_of_each_english(pairs), arrays.one_of_each_english(pairs))
    assert not np.array_equal(arrays.one_of_each_english(pairs), arrays.one_of_each_english(pairs, 1))


def test_a_run_that_has_begun_is_not_given_another_share(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor one of an older version, whose settings do not name the field."""
    run(folder, monkeypatch, "begun", "--variants", "dense")
    for path in (folder / "begun" / "dense").glob("*/settings.json"):
        settings = json.loads(path.read_text())
        assert settings.pop("into_english_share") == 1.0
        path.write_text(json.dumps(settings))
        (path.parent / "result.json").unlink()
    with pytest.raises(ValueError, match=r" was begun with into_english_share 1.0, not 0.5; give the same again"):
        run(folder, monkeypatch, "begun", "--variants", "dense", "--into_english_share", "0.5")
    run(folder, monkeypatch, "begun", "--variants", "dense")


def test_shares_that_are_refused(folder: Path) -> None:
    recipe = str(folder / "recipe.json")
    with pytest.raises(ValueError, match=r"into_english_share \(1.5\) must be between 0 and 1"):
        train_multitask.command_of([recipe, "--into_english_share", "1.5"])
    with pytest.raises(ValueError, match=r"one of english_once \(True\) and into_english_share \(0.5\)"):
        train_multitask.command_of([recipe, "--english_once", "true", "--into_english_share", "0.5"])
    both = r"pivoted_share \(0.2\), into_english_share \(0.5\) needs a sampling_temperature of 1, not 5.0"
    with pytest.raises(ValueError, match=both):
        shares = ["--into_english_share", "0.5", "--pivoted_share", "0.2", "--sampling_temperature", "5"]
        train_multitask.command_of([recipe, *shares])
    with pytest.raises(ValueError, match=r"into_english_share \(0.5\) needs token ids: give train_tokens"):
        DataArguments(train_file="train.tsv", validation_file="valid.tsv", into_english_share=0.5)


def test_a_model_that_is_not_trained_yet(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ValueError, match=r"model_name_or_path \(runs/other/seed_0\) of dense cannot be read; if another"
    ):
        run(folder, monkeypatch, "last", "--variants", "dense", "--model_name_or_path", "runs/other/seed_0")
