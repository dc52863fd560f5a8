"""Numbers and pictures of an experiment that `train_multitask.py` ran.

    python examples/experiment_report.py runs/token_dropping --title "Random Token Selection"

reads `<variant>/seed_<seed>/result.json` and `translations.json` and writes `report.md`, `curves.png` and, where tokens
were dropped, `dropped_by_place.png` to the folder. `--reference` is the variant with which the others are compared: how
many times fewer steps, and fewer seconds of training alone, they need for its losses. Numbers are means over seeds,
with the standard deviation if there are several. Two variants are compared seed by seed. Translations are scored with
BLEU, chrF and their length, from and into English and by tier.
"""

import argparse
import itertools
import json
import math
import re
import textwrap
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

from matplotlib.figure import Figure
from tqdm.auto import tqdm

from hf_moe_ted import score_translations

Curve = list[tuple[float, float, float]]  # steps, seconds, loss
TRAINING_LOSS_STEPS = 200
EVAL_LOSS = re.compile(r"eval_(\w+)_loss")


def read_runs(folder: Path, variants: list[str] | None = None) -> dict[str, list[dict[str, Any]]]:
    """Results by variant (all, or the named ones in their order), with existing `translations`.

    A run that is not done is left out where another one of its variant is done: its losses are those of fewer steps.

    Raises:
        ValueError: no run in the folder is done, or none of a variant that is named.
    """
    runs = defaultdict(list)
    for path in sorted(folder.glob("*/seed_*/result.json"), key=lambda path: path.stat().st_mtime_ns):
        result = json.loads(path.read_text(encoding="utf-8"))
        translations = path.with_name("translations.json")
        result["translations"] = json.loads(translations.read_text(encoding="utf-8")) if translations.is_file() else []
        runs[result["variant"]].append(result)
    if not runs:
        raise ValueError(f"no */seed_*/result.json in {folder}: train_multitask.py writes them to its output_dir")
    if missing := [name for name in variants or () if name not in runs]:
        raise ValueError(f"{folder} has no results of {missing}; it has those of {list(runs)}")
    return {name: [run for run in runs[name] if is_done(run)] or runs[name] for name in variants or runs}


def is_done(result: dict[str, Any]) -> bool:
    """Whether a run made all of its steps; results of older versions, which were written at the end, do not say it."""
    return bool(result.get("is_done", True))


def curves_of(result: dict[str, Any]) -> dict[str, Curve]:
    """The losses on validation sets over the steps of a run.

    Runs on token ids have one, which is told apart by the tiers of the recipe and by whether English is the source,
    weighted by target tokens. What is measured besides, such as with another capacity, stands behind.
    """
    curves: dict[str, Curve] = {}
    entries = [entry for entry in result["log_history"] if "direction_losses" in entry]
    for group, directions in groups_of(result).items() if entries else ():
        curves[group] = [(entry["step"], entry["seconds"], mean_loss(result, entry, directions)) for entry in entries]
    for name in sorted({name for entry in result["log_history"] for name in entry}):
        if found := EVAL_LOSS.fullmatch(name):
            curves[found[1]] = [(e["step"], e["seconds"], e[name]) for e in result["log_history"] if name in e]
    return curves


def curves_of_all(results: list[dict[str, Any]]) -> list[str]:
    """Names of the curves that all of some runs have: later runs may have other measurements."""
    return [name for name in curves_of(results[0]) if all(name in curves_of(result) for result in results)]


def groups_of(result: dict[str, Any]) -> dict[str, list[str]]:
    """Directions of the held-out text, all of them first, then by tier and side."""
    directions = list(result["held_out_tokens"])
    groups = {"held-out": directions, "en-X": [], "X-en": []}
    for direction in directions:
        groups["en-X" if direction.startswith("en-") else "X-en"].append(direction)
    for tier, languages in result["tiers"].items():
        groups[tier] = [each for each in directions if each.removeprefix("en-").removesuffix("-en") in languages]
    return {name: of_group for name, of_group in groups.items() if of_group}


