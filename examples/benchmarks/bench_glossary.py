"""Glossaries on real text: the share of terms that translations have, and what that does to chrF.

    python examples/benchmarks/bench_glossary.py --model examples/checkpoints/zcode_m3_demo --output glossary.json

A glossary of each direction is made of the training pairs of the examples: words, and pairs of words, that nearly
always have the same translation. It is used on the sentences of the test split that have a term of it. "Consistent"
sentences are those whose reference has all terms in the form of the glossary; in the others it has another form, or
another word.

Ways: "none" is without a glossary; "grid" what `TextTranslator` does; "bonus" a `LogitsProcessor` that raises the
tokens of missing terms in beam search and lets no translation end without them; "marker" puts `$1` in the place of a
term, and the term in the place of the marker. All of them translate only those sentences again in which "none" misses
a term.

Placeholders are those of the test sentences, as they are (`$1`) and written in other ways.
"""

import argparse
import json
import lzma
import platform
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from csv import QUOTE_NONE, DictReader
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import regex
import sacrebleu
import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import LogitsProcessor

from hf_moe_ted import Glossary, TextTranslator, load_model_and_tokenizer

DATA = Path(__file__).parents[1] / "data"
DIRECTIONS = "en-de,en-fr,en-es,en-ru,en-tr,en-ja,en-zh,de-en"
WORD = regex.compile(r"[\p{L}\p{M}]+")
NO_SPACES = regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}ー\p{Thai}]+")
PLACEHOLDERS = ("$1", "%s", "{name}", "https://example.org/a?b=1", "`--flag`", "&amp;")
MIN_LETTERS, MIN_COUNT, MAX_SHARE, MIN_DICE = 4, 8, 0.05, 0.7
BONUSES = (2.0,)

Pairs = list[tuple[str, str]]


@dataclass
class Result:
    """What a way makes of some sentences.

    Attributes:
        share: of the terms that the translations have.
        again, chrf_again: sentences in which "none" misses a term, and chrF of these.
        seconds: of the sentences that are translated again; for "none", of all.
    """

    direction: str
    sentences: str
    way: str
    num_sentences: int
    num_terms: int
    share: float
    chrf: float
    again: int
    chrf_again: float
    seconds: float


def read_pairs(split: str, direction: str) -> Pairs:
    """Sources and targets of a direction from or to English."""
    src, tgt = direction.split("-")
    with lzma.open(DATA / f"chromium_l10n.{split}.tsv.xz", "rt", encoding="utf-8", newline="") as file:
        rows = [r for r in DictReader(file, delimiter="\t", quoting=QUOTE_NONE) if r["lang"] in (src, tgt)]
    pairs = [(row["english"], row["target"]) for row in rows]
    return pairs if src == "en" else [(target, source) for source, target in pairs]


def candidate_terms(text: str) -> set[str]:
    """Words and pairs of words; in scripts without spaces, 2 to 6 characters."""
    words = [match for match in WORD.finditer(text) if len(match[0]) >= MIN_LETTERS and not NO_SPACES.search(match[0])]
    pairs = {f"{a[0]} {b[0]}" for a, b in pairwise(words) if text[a.end() : b.start()] == " "}
    runs = [run for run in NO_SPACES.findall(text)]
    return (
        {word[0] for word in words}
        | pairs
        | {r[i : i + n] for r in runs for n in range(2, 7) for i in range(len(r) - n + 1)}
    )


def make_glossary(pairs: Pairs) -> Glossary:
    """Terms that stand in the same pairs as one translation, by the Dice coefficient."""
    sources: Counter[str] = Counter()
    targets: Counter[str] = Counter()
    together: dict[str, Counter[str]] = defaultdict(Counter)
    for source, target in pairs:
        of_source, of_target = {term.lower() for term in candidate_terms(source)}, candidate_terms(target)
        sources.update(of_source)
        targets.update(of_target)
        for term in of_source:
            together[term].update(of_target)
    entries = {}
    for term, count in sources.items():
        if not MIN_COUNT <= count <= MAX_SHARE * len(pairs):
            continue
        dice = {target: 2 * both / (count + targets[target]) for target, both in together[term].items()}
        best = max(dice, key=lambda target: (dice[target], len(target)), default=None)
        if best is not None and dice[best] >= MIN_DICE and best.lower() != term:
            entries[term] = best
    return Glossary(entries.items())


