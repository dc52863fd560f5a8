"""The multitask example: data files, plans, an experiment of tiny models and its report."""

import json
import lzma
import sys
from pathlib import Path
from typing import Any

import experiment_report
import pytest
import train_multitask
from multitask_data import backwards, first_pairs, monolingual, read_pairs
from multitask_recipe import read_recipe
from tiny_sizes import SIZES

ALL_RECIPES = sorted((Path(__file__).parents[2] / "examples" / "recipes").rglob("*.json"))
RECIPES = [path for path in ALL_RECIPES if "variants" in read_recipe(path)]  # the others are of train_translation.py
LINES = [
    f"{lang}\tEnglish sentence {number} about {topic}\t{lang} {topic} sentensi {number} hapa"
    for topic in ("tabs", "windows")
    for number in range(12)
    for lang in ("de", "is")
]
TABLE = ["rows", "source", "target", "batches", "steps", "padding"]
TINY = {**SIZES, "max_position_embeddings": 64, "capacity_factor": 1.0}
RECIPE: dict[str, Any] = {
    "vocab_size": 320,
    "config": TINY,
    "max_length": 48,
    "max_tokens_per_batch": 512,
    "low_resource_languages": ["is"],
    "low_resource_pairs": 5,
    "max_eval_samples": 2,
    "max_test_samples": 1,
    "max_steps": 4,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "bf16": True,
    "seeds": [0, 1],
    "variants": {
        "sparse": {"denoising": True, "task_weights": {"translation": 0.5, "denoising": 0.5}},
        "dense": {"config": {"encoder_sparse_step": 0, "decoder_sparse_step": 0}},
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("train_multitask")
    with lzma.open(folder / "train.tsv.xz", "wt", encoding="utf-8") as file:
        file.write("\n".join(["lang\tenglish\ttarget", *LINES]) + "\n")
    (folder / "validation.tsv").write_text("\n".join(line.replace("\t", "\torigin\t", 1) for line in LINES[:20]) + "\n")
    (folder / "recipe.json").write_text(json.dumps(RECIPE))
    return folder


def run(folder: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> None:
    files = ["--train_file", str(folder / "train.tsv.xz"), "--validation_file", str(folder / "validation.tsv")]
    argv = ["train_multitask.py", str(folder / "recipe.json"), *files, "--output_dir", str(folder / "runs"), *more]
    monkeypatch.setattr(sys, "argv", argv)
    train_multitask.main()


def test_files_are_read_in_all_their_forms(folder: Path) -> None:
    pairs = read_pairs(folder / "train.tsv.xz")
    assert len(pairs) == 48
    assert pairs[0] == {
        "source": "English sentence 0 about tabs",
        "target": "de tabs sentensi 0 hapa",
        "src_lang": "en",
        "tgt_lang": "de",
    }
    assert read_pairs(folder / "validation.tsv") == pairs[:20]
    assert {pair["tgt_lang"] for pair in read_pairs(folder / "train.tsv.xz", ["is"])} == {"is"}
    assert backwards(pairs[:1])[0]["src_lang"] == "de"
    low = first_pairs(pairs, 5, ["is"])
    assert [sum(pair["tgt_lang"] == lang for pair in low) for lang in ("is", "de")] == [5, 24]
    texts = monolingual(pairs)
    assert len(texts) == 48 + 24  # an English text that has two translations is one text
    with pytest.raises(ValueError, match=r"no line of .*train.tsv.xz is in \['fr'\]"):
        read_pairs(folder / "train.tsv.xz", ["de", "fr"])
    (folder / "bad.tsv").write_text("de\tonly\tthree\nde\ttwo\n")
    with pytest.raises(ValueError, match=r"line 2 of .*bad\.tsv has 2 columns"):
        read_pairs(folder / "bad.tsv")


def test_dry_run_prints_the_plan(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(folder, monkeypatch, "--dry_run")
    printed = capsys.readouterr().out
    plans = printed.split("\nsparse, seed 0")[1].split("\ndense, seed 0")
    assert "seed 1" not in printed
    rows = {line.split()[0] + line.split()[1]: line.split()[2:] for line in plans[0].splitlines() if "%" in line}
    assert [rows[name][0] for name in ("translationen-de", "translationen-is", "denoisingis-is")] == ["24", "5", "24"]
    shares = [float(row[2].rstrip("%")) for name, row in rows.items() if name.startswith("denoising")]
    assert sum(shares) == pytest.approx(50, abs=2)
    assert "training: 4 steps" in plans[0] and "memory: weights" in plans[0]
    sparse, dense = (plan.split("parameters: ")[1].split("\n")[0] for plan in plans)
    assert sparse.split(", of which a token uses ")[0] != dense.split(", of which a token uses ")[0]
    assert dense.split(", of which a token uses ") == [dense.split(", of")[0]] * 2
    assert not (folder / "runs" / "sparse").exists()
    assert "signatures" not in printed


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "language\tsource\ttarget\nde\tTab\tTab\n",
            "line 1 of .* begins with 'language', but must begin with the code",
        ),
        ("de\tTab\tTab\nen\tColor\tColour\n", "line 2 of .* begins with 'en'"),
        ("lang\tenglish\ttarget\n", "has no pairs"),
        ("de\tTab\n", "line 1 of .* has 2 columns"),
    ],
)
def test_what_is_no_file_of_pairs_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "pairs.tsv").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_pairs(tmp_path / "pairs.tsv")