def mean_loss(result: dict[str, Any], entry: dict[str, Any], directions: list[str]) -> float:
    """Nats per target token of some directions together."""
    tokens = result["held_out_tokens"]
    nats = sum(entry["direction_losses"][direction] * tokens[direction] for direction in directions)
    return nats / sum(tokens[direction] for direction in directions)


def steps_to(curve: Curve, loss: float) -> float:
    """Steps until a loss is reached, interpolated between evaluations; infinite if it is not."""
    return reached(curve, loss)[0]


def reached(curve: Curve, loss: float) -> tuple[float, float]:
    """Steps and seconds until a loss is reached, interpolated between evaluations; infinite if it is not."""
    before: tuple[float, float, float] | None = None
    for step, seconds, value in curve:
        if value <= loss:
            if before is None or before[2] == value:
                return step, seconds
            share = (before[2] - loss) / (before[2] - value)
            return before[0] + (step - before[0]) * share, before[1] + (seconds - before[1]) * share
        before = (step, seconds, value)
    return math.inf, math.inf


def ratios_to(curve: Curve, reference: Curve) -> list[tuple[float, float, float]]:
    """How many times fewer steps, and seconds, a run needs for the loss that another has at each of its evaluations.

    Returns:
        Step of the reference, ratio of steps, and ratio of seconds, for its evaluations behind which no earlier one was
        better; 0 where the run does not reach the loss. The first evaluation of the run is left out as a bound only.
    """
    found = []
    best = math.inf
    for step, seconds, loss in reference:
        if not curve or loss >= best or loss >= curve[0][2]:
            continue
        best = loss
        own_steps, own_seconds = reached(curve, loss)
        found.append((step, step / own_steps, seconds / own_seconds))
    return found


def step_ms(result: dict[str, Any]) -> float:
    """Median time of a step between two logs, in milliseconds, without evaluation."""
    logs = [entry for entry in result["log_history"] if "loss" in entry]
    times = [
        (last["seconds"] - first["seconds"]) / (last["step"] - first["step"])
        for first, last in itertools.pairwise(logs)
    ]
    return 1e3 * median(times) if times else math.nan


def mean_and_spread(values: list[float], digits: int = 3, none: str = "never") -> str:
    """`mean ± standard deviation` of what is finite, and how many that are if not all; `none` if none is."""
    finite = [value for value in values if math.isfinite(value)]
    if not values:
        return "-"
    if not finite:
        return none
    spread = f" ± {stdev(finite):.{digits}f}" if len(finite) > 1 else ""
    which = f" ({len(finite)} of {len(values)} seeds)" if len(finite) < len(values) else ""
    return f"{fmean(finite):.{digits}f}{spread}{which}"


