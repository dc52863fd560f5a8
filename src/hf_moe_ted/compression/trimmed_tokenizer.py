"""Tokenizers with fewer tokens. A text whose tokens are all kept is encoded as before.

The reason: byte-pair encoding merges the pair with the lowest rank, again and again. A text of kept tokens needs only
the merges that make them, and these are kept; it never used a removed merge. In a unigram model the best segmentation
stays the best when others are removed, if the score of the unknown token does not change. SentencePiece has a type of
piece for this: an unused piece still takes part in merging, and is then split again.
"""

import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

from transformers import M2M100Tokenizer, PreTrainedTokenizerBase
from transformers.tokenization_utils_tokenizers import TokenizersBackend

from ..models.language_codes import language_ids

_PROCESSORS = ("TemplateProcessing", "ByteLevel", "Sequence")
_LISTS_OF_SPECIAL_TOKENS = ("extra_special_tokens", "additional_special_tokens")
_OF_LOADING = ("is_local", "local_files_only")  # which `save_pretrained` writes, too
_NORMAL, _UNUSED = 1, 5  # of SentencePiece's `ModelProto.SentencePiece.Type`


class TokenizerTrimming(Protocol):
    """How tokens are removed from a kind of tokenizer."""

    def needed(self, used: Collection[int]) -> set[int]:
        """Ids that are needed to make `used`, or to encode every text that can be encoded now."""

    def write(self, folder: Path, new_of_old: Mapping[int, int], languages: Collection[str]) -> None:
        """Write the files of the smaller tokenizer into an empty folder.

        Args:
            folder: an existing, empty folder.
            new_of_old: id -> new id of all kept tokens, ascending in both.
            languages: the languages that are left.
        """


def trimming_of(tokenizer: PreTrainedTokenizerBase) -> TokenizerTrimming:
    """How tokens are removed from this tokenizer.

    Raises:
        ValueError: the tokenizer is of an unknown kind.
    """
    if isinstance(tokenizer, M2M100Tokenizer):
        return _SentencePieceTrimming(tokenizer)
    if isinstance(tokenizer, TokenizersBackend):
        return _BackendTrimming(tokenizer)
    raise ValueError(
        f"tokenizer ({type(tokenizer).__name__}) cannot be trimmed; it must be a ZCodeM3Tokenizer, NllbTokenizer, "
        "M2M100Tokenizer, or another one of the tokenizers library"
    )


def tags_that_go(tokenizer: PreTrainedTokenizerBase, languages: Collection[str]) -> dict[str, int]:
    """Language -> id of its tag, for tags that are not among `languages` and can be removed.

    M2M100Tokenizer has its 100 languages in its code, so all of them stay.
    """
    if isinstance(tokenizer, M2M100Tokenizer):
        return {}
    return {language: tag for language, tag in language_ids(tokenizer).items() if language not in languages}


