"""Scores, tables and curves of what bench_compression.py translated.

    python examples/benchmarks/compression_curves.py runs/compression

Writes `compression.json`, `compression.md` and `compression.png` to the folder. Scores are means over directions; where
the choice of experts is random, means over seeds, with the standard deviation.
"""

import argparse
import json
import lzma
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib
from tqdm.auto import tqdm
from translation_batches import read_sentences

from hf_moe_ted import score_translations

matplotlib.use("Agg")
from matplotlib import pyplot as plt

DIRECTIONS = {"all": ("", ""), "from_english": ("en-", ""), "to_english": ("", "-en")}  # how they begin and end
SCORES = ("bleu", "chrf", "length_ratio", "off_target")
# title -> directions, score and format
COLUMNS = {
    "BLEU": ("all", "bleu", ".1f"),
    "chrF": ("all", "chrf", ".1f"),
    "chrF en-X": ("from_english", "chrf", ".1f"),
    "chrF X-en": ("to_english", "chrf", ".1f"),
    "length ratio": ("all", "length_ratio", ".2f"),
    "length ratio X-en": ("to_english", "length_ratio", ".2f"),
    "off target": ("all", "off_target", ".1%"),
}
# title of a panel -> label of a curve -> part and series
PANELS = {
    "pruning: criteria": {name: ("prune", name) for name in ("utilization", "activity_confidence", "reap", "random")},
    "pruning: for whose text (utilization)": {
        "global": ("prune", "utilization"),
        **{
            name: ("scope", name)
            for name in ("scope=language_pair", "scope=language", "per_layer=adaptive", "languages=[en, X]")
        },
    },
    "merging and pruning": {
        "pruning, utilization": ("prune", "utilization"),
        "merging, clustering": ("merge", "clustering"),
        "merging, frequency": ("merge", "frequency"),
    },
    "further training": {
        "pruned": ("prune", "utilization"),
        "pruned, trained": ("train", "utilization"),
        "merged": ("merge", "clustering"),
        "merged, trained": ("train", "clustering"),
    },
}

Point = dict[str, Any]  # part, series, keep, and by directions and score the mean and the deviation


def score(line: dict[str, Any], data_dir: Path) -> dict[str, dict[str, float | None]]:
    """Direction -> scores of the translations in a line."""
    texts: dict[tuple[str, str], list[tuple[str, str, str]]] = defaultdict(list)
    sentences = read_sentences("test", data_dir, line["languages"], line["max_sentences"])
    for sentence, output in zip(sentences, line["outputs"], strict=True):
        texts[sentence.src_lang, sentence.tgt_lang].append((sentence.source, output, sentence.target))
    scores = {}
    for (src_lang, tgt_lang), columns in texts.items():
        found = score_translations(*zip(*columns, strict=True), tgt_lang=tgt_lang, languages=line["model_languages"])
        scores[f"{src_lang}-{tgt_lang}"] = {kind: getattr(found, kind) for kind in SCORES}
    return scores


def points_of(lines: list[dict[str, Any]]) -> list[Point]:
    """The lines with the same part, series and keep as one: languages side by side, the mean over seeds."""
    groups: dict[tuple[str, str, float], list[dict[str, Any]]] = defaultdict(list)
    for line in lines:
        groups[line["part"], line["series"], line["keep"]].append(line)
    points = []
    for (part, series, keep), group in groups.items():
        by_seed: dict[int, dict[str, dict[str, float | None]]] = defaultdict(dict)
        for line in group:
            by_seed[line["seed"]] |= line["scores"]
        point: Point = {"part": part, "series": series, "keep": keep, "num_seeds": len(by_seed)}
        point["num_bytes"] = mean(line["num_bytes"] for line in group)
        for name, (begin, end) in DIRECTIONS.items():
            means = [mean_scores(scores, begin, end) for scores in by_seed.values()]
            known = {kind: [m[kind] for m in means if m[kind] is not None] for kind in SCORES}
            point[name] = {kind: mean(values) if values else None for kind, values in known.items()}
            if len(means) > 1:
                point[f"{name}_stdev"] = {kind: stdev(v) if len(v) > 1 else None for kind, v in known.items()}
        points.append(point)
    return points


def mean_scores(scores: dict[str, dict[str, float | None]], begin: str, end: str) -> dict[str, float | None]:
    """Over the directions that begin and end so and have the score; `None` if none has."""
    chosen = [scores[direction] for direction in scores if direction.startswith(begin) and direction.endswith(end)]
    known = {kind: [of_direction[kind] for of_direction in chosen if of_direction[kind] is not None] for kind in SCORES}
    return {kind: mean(numbers) if numbers else None for kind, numbers in known.items()}