def test_files_of_windows_have_the_same_pairs(tmp_path: Path) -> None:
    text = "lang\tenglish\ttarget\nde\tTab\tReiter\nzh-CN\tTab\t标签\n"
    (tmp_path / "pairs.tsv").write_bytes(text.encode())
    (tmp_path / "windows.tsv").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert len(read_pairs(tmp_path / "pairs.tsv")) == 2
    assert read_pairs(tmp_path / "windows.tsv") == read_pairs(tmp_path / "pairs.tsv")


def test_lengths_and_tokenizer_are_those_of_the_text_as_it_is(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("train.tsv.xz", "validation.tsv", "recipe.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    run(tmp_path, monkeypatch, "--variants", "dense", "--seeds", "0")
    kept = {path.name for path in (tmp_path / "runs").glob("*_*")}
    rows = lzma.decompress((tmp_path / "train.tsv.xz").read_bytes()).decode().replace("hapa", "hapa hapa hapa")
    (tmp_path / "train.tsv.xz").write_bytes(lzma.compress(rows.encode()))
    with pytest.raises(ValueError, match=r"was begun with training_text '\w+', not '\w+'"):
        run(tmp_path, monkeypatch, "--variants", "dense", "--seeds", "0")
    run(tmp_path, monkeypatch, "--variants", "dense", "--seeds", "1")
    assert len({path.name for path in (tmp_path / "runs").glob("*_*")}) == 2 * len(kept) > 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"seeds": 2}, r"seeds of .* \(2\) must be a list of whole numbers"),
        ({"pilot": {"learning_rates": [0.1]}}, "must have a list of numbers as learning_rate"),
        ({"pilot": {"learning_rate": 0.1}}, "must have a list of numbers as learning_rate"),
        ({"pilot": {"learning_rate": [0.1]}, "eval_strategy": "no"}, "give eval_strategy and eval_steps"),
        (
            {"low_resource_languages": ["sv"]},
            r"low_resource_languages \['sv'\] have no pairs; there are \['de', 'is'\]",
        ),
    ],
)
def test_wrong_fields_of_recipes_are_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], message: str
) -> None:
    for name in ("train.tsv.xz", "validation.tsv"):
        (tmp_path / name).symlink_to(folder / name)
    (tmp_path / "recipe.json").write_text(json.dumps({**RECIPE, **fields}))
    with pytest.raises(ValueError, match=message):
        run(tmp_path, monkeypatch, "--dry_run")


def test_a_result_that_is_no_json_is_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = tmp_path / "runs" / "dense" / "seed_0" / "result.json"
    result.parent.mkdir(parents=True)
    result.write_text("{")
    for name in ("train.tsv.xz", "validation.tsv", "recipe.json"):
        (tmp_path / name).symlink_to(folder / name)
    with pytest.raises(ValueError, match=r"result\.json is no JSON .*: remove it"):
        run(tmp_path, monkeypatch)


