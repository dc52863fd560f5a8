"""Numbers and pictures of an experiment that `train_multitask.py` has run.

    python examples/experiment_report.py runs/token_dropping --title "Random Token Selection"

reads `<variant>/seed_<seed>/result.json` and `translations.json` and writes `report.md`, `curves.png` and, where tokens
were dropped, `dropped_by_place.png` to the folder. Numbers are means over seeds, with the standard deviation if there
are several. Translations are scored by BLEU and chrF.
"""

import argparse
import json
import math
import re
import textwrap
from collections import defaultdict
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from matplotlib.figure import Figure
from tqdm.auto import tqdm

from hf_moe_ted import score_translations

Curve = list[tuple[float, float, float]]  # steps, seconds, loss
EVAL_LOSS = re.compile(r"eval_(\w+)_loss")


def read_runs(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Results by variant, with the `translations` that there are.

    Raises:
        ValueError: no run in the folder is done.
    """
    runs = defaultdict(list)
    for path in sorted(folder.glob("*/seed_*/result.json"), key=lambda path: path.stat().st_mtime):
        result = json.loads(path.read_text(encoding="utf-8"))
        translations = path.with_name("translations.json")
        result["translations"] = json.loads(translations.read_text(encoding="utf-8")) if translations.is_file() else []
        runs[result["variant"]].append(result)
    if not runs:
        raise ValueError(f"no */seed_*/result.json in {folder}: train_multitask.py writes them to its output_dir")
    return dict(runs)


def validation_sets(result: dict[str, Any]) -> list[str]:
    """Names of the validation sets of a run."""
    names = {name for entry in result["log_history"] for name in entry}
    return sorted(found[1] for name in names if (found := EVAL_LOSS.fullmatch(name)))


def curve_of(result: dict[str, Any], dataset: str) -> Curve:
    """The loss on a validation set over the steps of a run."""
    name = f"eval_{dataset}_loss"
    return [(entry["step"], entry["seconds"], entry[name]) for entry in result["log_history"] if name in entry]


def steps_to(curve: Curve, loss: float) -> float:
    """Steps until a loss is reached, interpolated between evaluations; infinite if it is not."""
    before = None
    for step, _, value in curve:
        if value <= loss:
            if before is None or before[1] == value:
                return step
            return before[0] + (step - before[0]) * (before[1] - loss) / (before[1] - value)
        before = (step, value)
    return math.inf


def mean_and_spread(values: list[float], digits: int = 3) -> str:
    """`mean ± standard deviation` of what is finite, and how many that are if not all."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return "never"
    spread = f" ± {stdev(finite):.{digits}f}" if len(finite) > 1 else ""
    which = f" ({len(finite)} of {len(values)} seeds)" if len(finite) < len(values) else ""
    return f"{fmean(finite):.{digits}f}{spread}{which}"


def score(result: dict[str, Any]) -> dict[str, float]:
    """Mean BLEU and chrF over directions from and into English, and of low-resource languages if there are any."""
    by_direction = defaultdict(list)
    for row in result["translations"]:
        by_direction[row["src_lang"], row["tgt_lang"]].append(row)
    scores = defaultdict(list)
    for (src_lang, tgt_lang), rows in by_direction.items():
        texts = ([row[name] for row in rows] for name in ("source", "translation", "target"))
        found = score_translations(*texts, tgt_lang=tgt_lang)
        groups = ["en-X" if src_lang == "en" else "X-en"]
        if {src_lang, tgt_lang} & {*result["low_resource_languages"]}:
            groups.append(f"{groups[0]}, low-resource")
        for group in groups:
            scores[f"BLEU {group}"].append(found.bleu)
            scores[f"chrF {group}"].append(found.chrf)
    return {name: fmean(values) for name, values in scores.items()}


def last_of(result: dict[str, Any], name: str) -> float | None:
    """The last logged value of a number."""
    values = [entry[name] for entry in result["log_history"] if name in entry]
    return values[-1] if values else None


def rows_of(runs: dict[str, list[dict[str, Any]]], reference: str) -> list[dict[str, str]]:
    """A row of the table per variant."""
    datasets = validation_sets(runs[reference][0])
    goals = {dataset: fmean(curve_of(result, dataset)[-1][2] for result in runs[reference]) for dataset in datasets}
    rows = []
    for variant, results in runs.items():
        row = {
            "variant": variant,
            "seeds": str(len(results)),
            "parameters": f"{results[0]['num_parameters'] / 1e6:.0f}M",
        }
        for dataset in datasets:
            curves = [curve_of(result, dataset) for result in results]
            row[f"{dataset} loss"] = mean_and_spread([curve[-1][2] for curve in curves])
            row[f"steps to {goals[dataset]:.3f}"] = mean_and_spread([steps_to(c, goals[dataset]) for c in curves], 0)
        row["seconds"] = mean_and_spread([result["log_history"][-1]["seconds"] for result in results], 0)
        for name, title in (("router/dropped", "dropped"), ("router/load_max", "busiest expert")):
            values = [last_of(result, name) for result in results]
            row[title] = mean_and_spread([v for v in values if v is not None]) if None not in values else "-"
        scores = [score(result) for result in tqdm(results, desc=f"Scoring {variant}", leave=False)]
        for name in sorted(scores[0]):
            row[name] = mean_and_spread([each[name] for each in scores], 2)
        rows.append(row)
    return rows


def draw_curves(runs: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Losses over steps and over seconds, each seed a line."""
    datasets = validation_sets(next(iter(runs.values()))[0])
    figure = Figure(figsize=(11, 4 * len(datasets)), layout="constrained")
    axes = figure.subplots(len(datasets), 2, squeeze=False, sharey="row")
    for row, dataset in zip(axes, datasets, strict=True):
        for column, (axis, unit) in enumerate(zip(row, ("steps", "seconds of training"), strict=True)):
            for number, (variant, results) in enumerate(runs.items()):
                for place, result in enumerate(results):
                    curve = curve_of(result, dataset)
                    xs, ys = [point[column] for point in curve], [point[2] for point in curve]
                    axis.plot(xs, ys, color=f"C{number}", alpha=0.8, label=variant if place == 0 else None)
            axis.set(xlabel=unit, ylabel=f"{dataset} loss", yscale="log")
            axis.grid(alpha=0.3, which="both")
        row[0].legend()
    figure.savefig(path, dpi=120)


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


def write_report(folder: Path, title: str, reference: str | None) -> str:
    """Write the report and its pictures; returns its text."""
    runs = read_runs(folder)
    reference = next(iter(runs)) if reference is None else reference
    if reference not in runs:
        raise ValueError(f"reference ({reference!r}) must be one of the variants {list(runs)}")
    rows = rows_of(runs, reference)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [f"# {title}", "", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(row.get(name, "-") for name in columns) + " |" for row in rows]
    first = runs[reference][0]
    steps = {result["log_history"][-1]["step"] for results in runs.values() for result in results}
    notes = f"""
        {", ".join(map(str, sorted(steps)))} steps of up to {first["max_tokens_per_batch"]:,} tokens (source, target and
        padding), {first["device"]}, torch {first["torch"]}. Losses are cross-entropies of the validation set in nats
        per token, steps those to the mean last loss of `{reference}`; seconds are without evaluation; "dropped" and
        "busiest expert" (1 is an even share) are means over the sparse layers at the end of training."""
    lines += ["", *textwrap.wrap(" ".join(notes.split()), 120), "", "![Losses](curves.png)"]
    draw_curves(runs, folder / "curves.png")
    if draw_dropped(runs, folder / "dropped_by_place.png"):
        lines += ["", "![Dropped tokens by place in the batch](dropped_by_place.png)"]
    text = "\n".join(lines) + "\n"
    (folder / "report.md").write_text(text, encoding="utf-8")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--title")
    parser.add_argument("--reference", help="The variant whose last loss the others are timed to; default: the first.")
    args = parser.parse_args()
    print(write_report(args.folder, args.title or args.folder.name, args.reference))


if __name__ == "__main__":
    main()
