"""How well and how fast a model translates, per direction: in memory and on disk."""

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
    """The translations of a test set from one language to another: [`TranslationScores`] and how they were made.

    Attributes:
        num_cut: translations that had not ended after `max_new_tokens`.
        seconds: that translating took.
        text_sha256: of the sources and references, to tell whether two qualities are of the same text.
    """

    num_cut: int
    seconds: float
    text_sha256: str


@dataclass(frozen=True, kw_only=True)
class MeanQuality:
    """Means over directions, each counting the same; see [`DirectionQuality`].

    Attributes:
        copied: kind -> share of what was to be copied in all directions together; kinds of which there is nothing are
            not in it.
    """

    bleu: float
    chrf: float
    length_ratio: float
    off_target: float | None
    copied: dict[str, float]
    repeating: float | None


@dataclass(frozen=True, kw_only=True)
class TranslationQuality:
    """How well and how fast a model translates.

    Attributes:
        model: its name or folder.
        directions: (source language, target language) -> [`DirectionQuality`].
        batch_size, num_beams, max_new_tokens: of the generation.
        device: name of the GPU, or `"cpu"`.
        dtype: of the weights that are not quantized.
        num_bytes: of the weights in memory.
        peak_memory_bytes: most memory of the GPU that tensors had while it translated, weights included; `None`
            without a GPU.
        also: the same of another text, such as one of another domain; `None` without.
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

    @property
    def num_sentences(self) -> int:
        """Number of sentences of all directions together."""
        return sum(direction.num_sentences for direction in self.directions.values())

    @property
    def sentences_per_s(self) -> float:
        """Over all directions, from text to text; 0 if there was nothing but blank sources to translate."""
        seconds = sum(direction.seconds for direction in self.directions.values())
        return self.num_sentences / seconds if seconds else 0.0

    def groups(self) -> dict[str, list[LanguagePair]]:
        """All directions, and if one language is in all of them, those from it and those into it."""
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
        """Over some of the directions."""
        directions = [self.directions[pair] for pair in pairs]
        off_target = [direction.off_target for direction in directions if direction.off_target is not None]
        repeating = [direction.repeating for direction in directions if direction.repeating is not None]
        return MeanQuality(
            bleu=fmean(direction.bleu for direction in directions),
            chrf=fmean(direction.chrf for direction in directions),
            length_ratio=fmean(direction.length_ratio for direction in directions),
            off_target=fmean(off_target) if off_target else None,
            copied=copied_shares(directions),
            repeating=fmean(repeating) if repeating else None,
        )

    def __str__(self) -> str:
        lines = []
        for name, pairs in self.groups().items():
            mean = self.mean(pairs)
            off_target = "" if mean.off_target is None else f", off target {mean.off_target:.1%}"
            copied = "".join(f", {kind} copied {share:.1%}" for kind, share in mean.copied.items())
            repeating = "" if mean.repeating is None else f", repeating {mean.repeating:.1%}"
            lines.append(
                f"{name}: BLEU {mean.bleu:.1f}, chrF {mean.chrf:.1f}, length ratio {mean.length_ratio:.2f}{off_target}"
                f"{copied}{repeating}"
            )
        lines.append(f"{self.sentences_per_s:,.1f} sentences/s")
        if self.also is not None:
            lines += [f"other text: {line}" for line in str(self.also).splitlines()]
        return "\n".join(lines)

    def require_comparable(self, other: "TranslationQuality") -> None:
        """
        Raises:
            ValueError: the other quality is of other text, or translations were made in another way.
        """
        problems = [
            f"{name} is {mine} and {others}"
            for name in ("num_beams", "max_new_tokens")
            if (mine := getattr(self, name)) != (others := getattr(other, name))
        ]
        for pair in sorted(self.directions.keys() | other.directions.keys()):
            if pair not in self.directions or pair not in other.directions:
                problems.append(f"{'-'.join(pair)} is in one of them only")
            elif self.directions[pair].text_sha256 != other.directions[pair].text_sha256:
                problems.append(f"{'-'.join(pair)} has other sentences")
        if (self.also is None) != (other.also is None):
            problems.append("one of them has another text, too (also), and the other has not")
        if problems:
            listed = shorten("; ".join(problems), 600)
            raise ValueError(f"the translations of {self.model} and {other.model} cannot be compared: {listed}")
        if self.also is not None and other.also is not None:
            self.also.require_comparable(other.also)

    @staticmethod
    def check_path(path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """
        Raises:
            ValueError: `save` would not write there: it is a folder or a link, a file and not `overwrite`, or one that
                `save` has not written.
        """
        check_output_file(path, overwrite=overwrite, marker=f'"format": "{FORMAT}"'.encode())

    @classmethod
    @contextmanager
    def keeping_path(cls, path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[None]:
        """As `check_path`, and no other process can write there to the end of the block, in which `save` does.

        Raises:
            ValueError: see `check_path`; another process writes there.
        """
        with keeping_places():
            cls.check_path(path, overwrite=overwrite)
            yield

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write it as one JSON file, which appears when it is complete.

        Raises:
            ValueError: see `check_path`.
        """
        self.check_path(path, overwrite=overwrite)
        fields = {"format": FORMAT, "format_version": FORMAT_VERSION, **self.to_dict()}
        write_file(path, json.dumps(fields, indent=1, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "TranslationQuality":
        """What `save` wrote.

        Raises:
            ValueError: the file is missing, of another format, or not as it was written.
        """
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"{path} does not exist; `hf-moe-ted evaluate` writes such a file")
        fields = read_json_object(path, "quality")
        if fields.pop("format", None) != FORMAT:
            raise ValueError(f"{path} is no file of translation quality; `hf-moe-ted evaluate` writes one")
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
        """What `to_dict` has made.

        Raises:
            ValueError: fields are missing, unknown or of another type; there is no direction, or one of them twice.
        """
        directions: dict[LanguagePair, DirectionQuality] = {}
        for row in of_type(list[dict[str, Any]], fields.get("directions"), "directions"):
            scores = {name: value for name, value in row.items() if name not in ("src_lang", "tgt_lang")}
            source, target = (of_type(str, row.get(name), name) for name in ("src_lang", "tgt_lang"))
            if (source, target) in directions:
                raise ValueError(f"the direction {source}-{target} is there twice")
            directions[source, target] = from_fields(DirectionQuality, {**_NOT_IN_OLDER_FILES, **scores})
        if not directions:
            raise ValueError("there is no direction in it")
        rest = {name: value for name, value in fields.items() if name not in ("directions", "also")}
        also = of_type(dict[str, Any] | None, fields.get("also"), "also")
        if also is not None and also.get("also") is not None:
            raise ValueError("also has another text (also) itself")
        return from_fields(cls, rest, directions=directions, also=None if also is None else cls.from_dict(also))


def copied_shares(directions: Iterable[TranslationScores]) -> dict[str, float]:
    """Kind -> share of what was to be copied, of all directions together; without kinds of which there is nothing."""
    totals: dict[str, list[int]] = {}
    for direction in directions:
        for kind, counts in direction.copied.items():
            totals[kind] = [total + count for total, count in zip(totals.get(kind, [0, 0]), counts, strict=True)]
    return {kind: num_copied / num_wanted for kind, (num_wanted, num_copied) in totals.items() if num_wanted}


__all__ = ["DirectionQuality", "MeanQuality", "TranslationQuality", "copied_shares"]
