"""Quality and speed of a model's translations, per direction, in memory and on disk."""

import dataclasses
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from ..files.json_file import read_json_object
from ..files.messages import shorten
from ..files.output import check_output_file, write_file
from ..files.typed_fields import from_fields, of_type
from ..files.writing import keeping_places
from ..models.language_codes import LanguagePair
from .translation_scores import TranslationScores

FORMAT = "hf_moe_ted.translation_quality"
FORMAT_VERSION = 1
_NOT_IN_OLDER_FILES: dict[str, Any] = {"copied": {}, "repeating": None, "reference_repeating": None}


@dataclass(frozen=True, kw_only=True)
class DirectionQuality(TranslationScores):
    """Translations of a test set from one language to another: [`TranslationScores`], and how they were made.

    Attributes:
        num_cut: translations that were cut at `max_new_tokens`.
        seconds: time of the translation.
        text_sha256: hash of sources and references, which tells whether two qualities are of the same text.
    """

    num_cut: int
    seconds: float
    text_sha256: str


@dataclass(frozen=True, kw_only=True)
class MeanQuality:
    """Means over directions, each counting the same; those without a number are left out. See [`DirectionQuality`].

    Attributes:
        copied: kind -> copied share of all parts to copy, over all directions together; kinds without parts are left
            out.
    """

    bleu: float | None
    chrf: float
    length_ratio: float
    off_target: float | None
    copied: dict[str, float]
    repeating: float | None


