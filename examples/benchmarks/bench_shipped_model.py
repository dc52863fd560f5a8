r"""The shipped model in float32, int8, trimmed, and both: sentences per second, memory and quality with four beams.

    python examples/benchmarks/bench_shipped_model.py --threads 2 --output shipped_model.json
    python examples/benchmarks/bench_shipped_model.py --isa avx2

The smaller models are made first, in a temporary folder. Each is loaded and translates in a process of its own, whose
peak memory is reported; the processes take turns, round by round, and the fastest round counts, by the clock. "equal"
is how many translations are those of float32. Those of the trimmed model are compared as well with what float32
translates when it cannot generate the tokens that are gone, which is the same arithmetic: with beams these tokens count
even if no translation has them, as they take places of the beam and have a share of the probabilities.

If CTranslate2 is installed, a dense model of the same active size stands beside them: one expert of each layer, drawn
at random and trained no further, in int8. Its translations are worth nothing, so each is as long as those of float32
are on average: speed and memory only. It runs without PyTorch, from text to text. On a GPU (`--device cuda`) it is left
out, the first row runs step by step, and all others, of which there are more, with CUDA graphs where they can.

Whether experts in few bits, and such that are not all on the GPU, translate as bfloat16 does, in one process:

    python examples/benchmarks/bench_shipped_model.py --device cuda --in_one_process --num_sentences 200 \
        --batch_size 100 --num_rounds 0 --output shipped_model_cuda.json
"""

import argparse
import csv
import json
import lzma
import os
import random
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bench_translation_cpu import keep_to
from translation_ways import Direction, Round, Settings, Way, WayHere, WayProcess

EXAMPLES = Path(__file__).parents[1]
MODEL = EXAMPLES / "checkpoints" / "zcode_m3_demo"
FLOAT32, INT8, TRIMMED, TRIMMED_INT8 = "float32", "int8", "trimmed", "trimmed + int8"
RESTRICTED = "float32, without the tokens that are gone"
GRAPH_BEAMS, CTRANSLATE2 = "float32, graph beams", "CTranslate2, dense, int8"
BFLOAT16, BFLOAT16_STEPS = "bfloat16", "bfloat16, step by step"
INT8_EXPERTS, INT4_EXPERTS = "int8 experts, bfloat16", "int4 experts, bfloat16"
EXPERT_MEMORY = "int4 experts, bfloat16, a quarter of them on the GPU"
INT4_ALL = "int4 experts, all else int8"
ALL_EXPERT_MEMORY = "int4 experts, all else int8, an eighth of the experts on the GPU"
WITH_SMALL_EXPERTS = (INT8_EXPERTS, INT4_EXPERTS, EXPERT_MEMORY, INT4_ALL, ALL_EXPERT_MEMORY)
ON_GPUS = (GRAPH_BEAMS, BFLOAT16, BFLOAT16_STEPS, *WITH_SMALL_EXPERTS)
WAYS = (FLOAT32, INT8, TRIMMED, TRIMMED_INT8, *ON_GPUS, CTRANSLATE2)
MAX_CHRF_DIFFERENCE = 0.3


# ---- text and models ----


def rows_of(split: str, language: str) -> list[dict[str, str]]:
    with lzma.open(EXAMPLES / "data" / f"chromium_l10n.{split}.tsv.xz", "rt", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE) if row["lang"] == language]
    if not rows:
        raise ValueError(f"--language {language}: no text in examples/data")
    return rows


def test_directions(language: str, num_sentences: int) -> list[Direction]:
    """From English and back: the same rows of the test split, drawn once for all."""
    rows = rows_of("test", language)
    rows = random.Random(0).sample(rows, min(num_sentences, len(rows)))
    english, others = [row["english"] for row in rows], [row["target"] for row in rows]
    return [Direction("en", language, english, others), Direction(language, "en", others, english)]


