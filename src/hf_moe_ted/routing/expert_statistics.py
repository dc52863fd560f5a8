"""Statistics of a model's experts on real text, per language pair, in memory and on disk.

Shape letters: P language pairs, K experts per token, E experts, D model width.
"""

import dataclasses
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..files.json_file import read_json_object
from ..files.messages import shorten
from ..files.output import check_output_dir, new_folder
from ..files.output_kinds import EXPERT_STATISTICS
from ..files.writing import keeping_places
from ..models.configuration_zcode_m3 import Side, ZCodeM3Config
from ..models.language_codes import LanguagePair
from ..models.layer_names import moe_layers
from .statistics_checks import COUNTS, check_fingerprint, check_layers, check_pairs

TENSORS_NAME = "expert_statistics.safetensors"
METADATA_NAME = "expert_statistics.json"
FORMAT = "hf_moe_ted.expert_statistics"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class ModelFingerprint:
    """Identifies the model to which statistics belong.

    Attributes:
        num_experts: name of each MoE layer -> number of experts.
        num_experts_per_tok: K.
        d_model: D.
        router_hash: SHA-256 of the router weights in bfloat16, so a float32 checkpoint that is loaded in bfloat16 is
            still the same model.
    """

    num_experts: dict[str, int]
    num_experts_per_tok: int
    d_model: int
    router_hash: str

    @classmethod
    def of(cls, config: ZCodeM3Config, router_weights: Mapping[str, Tensor]) -> "ModelFingerprint":
        """The fingerprint of a model; `router_weights` maps each MoE layer to its router weight float[E, D]."""
        digest = hashlib.sha256()
        for layer in moe_layers(config):
            weight = router_weights[layer].detach().to("cpu", torch.bfloat16).contiguous()
            digest.update(layer.encode() + weight.view(torch.int16).numpy().tobytes())
        return cls(moe_layers(config), config.num_experts_per_tok, config.d_model, digest.hexdigest())

    def require_equal(self, other: "ModelFingerprint", what: str) -> None:
        """
        Raises:
            ValueError: `other` is of another model; `what` names the two in the message.
        """
        differences = [
            f"{field.name} {getattr(self, field.name)} and {getattr(other, field.name)}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != getattr(other, field.name)
        ]
        if differences:
            raise ValueError(f"{what} are of different models: " + "; ".join(differences))


@dataclass(frozen=True, eq=False)
class LayerStatistics:
    """Statistics of the experts of one MoE layer on real tokens, without padding.

    Attributes:
        num_routed: int64[P, K, E], tokens that have the expert as first, second, ... choice, dropped ones included.
        num_dropped: int64[P, E], the part of these that the expert did not compute: it was full, or a second choice was
            left out at random.
        gate_mass: float64[P, E], sum of the router's probability of the expert over all tokens.
        confidence: float64[P, E], sum of the router's probability over the tokens with the expert as first choice.
        gated_norm: float64[P, E], sum of `weight * ||output||` over the tokens that the expert computed, where `weight`
            is the factor that the layer applies to its output.
        output_sum: float64[E, D], sum of the expert's outputs, unweighted, over the tokens that it computed, of all
            collected pairs.
    """

    num_routed: Tensor
    num_dropped: Tensor
    gate_mass: Tensor
    confidence: Tensor
    gated_norm: Tensor
    output_sum: Tensor

    @property
    def num_computed(self) -> Tensor:
        """int64[P, E], (token, choice) slots that the expert computed."""
        return self.num_routed.sum(dim=1) - self.num_dropped

    @property
    def centroids(self) -> Tensor:
        """float64[E, D], mean output of each expert over all pairs; zeros if it computed no token.

        It is only valid for statistics with all their pairs, not for a part (`of_pairs`).
        """
        return self.output_sum / self.num_computed.sum(dim=0).clamp(min=1).unsqueeze(-1)

    def of_pairs(self, pairs: Sequence[int]) -> "LayerStatistics":
        """The statistics of some pairs, by index; `output_sum` is still over all pairs."""
        rows = {name: tensor[list(pairs)] for name, tensor in vars(self).items() if name != "output_sum"}
        return LayerStatistics(**rows, output_sum=self.output_sum)

    def _at_rows(self, rows: Sequence[int], num_pairs: int) -> dict[str, Tensor]:
        """The fields for a larger number of pairs: these pairs get the given rows, and others get zeros."""
        return {
            name: tensor
            if name == "output_sum"
            else tensor.new_zeros(num_pairs, *tensor.shape[1:]).index_copy(0, torch.tensor(rows), tensor)
            for name, tensor in vars(self).items()
        }


