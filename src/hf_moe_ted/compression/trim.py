"""A smaller vocabulary: only the tokens that some text uses, with their rows of the embeddings and a new tokenizer."""

import copy
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, M2M100Tokenizer, PreTrainedTokenizerBase

from ..evaluation.parallel_text import choose_languages
from ..files.output import new_folder
from ..files.writing import keeping_places
from ..models.configuration_zcode_m3 import ZCodeM3Config
from ..models.layer_names import moe_layers
from ..models.modeling_zcode_m3 import ZCodeM3ForConditionalGeneration
from ..tensors.lazy_tensors import LazyTensors, check_all, num_bytes, num_parameters
from ..tensors.model_folder import meta_model, read_generation_config, stored_specs
from ..tensors.whole_model import load_tokenizer
from .model_source import CompressionResult, ModelSource, open_source
from .report.compression_report import TrimmingReport
from .report.report_folder import describe
from .report.summary import Summary
from .text_tokens import WITHOUT_LANGUAGE, Comparison, TextsByLanguage, TokenCounts, compare_encodings, count_tokens
from .token_fields import named_tokens, with_new_ids
from .trimmed_tokenizer import tags_that_go, trimming_of

_EMBEDDINGS = ("model.shared", "model.encoder.embed_tokens", "model.decoder.embed_tokens", "lm_head")


@dataclass(frozen=True, kw_only=True)
class TrimmingResult(CompressionResult):
    """A model with a smaller vocabulary.

    Attributes:
        report: sizes before and after, and how the texts are encoded.
        tokenizer: the tokenizer of the smaller model.
        kept_tokens: ids of the full model, ascending: token `i` of the smaller model was `kept_tokens[i]`.
    """

    report: TrimmingReport
    tokenizer: PreTrainedTokenizerBase
    kept_tokens: tuple[int, ...]


@keeping_places()
def trim_vocabulary(
    model_or_folder: ZCodeM3ForConditionalGeneration | str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    dataset: Iterable[Any],
    languages: Sequence[str] | None = None,
    min_count: int = 1,
    output_dir: str | os.PathLike[str] | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
) -> TrimmingResult:
    """Keep the tokens that a text uses, and remove the others from the tokenizer and the embeddings.

    A text whose tokens are all kept is encoded as before; this is verified for every text of `dataset`. The model
    computes the same logits for kept tokens. These are kept, too: special tokens, the tags of `languages`, single bytes
    or characters, and the pieces from which kept tokens are merged. So no text gets new unknown tokens (with
    M2M100Tokenizer it may have fewer). Words whose tokens were removed are encoded in smaller pieces, which the model
    was not trained to read. So `dataset` should have much text, more than is translated later.

    It works on pruned and merged models, before they are quantized.

    Args:
        model_or_folder: a model in memory, which does not change, or a folder with `config.json` and weights of
            ZCodeM3, sharded or not, which are read one by one.
        tokenizer: the model's tokenizer: a [`ZCodeM3Tokenizer`], `NllbTokenizer` or `M2M100Tokenizer` (which needs
            `output_dir`, and keeps all its languages), or another one of the *tokenizers* library with byte-pair
            encoding or unigram. By default the tokenizer in the folder.
        dataset: rows like those of `collect_expert_statistics`, each side of which is a text in its language; or
            strings, together with `languages`. It is read twice.
        languages: languages whose texts count and whose tags stay; by default those of all texts.
        min_count: how often a token must occur in the texts of all languages together.
        output_dir: a new folder for the smaller model and its tokenizer; it appears once it is complete. Required for a
            folder.
        max_shard_size: largest size of a weight file, in bytes or as a string such as `"5GB"`.
        overwrite: whether to replace an `output_dir` that is not empty.

    Returns:
        [`TrimmingResult`] with the model, or with `output_dir`, which holds `compression_report.json` and `report.md`.

    Raises:
        ValueError: before anything is written: there is no text, or none in one of `languages`; the tokenizer lacks a
            language; a language that a setting names (`forced_bos_token_id`, `src_lang` or `tgt_lang` of the tokenizer)
            is not among `languages`; the tokenizer belongs to another model, is of another kind, or encodes at random;
            the folder is no ZCodeM3 model or `output_dir` is not empty; the model is quantized, has an adapter, or has
            weights in other processes.
    """
    if min_count < 1:
        raise ValueError(f"min_count ({min_count}) must be at least 1")
    source = open_source(
        model_or_folder,
        output_dir,
        overwrite=overwrite,
        max_shard_size=max_shard_size,
        purpose="trim the vocabulary of a folder",
        allow_merged=True,
    )
    generation_config = _generation_config(source)
    trim = _plan(source, _tokenizer(source, tokenizer, output_dir), generation_config, dataset, languages, min_count)
    config = with_new_ids(source.config, trim.new_of_old)
    config.vocab_size = len(trim.kept)
    config.validate_architecture()
    tensors = _trimmed_tensors(source.tensors, config, trim.kept)
    generation_config = with_new_ids(generation_config, trim.new_of_old)
    with tempfile.TemporaryDirectory() as temporary:
        smaller = trim.write_tokenizer(Path(temporary))
        report = _report(source, tensors, trim, smaller, min_count)
        if output_dir is None:
            assert source.model is not None
            check_all(source.tensors)
            model = _trimmed_model(source.model, config, generation_config, trim.kept)
            return TrimmingResult(report=report, model=model, tokenizer=smaller, kept_tokens=trim.kept)

        with new_folder(output_dir, overwrite=overwrite) as folder:
            save_others = _saver(Path(temporary), generation_config)
            replace(source, save_others=save_others).write(folder, tensors, config, max_shard_size)
            describe(folder, Summary.of(report), str(source.card))
    smaller = type(smaller).from_pretrained(output_dir)
    return TrimmingResult(report=report, output_dir=Path(output_dir), tokenizer=smaller, kept_tokens=trim.kept)