def test_dry_run_prints_the_shapes_of_batches(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    buckets = ["--length_buckets", "16", "32", "48", "--max_signatures", "3"]
    run(folder, monkeypatch, "--dry_run", "--variants", "dense", *buckets)
    lines = capsys.readouterr().out.splitlines()
    start = next(number for number, line in enumerate(lines) if line.split() == TABLE)
    rows = [line.split() for line in lines[start + 1 :]]
    rows = rows[: next(number for number, row in enumerate(rows) if "signatures," in row) + 1]
    signatures = [row for row in rows if len(row) == len(TABLE) and row[1] != "other"]
    assert 1 <= len(signatures) == int(rows[-1][0]) <= 3
    assert any(line.startswith("proposed: --length_buckets ") for line in lines)
    for num_rows, source, target, num_batches, share, padding in signatures:
        assert {source, target} <= {"16", "32", "48"}
        assert int(num_rows) == 512 // (int(source) + int(target)) and int(num_batches) > 0
        assert 0 < float(share.rstrip("%")) <= 100 and 0 <= float(padding.rstrip("%")) < 100


def test_experiment_and_report(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(folder, monkeypatch, "--seeds", "0")
    run(folder, monkeypatch)  # the other seed
    assert capsys.readouterr().out.count(" is done") == 2
    result = json.loads((folder / "runs" / "sparse" / "seed_1" / "result.json").read_text())
    history = result["log_history"]
    seconds = [entry["seconds"] for entry in history]
    assert seconds == sorted(seconds) and seconds[0] > 0
    assert {"eval_low_loss", "eval_high_loss"} <= {name for entry in history for name in entry}
    places = [entry["dropped_by_place"] for entry in history if "dropped_by_place" in entry]
    assert len(places) == 4 and all(len(place) == 10 for place in places)
    overall = next(entry["router/dropped"] for entry in history if "router/dropped" in entry)
    assert min(places[0]) <= overall + 0.1 and max(places[0]) >= overall - 0.1
    translations = json.loads((folder / "runs" / "dense" / "seed_0" / "translations.json").read_text())
    assert {(row["src_lang"], row["tgt_lang"]) for row in translations} == {
        ("en", "de"),
        ("de", "en"),
        ("en", "is"),
        ("is", "en"),
    }

    text = experiment_report.write_report(folder / "runs", "Sparse and dense", "dense")
    assert text.startswith("# Sparse and dense")
    assert "| sparse | 2 |" in text and "low loss" in text
    rows = [line.strip("| ").split(" | ")[:3] for line in text.splitlines() if line.startswith("| dense | ")][1:]
    groups = ["X-en", "X-en, low-resource", "en-X", "en-X, low-resource"]
    assert rows == [["dense", group, "2"] for group in groups]
    assert (folder / "runs" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "runs" / "dropped_by_place.png").is_file()
    with pytest.raises(ValueError, match="must be one of the variants"):
        experiment_report.write_report(folder / "runs", "Sparse", "other")


def test_other_settings_and_unknown_fields_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    once = ["--variants", "dense", "--seeds", "0", "--output_dir", str(folder / "once")]
    run(folder, monkeypatch, *once)
    run(folder, monkeypatch, *once, "--logging_steps", "2", "--max_test_samples", "0")  # changes no model
    for options, message in (
        (
            ["--max_steps", "5"],
            "dense/seed_0 was begun with max_steps 4, not 5; give the same again, or another output_dir",
        ),
        (
            ["--languages", "is", "--learning_rate", "0.1"],
            r"was begun with languages None, not \['is'\], learning_rate [\de.-]+, not 0.1;",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            run(folder, monkeypatch, *once, *options)
    settings = folder / "once" / "dense" / "seed_0" / "settings.json"
    fields = json.loads(settings.read_text())
    settings.write_text(
        json.dumps({name: value for name, value in fields.items() if name != "mask_ratio"} | {"old": 1})
    )
    run(folder, monkeypatch, *once)  # begun by a version with other fields
    config = json.dumps({**TINY, "num_expertz": 4})
    with pytest.raises(ValueError, match=r"config of dense has fields \['num_expertz'\], which ZCodeM3Config has not"):
        run(folder, monkeypatch, *once, "--config", config)
    (folder / "broken.json").write_text("{")
    for name, message in (("broken", r"recipe \(.*broken\.json\) is not JSON: "), ("none", "does not exist")):
        with pytest.raises(ValueError, match=message):
            read_recipe(folder / f"{name}.json")


def test_a_run_does_not_go_on_compiled(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled layers have other random numbers."""
    once = ["--variants", "dense", "--seeds", "0", "--output_dir", str(folder / "compiled")]
    run(folder, monkeypatch, *once)
    for name in ("BACKEND", "MODE"):  # which transformers sets
        monkeypatch.setenv(f"ACCELERATE_DYNAMO_{name}", "no")
        monkeypatch.delenv(f"ACCELERATE_DYNAMO_{name}")
    with pytest.raises(ValueError, match="was begun with torch_compile False, not True"):
        run(folder, monkeypatch, *once, "--torch_compile", "true")


def test_translations_are_scored_by_group() -> None:
    texts = ["One sentence about tabs and windows.", "Another one about files and folders."]
    rows = [
        {"source": text, "target": text, "translation": translation, "src_lang": src_lang, "tgt_lang": tgt_lang}
        for (src_lang, tgt_lang), share in {("en", "de"): 1.0, ("de", "en"): 1.0, ("en", "is"): 0.5}.items()
        for text in texts
        for translation in [text[: int(len(text) * share)]]
    ]
    result = {"translations": rows, "low_resource_languages": ["is"], "tiers": {"german": ["de"], "none": ["fi"]}}
    scores = experiment_report.score(result)
    assert list(scores) == ["X-en", "en-X", "en-X, low-resource", "german"]
    assert scores["german"] == scores["X-en"] == pytest.approx({"BLEU": 100, "chrF": 100, "length ratio": 1})
    poor = scores["en-X, low-resource"]
    assert poor["length ratio"] == pytest.approx(0.5) and poor["BLEU"] < 50 and 0 < poor["chrF"] < 60
    assert scores["en-X"] == pytest.approx({name: (value + scores["german"][name]) / 2 for name, value in poor.items()})
    assert experiment_report.score_lines({"a": [{**result, "translations": []}]}) == []
    assert experiment_report.score_lines({"a": [result]})[-1].startswith("| a | german | 1 | 100.00 | 100.00 | 1.00")


def test_steps_to_a_loss_are_interpolated() -> None:
    curve = [(100, 1.0, 4.0), (200, 2.0, 3.0), (300, 3.0, 2.0)]
    assert experiment_report.steps_to(curve, 2.5) == 250
    assert experiment_report.steps_to(curve, 5.0) == 100
    assert experiment_report.steps_to(curve, 1.0) == float("inf")
    assert experiment_report.mean_and_spread([1.0, 2.0, float("inf")], 1) == "1.5 ± 0.7 (2 of 3 seeds)"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_have_only_fields_that_there_are(recipe: Path, folder: Path) -> None:
    files = ["--train_file", str(folder / "train.tsv.xz"), "--validation_file", str(folder / "validation.tsv")]
    fields = read_recipe(recipe)
    command = train_multitask.command_of([str(recipe), *(() if fields.get("train_tokens") else files), "--use_cpu"])
    assert not command.is_dry and command.max_seconds is None
    assert len(command.runs) == len(fields["seeds"]) * len(fields["variants"])
    for each in command.runs:
        assert each.folder == Path(fields["output_dir"]) / each.variant / f"seed_{each.seed}"
        assert train_multitask.ZCodeM3Config(vocab_size=32000, **json.loads(each.model.config))


def test_unknown_variants(folder: Path) -> None:
    message = r"no recipe has variants \['other'\]; they have {'.*recipe.json': \['sparse', 'dense'\]}"
    with pytest.raises(ValueError, match=message):
        train_multitask.command_of([str(folder / "recipe.json"), "--variants", "other"])