def score(result: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """BLEU, chrF and length ratio of the translations by group, means over its directions.

    Groups are the directions from and into English, those of low-resource languages among them, and the tiers of the
    recipe.
    """
    by_direction = defaultdict(list)
    for row in result["translations"]:
        by_direction[row["src_lang"], row["tgt_lang"]].append(row)
    of_group = defaultdict(list)
    for (src_lang, tgt_lang), rows in by_direction.items():
        texts = ([row[name] for row in rows] for name in ("source", "translation", "target"))
        found = score_translations(*texts, tgt_lang=tgt_lang)
        groups = ["en-X" if src_lang == "en" else "X-en"]
        if {src_lang, tgt_lang} & {*result["low_resource_languages"]}:
            groups.append(f"{groups[0]}, low-resource")
        groups += [tier for tier, languages in result.get("tiers", {}).items() if {src_lang, tgt_lang} & {*languages}]
        for group in groups:
            of_group[group].append((found.bleu, found.chrf, found.length_ratio))
    names = ("BLEU", "chrF", "length ratio")
    return {
        group: dict(zip(names, map(mean_of_known, zip(*of_group[group], strict=True)), strict=True))
        for group in sorted(of_group)
    }


def mean_of_known(numbers: Iterable[float | None]) -> float | None:
    """The mean over the directions that have the number; `None` if none has."""
    known = [number for number in numbers if number is not None]
    return fmean(known) if known else None


def score_lines(runs: dict[str, list[dict[str, Any]]]) -> list[str]:
    """A table: scores of the translations by variant and group; nothing where nothing was translated."""
    lines = []
    for variant, results in runs.items():
        translated = [result for result in results if result["translations"]]
        scores = [score(result) for result in tqdm(translated, desc=f"Scoring {variant}", leave=False)]
        for group in scores[0] if scores else ():
            found = ([of_run[group][name] for of_run in scores] for name in scores[0][group])
            cells = [mean_and_spread([number for number in numbers if number is not None], 2) for numbers in found]
            lines.append(f"| {variant} | {group} | {len(scores)} | {' | '.join(cells)} |")
    if not lines:
        return []
    return ["", "| variant | translations | seeds | BLEU | chrF | length ratio |", "|" + "---|" * 6, *lines]


def last_of(result: dict[str, Any], name: str) -> float | None:
    """The last logged value of a number."""
    values = [entry[name] for entry in result["log_history"] if name in entry]
    return values[-1] if values else None


def last_training_loss(result: dict[str, Any]) -> float:
    """Mean of the logs of the last `TRAINING_LOSS_STEPS` steps, a log counting as many steps as it is a mean of."""
    num_steps = nats = 0.0
    logs = [entry for entry in result["log_history"] if "loss" in entry]
    for before, entry in itertools.pairwise(reversed([{"step": 0}, *logs])):
        of_log = before["step"] - entry["step"]
        num_steps, nats = num_steps + of_log, nats + of_log * before["loss"]
        if num_steps >= TRAINING_LOSS_STEPS:
            break
    return nats / num_steps if num_steps else math.inf


def is_comparable(result: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether the held-out losses of two runs are of the same text."""
    return bool(result.get("held_out_tokens") == other.get("held_out_tokens"))


def beside(results: list[dict[str, Any]], others: list[dict[str, Any]], dataset: str) -> dict[int, tuple[float, float]]:
    """Last losses of runs, and of others with the same seed and held-out text after the same step, by seed."""
    others_by_key = {(other["seed"], last_of(other, "step")): other for other in others}
    found = [(result, others_by_key.get((result["seed"], last_of(result, "step")))) for result in results]
    return {
        result["seed"]: (curves_of(result)[dataset][-1][2], curves_of(other)[dataset][-1][2])
        for result, other in found
        if other is not None and is_comparable(result, other)
    }


def differences(results: list[dict[str, Any]], others: list[dict[str, Any]], dataset: str) -> str:
    """How much higher last losses are than those of others with the same seeds, whose batches were the same."""
    values = [own - other for own, other in beside(results, others, dataset).values()]
    return f" ({mean_and_spread(values)})" if values else ""


def gain_shares(
    results: list[dict[str, Any]], references: list[dict[str, Any]], best: list[dict[str, Any]], dataset: str
) -> list[float]:
    """What part of the way from the loss of a reference to that of the best model a run has gone, seed by seed."""
    own, of_best = beside(results, references, dataset), beside(best, references, dataset)
    return [(own[seed][1] - own[seed][0]) / (own[seed][1] - of_best[seed][0]) for seed in own.keys() & of_best.keys()]


def rows_of(runs: dict[str, list[dict[str, Any]]], reference: str, best: str | None = None) -> list[dict[str, str]]:
    """A row of the table per variant."""
    datasets = curves_of_all(runs[reference])
    goals = {dataset: fmean(curves_of(result)[dataset][-1][2] for result in runs[reference]) for dataset in datasets}
    is_any_started = any(result.get("start") for results in runs.values() for result in results)
    rows = []
    for variant, results in runs.items():
        row = {
            "variant": variant,
            "seeds": str(len(results)),
            "parameters": f"{results[0]['num_parameters'] / 1e6:.0f}M",
        }
        if is_any_started:
            firsts = [curves_of(result)[datasets[0]][0][2] for result in results if result.get("start")]
            row["loss at start"] = mean_and_spread(firsts) if firsts else "-"
        if best is not None:
            shares = gain_shares(results, runs[reference], runs[best], datasets[0])
            row[f"share of the gain of {best}"] = mean_and_spread(shares, 2)
        for dataset in datasets:
            curves = [curves_of(result).get(dataset) for result in results]
            if None in curves:  # such as the loss without a capacity of a dense model
                continue
            row[f"{dataset} loss"] = mean_and_spread([curve[-1][2] for curve in curves], none="diverged")
            if variant != reference:
                row[f"{dataset} loss"] += differences(results, runs[reference], dataset)
            is_same_text = all(is_comparable(result, runs[reference][0]) for result in results)
            steps = [steps_to(curve, goals[dataset]) for curve in curves] if is_same_text else []
            row[f"steps to {goals[dataset]:.3f}"] = mean_and_spread(steps, 0)
        row["steps"] = mean_and_spread([last_of(result, "step") or 0 for result in results], 0)
        row["seconds"] = mean_and_spread([last_of(result, "seconds") or 0 for result in results], 0)
        row["ms per step"] = mean_and_spread([step_ms(result) for result in results], 1)
        row["last training loss"] = mean_and_spread([last_training_loss(result) for result in results])
        if "learning_rate" in results[0]:
            row["learning rate"] = f"{results[0]['learning_rate']:g}"
        for name, title in (("router/dropped", "dropped"), ("router/load_max", "busiest expert")):
            values = [
                None if name == "router/dropped" and drops_none(result) else last_of(result, name) for result in results
            ]
            row[title] = mean_and_spread([v for v in values if v is not None]) if None not in values else "-"
        rows.append(row)
    return rows


def draw_curves(runs: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Losses over steps and over seconds, each seed a line."""
    datasets = list(curves_of(next(iter(runs.values()))[0]))
    figure = Figure(figsize=(11, 4 * len(datasets)), layout="constrained")
    axes = figure.subplots(len(datasets), 2, squeeze=False, sharey="row")
    for row, dataset in zip(axes, datasets, strict=True):
        for column, (axis, unit) in enumerate(zip(row, ("steps", "seconds of training"), strict=True)):
            for number, (variant, results) in enumerate(runs.items()):
                for place, result in enumerate(results):
                    curve = curves_of(result).get(dataset, [])
                    xs, ys = [point[column] for point in curve], [point[2] for point in curve]
                    axis.plot(xs, ys, color=f"C{number}", alpha=0.8, label=variant if place == 0 else None)
            axis.set(xlabel=unit, ylabel=f"{dataset} loss", yscale="log")
            axis.grid(alpha=0.3, which="both")
        row[0].legend()
    figure.savefig(path, dpi=120)


def drops_none(result: dict[str, Any]) -> bool:
    """Whether its numbers are of evaluations (`TokenPairsTrainer`) without a capacity."""
    return "held_out_tokens" in result and result["config"].get("eval_capacity_factor") is None


def ratio_lines(runs: dict[str, list[dict[str, Any]]], reference: str) -> list[str]:
    """A table: times fewer steps and seconds than the reference with the same seed, over the steps of the reference.

    The last columns are times fewer steps for the losses of parts of the held-out text. A row is an evaluation of the
    reference where one of its losses is lower than before; "-" stands for one that is not.
    """
    lines = []
    parts = curves_of_all(runs[reference])
    for variant, results in runs.items():
        for result in results if variant != reference else ():
            others = [other for other in runs[reference] if other["seed"] == result["seed"]]
            if not others or not is_comparable(result, others[0]):
                continue
            curves, of_reference = curves_of(result), curves_of(others[0])
            found = [
                {step: ratios for step, *ratios in ratios_to(curves.get(name, []), of_reference[name])}
                for name in parts
            ]
            speed = math.nan if result.get("start") else step_ms(others[0]) / step_ms(result)
            for step in sorted({step for of_part in found for step in of_part}):
                of_steps, of_seconds = found[0].get(step, (math.nan, math.nan))
                numbers = [of_steps, of_seconds, of_steps * speed]
                numbers += [of_part.get(step, [math.nan])[0] for of_part in found[1:]]
                lines.append(f"| {variant} | {result['seed']} | {step:.0f} | {' | '.join(map(times_fewer, numbers))} |")
    if not lines:
        return []
    columns = ["variant", "seed", f"step of {reference}", "steps, times fewer", "seconds", "seconds at median speed"]
    columns += [f"steps, {name}" for name in parts[1:]]
    return ["", f"| {' | '.join(columns)} |", "|" + "---|" * len(columns), *lines]


def times_fewer(ratio: float) -> str:
    if math.isnan(ratio):
        return "-"
    return f"{ratio:.2f}" if ratio else "never"


def draw_dropped(runs: dict[str, list[dict[str, Any]]], path: Path) -> bool:
    """Dropped share by place in the batch, mean over the training; whether any token was dropped."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    is_any = False
    for variant, results in runs.items():
        logs = [e["dropped_by_place"] for result in results for e in result["log_history"] if "dropped_by_place" in e]
        shares = [fmean(places) for places in zip(*logs, strict=True)]
        if any(shares):
            is_any = True
            axis.plot(range(1, len(shares) + 1), shares, marker="o", label=variant)
    axis.set(xlabel="tenth of the batch", ylabel="share of the tokens that no expert computes", ylim=(0, None))
    if is_any:
        axis.legend()
        figure.savefig(path, dpi=120)
    return is_any


def write_report(
    folder: Path,
    title: str,
    reference: str | None,
    *,
    best: str | None = None,
    variants: list[str] | None = None,
    output_dir: Path | None = None,
) -> str:
    """Write the report and its pictures, to the folder of the runs or another one; returns its text."""
    runs = read_runs(folder, variants)
    reference = next(iter(runs)) if reference is None else reference
    for name, variant in (("reference", reference), ("best", best)):
        if variant is not None and variant not in runs:
            raise ValueError(f"{name} ({variant!r}) must be one of the variants {list(runs)}")
    if not curves_of_all(runs[reference]):
        raise ValueError(
            f"{folder} has no held-out losses of {reference}: give eval_strategy and eval_steps, train again"
        )
    rows = rows_of(runs, reference, best)
    output_dir = folder if output_dir is None else output_dir
    output_dir.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [f"# {title}", "", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(row.get(name, "-") for name in columns) + " |" for row in rows]
    first = runs[reference][0]
    steps = {result["log_history"][-1]["step"] for results in runs.values() for result in results}
    notes = f"""
        {", ".join(map(str, sorted(steps)))} steps of up to {first["max_tokens_per_batch"]:,} tokens (source, target and
        padding), {first["device"]}, torch {first["torch"]}. Losses are cross-entropies of the validation set in nats
        per token, steps those to the mean last loss of `{reference}`; in parentheses is their distance from it seed by
        seed; seconds are without evaluation; "dropped" and "busiest expert" (what it computes; 1 is an even share) are
        means over the sparse layers at the end, in evaluation where the text is token ids, else in training. Steps
        and seconds of runs that have begun with models of others ("loss at start") count from
        the beginning of these, but for those that took the weights that are no experts, as a start."""
    of_other_text = [
        name for name, results in runs.items() if not all(is_comparable(result, first) for result in results)
    ]
    if of_other_text:
        notes += f" {', '.join(of_other_text)}: evaluated on other text, so not compared with `{reference}`."
    lines += ["", *textwrap.wrap(" ".join(notes.split()), 120), "", "![Losses](curves.png)"]
    lines += score_lines(runs)
    lines += ratio_lines(runs, reference)
    draw_curves(runs, output_dir / "curves.png")
    if draw_dropped(runs, output_dir / "dropped_by_place.png"):
        lines += ["", "![Dropped tokens by place in the batch](dropped_by_place.png)"]
    text = "\n".join(lines) + "\n"
    (output_dir / "report.md").write_text(text, encoding="utf-8")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--title")
    parser.add_argument("--reference", help="Variant with whose last loss the others are compared; default: the first.")
    parser.add_argument("--best", help="Variant of whose gain over the reference the others have a share.")
    parser.add_argument("--variants", nargs="+", help="In their order; default: all.")
    parser.add_argument("--output_dir", type=Path, help="Default: the folder.")
    args = parser.parse_args()
    options = {"best": args.best, "variants": args.variants, "output_dir": args.output_dir}
    print(write_report(args.folder, args.title or args.folder.name, args.reference, **options))


if __name__ == "__main__":
    main()