def make_ways(folder: Path, arguments: argparse.Namespace) -> list[Way]:
    """What others are compared with, and what `--ways` names, in the order of the table."""
    from hf_moe_ted import quantize_experts

    wanted, language = {BFLOAT16 if arguments.in_one_process else FLOAT32, *arguments.ways}, arguments.language
    on_gpu = arguments.device == "cuda"
    if arguments.in_one_process:
        return [way for way in gpu_ways(folder) if way.name in wanted]
    ways = [Way(FLOAT32, MODEL, {"cuda_graphs": False} if on_gpu else {})]
    if INT8 in wanted:
        quantize_experts(MODEL, what="all", output_dir=folder / "int8")
        ways.append(Way(INT8, folder / "int8"))
    if wanted & {TRIMMED, TRIMMED_INT8}:
        trim(folder / "trimmed", language)
    if TRIMMED in wanted:
        ways.append(Way(TRIMMED, folder / "trimmed"))
        ways.append(Way(RESTRICTED, MODEL, tokens=kept_tokens(folder / "trimmed")))
    if TRIMMED_INT8 in wanted:
        quantize_experts(folder / "trimmed", what="all", output_dir=folder / "trimmed_int8")
        ways.append(Way(TRIMMED_INT8, folder / "trimmed_int8"))
    if on_gpu:
        ways += [way for way in gpu_ways(folder) if way.name in wanted]
    elif CTRANSLATE2 in wanted:
        ways += ctranslate2_ways(folder)
    return ways


