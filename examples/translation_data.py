"""Parallel text of the examples: tab-separated files -> one dataset per translation direction -> token ids."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, interleave_datasets, load_dataset

DATA_DIR = Path(__file__).parent / "data"
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, order=True)
class Direction:
    """A source and a target language."""

    src_lang: str
    tgt_lang: str

    def __str__(self) -> str:
        return f"{self.src_lang}-{self.tgt_lang}"


def load_directions(
    split: str, languages: list[str] | None = None, *, to_english: bool = True, data_dir: Path = DATA_DIR
) -> dict[Direction, Dataset]:
    """English to each language, and back, as datasets with the string columns `source` and `target`.

    Args:
        split: `"train"`, `"validation"` or `"test"`.
        languages: languages other than English, all of the file by default.
        to_english: whether to return the directions into English, too.
        data_dir: folder of the files, `*.{split}.tsv.xz` with the columns lang, english and target.

    Raises:
        ValueError: for an unknown split or a language without text.
    """
    files = sorted(str(path) for path in Path(data_dir).glob(f"*.{split}.tsv.xz"))
    if split not in SPLITS or not files:
        raise ValueError(f"no *.{split}.tsv.xz in {data_dir}; split must be one of {SPLITS}")
    # quoting=3 is csv.QUOTE_NONE: quotes are text; keep_default_na: "None" and "NA" are text, too
    rows = load_dataset("csv", data_files=files, delimiter="\t", quoting=3, keep_default_na=False, split="train")
    pairs_of = dict(list(rows.to_pandas().groupby("lang")))
    known = sorted(pairs_of)
    directions: dict[Direction, Dataset] = {}
    for lang in known if languages is None else languages:
        if lang not in known:
            raise ValueError(f"no text in language {lang!r} in {files}; there is text in {known}")
        pairs = Dataset.from_pandas(pairs_of[lang][["english", "target"]], preserve_index=False)
        directions[Direction("en", lang)] = pairs.rename_columns({"english": "source"})
        if to_english:
            directions[Direction(lang, "en")] = pairs.rename_columns({"target": "source", "english": "target"})
    return directions


def first_rows(directions: dict[Direction, Dataset], max_samples: int | None = None) -> list[dict[str, str]]:
    """The first rows of each direction with their languages, as `collect_expert_statistics` takes them."""
    return [
        {
            "source": row["source"],
            "target": row["target"],
            "src_lang": direction.src_lang,
            "tgt_lang": direction.tgt_lang,
        }
        for direction, data in directions.items()
        for row in data.select(range(min(len(data), max_samples or len(data))))
    ]


def tokenize(dataset: Dataset, tokenizer: Any, direction: Direction, max_length: int) -> Dataset:
    """Columns `input_ids`, `attention_mask`, `labels` and `length`; longer texts are truncated to `max_length`."""

    def encode(batch: dict[str, list[str]]) -> dict[str, Any]:
        encoded = tokenizer(
            batch["source"],
            text_target=batch["target"],
            src_lang=direction.src_lang,
            tgt_lang=direction.tgt_lang,
            truncation=True,
            max_length=max_length,
        )
        encoded["length"] = [max(len(s), len(t)) for s, t in zip(encoded["input_ids"], encoded["labels"], strict=True)]
        return dict(encoded)

    return dataset.map(encode, batched=True, remove_columns=dataset.column_names, desc=f"Tokenizing {direction}")


def mix(datasets: list[Dataset], temperature: float = 1.0, seed: int = 0) -> Dataset:
    """One dataset that draws from each with probability proportional to `size ** (1 / temperature)`.

    A temperature of 1 keeps the proportions, a higher one evens them out. It ends when every example was drawn at
    least once, so smaller datasets repeat.

    Raises:
        ValueError: for a temperature that is not positive.
    """
    if temperature <= 0:
        raise ValueError(f"temperature ({temperature}) must be positive")
    weights = [len(dataset) ** (1.0 / temperature) for dataset in datasets]
    probabilities = [weight / sum(weights) for weight in weights]
    return interleave_datasets(datasets, probabilities, seed=seed, stopping_strategy="all_exhausted")
