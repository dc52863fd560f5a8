"""Experiments on methods: their recipes with tiny models, models made of those of other runs, teachers, capacities."""

import json
import multiprocessing
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import experiment_report
import multitask_starts
import pytest
import torch
import train_multitask
from distillation import DistillationTrainer, soft_cross_entropy
from multitask_recipe import START_METHODS, read_recipe
from multitask_starts import METHODS
from safetensors.torch import load_file
from tiny_sizes import SIZES
from tiny_tokens import prepare
from token_pairs import TokenPairs
from token_trainer import TokenPairsTrainer

from hf_moe_ted import ExpertStatistics, prune_experts

RECIPES = Path(__file__).parents[2] / "examples" / "recipes" / "experiments"
NAMES = (
    *("num_experts", "pruning", "upcycling", "token_dropping", "distillation", "aggregation", "denoising"),
    *("no_capacity", "controls", "pruning_by_language"),
)
STEPS = 8
TINY: dict[str, Any] = {
    "config": {**SIZES, "num_experts": 64, "max_position_embeddings": 64},
    "max_length": 48,
    "max_tokens_per_batch": 512,
    "length_buckets": [24, 48],
    "max_eval_samples": 4,
    "max_steps": STEPS,
    "warmup_steps": 2,
    "eval_steps": 4,
    "logging_steps": 1,
    "learning_rate": 0.01,
    "tiers": {"german": ["de"], "icelandic": ["is"]},
    "seeds": [3],
}
HALVES = {"first_half": ["de"], "second_half": ["is"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recipes of tiny models with the variants of the real ones, which are done."""
    folder = tmp_path_factory.mktemp("methods")
    fields = {**TINY, **prepare(folder)}
    for name in NAMES:
        recipe = RECIPES / f"{name}_small.json"
        variants = read_recipe(recipe)["variants"]
        for half, languages in HALVES.items():
            if half in variants:
                variants[half]["languages"] = languages
        of_name = {**fields, "base": str(recipe), "variants": variants}
        if name == "denoising":
            of_name |= {"low_resource_languages": ["is"], "low_resource_pairs": 2}
        (folder / f"{name}.json").write_text(json.dumps(of_name))
    for name in NAMES:
        run(folder, name)
    return folder


def run(folder: Path, name: str, *more: str, output: str = "runs") -> None:
    with pytest.MonkeyPatch.context() as patch:
        argv = ["train_multitask.py", str(folder / f"{name}.json"), "--output_dir", str(folder / output), *more]
        patch.setattr(sys, "argv", argv)
        train_multitask.main()


def result_of(folder: Path, variant: str, output: str = "runs") -> dict[str, Any]:
    return json.loads((folder / output / variant / "seed_3" / "result.json").read_text())


def weights_of(folder: Path, variant: str, checkpoint: str = "", output: str = "runs") -> dict[str, torch.Tensor]:
    return load_file(folder / output / variant / "seed_3" / checkpoint / "model.safetensors")


def losses_of(result: dict[str, Any], name: str = "eval_loss") -> dict[int, float]:
    return {entry["step"]: entry[name] for entry in result["log_history"] if name in entry}


def test_a_variant_is_the_same_in_all_recipes_of_one_folder() -> None:
    recipes = [read_recipe(RECIPES / f"{name}_small.json") for name in NAMES]
    assert len({recipe["output_dir"] for recipe in recipes}) == 1
    seen: dict[str, Any] = {}
    for recipe in recipes:
        others = {name: value for name, value in recipe.items() if name not in ("variants", "seeds")}
        for variant, fields in recipe["variants"].items():
            assert seen.setdefault(variant, (fields, others)) == (fields, others)
    methods = (variant.get("start_from", {}).get("method") for variant, _ in seen.values())
    assert {*methods} == {None, *METHODS} and tuple(METHODS) == START_METHODS


def test_a_pruned_run_goes_on_where_the_whole_one_was(folder: Path) -> None:
    whole = result_of(folder, "64_experts")
    assert [*losses_of(whole)] == [4, 8]
    seconds = next(entry["seconds"] for entry in whole["log_history"] if entry["step"] == 7)
    source = weights_of(folder, "64_experts", "checkpoint-7")
    checkpoint = folder / "runs" / "64_experts" / "seed_3" / "checkpoint-7"
    statistics = ExpertStatistics.load(checkpoint / "expert_statistics")
    assert {*statistics.pairs} == {("en", "de"), ("de", "en"), ("en", "is"), ("is", "en")}
    router = "model.encoder.layers.1.ffn.router.weight"
    for count in (32, 16):
        kept = {}
        for criterion in ("utilization", "random"):
            variant = f"{count}_of_64_by_{criterion}"
            result = result_of(folder, variant)
            assert [*losses_of(result)] == [7, 8] and result["config"]["num_experts"] == count
            start = {"method": "prune", "variants": ["64_experts"], "steps": 7, "seconds": seconds}
            assert result["start"] == start and result["log_history"][1]["seconds"] >= seconds
            begun = weights_of(folder, variant, "checkpoint-7")
            rows = [(source[router] == row).all(dim=1).nonzero().item() for row in begun[router]]
            experts = "model.encoder.layers.1.ffn.experts.up_proj"
            assert torch.equal(begun[experts], source[experts][rows]) and rows == sorted(rows)
            assert torch.equal(begun["model.shared.weight"], source["model.shared.weight"])
            kept[criterion] = rows
        assert kept["utilization"] != kept["random"]
        counts = statistics.layers["model.encoder.layers.1.ffn"].num_computed.sum(dim=0)
        removed = [expert for expert in range(64) if expert not in kept["utilization"]]
        assert counts[kept["utilization"]].min() >= counts[removed].max()


def test_languages_can_be_counted_alike(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(
        multitask_starts,
        "prune_experts",
        lambda *args, **options: asked.append(options) or prune_experts(*args, **options),
    )
    shutil.copytree(folder / "runs" / "64_experts", folder / "alike" / "64_experts")
    for recipe, variant in (("pruning_by_language", "16_of_64_by_language"), ("pruning", "16_of_64_by_utilization")):
        run(folder, recipe, "--variants", variant, output="alike")
    assert [(options["scope"], options["criterion"], options["keep"]) for options in asked] == [
        ("language", "utilization", 16),
        ("global", "utilization", 16),
    ]


@pytest.mark.parametrize(("name", "value"), [("scope", "langauge"), ("criterion", "utilizaton")])
def test_a_misspelt_way_of_pruning_is_refused_before_any_training(folder: Path, name: str, value: str) -> None:
    start = {"method": "prune", "variants": ["64_experts"], "at": 0.8, name: value}
    recipe = {"base": str(folder / "pruning.json"), "variants": {"64_experts": "base", "pruned": {"start_from": start}}}
    (folder / "misspelt.json").write_text(json.dumps(recipe))
    with pytest.raises(ValueError, match=f"{name} '{value}' of start_from must be"):
        train_multitask.command_of([str(folder / "misspelt.json")])


def test_batches_go_on_behind_those_of_the_sources(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(folder / "runs" / "dense", folder / "batches" / "dense")
    drawn: list[Any] = []
    getitems = TokenPairs.__getitems__
    monkeypatch.setattr(TokenPairs, "__getitems__", lambda data, draws: drawn.append(draws) or getitems(data, draws))
    run(folder, "upcycling", "--variants", "upcycled", output="batches")
    [dense] = train_multitask.command_of([str(folder / "upcycling.json"), "--variants", "dense"]).runs
    text = train_multitask.Tokens(dense)
    of_epoch = [*train_multitask.sampler_of(dense, text, train_multitask.tokenizer_of(dense, text))]
    assert drawn[:4] == of_epoch[4:8]


def test_the_schedule_goes_on_behind_a_warmup(folder: Path) -> None:
    rates = {
        variant: {e["step"]: e["learning_rate"] for e in result_of(folder, variant)["log_history"] if "loss" in e}
        for variant in ("dense", "upcycled", "aggregated")
    }
    assert [*rates["upcycled"]] == [5, 6, 7, 8] and [*rates["aggregated"]] == [5, 6, 7, 8]
    for variant in ("upcycled", "aggregated"):
        expected = [rates["dense"][step] * share for step, share in ((5, 0), (6, 0.5), (7, 1), (8, 1))]
        assert [rates[variant][step] for step in (5, 6, 7, 8)] == pytest.approx(expected)


def test_upcycled_experts_are_the_dense_feed_forward(folder: Path) -> None:
    dense = weights_of(folder, "dense", "checkpoint-4")
    begun = weights_of(folder, "upcycled_top2", "checkpoint-4")
    experts = begun["model.decoder.layers.1.ffn.experts.down_proj"]
    assert all(torch.equal(expert, dense["model.decoder.layers.1.ffn.fc2.weight"]) for expert in experts)
    assert 0 < begun["model.decoder.layers.1.ffn.router.weight"].std() < 0.004  # a tenth of 0.02
    # two experts that are equal, with weights that sum to 1, are the dense layer, where no expert is full
    assert losses_of(result_of(folder, "upcycled_top2"))[4] == pytest.approx(
        losses_of(result_of(folder, "dense"))[4], abs=0.05
    )
    config = result_of(folder, "upcycled_top2")["config"]
    assert (config["num_experts_per_tok"], config["normalize_router_weights"]) == (2, "after_dropping")


def test_an_aggregated_run_has_all_experts_of_its_halves(folder: Path) -> None:
    halves = [weights_of(folder, half) for half in HALVES]
    begun = weights_of(folder, "aggregated", "checkpoint-4")
    experts = "model.encoder.layers.1.ffn.experts.up_proj"
    assert torch.equal(begun[experts], torch.cat([half[experts] for half in halves]))
    mean = (halves[0]["model.shared.weight"].double() + halves[1]["model.shared.weight"]) / 2
    assert torch.equal(begun["model.shared.weight"], mean.float())
    results = [result_of(folder, half) for half in HALVES]
    assert [result["log_history"][-1]["step"] for result in results] == [2, 2]
    assert [{*result["held_out_tokens"]} for result in results] == [{"en-de", "de-en"}, {"en-is", "is-en"}]
    assert result_of(folder, "aggregated")["start"]["seconds"] == pytest.approx(
        sum(experiment_report.last_of(result, "seconds") for result in results)
    )


def test_a_student_starts_with_what_its_teacher_has_besides_experts(folder: Path) -> None:
    teacher = weights_of(folder, "64_experts")
    begun = weights_of(folder, "distilled", "checkpoint-0")
    shared = begun.keys() & teacher.keys()
    assert {"model.shared.weight", "model.encoder.layers.0.ffn.fc1.weight"} <= shared
    assert all(torch.equal(begun[name], teacher[name]) for name in shared)
    assert {name.split(".ffn.")[1] for name in begun.keys() - shared} == {
        "fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"
    }  # fmt: skip
    assert result_of(folder, "distilled")["teacher"] == "64_experts"
    assert result_of(folder, "dense_from_shared_weights")["teacher"] is None
    results = [result_of(folder, name) for name in ("distilled", "dense_from_shared_weights", "dense")]
    starts = [losses_of(result).get(0) for result in results]
    assert starts[0] == starts[1] and starts[2] is None
    first = [next(e["loss"] for e in result["log_history"] if "loss" in e) for result in results]
    assert len({*first}) == 3


def test_a_student_learns_what_its_teacher_says() -> None:
    torch.manual_seed(0)
    logits, of_teacher = torch.randn(2, 3, 5, requires_grad=True), torch.randn(2, 3, 5)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    nats = soft_cross_entropy(logits, of_teacher, mask)
    expected = -(of_teacher.softmax(-1) * logits.log_softmax(-1)).sum(-1)[mask].sum()
    torch.testing.assert_close(nats, expected)
    nats.backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, (logits.detach().softmax(-1) - of_teacher.softmax(-1)) * mask[..., None])


def test_a_teacher_is_for_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Trainer multiplies its own loss by the number of processes, for the mean of gradients."""
    monkeypatch.setattr(TokenPairsTrainer, "__init__", lambda self, args: setattr(self, "args", args))
    args = SimpleNamespace(world_size=2)
    with pytest.raises(ValueError, match="with a teacher is for one process, not 2"):
        DistillationTrainer(args, teacher=torch.nn.Linear(1, 1), teacher_share=0.5)


def test_losses_with_and_without_a_capacity(folder: Path) -> None:
    results = {name: result_of(folder, name) for name in ("none", "position_1.0", "random_1.0")}
    for result in results.values():
        without, with_capacity = losses_of(result), losses_of(result, "eval_capacity_1_0_loss")
        assert [*without] == [*with_capacity] == [4, 8]
        assert all(without[step] != with_capacity[step] for step in without)
        assert result["config"].get("eval_capacity_factor") is None
    position, random = (results[name]["log_history"] for name in ("position_1.0", "random_1.0"))
    assert position[0]["loss"] != random[0]["loss"]


def test_denoising_is_drawn_beside_translation_of_poor_languages(folder: Path) -> None:
    results = [result_of(folder, name) for name in ("translation", "translation_and_denoising")]
    assert [result["low_resource_languages"] for result in results] == [["is"], ["is"]]
    assert results[0]["tokens_per_epoch"] < results[1]["tokens_per_epoch"]
    assert [*results[0]["held_out_tokens"]] == [*results[1]["held_out_tokens"]] == ["en-de", "en-is", "de-en", "is-en"]
    assert all(losses_of(result).keys() == {4, 8} for result in results)


def test_runs_that_start_from_others_go_on_exactly(folder: Path) -> None:
    for source in ("dense", "64_experts"):
        shutil.copytree(folder / "runs" / source, folder / "pieces" / source)
    for name, variant, first in (("upcycling", "upcycled", 4), ("distillation", "distilled", 0)):
        for step in (first + 1, first + 2):
            run(folder, name, "--variants", variant, "--max_seconds", "0.001", output="pieces")
            assert result_of(folder, variant, "pieces")["log_history"][-1]["step"] == step
        half = folder / "pieces" / variant / "seed_3" / "checkpoint-77"  # of a process that was killed while it wrote
        half.mkdir()
        (half / "model.safetensors").write_bytes(b"")
        run(folder, name, "--variants", variant, output="pieces")
        assert not half.exists()
        whole, pieces = (result_of(folder, variant, output) for output in ("runs", "pieces"))
        assert pieces["is_done"]
        logs = [[(e["step"], e["loss"]) for e in each["log_history"] if "loss" in e] for each in (whole, pieces)]
        assert logs[0] == logs[1]
        assert losses_of(whole).items() <= losses_of(pieces).items()


def run_in_its_process(argv: list[str], begun: Any) -> None:
    sys.argv = ["train_multitask.py", *argv]
    train = train_multitask.train
    train_multitask.train = lambda each, *rest: (begun.put(each.variant), train(each, *rest))  # type: ignore[assignment]
    train_multitask.main()


def test_two_processes_share_the_runs_of_two_recipes(folder: Path) -> None:
    variants = ["64_experts", "16_of_64_by_utilization", "32_of_64_by_utilization", "distilled"]
    recipes = [str(folder / f"{name}.json") for name in ("pruning", "distillation")]
    argv = [*recipes, "--output_dir", str(folder / "shared"), "--variants", *variants]
    context = multiprocessing.get_context("fork")
    begun = context.Queue()
    processes = [context.Process(target=run_in_its_process, args=(argv, begun)) for _ in range(2)]
    for process in processes:
        process.start()
    assert sorted(begun.get(timeout=300) for _ in variants) == sorted(variants)
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0] and begun.empty()
    for variant in variants:
        whole, shared = (result_of(folder, variant, name) for name in ("runs", "shared"))
        assert losses_of(whole) == losses_of(shared) and losses_of(whole, "loss") == losses_of(shared, "loss")


def test_recipes_that_would_share_a_folder_must_agree(folder: Path) -> None:
    fields = json.loads((folder / "pruning.json").read_text())
    (folder / "longer.json").write_text(json.dumps({**fields, "max_steps": 9}))
    message = (
        r"two recipes have a run in .*64_experts/seed_3, with different .*'max_steps'.*: give one its own output_dir"
    )
    with pytest.raises(ValueError, match=message):
        train_multitask.command_of([str(folder / f"{name}.json") for name in ("pruning", "longer")])


def test_pilots_and_needed_runs_of_one_folder_must_agree(tmp_path: Path) -> None:
    fields = {"train_tokens": "a", "validation_tokens": "b", "max_steps": 4, "report_to": "none"}
    fields |= {"eval_strategy": "steps", "eval_steps": 2}
    variants = {"one": {}, "two": {"teacher": "one"}}

    def command(*others: dict[str, Any], variants: dict[str, Any] = variants) -> None:
        for number, other in enumerate(others):
            recipe = {**fields, "variants": variants, **other}
            (tmp_path / f"{number}.json").write_text(json.dumps(recipe))
        argv = [str(tmp_path / f"{number}.json") for number in range(len(others))]
        train_multitask.command_of([*argv, "--variants", [*variants][-1]])

    for other in ({"max_steps": 4}, {"seeds": [1]}):
        command({}, other)
    with pytest.raises(ValueError, match=r"two recipes have a run in .*one/seed_0, with different \['config'\]"):
        command({}, {"variants": {"one": {"config": {"num_experts": 8}}, "two": {"teacher": "one"}}})
    pilot = {"learning_rate": [0.1, 0.2], "max_steps": 2}
    for other, different in (
        ({"pilot": {**pilot, "learning_rate": [0.1]}}, "pilot"),
        ({"pilot": {**pilot, "max_steps": 3}}, "max_steps"),
        ({"pilot": pilot, "seeds": [1]}, "seed"),
    ):
        with pytest.raises(ValueError, match=f"two recipes have a run in .*, with different .*'{different}'"):
            command({"pilot": pilot}, other, variants={"one": {}})


@pytest.mark.parametrize(
    ("start", "message"),
    [
        ({"at": 1}, r"pruned begins at step 4, behind those of \['one'\], so its max_steps \(4\) must be more"),
        ({"at": 1.5}, r"at \(1.5\) of start_from must be over 0 and at most 1"),
        ({"method": "prun"}, r"method 'prun' of start_from must be one of \('prune', "),
    ],
)
def test_starts_that_are_refused(tmp_path: Path, start: dict[str, Any], message: str) -> None:
    """When the recipe is read, before the other run is trained."""
    variants = {"one": {}, "pruned": {"start_from": {"method": "prune", "variants": ["one"], **start}}}
    recipe = {"train_tokens": "a", "validation_tokens": "b", "max_steps": 4, "variants": variants}
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(recipe))
    with pytest.raises(ValueError, match=message):
        train_multitask.command_of([str(path)])