@dataclass(frozen=True, kw_only=True)
class TranslationQuality:
    """Quality and speed of a model's translations.

    Attributes:
        model: its name or folder.
        directions: (source language, target language) -> [`DirectionQuality`].
        batch_size, num_beams, max_new_tokens: options of the generation.
        device: name of the GPU, or `"cpu"`.
        dtype: dtype of the weights that are not quantized.
        num_bytes: bytes of the weights in memory.
        peak_memory_bytes: peak memory of tensors on the GPU during translation, with the weights; `None` without a GPU.
        also: the same for another text, such as one from another domain; or `None`.
    """

    model: str
    directions: dict[LanguagePair, DirectionQuality]
    batch_size: int
    num_beams: int
    max_new_tokens: int
    device: str
    dtype: str
    num_bytes: int
    peak_memory_bytes: int | None
    also: "TranslationQuality | None" = None

    def is_of_other_folder(self, folder: str | os.PathLike[str]) -> bool:
        """Whether `model` is a folder that exists and is another one. A model may have moved since it was measured."""
        return Path(self.model).is_dir() and Path(self.model).resolve() != Path(folder).resolve()

    @property
    def num_sentences(self) -> int:
        """Number of sentences of all directions together."""
        return sum(direction.num_sentences for direction in self.directions.values())

    @property
    def sentences_per_s(self) -> float:
        """Sentences per second over all directions, from text to text; 0 if all sources are blank."""
        seconds = sum(direction.seconds for direction in self.directions.values())
        return self.num_sentences / seconds if seconds else 0.0

    def groups(self) -> dict[str, list[LanguagePair]]:
        """Groups of directions: all; and if one language is in all of them, those from it and those into it."""
        pairs = list(self.directions)
        groups = {"all directions": pairs}
        common = set.intersection(*map(set, pairs))
        if len(common) == 1:
            (language,) = common
            sides = {
                f"{language} to X": [pair for pair in pairs if pair[0] == language],
                f"X to {language}": [pair for pair in pairs if pair[1] == language],
            }
            if all(sides.values()):
                groups |= sides
        return groups

    def mean(self, pairs: list[LanguagePair]) -> MeanQuality:
        """Means over some of the directions."""
        directions = [self.directions[pair] for pair in pairs]
        return MeanQuality(
            bleu=_mean_of_known(direction.bleu for direction in directions),
            chrf=fmean(direction.chrf for direction in directions),
            length_ratio=fmean(direction.length_ratio for direction in directions),
            off_target=_mean_of_known(direction.off_target for direction in directions),
            copied=copied_shares(directions),
            repeating=_mean_of_known(direction.repeating for direction in directions),
        )

    def __str__(self) -> str:
        lines = []
        for name, pairs in self.groups().items():
            mean = self.mean(pairs)
            bleu = "" if mean.bleu is None else f"BLEU {mean.bleu:.1f}, "
            off_target = "" if mean.off_target is None else f", off target {mean.off_target:.1%}"
            copied = "".join(f", {kind} copied {share:.1%}" for kind, share in mean.copied.items())
            repeating = "" if mean.repeating is None else f", repeating {mean.repeating:.1%}"
            lines.append(
                f"{name}: {bleu}chrF {mean.chrf:.1f}, length ratio {mean.length_ratio:.2f}{off_target}{copied}"
                f"{repeating}"
            )
        lines.append(f"{self.sentences_per_s:,.1f} sentences/s")
        if self.also is not None:
            lines += [f"other text: {line}" for line in str(self.also).splitlines()]
        return "\n".join(lines)

    def require_comparable(self, other: "TranslationQuality") -> None:
        """
        Raises:
            ValueError: the other quality is of different text, or its translations were made with other options.
        """
        problems = [
            f"{name} is {mine} in one and {others} in the other"
            for name in ("num_beams", "max_new_tokens")
            if (mine := getattr(self, name)) != (others := getattr(other, name))
        ]
        for pair in sorted(self.directions.keys() | other.directions.keys()):
            if pair not in self.directions or pair not in other.directions:
                problems.append(f"{'-'.join(pair)} is only in one of them")
            elif self.directions[pair].text_sha256 != other.directions[pair].text_sha256:
                problems.append(f"{'-'.join(pair)} has other sentences")
        if (self.also is None) != (other.also is None):
            problems.append("only one of them has a second text (also)")
        if problems:
            listed = shorten("; ".join(problems), 600)
            raise ValueError(f"the translations of {self.model} and {other.model} cannot be compared: {listed}")
        if self.also is not None and other.also is not None:
            self.also.require_comparable(other.also)

    @staticmethod
    def check_path(path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """
        Raises:
            ValueError: `save` would not write there: it is a folder or a link, a file without `overwrite`, or a file
                that `save` did not write.
        """
        check_output_file(path, overwrite=overwrite, marker=f'"format": "{FORMAT}"'.encode())

    @classmethod
    @contextmanager
    def keeping_path(cls, path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[None]:
        """Like `check_path`, and no other process can write there until the end of the block, which calls `save`.

        Raises:
            ValueError: see `check_path`; another process writes there.
        """
        with keeping_places():
            cls.check_path(path, overwrite=overwrite)
            yield

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write the quality to a JSON file, which appears once it is complete.

        Raises:
            ValueError: see `check_path`.
        """
        self.check_path(path, overwrite=overwrite)
        fields = {"format": FORMAT, "format_version": FORMAT_VERSION, **self.to_dict()}
        write_file(path, json.dumps(fields, indent=1, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "TranslationQuality":
        """Load what `save` wrote.

        Raises:
            ValueError: the file is missing, of another format, or changed after writing.
        """
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"{path} does not exist; `hf-moe-ted evaluate` writes such a file")
        fields = read_json_object(path, "quality")
        if fields.pop("format", None) != FORMAT:
            raise ValueError(f"{path} is not a file of translation quality; `hf-moe-ted evaluate` writes one")
        if (version := fields.pop("format_version", None)) != FORMAT_VERSION:
            raise ValueError(
                f"{path} has format_version {shorten(version)}, this version of hf_moe_ted reads {FORMAT_VERSION}; "
                "evaluate the model again"
            )
        try:
            return cls.from_dict(fields)
        except ValueError as error:
            raise ValueError(f"{path} is corrupted: {error}; evaluate the model again") from error

    def to_dict(self) -> dict[str, Any]:
        """The quality as plain values for JSON."""
        directions = [
            {"src_lang": source, "tgt_lang": target, **dataclasses.asdict(direction)}
            for (source, target), direction in self.directions.items()
        ]
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**fields, "directions": directions, "also": None if self.also is None else self.also.to_dict()}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "TranslationQuality":
        """Make a quality from what `to_dict` returned.

        Raises:
            ValueError: fields are missing, unknown or of another type; there is no direction, or one occurs twice.
        """
        directions: dict[LanguagePair, DirectionQuality] = {}
        for row in of_type(list[dict[str, Any]], fields.get("directions"), "directions"):
            scores = {name: value for name, value in row.items() if name not in ("src_lang", "tgt_lang")}
            source, target = (of_type(str, row.get(name), name) for name in ("src_lang", "tgt_lang"))
            if (source, target) in directions:
                raise ValueError(f"the direction {source}-{target} occurs twice")
            directions[source, target] = from_fields(DirectionQuality, {**_NOT_IN_OLDER_FILES, **scores})
        if not directions:
            raise ValueError("it has no direction")
        rest = {name: value for name, value in fields.items() if name not in ("directions", "also")}
        also = of_type(dict[str, Any] | None, fields.get("also"), "also")
        if also is not None and also.get("also") is not None:
            raise ValueError("also must not have a second text (also) itself")
        return from_fields(cls, rest, directions=directions, also=None if also is None else cls.from_dict(also))


def _mean_of_known(numbers: Iterable[float | None]) -> float | None:
    known = [number for number in numbers if number is not None]
    return fmean(known) if known else None


def copied_shares(directions: Iterable[TranslationScores]) -> dict[str, float]:
    """Kind -> copied share of all parts to copy, over all directions together; kinds without parts are left out."""
    totals: dict[str, list[int]] = {}
    for direction in directions:
        for kind, counts in direction.copied.items():
            totals[kind] = [total + count for total, count in zip(totals.get(kind, [0, 0]), counts, strict=True)]
    return {kind: num_copied / num_wanted for kind, (num_wanted, num_copied) in totals.items() if num_wanted}


__all__ = ["DirectionQuality", "MeanQuality", "TranslationQuality", "copied_shares"]