@dataclass(frozen=True, eq=False)
class ExpertStatistics:
    """Statistics of a model's experts on real text.

    Statistics of several runs or processes can be added: `a + b`, or `functools.reduce(operator.add, all_statistics)`,
    for example after `torch.distributed.all_gather_object`.

    Attributes:
        fingerprint: fingerprint of the model.
        pairs: (source language, target language) of each row of the statistics.
        num_sentences: sentences of each pair.
        layers: name of each MoE layer -> [`LayerStatistics`].
    """

    fingerprint: ModelFingerprint
    pairs: tuple[LanguagePair, ...]
    num_sentences: tuple[int, ...]
    layers: dict[str, LayerStatistics]

    def languages(self, side: Side) -> dict[str, list[int]]:
        """Language -> indices of its pairs: source languages for the encoder, target languages for the decoder."""
        indices: dict[str, list[int]] = {}
        for index, (source, target) in enumerate(self.pairs):
            indices.setdefault(source if side == "encoder" else target, []).append(index)
        return dict(sorted(indices.items()))

    def __add__(self, other: "ExpertStatistics") -> "ExpertStatistics":
        """
        Raises:
            ValueError: the two are of different models.
        """
        self.fingerprint.require_equal(other.fingerprint, "the two statistics that are to be added")
        num_sentences = Counter(dict(zip(self.pairs, self.num_sentences, strict=True)))
        num_sentences.update(dict(zip(other.pairs, other.num_sentences, strict=True)))
        row_of = {pair: row for row, pair in enumerate(num_sentences)}
        rows = [[row_of[pair] for pair in statistics.pairs] for statistics in (self, other)]
        layers = {}
        for layer in self.layers:
            mine = self.layers[layer]._at_rows(rows[0], len(row_of))
            others = other.layers[layer]._at_rows(rows[1], len(row_of))
            layers[layer] = LayerStatistics(**{name: mine[name] + others[name] for name in mine})
        return ExpertStatistics(self.fingerprint, tuple(row_of), tuple(num_sentences.values()), layers)

    @staticmethod
    def check_folder(folder: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """
        Raises:
            ValueError: `save` would not write there: it is a file, is not empty without `overwrite`, or has other
                content than expert statistics.
        """
        check_output_dir(folder, overwrite=overwrite, kind=EXPERT_STATISTICS)

    @classmethod
    @contextmanager
    def keeping_folder(cls, folder: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[None]:
        """Like `check_folder`, and no other process can write there until the end of the block, which calls `save`.

        Raises:
            ValueError: see `check_folder`; another process writes there.
        """
        with keeping_places():
            cls.check_folder(folder, overwrite=overwrite)
            yield

    def save(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write `expert_statistics.safetensors` and `expert_statistics.json` to a new folder, both or none.

        Args:
            folder: the new folder; it appears once it is complete.
            overwrite: whether to replace a folder with earlier statistics.

        Raises:
            ValueError: see `check_folder`.
        """
        tensors = {
            f"{layer}.{name}": tensor.contiguous()
            for layer, statistics in self.layers.items()
            for name, tensor in vars(statistics).items()
        }
        with new_folder(folder, overwrite=overwrite, kind=EXPERT_STATISTICS) as temporary:
            save_file(tensors, temporary / TENSORS_NAME)
            metadata = {
                "format": FORMAT,
                "format_version": FORMAT_VERSION,
                "tensors_sha256": _sha256(temporary / TENSORS_NAME),
                "fingerprint": dataclasses.asdict(self.fingerprint),
                "pairs": self.pairs,
                "num_sentences": self.num_sentences,
            }
            text = json.dumps(metadata, indent=1, ensure_ascii=False) + "\n"
            (temporary / METADATA_NAME).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "ExpertStatistics":
        """Load what `save` wrote.

        Raises:
            ValueError: a file is missing, of another format, changed after writing, or has impossible numbers; see
                `check`.
        """
        folder = Path(folder)
        metadata = _read_metadata(folder / METADATA_NAME)
        path = folder / TENSORS_NAME
        if not path.is_file():
            raise ValueError(f"{path} does not exist; expert statistics are this file and {METADATA_NAME}")
        if _sha256(path) != metadata["tensors_sha256"]:
            raise ValueError(
                f"{path} is corrupted: it is not the file that was written with {METADATA_NAME}; collect the "
                "statistics again"
            )
        try:
            fingerprint = ModelFingerprint(**metadata["fingerprint"])
            check_fingerprint(**vars(fingerprint))
            check_pairs(metadata["pairs"], metadata["num_sentences"])
            pairs = tuple((source, target) for source, target in metadata["pairs"])
            layers = _layers_of(load_file(path), fingerprint, len(pairs))
            statistics = cls(fingerprint, pairs, tuple(metadata["num_sentences"]), layers)
            statistics.check()
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            problem = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(
                f"{folder} does not hold complete expert statistics: {shorten(problem, 600)}; collect them again"
            ) from error
        return statistics

    def check(self) -> None:
        """Check what must hold for any text; `load` and `collect_expert_statistics` call it.

        Raises:
            ValueError: a number is negative or not finite, a sum is impossible, or a pair has no token.
        """
        check_layers(self.layers, self.pairs)


def _layers_of(
    tensors: Mapping[str, Tensor], fingerprint: ModelFingerprint, num_pairs: int
) -> dict[str, LayerStatistics]:
    layers = {}
    for layer, num_experts in fingerprint.num_experts.items():
        shapes: dict[str, tuple[int, ...]] = {
            field.name: (num_pairs, num_experts) for field in dataclasses.fields(LayerStatistics)
        }
        shapes |= {
            "num_routed": (num_pairs, fingerprint.num_experts_per_tok, num_experts),
            "output_sum": (num_experts, fingerprint.d_model),
        }
        for name, shape in shapes.items():
            tensor, dtype = tensors[f"{layer}.{name}"], torch.int64 if name in COUNTS else torch.float64
            if tensor.shape != shape:
                raise ValueError(
                    f"{layer}.{name} must have the shape {shape}, where {num_pairs} is the number of pairs"
                )
            if tensor.dtype != dtype:
                raise ValueError(f"{layer}.{name} is {tensor.dtype}, but must be {dtype}")
        layers[layer] = LayerStatistics(**{name: tensors[f"{layer}.{name}"] for name in shapes})
    return layers


def _read_metadata(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path} does not exist; expert statistics are this file and {TENSORS_NAME}")
    metadata = read_json_object(path, "expert statistics")
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} is not a file of expert statistics")
    if metadata.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format_version {shorten(metadata.get('format_version'))}, this version of hf_moe_ted reads "
            f"{FORMAT_VERSION}; collect the statistics again"
        )
    if missing := {"tensors_sha256", "fingerprint", "pairs", "num_sentences"} - metadata.keys():
        raise ValueError(f"{path} is corrupted: it has no {', '.join(sorted(missing))}")
    return metadata


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


__all__ = ["ExpertStatistics", "LayerStatistics", "ModelFingerprint"]