def test_runs_that_need_each_other_are_refused(tmp_path: Path) -> None:
    fields = {"train_tokens": "a", "validation_tokens": "b", "max_steps": 4, "report_to": "none"}
    variants = {"one": {"teacher": "two"}, "two": {"start_from": {"method": "prune", "variants": ["one"]}}}
    (tmp_path / "recipe.json").write_text(json.dumps({**fields, "variants": variants}))
    with pytest.raises(ValueError, match=r"recipe\.json go round in a circle: one needs two needs one"):
        train_multitask.command_of([str(tmp_path / "recipe.json")])


def test_what_is_missing_is_named(folder: Path) -> None:
    for variant, needed in (("32_of_64_by_random", "64_experts"), ("distilled_from_nothing", "64_experts")):
        name = "pruning" if "of_64" in variant else "distillation"
        with pytest.raises(ValueError, match=f"{needed} with seed 3 is not done, see .*: run it first"):
            run(folder, name, "--variants", variant, output="nothing")
    shutil.copytree(folder / "runs" / "64_experts", folder / "other" / "64_experts")
    with pytest.raises(ValueError, match="seed_3 has 8 steps, not 10: give it another output_dir"):
        run(folder, "pruning", "--variants", "32_of_64_by_random", "--max_steps", "10", output="other")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"start_from": {"method": "prune"}}, "must name variants"),
        ({"start_from": {"variants": ["one"]}}, "missing 1 required positional argument: 'method'"),
        ({"start_from": {"variants": ["one"], "method": "prune", "keep": 3}}, "unexpected keyword argument 'keep'"),
        ({"teacher": "two"}, r"needs \['two'\]; there are \['one', 'other'\]"),
        ({"teacher": "one", "max_steps": -1}, r"needs max_steps \(-1\)"),
        (
            {"teacher": "one", "train_tokens": None, "validation_tokens": None, "train_file": "a"},
            "need token ids: give train_tokens",
        ),
    ],
)
def test_what_a_variant_cannot_start_from(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    recipe = {"train_tokens": "a", "validation_tokens": "b", "max_steps": 4, "report_to": "none"}
    (tmp_path / "recipe.json").write_text(json.dumps({**recipe, "variants": {"one": {}, "other": fields}}))
    with pytest.raises(ValueError, match=message):
        train_multitask.command_of([str(tmp_path / "recipe.json"), "--validation_file", "b"])


def test_a_pilot_knows_no_learning_rate_of_other_runs(tmp_path: Path) -> None:
    recipe = {"train_tokens": "a", "validation_tokens": "b", "max_steps": 4, "report_to": "none"}
    recipe |= {"pilot": {"learning_rate": [0.1]}, "variants": {"one": {}, "other": {"teacher": "one"}}}
    recipe |= {"eval_strategy": "steps", "eval_steps": 2}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    with pytest.raises(ValueError, match=r"pilot does not go with other, which needs \['one'\]"):
        train_multitask.command_of([str(tmp_path / "recipe.json")])
    (tmp_path / "child.json").write_text(json.dumps({"base": "recipe.json", "variants": {"two": "base"}}))
    with pytest.raises(ValueError, match=r"takes variants \['two'\] of recipe.json, which has \['one', 'other'\]"):
        read_recipe(tmp_path / "child.json")
    (tmp_path / "child.json").write_text(json.dumps({"base": "recipe.json", "max_steps": 3}))
    assert [*read_recipe(tmp_path / "child.json")["variants"]] == ["one", "other"]


def test_the_report_compares_seed_by_seed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment_report, "draw_curves", lambda runs, path: None)  # as of every experiment
    names = ["dense", "64_experts", "distilled"]
    output = folder / "report"
    text = experiment_report.write_report(
        folder / "runs", "Distillation", "dense", best="64_experts", variants=names, output_dir=output
    )
    losses = [losses_of(result_of(folder, name))[STEPS] for name in names]
    row = next(line.split(" | ") for line in text.splitlines() if line.startswith("| distilled"))
    header = next(line.split(" | ") for line in text.splitlines() if line.startswith("| variant"))
    cells = dict(zip(header, row, strict=True))
    assert cells["held-out loss"] == f"{losses[2]:.3f} ({losses[2] - losses[0]:.3f})"
    assert cells["share of the gain of 64_experts"] == f"{(losses[0] - losses[2]) / (losses[0] - losses[1]):.2f}"
    assert cells["loss at start"] == f"{losses_of(result_of(folder, 'distilled'))[0]:.3f}"
    assert (output / "report.md").read_text() == text and "32_experts" not in text
    text = experiment_report.write_report(
        folder / "runs", "Capacity", "none", variants=["none", "random_1.0"], output_dir=output
    )
    assert "capacity_1_0 loss" in text
    with pytest.raises(ValueError, match=r"has no results of \['other'\]"):
        experiment_report.write_report(folder / "runs", "Other", None, variants=["other"])
    with pytest.raises(ValueError, match=r"best .'dense'. must be one of the variants"):
        experiment_report.write_report(folder / "runs", "Other", None, best="dense", variants=["none"])