def gpu_ways(folder: Path) -> list[Way]:
    from hf_moe_ted import quantize_experts

    for bits in (8, 4):
        quantize_experts(MODEL, bits=bits, output_dir=folder / f"int{bits}_experts", dtype="bfloat16")
    quantize_experts(MODEL, bits=4, what="all", output_dir=folder / "int4_all", dtype="bfloat16")
    int4, int4_all = folder / "int4_experts", folder / "int4_all"
    return [
        Way(GRAPH_BEAMS, MODEL),
        Way(BFLOAT16, MODEL, dtype="bfloat16"),
        Way(BFLOAT16_STEPS, MODEL, {"cuda_graphs": False}, dtype="bfloat16"),
        Way(INT8_EXPERTS, folder / "int8_experts"),
        Way(INT4_EXPERTS, int4),
        Way(EXPERT_MEMORY, int4, expert_bytes=bytes_of_experts(int4) // 4),
        Way(INT4_ALL, int4_all),
        Way(ALL_EXPERT_MEMORY, int4_all, expert_bytes=bytes_of_experts(int4_all) // 8),
    ]


def bytes_of_experts(folder: Path) -> int:
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as tensors:
        return sum(tensors.get_tensor(name).nbytes for name in tensors.keys() if ".experts." in name)  # noqa: SIM118


def trim(folder: Path, language: str) -> None:
    """For English and another language, by the rows of the training split."""
    from hf_moe_ted import trim_vocabulary

    texts = [{"translation": {"en": row["english"], language: row["target"]}} for row in rows_of("train", language)]
    trim_vocabulary(MODEL, dataset=texts, languages=["en", language], output_dir=folder)


def kept_tokens(trimmed: Path) -> tuple[int, ...]:
    """Ids of the whole model."""
    from transformers import AutoTokenizer

    whole, smaller = (AutoTokenizer.from_pretrained(folder).get_vocab() for folder in (MODEL, trimmed))
    return tuple(index for token, index in whole.items() if token in smaller)


def ctranslate2_ways(folder: Path) -> list[Way]:
    """A dense model of the same active size for CTranslate2, if that is installed."""
    try:
        from ctranslate2.converters import TransformersConverter
    except ImportError:
        print("ctranslate2 is not installed: its row is left out", file=sys.stderr)
        return []
    from hf_moe_ted import export_m2m100, prune_experts

    prune_experts(MODEL, None, keep=1, criterion="random", output_dir=folder / "dense")
    export_m2m100(folder / "dense", folder / "m2m100")
    TransformersConverter(str(folder / "m2m100"), copy_files=["tokenizer.json"]).convert(
        str(folder / "ctranslate2"), quantization="int8"
    )
    return [Way(CTRANSLATE2, folder / "ctranslate2", is_ctranslate2=True)]


# ---- measuring ----


def measure(
    ways: list[Way],
    directions: list[Direction],
    settings: Settings,
    num_rounds: int,
    kind: type[WayProcess] | type[WayHere] = WayProcess,
) -> dict[str, list[Round]]:
    """A round to warm up, which is the first of each list, then `num_rounds` in turns."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    processes: list[WayProcess | WayHere] = []
    rounds: dict[str, list[Round]] = {}
    for way in ways:
        process = kind(way, settings)
        rounds[way.name] = [process.round(directions)]
        if way.name == RESTRICTED:  # for its translations only
            process.end()
            continue
        processes.append(process)
        if way.name == FLOAT32:
            directions = [
                replace(direction, num_new_tokens=mean_length(tokenizer, texts))
                for direction, texts in zip(directions, rounds[FLOAT32][0].translations, strict=True)
            ]
    for _ in range(num_rounds):
        for process in processes:
            rounds[process.way.name].append(process.round(directions))
    for process in processes:
        process.end()
    return rounds


def mean_length(tokenizer: Any, texts: list[str]) -> int:
    """Tokens of a translation on average, that of the end included."""
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return round(sum(len(of_text) + 1 for of_text in ids) / len(ids))


def result_of(way: Way, rounds: dict[str, list[Round]], directions: list[Direction]) -> dict[str, Any]:
    """A row of the table; without quality for CTranslate2."""
    own = rounds[way.name]
    timed = own[1:] or own
    best = min(timed, key=lambda each: each.seconds)
    row: dict[str, Any] = {
        "way": way.name,
        "weights_mb": way.weights_mb,
        "libraries_mb": own[-1].libraries_mb,
        "peak_mb": own[-1].peak_mb,
        "peak_gpu_mb": own[-1].peak_gpu_mb,
        "seconds": [each.seconds for each in timed],
        "processor_s": [each.processor_s for each in timed],
        "sentences_per_s": num_sentences(directions) / best.seconds,
        "sentences_per_processor_s": num_sentences(directions) / min(each.processor_s for each in timed),
    }
    if way.name == CTRANSLATE2:
        return row
    row["scores"] = scores_of(own[0].translations, directions)
    row["num_equal"] = num_equal(own[0], next(iter(rounds.values()))[0])
    if way.name == TRIMMED:
        row["num_equal_restricted"] = num_equal(own[0], rounds[RESTRICTED][0])
    return row | {"num_sentences": num_sentences(directions)}


def num_sentences(directions: list[Direction]) -> int:
    return sum(len(direction.sources) for direction in directions)


def num_equal(one: Round, other: Round) -> int:
    pairs = zip(one.translations, other.translations, strict=True)
    return sum(text == expected for pair in pairs for text, expected in zip(*pair, strict=True))


def scores_of(translations: list[list[str]], directions: list[Direction]) -> dict[str, dict[str, Any]]:
    """Direction -> sacreBLEU's BLEU and chrF, and others."""
    from hf_moe_ted import score_translations

    return {
        str(direction): asdict(
            score_translations(
                direction.sources, texts, direction.references, tgt_lang=direction.tgt_lang,
                languages=[direction.src_lang, direction.tgt_lang],
            )
        )
        for direction, texts in zip(directions, translations, strict=True)
    }  # fmt: skip


def remark(row: dict[str, Any], first: dict[str, Any]) -> str:
    """What is not as it should be, in capitals."""
    if "scores" not in row:
        return "speed and memory only"
    remarks = []
    for name, scores in row["scores"].items():
        difference = scores["chrf"] - first["scores"][name]["chrf"]
        if abs(difference) > MAX_CHRF_DIFFERENCE:
            far = f"MORE THAN {MAX_CHRF_DIFFERENCE} FROM {first['way'].upper()}"
            remarks.append(f"CHRF OF {name} {difference:+.2f}, {far}")
    same = row.get("num_equal_restricted", row["num_equal"] if row["way"] == GRAPH_BEAMS else None)
    if same is not None and same < row["num_sentences"]:
        remarks.append("NOT THE TRANSLATIONS OF THE SAME ARITHMETIC")
    return "; ".join(remarks)


def table(rows: list[dict[str, Any]]) -> str:
    names = [*rows[0]["scores"]]
    heads = [*(f"chrF {name}" for name in names), *(f"BLEU {name}" for name in names)]
    lines = [
        "| | weights, MB | peak memory, MB | of it libraries | sentences/s | sentences / processor s | "
        f"{' | '.join(heads)} | equal | |",
        "|---|" + "---|" * (len(heads) + 7),
    ]
    for row in rows:
        scores = row.get("scores")
        found = [scores[name][kind] if scores else None for kind in ("chrf", "bleu") for name in names]
        quality = ["" if score is None else f"{score:.1f}" for score in found]
        equal = f"{row['num_equal']}/{row['num_sentences']}" if scores else ""
        if "num_equal_restricted" in row:
            equal += f"; {row['num_equal_restricted']}/{row['num_sentences']} without the tokens that are gone"
        memory = f"{row['peak_mb']:.0f}" + (f" + {row['peak_gpu_mb']:.0f} (GPU)" if row["peak_gpu_mb"] else "")
        cells = [
            row["way"], f"{row['weights_mb']:.1f}", memory, f"{row['libraries_mb']:.0f}",
            f"{row['sentences_per_s']:.1f}", f"{row['sentences_per_processor_s']:.1f}", *quality, equal,
            remark(row, rows[0]),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def environment() -> dict[str, Any]:
    import torch
    import transformers
    from bench_generation import cpu_name

    return {
        "processor": cpu_name(),
        "cores": os.cpu_count(),
        "load": os.getloadavg(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--language", default="de", help="beside English")
    parser.add_argument("--num_sentences", type=int, default=64, help="of each direction")
    parser.add_argument("--num_beams", type=int, default=4)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--num_rounds", type=int, default=3, help="0: the one that warms up is timed")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--ways", nargs="+", choices=WAYS, help="rows, beside the first")
    parser.add_argument("--in_one_process", action="store_true", help="those of few bits, beside bfloat16")
    parser.add_argument("--isa", choices=("native", "avx2"), default="native")
    parser.add_argument("--output", type=Path, help="JSON file with all that was measured")
    arguments = parser.parse_args()
    arguments.ways = arguments.ways or (WITH_SMALL_EXPERTS if arguments.in_one_process else WAYS)
    return arguments


def main() -> None:
    arguments = parse_arguments()
    keep_to(arguments.isa)
    import torch

    torch.set_num_threads(arguments.threads)
    settings = Settings(arguments.num_beams, arguments.batch_size, arguments.threads, arguments.device)
    directions = test_directions(arguments.language, arguments.num_sentences)
    with tempfile.TemporaryDirectory() as folder:
        ways = make_ways(Path(folder), arguments)
        kind = WayHere if arguments.in_one_process else WayProcess
        rounds = measure(ways, directions, settings, arguments.num_rounds, kind)
        rows = [result_of(way, rounds, directions) for way in ways if way.name != RESTRICTED]
    load = os.getloadavg()[0]
    print(f"{num_sentences(directions)} sentences, {arguments.isa}, {asdict(settings)}, load {load:.1f}\n")
    print(table(rows))
    if arguments.output:
        written = {"environment": environment(), "arguments": vars(arguments), "results": rows}
        arguments.output.write_text(json.dumps(written, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