def table(points: list[Point]) -> str:
    """Markdown."""
    titles = ["part", "series", "experts kept", "MB", *COLUMNS]
    rows = [titles, ["---"] * len(titles)]
    for point in points:
        names = [point["part"], point["series"], f"{point['keep']:.1%}", f"{point['num_bytes'] / 1e6:.1f}"]
        rows.append([*names, *(_cell(point, *column) for column in COLUMNS.values())])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cell(point: Point, directions: str, kind: str, form: str) -> str:
    if point[directions][kind] is None:
        return ""
    spread = point.get(f"{directions}_stdev", {}).get(kind)
    text = format(point[directions][kind], form)
    return text if spread is None else f"{text} ± {spread:{form}}"


def speed_table(lines: list[dict[str, Any]]) -> str:
    """Markdown."""
    rows = ["| series | experts kept | MB | sentences/s, each run | peak MB |", "|---|---|---|---|---|"]
    for line in lines:
        runs = ", ".join(f"{speed:,.0f}" for speed in line["sentences_per_s"])
        peak = f"{line['peak_memory_mb']:,.0f}" if line["peak_memory_mb"] else ""
        rows.append(f"| {line['series']} | {line['keep']:.1%} | {line['num_bytes'] / 1e6:.1f} | {runs} | {peak} |")
    return "\n".join(rows)


def draw(points: list[Point], path: Path) -> None:
    """chrF of all directions and the length ratio into English against experts kept, a panel for each comparison."""
    by_name = {(point["part"], point["series"], point["keep"]): point for point in points}
    keeps = sorted({point["keep"] for point in points})
    figure, axes = plt.subplots(2, len(PANELS), figsize=(4.2 * len(PANELS), 7), sharex=True, sharey="row")
    for column, (title, curves) in enumerate(PANELS.items()):
        for (directions, kind), axis in zip(
            (("all", "chrf"), ("to_english", "length_ratio")), axes[:, column], strict=True
        ):
            for label, name in curves.items():
                # all curves begin with the full model, trained if their other points are
                full = ("train" if name[0] == "train" else "full", "full")
                curve = [by_name[key] for keep in keeps if (key := (*(full if keep == 1.0 else name), keep)) in by_name]
                axis.errorbar(
                    [100 * point["keep"] for point in curve],
                    [point[directions][kind] for point in curve],
                    yerr=[point.get(f"{directions}_stdev", {}).get(kind, 0.0) for point in curve],
                    label=label,
                    marker="o",
                    capsize=3,
                )
            axis.grid(alpha=0.3)
        axes[0, column].set_title(title)
        axes[0, column].legend(fontsize="small")
        axes[1, column].set_xlabel("experts kept, %")
    axes[0, 0].set_ylabel("chrF, mean of all directions")
    axes[1, 0].set_ylabel("length ratio into English")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", type=Path, help="of bench_compression.py")
    parser.add_argument("--data_dir", type=Path, default=Path(__file__).parents[1] / "data")
    arguments = parser.parse_args()
    paths = sorted(arguments.output_dir.glob("lines/[!.]*.json.xz"))
    if not paths:
        raise ValueError(f"no lines/*.json.xz in {arguments.output_dir}; bench_compression.py writes them")
    lines = [json.loads(lzma.decompress(path.read_bytes())) for path in paths]
    translated = [line for line in lines if "outputs" in line]
    with ProcessPoolExecutor() as pool:
        scores = pool.map(partial(score, data_dir=arguments.data_dir), translated)
        for line, of_line in zip(translated, tqdm(scores, total=len(translated), desc="Scoring"), strict=True):
            line["scores"] = of_line
            del line["outputs"]
    lines.sort(key=lambda line: (line["part"], line["series"], -line["keep"], line["seed"]))
    points = points_of([line for line in lines if "scores" in line])
    speeds = [line for line in lines if line["part"] == "speed"]
    report = json.dumps({"points": points, "lines": lines}, indent=1, ensure_ascii=False)
    (arguments.output_dir / "compression.json").write_text(report + "\n")
    tables = f"{table(points)}\n\n{speed_table(speeds)}\n"
    (arguments.output_dir / "compression.md").write_text(tables)
    draw(points, arguments.output_dir / "compression.png")
    print(tables)


if __name__ == "__main__":
    main()