class _BackendTrimming:
    """Trimming of a tokenizer of the *tokenizers* library: byte-pair encoding, or unigram."""

    def __init__(self, tokenizer: TokenizersBackend):
        self._tokenizer = tokenizer
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        self._model: dict[str, Any] = content["model"]
        self._check(content)
        vocabulary = self._model["vocab"]
        pieces = vocabulary if isinstance(vocabulary, dict) else {item[0]: i for i, item in enumerate(vocabulary)}
        self._id_of_piece: dict[str, int] = pieces

    def _check(self, content: Mapping[str, Any]) -> None:
        name, kind = type(self._tokenizer).__name__, self._model.get("type")
        if kind not in ("BPE", "Unigram"):
            raise ValueError(f"tokenizer ({name}) has a model of type {kind!r}, which must be 'BPE' or 'Unigram'")
        for option in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
            if self._model.get(option):
                raise ValueError(f"tokenizer ({name}) has {option} ({self._model[option]!r}), which cannot be trimmed")
        for processor in _processors(content["post_processor"]):
            if processor["type"] not in _PROCESSORS:
                raise ValueError(f"tokenizer ({name}) has a {processor['type']}, but only {_PROCESSORS} can be trimmed")

    def needed(self, used: Collection[int]) -> set[int]:
        ids = self._id_of_piece
        needed = {index for piece, index in ids.items() if len(piece) == 1}  # single bytes, or single characters
        if self._model["type"] == "Unigram":
            scores = [score for _, score in self._model["vocab"]]
            needed.add(scores.index(min(scores)))  # the score of the unknown token depends on it
            needed |= _with_lone_characters(ids)
        else:
            chains = _Merges(self._model["merges"])
            piece_of_id = {index: piece for piece, index in ids.items()}
            pieces = (piece_of_id[index] for index in used if index in piece_of_id)
            needed |= {ids[part] for part in chains.parts_of(pieces)}
        if self._model.get("byte_fallback"):
            needed |= {ids[piece] for byte in range(256) if (piece := f"<0x{byte:02X}>") in ids}
        return needed

    def write(self, folder: Path, new_of_old: Mapping[int, int], languages: Collection[str]) -> None:
        self._tokenizer.save_pretrained(folder)
        _rewrite_json(folder / "tokenizer.json", lambda content: self._trim(content, new_of_old))
        gone = {
            str(self._tokenizer.convert_ids_to_tokens(tag)): language
            for language, tag in tags_that_go(self._tokenizer, languages).items()
        }
        _rewrite_json(
            folder / "tokenizer_config.json", lambda content: _trim_config(content, new_of_old, gone, languages)
        )

    def _trim(self, content: dict[str, Any], new_of_old: Mapping[int, int]) -> dict[str, Any]:
        model, added = content["model"], content["added_tokens"]
        content["added_tokens"] = [
            token | {"id": new_of_old[token["id"]]} for token in added if token["id"] in new_of_old
        ]
        for processor in _processors(content["post_processor"]):
            if processor["type"] == "TemplateProcessing":
                _trim_template(processor, new_of_old)
        kept = {piece: new_of_old[index] for piece, index in self._id_of_piece.items() if index in new_of_old}
        if model["type"] == "BPE":
            model["vocab"] = kept
            model["merges"] = [pair for pair in map(_pair, model["merges"]) if {*pair, "".join(pair)} <= kept.keys()]
            return content
        model["vocab"] = [item for item in model["vocab"] if item[0] in kept]
        if [*kept.values()] != [*range(len(kept))]:
            raise ValueError("tokenizer has added tokens before pieces of its unigram model, and cannot be trimmed")
        if model["unk_id"] is not None:
            model["unk_id"] = new_of_old[model["unk_id"]]
        return content


class _Merges:
    """The merges of byte-pair encoding, in their order."""

    def __init__(self, merges: Iterable[Any]):
        self._rank = {_pair(merge): rank for rank, merge in enumerate(merges)}
        self._pairs: dict[str, list[tuple[str, str]]] = {}
        for pair in self._rank:
            self._pairs.setdefault("".join(pair), []).append(pair)

    def parts_of(self, pieces: Iterable[str]) -> set[str]:
        """The pieces and all pieces from which they are merged, without single characters."""
        made: set[str] = set()
        waiting = [*pieces]
        while waiting:
            piece = waiting.pop()
            if len(piece) > 1 and piece not in made:
                made.add(piece)
                waiting += self._last_parts(piece)
        return made

    def _last_parts(self, piece: str) -> Sequence[str]:
        """The two parts of the last merge that makes a piece; if no merges make it, the parts that remain."""
        if len(pairs := self._pairs.get(piece, [])) == 1:
            return pairs[0]
        before, parts = [*piece], [*piece]
        while (index := self._first_to_merge(parts)) is not None:
            before = [*parts]
            parts[index : index + 2] = [parts[index] + parts[index + 1]]
        return before if parts == [piece] else parts

    def _first_to_merge(self, parts: list[str]) -> int | None:
        ranks = [self._rank.get(pair, math.inf) for pair in pairwise(parts)]
        best = min(ranks, default=math.inf)
        return None if best == math.inf else ranks.index(best)