class BonusProcessor(LogitsProcessor):
    """Raises the next token of each term that a beam misses; a beam with a term missing does not end.

    Args:
        spellings: of each sentence, of each of its terms, the ways to write it in tokens.
        bonus: added to log-probabilities.
    """

    def __init__(self, spellings: Sequence[Sequence[Sequence[tuple[int, ...]]]], eos: int, bonus: float):
        self.spellings, self.eos, self.bonus = spellings, eos, bonus

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        num_beams = len(input_ids) // len(self.spellings)
        for index, tokens in enumerate(map(tuple, input_ids[:, 2:].tolist())):
            missing = list(_without_found(self.spellings[index // num_beams], tokens))
            if not missing or input_ids.shape[1] < 2 or tokens[-1:] == (self.eos,):
                continue
            scores[index, self.eos] = -torch.inf
            for spelling in {spelling for term in missing for spelling in term}:
                lengths = range(min(len(spelling) - 1, len(tokens)), 0, -1)
                begun = next((n for n in lengths if tokens[-n:] == spelling[:n]), 0)
                scores[index, spelling[begun]] += self.bonus
        return scores


def _without_found(terms: Sequence[Sequence[tuple[int, ...]]], tokens: tuple[int, ...]) -> Iterator[Any]:
    taken: Counter[tuple[int, ...]] = Counter()
    for term in terms:
        found = next((spelling for spelling in term if _count(spelling, tokens) > taken[spelling]), None)
        if found is None:
            yield term
        else:
            taken[found] += 1


def _count(spelling: tuple[int, ...], tokens: tuple[int, ...]) -> int:
    return sum(tokens[i : i + len(spelling)] == spelling for i, token in enumerate(tokens) if token == spelling[0])


class Bench:
    def __init__(self, model: Any, tokenizer: Any, num_beams: int):
        self.model, self.tokenizer = model, tokenizer
        self.num_beams = num_beams
        self.plain = TextTranslator(model, tokenizer, num_beams=num_beams, split=False, keep_placeholders=False)
        self.keeping = TextTranslator(model, tokenizer, num_beams=num_beams, split=False)

    def none(self, sources: Sequence[str], direction: str) -> list[str]:
        return [text.text for text in self.plain.translate(sources, *direction.split("-"))]

    def grid(self, sources: Sequence[str], direction: str, glossary: Glossary) -> list[str]:
        return [text.text for text in self.plain.translate(sources, *direction.split("-"), glossary=glossary)]

    def keep(self, sources: Sequence[str], direction: str) -> list[str]:
        return [text.text for text in self.keeping.translate(sources, *direction.split("-"))]

    def marker(self, sources: Sequence[str], direction: str, glossary: Glossary) -> list[str]:
        marked, markers = [], []
        for source in sources:
            free = (f"${n}" for n in range(1, 99) if f"${n}" not in source)
            terms = {next(free): term for term in glossary.terms_in(source)}
            text = source
            for name, term in reversed(terms.items()):
                text = text[: term.start] + name + text[term.end :]
            marked.append(text)
            markers.append(terms)
        translations = self.none(marked, direction)
        for index, terms in enumerate(markers):
            for name, term in terms.items():
                translations[index] = translations[index].replace(name, term.target)
        return translations

    def bonus(self, sources: Sequence[str], direction: str, glossary: Glossary, bonus: float) -> list[str]:
        src, tgt = direction.split("-")
        translations = {}
        order = sorted(sources, key=len)
        for start in range(0, len(order), 32):
            batch = order[start : start + 32]
            inputs = self.tokenizer(batch, src_lang=src, padding=True, return_tensors="pt")
            spellings = [[self._spellings(term.target) for term in glossary.terms_in(source)] for source in batch]
            with torch.inference_mode():
                ids = self.model.generate(
                    **inputs,
                    forced_bos_token_id=self.tokenizer.get_lang_id(tgt),
                    num_beams=self.num_beams,
                    max_new_tokens=min(250, 4 * inputs["input_ids"].shape[1] + 32),
                    logits_processor=[BonusProcessor(spellings, self.tokenizer.eos_token_id, bonus)],
                )
            translations |= zip(batch, self.tokenizer.batch_decode(ids, skip_special_tokens=True), strict=True)
        return [translations[source] for source in sources]

    def _spellings(self, term: str) -> list[tuple[int, ...]]:
        texts = [term, f" {term}", term[:1].upper() + term[1:]]
        return [tuple(self.tokenizer.encode(text, add_special_tokens=False)) for text in texts]


def chrf(translations: Sequence[str], references: Sequence[str]) -> float:
    return sacrebleu.corpus_chrf(list(translations), [list(references)]).score if translations else 0.0


def timed(function: Callable[..., list[str]], *args: Any) -> tuple[list[str], float]:
    start = time.perf_counter()
    result = function(*args)
    return result, time.perf_counter() - start


def of_glossary(bench: Bench, direction: str, limit: int | None, ways: Sequence[str]) -> list[Result]:
    glossary = make_glossary(read_pairs("train", direction))
    pairs = [pair for pair in read_pairs("test", direction)[:limit] if glossary.terms_in(pair[0])]
    sources = [source for source, _ in pairs]
    num_terms = [len(glossary.terms_in(source)) for source in sources]
    plain, plain_s = timed(bench.none, sources, direction)
    again = [index for index, pair in enumerate(zip(sources, plain, strict=True)) if glossary.missing_terms(*pair)]
    consistent = [index for index, pair in enumerate(pairs) if not glossary.missing_terms(*pair)]
    functions: dict[str, Callable[..., list[str]]] = {"marker": bench.marker, "grid": bench.grid}
    functions |= {f"bonus {b:g}": lambda *args, b=b: bench.bonus(*args, b) for b in BONUSES}
    results = []
    for way in ("none", *[way for way in functions if way.split()[0] in ways]):
        translations, seconds = list(plain), plain_s
        if way != "none":
            new, seconds = timed(functions[way], [sources[index] for index in again], direction, glossary)
            for index, text in zip(again, new, strict=True):
                translations[index] = text
        for name, indices in (("all", list(range(len(pairs)))), ("consistent", consistent)):
            of_name = [index for index in indices if index in set(again)]
            missing = sum(len(glossary.missing_terms(sources[i], translations[i])) for i in indices)
            total = sum(num_terms[i] for i in indices)
            both = [chrf([translations[i] for i in some], [pairs[i][1] for i in some]) for some in (indices, of_name)]
            share = 1 - missing / max(1, total)
            results.append(
                Result(direction, name, way, len(indices), total, share, both[0], len(of_name), both[1], seconds)
            )
    return results


def of_placeholders(bench: Bench, direction: str, limit: int | None) -> list[Result]:
    results = []
    pairs = [pair for pair in read_pairs("test", direction) if "$1" in pair[0] and "$1" in pair[1]][:limit]
    for name in PLACEHOLDERS:
        sources, references = ([text.replace("$1", name) for text in texts] for texts in zip(*pairs, strict=True))
        num_wanted = [source.count(name) for source in sources]
        plain, plain_s = timed(bench.none, sources, direction)
        kept, kept_s = timed(bench.keep, sources, direction)
        again = [i for i, text in enumerate(plain) if text != kept[i]]
        for way, texts, seconds in (("none", plain, plain_s), ("grid", kept, kept_s - plain_s)):
            found = sum(min(n, text.count(name)) for n, text in zip(num_wanted, texts, strict=True))
            of_again = chrf([texts[i] for i in again], [references[i] for i in again])
            share = found / sum(num_wanted)
            results.append(
                Result(
                    *(direction, name, way, len(pairs), sum(num_wanted), share, chrf(texts, references)),
                    *(len(again), of_again, seconds),
                )
            )
    return results


def show(title: str, results: Sequence[Result]) -> None:
    table = Table(title=title)
    for name in ("direction", "sentences", "way", "number", "terms", "share", "chrF", "again", "chrF of these", "s"):
        table.add_column(name, justify="left" if name in ("direction", "sentences", "way") else "right")
    for r in results:
        table.add_row(
            *(r.direction, r.sentences, r.way, str(r.num_sentences), str(r.num_terms), f"{r.share:.1%}"),
            *(f"{r.chrf:.1f}", str(r.again), f"{r.chrf_again:.1f}", f"{r.seconds:.0f}"),
        )
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="with the languages of the examples' data")
    parser.add_argument("--directions", default=DIRECTIONS)
    parser.add_argument("--placeholders", default="en-de,en-ru,en-ja", help="directions")
    parser.add_argument("--ways", default="grid,marker,bonus")
    parser.add_argument("--beams", type=int, default=4)
    parser.add_argument("--limit", type=int, help="sentences of a direction")
    parser.add_argument("--output", type=Path, help="JSON")
    arguments = parser.parse_args()
    bench = Bench(*load_model_and_tokenizer(arguments.model, "auto", None, "--model"), arguments.beams)
    results: dict[str, list[Result]] = {"glossary": [], "placeholders": []}
    for direction in filter(None, arguments.directions.split(",")):
        results["glossary"] += of_glossary(bench, direction, arguments.limit, arguments.ways.split(","))
        show("Glossary", results["glossary"])
    for direction in filter(None, arguments.placeholders.split(",")):
        results["placeholders"] += of_placeholders(bench, direction, arguments.limit)
        show("Placeholders", results["placeholders"])
    if arguments.output is not None:
        record = {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "machine": platform.processor() or platform.machine(),
            "num_threads": torch.get_num_threads(),
            **{name: [asdict(result) for result in of_name] for name, of_name in results.items()},
        }
        arguments.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