@dataclass(frozen=True)
class _Trim:
    """What a trim keeps.

    Attributes:
        tokenizer: the tokenizer of the full model.
        texts: the texts that decide what is kept.
        counts: language -> its texts and their tokens.
        languages: languages whose tags stay.
        kept: ids of the full model, ascending.
        gone: ids of the tags that go. A few of them may be among `kept`, as unused rows.
    """

    tokenizer: PreTrainedTokenizerBase
    texts: TextsByLanguage
    counts: dict[str, TokenCounts]
    languages: tuple[str, ...]
    kept: tuple[int, ...]
    gone: frozenset[int]

    @property
    def new_of_old(self) -> dict[int, int]:
        """Id -> id in the smaller model, for tokens that its tokenizer has."""
        return {old: new for new, old in enumerate(self.kept) if old not in self.gone}

    def write_tokenizer(self, folder: Path) -> PreTrainedTokenizerBase:
        """Write the smaller tokenizer into a folder, and return it."""
        trimming_of(self.tokenizer).write(folder, self.new_of_old, self.languages)
        return type(self.tokenizer).from_pretrained(folder)


def _tokenizer(
    source: ModelSource, tokenizer: PreTrainedTokenizerBase | None, output_dir: Any
) -> PreTrainedTokenizerBase:
    """The given tokenizer, or the one in the folder."""
    if tokenizer is None and source.model is not None:
        raise ValueError("tokenizer is required to trim the vocabulary of a model in memory")
    tokenizer = load_tokenizer(source.path, "model_or_folder") if tokenizer is None else tokenizer
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(f"tokenizer ({type(tokenizer).__name__}) must be a tokenizer of transformers")
    if isinstance(tokenizer, M2M100Tokenizer) and output_dir is None:
        raise ValueError(
            "output_dir is required to trim an M2M100Tokenizer, which reads its files again when it is copied"
        )
    last, vocab_size = max(tokenizer.get_vocab().values()), source.config.vocab_size
    if last >= vocab_size:
        raise ValueError(
            f"tokenizer ({type(tokenizer).__name__}) has a token {last}, but vocab_size of {source.path} is "
            f"{vocab_size}; give the tokenizer of this model, or resize the model's embeddings first"
        )
    return tokenizer


def _generation_config(source: ModelSource) -> GenerationConfig | None:
    return read_generation_config(source.path) if source.model is None else source.model.generation_config


