"""Tokenizer of ZCode M3: byte-level BPE with one tag per language.

A source is encoded as `__src__ tokens </s>` and a target (`text_target=`) as `__tgt__ tokens </s>`, so a model starts
decoding from `</s>` with the id of the target tag as its `forced_bos_token_id`.
"""

import copy
import os
import re
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import BatchEncoding
from transformers.tokenization_utils_tokenizers import TokenizersBackend
from transformers.utils import logging

from .language_codes import resolve_language
from .remote_code import save_code

logger = logging.get_logger(__name__)

LANGUAGE_TOKEN = re.compile(r"__(\S+)__")

# each character matches one of these, so nothing is lost
WORD_PATTERN = "|".join(
    [
        r" ?[\p{L}\p{M}\x{200C}\x{200D}]+",  # letters, their combining marks (vowel signs, ...) and zero-width joiners
        r"\p{N}",  # digits, one at a time
        r" ?[^\s\p{L}\p{M}\p{N}\x{200C}\x{200D}]+",  # punctuation and symbols
        r"\s*[\r\n]+",
        r"\s+(?!\S)",  # leaves the last space to the next word
        r"\s+",
    ]
)


class _Turn:
    """The turn to encode: the backend can hold the tag, truncation and padding of one call at a time.

    Attributes:
        lock: held by the thread that encodes.
        languages: source and target language of the call that has the turn; `None` between calls.
        tag: language whose tag the backend writes now.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.languages: tuple[str | None, str | None] | None = None
        self.tag: str | None = None


def language_token(language: str) -> str:
    """The special token of a language: `en` -> `__en__`."""
    return f"__{language}__"


class ZCodeM3Tokenizer(TokenizersBackend):
    """
    Multilingual tokenizer (backed by the *tokenizers* library) for the ZCode M3 translation models.

    Every special token of the form `__xx__` is a language tag; `xx` is the code used everywhere in the interface.
    Arguments also accept other forms of a code: `zh-CN`, `zho_Hans` and `ZH` are `zh` if there is no closer one. Tags
    stay when other special tokens are added or replaced.

    Threads may share a tokenizer: each call uses its own languages, truncation and padding. Calls run one after
    another.

    Without `tokenizer_file` and `tokenizer_object` it is a lossless byte-level BPE without merges (one token per byte);
    train it with [`~ZCodeM3Tokenizer.train_new_from_iterator`]. Text is normalized to NFC and no token is unknown:
    decoding an encoded text returns its NFC form. Any other `tokenizer.json` can be loaded instead.

    Example:

    ```python
    >>> tokenizer = ZCodeM3Tokenizer(languages=["en", "de"]).train_new_from_iterator(corpus, vocab_size=32_000)
    >>> tokenizer.src_lang, tokenizer.tgt_lang = "en", "de"
    >>> batch = tokenizer(["Hello"], text_target=["Hallo"], return_tensors="pt")
    >>> loss = model(**batch).loss
    >>> inputs = tokenizer(["Hello", "Good night"], padding=True, return_tensors="pt")
    >>> output_ids = model.generate(**inputs, forced_bos_token_id=tokenizer.get_lang_id("de"))
    ```

    Args:
        languages (`Iterable[str]`, *optional*):
            Codes of the languages, in the order of their ids. Languages that the backend already has are kept.
        src_lang (`str`, *optional*):
            Language of the source texts. `None` encodes them without a tag, with a warning.
        tgt_lang (`str`, *optional*):
            Language of the target texts. `None` makes `text_target=` an error.
        bos_token (`str`, *optional*, defaults to `"<s>"`):
            The beginning of sequence token. Not added to encoded texts.
        pad_token (`str`, *optional*, defaults to `"<pad>"`):
            The token used for padding.
        eos_token (`str`, *optional*, defaults to `"</s>"`): The end of sequence token, also the start token of
            decoding.
        unk_token (`str`, *optional*, defaults to `"<unk>"`):
            The unknown token. The byte-level backend never produces it.
        mask_token (`str`, *optional*, defaults to `"<mask>"`):
            The token that replaces masked text in denoising.
        kwargs:
            As in [`TokenizersBackend`]: `tokenizer_file`, `tokenizer_object`, `model_max_length`, `padding_side`,
            `extra_special_tokens`, ...

    Raises:
        ValueError: an unknown `src_lang` or `tgt_lang`, here and in every method that takes a language.
    """

    vocab_files_names = {"tokenizer_file": "tokenizer.json"}
    model_input_names = ["input_ids", "attention_mask"]
    _tokenizer: Any
    _src_lang: str | None = None
    _tgt_lang: str | None = None
    _lang_ids: dict[str, int] | None = None

    def __init__(
        self,
        languages: Iterable[str] | None = None,
        src_lang: str | None = None,
        tgt_lang: str | None = None,
        bos_token: str | AddedToken = "<s>",
        pad_token: str | AddedToken = "<pad>",
        eos_token: str | AddedToken = "</s>",
        unk_token: str | AddedToken = "<unk>",
        mask_token: str | AddedToken = "<mask>",
        **kwargs: Any,
    ) -> None:
        languages = _checked_languages(languages or [])
        if kwargs.get("tokenizer_object") is None and kwargs.get("tokenizer_file") is None:
            special_tokens = [bos_token, pad_token, eos_token, unk_token, mask_token]
            special_tokens += [language_token(language) for language in languages]
            self._tokenizer = _byte_level_bpe([str(token) for token in special_tokens], unk_token=str(unk_token))

        super().__init__(
            src_lang=src_lang,
            tgt_lang=tgt_lang,
            bos_token=bos_token,
            pad_token=pad_token,
            eos_token=eos_token,
            unk_token=unk_token,
            mask_token=mask_token,
            **kwargs,
        )

        self.add_languages([*self.languages, *languages])
        self.src_lang = src_lang
        self.tgt_lang = tgt_lang

    @classmethod
    def convert_to_native_format(cls, trust_remote_code: bool = False, **kwargs: Any) -> dict[str, Any]:
        """Called by `from_pretrained`. It leaves `tokenizer_file` to `__init__`, because the base class would keep only
        its vocabulary and merges.
        """
        if kwargs.get("tokenizer_file") is None and kwargs.get("tokenizer_object") is None:
            raise OSError(f"no tokenizer.json in {kwargs.get('name_or_path')!r}")
        return kwargs

    # Languages

    @property
    def lang_code_to_id(self) -> dict[str, int]:
        """The id of each language's tag, in the order of the ids."""
        ids = self._lang_ids
        if ids is None:  # from the backend, which never loses a token
            named = {str(token) for token in self._special_tokens_map.values()}
            tokens = [(i, str(t)) for i, t in sorted(self.added_tokens_decoder.items()) if t.special]
            found = [(i, LANGUAGE_TOKEN.fullmatch(token)) for i, token in tokens if token not in named]
            ids = self._lang_ids = {match[1]: i for i, match in found if match}
        return dict(ids)

    def _add_tokens(self, new_tokens: Any, special_tokens: bool = False) -> int:
        with self._turn.lock:
            num_added = super()._add_tokens(new_tokens, special_tokens=special_tokens)
            self._lang_ids = None
        return num_added

    # Special tokens besides the named ones. The base class replaces the list in `add_special_tokens` and when
    # `extra_special_tokens` is set; language tags stay in it, because they stay special.

    @property
    def _extra_special_tokens(self) -> list[str | AddedToken]:
        return self.__dict__["_extra_special_tokens"]

    @_extra_special_tokens.setter
    def _extra_special_tokens(self, tokens: list[str | AddedToken]) -> None:
        names = {str(token) for token in tokens}
        before = self.__dict__.get("_extra_special_tokens", [])
        tags = [token for token in before if LANGUAGE_TOKEN.fullmatch(str(token)) and str(token) not in names]
        self.__dict__["_extra_special_tokens"] = [*tags, *tokens]

    @property
    def languages(self) -> list[str]:
        """The codes of the languages, in the order of their ids."""
        return list(self.lang_code_to_id)

    def get_lang_token(self, lang: str) -> str:
        """The tag of a language: `en` -> `__en__`."""
        return language_token(self._resolved(lang))

    def get_lang_id(self, lang: str) -> int:
        """The id of a language's tag. For the target language it is the `forced_bos_token_id` of generation."""
        return self.lang_code_to_id[self._resolved(lang)]

    def _resolved(self, lang: str) -> str:
        """This tokenizer's language for a code. Raises a `ValueError` if there is none."""
        return resolve_language(lang, self.lang_code_to_id, owner="this tokenizer")

    def add_languages(self, languages: Iterable[str]) -> int:
        """Adds languages. A new tag goes to the end of the vocabulary. Then resize the embeddings:
        `model.resize_token_embeddings(len(tokenizer))`.

        Returns:
            `int`: how many of the languages were new to this tokenizer.
        """
        known = self.lang_code_to_id
        new = [language for language in _checked_languages(languages) if language not in known]
        self.add_special_tokens(
            {"extra_special_tokens": [language_token(language) for language in new]},
            replace_extra_special_tokens=False,
        )
        return len(new)

    @property
    def src_lang(self) -> str | None:
        """Language of the source texts; `None` encodes them without a tag."""
        return self._src_lang

    @src_lang.setter
    def src_lang(self, lang: str | None) -> None:
        self._src_lang = None if lang is None else self._resolved(lang)
        self.update_post_processor()

    @property
    def tgt_lang(self) -> str | None:
        """Language of the target texts (`text_target=`)."""
        return self._tgt_lang

    @tgt_lang.setter
    def tgt_lang(self, lang: str | None) -> None:
        self._tgt_lang = None if lang is None else self._resolved(lang)

    # Encoding

    def __call__(
        self, *args: Any, src_lang: str | None = None, tgt_lang: str | None = None, **kwargs: Any
    ) -> BatchEncoding:
        """Encodes texts as [`~PreTrainedTokenizerBase.__call__`] does. `src_lang` and `tgt_lang` replace the
        tokenizer's languages for this call only; this holds for `encode` and `tokenize`, too.
        """
        with self._encoding(src_lang, tgt_lang):
            return super().__call__(*args, **kwargs)

    def _encode_plus(
        self, *args: Any, src_lang: str | None = None, tgt_lang: str | None = None, **kwargs: Any
    ) -> BatchEncoding:
        """Every method that encodes calls this; `encode` and `tokenize` do so without `__call__`."""
        if wrong := sorted(name for name in kwargs if "lang" in name or name.startswith("text_target")):
            raise ValueError(
                f"{', '.join(wrong)}: not an argument here; languages are `src_lang` and `tgt_lang`, and "
                "`text_target` is for a call, `tokenizer(text_target=...)`"
            )
        with self._turn.lock:
            if self._turn.languages is None:  # else set in `__call__`; no other thread is here now
                with self._encoding(src_lang, tgt_lang):
                    return self._encode_plus(*args, **kwargs)
            if self._turn.tag is None and self.languages and kwargs.get("add_special_tokens", True):
                logger.warning_once(
                    "A text is encoded without the tag of its language, which models expect: set `tokenizer.src_lang` "
                    "or pass `src_lang=`."
                )
            return super()._encode_plus(*args, **kwargs)

    @contextmanager
    def _encoding(self, src_lang: str | None, tgt_lang: str | None) -> Iterator[None]:
        """The turn of a call with its languages; before and after it, the backend has those of the tokenizer."""
        source = self._src_lang if src_lang is None else self._resolved(src_lang)
        target = self._tgt_lang if tgt_lang is None else self._resolved(tgt_lang)
        turn = self._turn
        with turn.lock:
            turn.languages = source, target
            try:
                self._switch_to_input_mode()
                yield
            finally:
                turn.languages = None
                self._switch_to_input_mode()

    @property
    def _turn(self) -> _Turn:
        """The turn of this process: a process that was forked while a thread encoded must not wait for that thread."""
        return self.__dict__.setdefault("_turns", {}).setdefault(os.getpid(), _Turn())

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_turns"}

    def __copy__(self) -> "ZCodeM3Tokenizer":
        return copy.deepcopy(self)  # two tokenizers with one backend would share one tag

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        """Number of special tokens in an encoded source, with its tag."""
        with self._turn.lock:
            return super().num_special_tokens_to_add(pair)

    def update_post_processor(self) -> None:
        """Called by the base class when special tokens change: set the source tag again."""
        with self._turn.lock:
            self._switch_to_input_mode()

    def _switch_to_input_mode(self) -> None:
        languages = self._turn.languages
        self._set_language_tag(self._src_lang if languages is None else languages[0])

    def _switch_to_target_mode(self) -> None:
        languages = self._turn.languages
        target = self._tgt_lang if languages is None else languages[1]
        if target is None:
            raise ValueError(
                "`text_target` needs the language of the target: set `tokenizer.tgt_lang` or pass `tgt_lang=`, one of: "
                f"{', '.join(self.languages) or 'none'}"
            )
        self._set_language_tag(target)

    def _set_language_tag(self, lang: str | None) -> None:
        """Makes the backend encode `text` as `__lang__ text </s>`, or as `text </s>` for `None`."""
        self._turn.tag = lang
        prefix = [] if lang is None else [language_token(lang)]
        suffix = [] if self.eos_token is None else [self.eos_token]
        self._tokenizer.post_processor = processors.TemplateProcessing(
            single=[*prefix, "$A", *suffix],
            pair=[*prefix, "$A", "$B", *suffix],
            special_tokens=[(token, self._tokenizer.token_to_id(token)) for token in prefix + suffix],
        )

    def _build_translation_inputs(
        self,
        raw_inputs: str | list[str],
        return_tensors: str | None,
        src_lang: str | None,
        tgt_lang: str | None,
        **extra_kwargs: Any,
    ) -> BatchEncoding:
        """The inputs of `generate()` for a translation, `forced_bos_token_id` included."""
        if src_lang is None or tgt_lang is None:
            raise ValueError(f"translation needs `src_lang` and `tgt_lang`, got {src_lang!r} and {tgt_lang!r}")
        inputs = self(raw_inputs, return_tensors=return_tensors, src_lang=src_lang, **extra_kwargs)
        inputs["forced_bos_token_id"] = self.get_lang_id(tgt_lang)
        return inputs

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> tuple[str, ...]:
        """Like [`~PreTrainedTokenizerBase.save_pretrained`], with the code that `auto_map` names."""
        auto_map = getattr(self, "_auto_map", None) or self.init_kwargs.get("auto_map") or {}
        if not os.path.isfile(save_directory):
            classes = auto_map.get("AutoTokenizer") or []
            save_code([classes] if isinstance(classes, str) else classes, save_directory)
        with self._turn.lock:  # the backend in its state between two calls
            return super().save_pretrained(save_directory, *args, **kwargs)

    # Training

    def train_new_from_iterator(
        self, text_iterator: Iterable[str] | Iterable[list[str]], vocab_size: int, *args: Any, **kwargs: Any
    ) -> "ZCodeM3Tokenizer":
        """
        Trains a tokenizer of the same kind on texts or batches of texts, with the same languages and special tokens.

        Args:
            text_iterator (`Iterable[str]` or `Iterable[list[str]]`):
                The texts.
            vocab_size (`int`):
                Size of the vocabulary with its special tokens, tags and, for a byte-level backend, all 256 bytes.
            args, kwargs:
                As in [`~TokenizersBackend.train_new_from_iterator`].
        """
        tokenizer = super().train_new_from_iterator(text_iterator, vocab_size, *args, **kwargs)
        tokenizer.src_lang, tokenizer.tgt_lang = self._src_lang, self._tgt_lang
        return tokenizer


def _checked_languages(languages: Iterable[str]) -> list[str]:
    """The languages without repetitions. Raises a `ValueError` if one cannot be a language code."""
    if isinstance(languages, str):
        raise ValueError(f"`languages` must be a list of codes, got the string {languages!r}")
    languages = list(dict.fromkeys(languages))
    for language in languages:
        if not isinstance(language, str) or LANGUAGE_TOKEN.fullmatch(language_token(language)) is None:
            raise ValueError(f"{language!r} cannot be a language code: codes are strings without spaces, not empty")
    return languages


def _byte_level_bpe(special_tokens: list[str], unk_token: str) -> Tokenizer:
    """A BPE without merges: the special tokens, then the 256 bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(special_tokens + alphabet))}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[], unk_token=unk_token))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


__all__ = ["ZCodeM3Tokenizer"]