class _SentencePieceTrimming:
    """Trimming of M2M100Tokenizer: a SentencePiece model (byte-pair encoding or unigram) with its own ids."""

    def __init__(self, tokenizer: M2M100Tokenizer):
        try:
            from sentencepiece import sentencepiece_model_pb2
        except ImportError:
            raise ValueError(
                "trimming an M2M100Tokenizer writes a model of SentencePiece, which needs protobuf: "
                "pip install sentencepiece protobuf"
            ) from None
        self._tokenizer: Any = tokenizer
        messages: Any = sentencepiece_model_pb2  # the import creates these classes
        self._proto: Any = messages.ModelProto.FromString(self._tokenizer.sp_model.serialized_model_proto())

    def needed(self, used: Collection[int]) -> set[int]:
        ids: dict[str, int] = self._tokenizer.encoder
        normal = {piece.piece: piece.score for piece in self._proto.pieces if piece.type == _NORMAL}
        needed = {ids[piece.piece] for piece in self._proto.pieces if piece.type != _NORMAL and piece.piece in ids}
        known = {piece: ids[piece] for piece in normal if piece in ids}
        needed |= {index for piece, index in known.items() if len(piece) == 1} | _with_lone_characters(known)
        # the scores of the unknown and of user-defined pieces depend on them
        extremes = [choose(normal, key=normal.__getitem__) for choose in (min, max)] if normal else []
        needed |= {ids[piece] for piece in extremes if piece in ids}
        return needed | {*self._tokenizer.lang_code_to_id.values()}

    def write(self, folder: Path, new_of_old: Mapping[int, int], languages: Collection[str]) -> None:
        self._tokenizer.save_pretrained(folder)
        ids: dict[str, int] = self._tokenizer.encoder
        for piece in self._proto.pieces:
            is_kept = ids.get(piece.piece) in new_of_old
            # a piece without an id was unknown; other pieces may be split into it
            if piece.type == _NORMAL and not is_kept and all(character in ids for character in piece.piece):
                piece.type = _UNUSED
        names = self._tokenizer.vocab_files_names
        (folder / names["spm_file"]).write_bytes(self._proto.SerializeToString())
        kept = {piece: new_of_old[index] for piece, index in ids.items() if index in new_of_old}
        (folder / names["vocab_file"]).write_text(json.dumps(kept, indent=2), encoding="utf-8")
        _rewrite_json(
            folder / "tokenizer_config.json",
            lambda content: _trim_config(content | {"num_madeup_words": 0}, new_of_old, {}, languages),
        )


def _with_lone_characters(id_of_piece: Mapping[str, int]) -> set[int]:
    """Ids of pieces with a character that is no piece itself; without these pieces it would be unknown."""
    return {index for piece, index in id_of_piece.items() if any(character not in id_of_piece for character in piece)}


def _pair(merge: Any) -> tuple[str, str]:
    first, second = merge.split(" ") if isinstance(merge, str) else merge
    return first, second


def _processors(processor: dict[str, Any] | None) -> list[dict[str, Any]]:
    """A post-processor as a list; for a sequence, its members."""
    if processor is None:
        return []
    return [processor, *(part for inner in processor.get("processors", []) for part in _processors(inner))]


def _trim_template(processor: dict[str, Any], new_of_old: Mapping[int, int]) -> None:
    """Replace the ids in a template; parts with a removed token are left out."""
    tokens = processor["special_tokens"]
    processor["special_tokens"] = kept = {
        name: token | {"ids": [new_of_old[index] for index in token["ids"]]}
        for name, token in tokens.items()
        if all(index in new_of_old for index in token["ids"])
    }
    for form in ("single", "pair"):
        processor[form] = [
            part for part in processor[form] if "SpecialToken" not in part or part["SpecialToken"]["id"] in kept
        ]


def _trim_config(
    content: dict[str, Any], new_of_old: Mapping[int, int], gone: Mapping[str, str], languages: Collection[str]
) -> dict[str, Any]:
    """`tokenizer_config.json` without the removed tags.

    Args:
        content: content of the file.
        new_of_old: id -> new id of each kept token.
        gone: tag -> its language.
        languages: languages that are left.
    """
    for name in _OF_LOADING:
        content.pop(name, None)
    for name in _LISTS_OF_SPECIAL_TOKENS:
        if isinstance(content.get(name), list):
            content[name] = [token for token in content[name] if _content(token) not in gone]
    if added := content.get("added_tokens_decoder"):
        content["added_tokens_decoder"] = {
            str(new_of_old[int(index)]): token for index, token in added.items() if int(index) in new_of_old
        }
    # these languages are only the default or the last ones used, not a request
    for name, instead in (("src_lang", next(iter(languages))), ("tgt_lang", None)):
        if content.get(name) in gone.values():
            content[name] = instead
    return content


def _content(token: Any) -> str:
    return token["content"] if isinstance(token, dict) else str(token)


def _rewrite_json(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    changed = change(json.loads(path.read_text(encoding="utf-8")))
    path.write_text(json.dumps(changed, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


__all__ = ["TokenizerTrimming", "tags_that_go", "trimming_of"]