def _plan(
    source: ModelSource,
    tokenizer: PreTrainedTokenizerBase,
    generation_config: GenerationConfig | None,
    dataset: Iterable[Any],
    languages: Sequence[str] | None,
    min_count: int,
) -> _Trim:
    """Read the text, and decide."""
    known, chosen = choose_languages(tokenizer, languages)
    needed_by = trimming_of(tokenizer).needed
    texts = TextsByLanguage(dataset, known, chosen)
    counts = count_tokens(tokenizer, texts, source.config.vocab_size)
    left = _languages_left(counts, chosen)
    gone = tags_that_go(tokenizer, left)
    configs = {"config": source.config, "generation_config": generation_config}
    named = {f"{where}.{name}": ids for where, config in configs.items() for name, ids in named_tokens(config).items()}
    _check_asked_for(tokenizer, named, gone)

    total = torch.stack([of_language.counts for of_language in counts.values()]).sum(dim=0)
    used = {*(total >= min_count).nonzero().flatten().tolist()}
    kept = used | needed_by(used) | {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
    kept |= {index for ids in named.values() for index in ids}
    pad_token_id: Any = source.config.pad_token_id  # positions are counted from it, so it stays
    rows = tuple(sorted(kept - {*gone.values()} | {*range(pad_token_id)}))
    return _Trim(tokenizer, texts, counts, left, rows, frozenset(gone.values()))


def _languages_left(counts: Collection[str], chosen: Sequence[str] | None) -> tuple[str, ...]:
    """The languages whose tags stay. If the texts name their languages, each must have text."""
    if WITHOUT_LANGUAGE in counts:
        if chosen is None:
            raise ValueError(
                "languages are required for texts that do not name theirs; the tags of other languages are removed"
            )
        return tuple(chosen)
    if missing := sorted({*(chosen or ())} - {*counts}):
        raise ValueError(
            f"the dataset has no text in {', '.join(missing)}: tokens of these languages would be removed; leave them "
            "out of languages, or give text in them"
        )
    return tuple(counts if chosen is None else chosen)


def _check_asked_for(tokenizer: PreTrainedTokenizerBase, named: dict[str, list[int]], gone: dict[str, int]) -> None:
    """Raise if a setting names a language whose tag is removed."""
    asked = {f"{name} of the tokenizer": tokenizer.init_kwargs.get(name) for name in ("src_lang", "tgt_lang")}
    language_of = {tag: language for language, tag in gone.items()}
    asked |= {name: language_of[index] for name, ids in named.items() for index in ids if index in language_of}
    for name, language in asked.items():
        if language in gone:
            raise ValueError(
                f"{name} names {language}, whose tag would be removed: it has no text in the dataset, or is not among "
                f"languages; keep it, or set {name} to None"
            )


def _trimmed_tensors(source: LazyTensors, config: ZCodeM3Config, kept: Sequence[int]) -> LazyTensors:
    """The weights of the smaller model, each made when it is read."""
    specs = {name: spec.to(source.specs[name].dtype) for name, spec in stored_specs(meta_model(config)).items()}
    rows = torch.tensor(kept)

    def read_into(name: str, out: Tensor) -> None:
        if name.removesuffix(".weight") in _EMBEDDINGS:
            out.copy_(source[name][rows])
        else:
            source.into(name, out)

    return LazyTensors(specs, read_into=read_into)


def _trimmed_model(
    model: ZCodeM3ForConditionalGeneration,
    config: ZCodeM3Config,
    generation_config: GenerationConfig | None,
    kept: Sequence[int],
) -> ZCodeM3ForConditionalGeneration:
    """A copy of the model, on its devices and in its dtypes; removed rows of the embeddings are not copied."""
    copies: dict[int, Any] = {id(model.config): config, id(model.generation_config): generation_config}
    for weight in {id(weight): weight for name in _EMBEDDINGS if (weight := _weight(model, name)) is not None}.values():
        rows = torch.tensor(kept, device=weight.device)
        copies[id(weight)] = nn.Parameter(weight.detach()[rows], weight.requires_grad)
    trimmed = copy.deepcopy(model, copies)  # deepcopy takes what is in `copies` instead of making a copy
    for name in _EMBEDDINGS:
        embedding: Any = trimmed.get_submodule(name)
        if isinstance(embedding, nn.Embedding):
            embedding.num_embeddings = len(kept)
        else:
            embedding.out_features = len(kept)
    return trimmed


def _weight(model: nn.Module, name: str) -> nn.Parameter:
    return model.get_parameter(f"{name}.weight")


def _saver(tokenizer_folder: Path, generation_config: GenerationConfig | None) -> Callable[[Path], Any]:
    """A function that writes the tokenizer and the generation config into the folder of a model."""

    def save(folder: Path) -> None:
        if generation_config is not None:
            generation_config.save_pretrained(folder)
        for path in tokenizer_folder.iterdir():
            shutil.copyfile(path, folder / path.name)

    return save


def _report(
    source: ModelSource, tensors: LazyTensors, trim: _Trim, smaller: PreTrainedTokenizerBase, min_count: int
) -> TrimmingReport:
    """Report what was kept; compare how the texts are encoded before and after."""
    unknown, after = (
        trim.tokenizer.unk_token_id,
        compare_encodings(trim.tokenizer, smaller, trim.texts, trim.new_of_old),
    )
    return TrimmingReport(
        source=str(source.path),
        arguments={"languages": [*trim.languages], "min_count": min_count},
        num_parameters_before=num_parameters(source.tensors.specs),
        num_parameters_after=num_parameters(tensors.specs),
        num_bytes_before=num_bytes(source.tensors.specs),
        num_bytes_after=num_bytes(tensors.specs),
        warnings=_warnings(after),
        num_tokens_before=source.config.vocab_size,
        num_tokens_after=len(trim.kept),
        num_experts=moe_layers(source.config),
        texts={
            language: {
                "num_texts": of_language.num_texts,
                "num_tokens_before": int(of_language.counts.sum()),
                "num_tokens_after": after[language].num_tokens,
                "num_unknown_before": 0 if unknown is None else int(of_language.counts[unknown]),
                "num_unknown_after": after[language].num_unknown,
                "num_changed": after[language].num_changed,
            }
            for language, of_language in trim.counts.items()
        },
    )


def _warnings(after: dict[str, Comparison]) -> tuple[str, ...]:
    changed = [language for language, of_language in after.items() if of_language.num_changed]
    if not changed:
        return ()
    return (
        f"texts in {', '.join(changed)} have tokens that occur less often than min_count: they are encoded in smaller "
        "pieces, which the model was not trained to read; measure the quality, or train the model further",
    )


__all__ = ["TrimmingResult", "trim_vocabulary"]
