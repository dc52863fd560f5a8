"""Language codes: map the code that a user types to a language of a tokenizer.

`zh-CN`, `zh_CN`, `zho_Hans`, `cmn` and `ZH` are one language in several forms: a code of ISO 639 (two or three
letters), perhaps with a script (`Hans`), a region (`CN`) or a variant (`valencia`) after `-` or `_`, in any case. A
tokenizer has some of these languages, in its own forms. Only this module knows which forms mean the same language.
"""

import difflib
import inspect
import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

LanguagePair = tuple[str, str]
"""Source and target language."""

# A line per language: the code used here, then its other codes. A macrolanguage (`ara`) equals the member that it
# usually means (`arb`), as in NLLB and FLORES-200; all languages of these two are here.
_CODES = """
aa aar|ab abk|ace|acm|acq|aeb|af afr|ajp|ak aka|am amh|an arg|ang|apc|ar ara arb|arc|ars|ary|arz|as asm|ast|av ava
awa|ay aym ayr|az aze azj|azb|ba bak|ban|bar|bcl|be bel|bem|bg bul|bh bih|bho|bi bis|bjn|bm bam|bn ben|bo bod tib
bpy|br bre|bs bos|bug|ca cat|cbk|ce che|ceb|ch cha|chr|cjk|ckb|co cos|cr cre|crh|cs ces cze|csb|cu chu|cv chv
cy cym wel|da dan|de deu ger|dik din|diq|dsb|dv div|dyu|dz dzo|ee ewe|el ell gre|en eng|eo epo|es spa|et est ekk
eu eus baq|ext|fa fas per pes|ff ful fuv|fi fin|fj fij|fo fao|fon|fr fra fre|frr|fur|fy fry|ga gle|gan|gcf|gcr|gd gla
gl glg|gn grn gug|gom|grc|gsw|gu guj|guw|gv glv|ha hau|hak|haw|hbo|he heb iw|hi hin|hif|hil|hmn|hne|ho hmo|hr hrv|hsb
ht hat|hu hun|hy hye arm|hz her|ia ina|id ind in|ie ile|ig ibo|ii iii|ik ipk|ilo|io ido|is isl ice|it ita|iu iku
ja jpn|jv jav jw|ka kat geo|kab|kac|kam|kbp|kea|kg kon|ki kik|kj kua|kk kaz|kl kal|km khm|kmb|kn kan|ko kor
kr kau knc|ks kas|ku kur kmr|kv kom|kw cor|ky kir|la lat|lb ltz|lg lug|li lim|lij|lmo|ln lin|lo lao|lt lit|ltg|lu lub
lua|luo|lus|lv lav lvs|lzh|mag|mai|mg mlg plt|mh mah|mi mri mao|min|mk mkd mac|ml mal|mn mon khk|mni|mos|mr mar
ms msa may zsm|mt mlt|mwl|my mya bur|na nau|nan|nap|nb nob no nor|nd nde|nds|ne nep npi|new|ng ndo|nl nld dut|nn nno
nr nbl|nso ns|nus|nv nav|ny nya|oc oci|oj oji|om orm gaz|or ori ory|os oss|pa pan|pag|pam|pap|pcm|pi pli|pl pol|pms
pnb|prs|ps pus pbt|pt por|qu que quy|rm roh|rn run|ro ron rum mo|rom|ru rus|rw kin|sa san|sah|sat|sc srd|scn|sco
sd snd|sdh|se sme|sg sag|sh hbs|shn|si sin|sk slk slo|sl slv|sm smo|sn sna|so som|sq sqi alb als|sr srp|ss ssw
st sot|su sun|sv swe|sw swa swh|szl|ta tam|taq|te tel|tet|tg tgk|th tha|ti tir|tk tuk|tl tgl fil|tn tsn|to ton|tpi
tr tur|ts tso|tt tat|tum|tw twi|ty tah|tyv|tzm|udm|ug uig|uk ukr|umb|ur urd|uz uzb uzn|uzs|ve ven|vec|vi vie|vo vol
wa wln|war|wo wol|wuu|xal|xh xho|yi yid ydd ji|yo yor|yue|za zha|zh zho chi cmn|zu zul|zxx
"""
_LANGUAGE_OF = {code: line.split()[0] for line in re.split(r"[|\n]", _CODES.strip()) for code in line.split()}

# what users type instead of a language code: the code of a country, or a name
_MISTAKES = {
    **{"br": "pt", "chinese": "zh", "cn": "zh", "cz": "cs", "dk": "da", "ee": "et", "english": "en", "french": "fr"},
    **{"german": "de", "gr": "el", "greek": "el", "ir": "fa", "japanese": "ja", "jp": "ja", "korean": "ko", "kr": "ko"},
    **{"portuguese": "pt", "se": "sv", "si": "sl", "spanish": "es", "tw": "zh", "ua": "uk", "us": "en", "vn": "vi"},
}

_SCRIPT_OF_CHINESE = {"CN": "Hans", "MY": "Hans", "SG": "Hans", "HK": "Hant", "MO": "Hant", "TW": "Hant"}
_HAN = ("Hanb", "Hani", "Hans", "Hant")

# scripts without spaces between words, and the languages with such a default script
_SCRIPT_WITHOUT_SPACES = {
    **dict.fromkeys(("gan", "hak", "lzh", "nan", "wuu", "yue", "zh"), "Hani"),
    **{"bo": "Tibt", "dz": "Tibt", "ja": "Jpan", "km": "Khmr", "lo": "Laoo", "my": "Mymr", "shn": "Mymr", "th": "Thai"},
}

# scripts from right to left, and the languages with such a default script
_SCRIPTS_FROM_RIGHT = ("Adlm", "Arab", "Aran", "Hebr", "Mand", "Mend", "Nkoo", "Rohg", "Samr", "Syrc", "Thaa")
_FROM_RIGHT = (
    *("acm", "acq", "aeb", "ajp", "apc", "ar", "arc", "ars", "ary", "arz", "azb", "ckb", "dv", "fa", "hbo", "he"),
    *("ks", "pnb", "prs", "ps", "sd", "sdh", "ug", "ur", "yi"),
)

_BLEU_TOKENIZER = {
    **dict.fromkeys(_HAN, "zh"),
    **dict.fromkeys(("Hira", "Hrkt", "Jpan", "Kana", "Khmr", "Laoo", "Mymr", "Thai", "Tibt"), "char"),
}

_LANGUAGE_TOKEN = re.compile(r"[a-z]{3}_[A-Z][a-z]{3}|[a-z]{2}_[A-Z]{2}")  # codes of NLLB and mBART: eng_Latn, en_XX
_MAX_LISTED = 30
_ENCODING = threading.RLock()


class LanguageCode(NamedTuple):
    """A language in normalized form.

    Attributes:
        language: ISO 639-1 code if there is one, otherwise ISO 639-3.
        script: ISO 15924, `Hans`.
        region: ISO 3166, `BR`, or three digits.
        variant: any other part, in lower case.
    """

    language: str
    script: str | None = None
    region: str | None = None
    variant: str | None = None


def parse_language(code: str) -> LanguageCode:
    """Parse a code: `zh_CN` -> `zh`, `Hans`, `CN`.

    Raises:
        ValueError: it is no code of a known language; the error lists similar ones.
    """
    parsed = _parsed(code) if isinstance(code, str) else None
    if parsed is None:
        near = did_you_mean(code, list(dict.fromkeys(_LANGUAGE_OF.values())))
        raise ValueError(f"unknown language {code!r}: it must be a code of ISO 639, such as de or deu_Latn{near}")
    return parsed


def resolve_language(
    code: str, languages: Iterable[str], *, name: str = "language", owner: str = "the tokenizer", hint: str = ""
) -> str:
    """Find the one of `languages` that a code means.

    An equal string comes first, so languages may have names of any kind. Otherwise the language must be the same, and
    also script, region and variant if both name one: `pt-BR` is `pt` if there is no closer one, but not `pt_PT`.

    Args:
        code: as a user types it: `zh-CN`, `zh_CN`, `zho_Hans`, `cmn`, `ZH`.
        languages: languages of a tokenizer or a model.
        name: name of the code in errors, such as `src_lang`.
        owner: name, in errors, of what has the languages.
        hint: what else to do about an unknown language, for the error.

    Raises:
        ValueError: the code means none of `languages`, or several (`zh` with `zho_Hans` and `zho_Hant`); the error
            lists similar ones.
    """
    languages = list(dict.fromkeys(languages))
    if code in languages:
        return code
    found = _closest(code, languages) if isinstance(code, str) else []
    if len(found) > 1:
        raise ValueError(f"ambiguous {name} {code!r}: it may be {', '.join(found)}; name one of them")
    if not found:
        known = [*languages[:_MAX_LISTED], *(["..."] if len(languages) > _MAX_LISTED else [])]
        raise ValueError(
            f"unknown {name} {code!r}, {owner} knows: {', '.join(known) or 'none'}{did_you_mean(code, languages)}{hint}"
        )
    return found[0]


def find_language(code: str, languages: Iterable[str]) -> str | None:
    """Like `resolve_language`, but `None` if the code means none.

    Raises:
        ValueError: the code means several languages.
    """
    languages = list(languages)
    if code not in languages and not _closest(code, languages):
        return None
    return resolve_language(code, languages)


def unknown_languages(codes: Iterable[str], languages: Iterable[str]) -> str:
    """Codes that mean none of `languages`, for an error message, with suggestions: `gr (el?), xx`."""
    near = {code: _near(str(code), list(languages)) for code in sorted(codes)}
    return ", ".join(f"{code} ({' or '.join(meant)}?)" if meant else str(code) for code, meant in near.items())


def parse_languages(text: str) -> list[str]:
    """Parse a list of codes, `"en, de"` -> `["en", "de"]`, each once.

    Raises:
        ValueError: there is no code, or an empty one between two commas.
    """
    codes = [code.strip() for code in text.split(",")]
    if not all(codes):
        raise ValueError(f"languages ({text!r}) must be codes with commas between them, such as 'en,de'")
    return list(dict.fromkeys(codes))


def sacrebleu_tokenizer(code: str) -> str:
    """The tokenizer of sacreBLEU for a language: `zh`, `char` if words have no spaces between them, else `13a`.

    Raises:
        ValueError: see `parse_language`.
    """
    parsed = parse_language(code)
    return _BLEU_TOKENIZER.get(parsed.script or _SCRIPT_WITHOUT_SPACES.get(parsed.language, ""), "13a")


def has_spaces_between_sentences(code: str) -> bool:
    """Whether a language has spaces between sentences: all except Chinese and Japanese."""
    try:
        parsed = parse_language(code)
    except ValueError:
        return True
    script = parsed.script or _SCRIPT_WITHOUT_SPACES.get(parsed.language, "")
    return script not in (*_HAN, "Hira", "Hrkt", "Jpan", "Kana")


def is_right_to_left(code: str) -> bool:
    """Whether a language is written from right to left; false for an unknown language."""
    try:
        parsed = parse_language(code)
    except ValueError:
        return False
    return parsed.language in _FROM_RIGHT if parsed.script is None else parsed.script in _SCRIPTS_FROM_RIGHT


def language_ids(tokenizer: Any) -> dict[str, int]:
    """The languages of a tokenizer for translation, and the ids of their tokens.

    They come from `lang_code_to_id` (`ZCodeM3Tokenizer`, `M2M100Tokenizer`). Otherwise they are the tokens that look
    like languages of NLLB and mBART (`eng_Latn`, `en_XX`); other special tokens are ignored.

    Raises:
        ValueError: the tokenizer has no languages.
    """
    ids: Mapping[str, int] = getattr(tokenizer, "lang_code_to_id", None) or {}
    if not ids and hasattr(tokenizer, "added_tokens_decoder"):
        tokens = ((str(token), token_id) for token_id, token in sorted(tokenizer.added_tokens_decoder.items()))
        ids = {token: token_id for token, token_id in tokens if _LANGUAGE_TOKEN.fullmatch(token)}
    if not ids:
        raise ValueError(f"{type(tokenizer).__name__} has no languages: use a tokenizer for translation")
    return dict(ids)


@contextmanager
def languages_kept(tokenizer: Any) -> Iterator[None]:
    """Context for code that sets the languages of a tokenizer: one thread at a time; the languages are restored.

    A tokenizer whose calls take languages, such as `ZCodeM3Tokenizer`, does not need it.
    """
    if calls_take_languages(tokenizer):
        yield
        return
    with _ENCODING, ExitStack() as afterwards:
        for name in ("tgt_lang", "src_lang"):  # the last one is restored first
            afterwards.callback(_put_back, tokenizer, name, getattr(tokenizer, name, None))
        yield


def _put_back(tokenizer: Any, name: str, language: str | None) -> None:
    if getattr(tokenizer, name, None) != language:
        setattr(tokenizer, name, language)


def encode_in(
    tokenizer: Any, *args: Any, src_lang: str | None = None, tgt_lang: str | None = None, **kwargs: Any
) -> Any:
    """`tokenizer(*args, **kwargs)` with languages for this call only; `None` means the tokenizer's own."""
    languages = {name: lang for name, lang in (("src_lang", src_lang), ("tgt_lang", tgt_lang)) if lang is not None}
    if calls_take_languages(tokenizer):
        return tokenizer(*args, **languages, **kwargs)
    with languages_kept(tokenizer):
        for name, lang in languages.items():
            setattr(tokenizer, name, lang)
        return tokenizer(*args, **kwargs)


def calls_take_languages(tokenizer: Any) -> bool:
    """Whether `tokenizer(text, src_lang=...)` encodes in that language, whatever other threads do."""
    return "src_lang" in inspect.signature(type(tokenizer).__call__).parameters


def _parsed(code: str) -> LanguageCode | None:
    """The parsed code; `None` if it is unknown."""
    first, *parts = re.split(r"[-_]", code.strip())
    language = _LANGUAGE_OF.get(first.lower())
    if language == "zh" and parts and len(parts[0]) == 3 and parts[0].lower() in _LANGUAGE_OF:
        language = _LANGUAGE_OF[parts.pop(0).lower()]  # zh-yue
    script, region = _taken(parts, r"[A-Za-z]{4}").title(), _taken(parts, r"[A-Za-z]{2}|\d{3}").upper()
    if language is None or not all(re.fullmatch(r"[A-Za-z0-9]{4,8}", part) for part in parts):
        return None
    if language == "zh" and not script:
        script = _SCRIPT_OF_CHINESE.get(region, "")
    variant = "-".join(parts).lower()
    return LanguageCode(language, script or None, None if region in ("", "XX") else region, variant or None)


def _taken(parts: list[str], form: str) -> str:
    """Remove and return the first of `parts` that matches; empty if none does."""
    found = next((part for part in parts if re.fullmatch(form, part)), "")
    if found:
        parts.remove(found)
    return found


def _closest(code: str, languages: list[str]) -> list[str]:
    """Languages that a code may mean: one, several equally close ones, or none."""
    form = code.strip().replace("-", "_").lower()
    if same := [language for language in languages if language.replace("-", "_").lower() == form]:
        return same
    wanted = _parsed(code)
    found = {language: _distance(wanted, _parsed(language)) for language in languages}
    distances = {language: distance for language, distance in found.items() if distance is not None}
    nearest = min(distances.values(), default=None)
    return [language for language, distance in distances.items() if distance == nearest]


def _distance(wanted: LanguageCode | None, has: LanguageCode | None) -> tuple[int, int] | None:
    """Distance of a language from the wanted one; `None` if it is another language."""
    if wanted is None or has is None or has.language != wanted.language:
        return None
    pairs = list(zip(wanted[1:], has[1:], strict=True))
    if any(a is not None and b is not None and a != b for a, b in pairs):
        return None
    # shared parts count first; an extra part adds distance
    return -sum(a is not None and a == b for a, b in pairs), sum(a != b for a, b in pairs)


def did_you_mean(code: Any, languages: list[str]) -> str:
    """The end of an error message: suggested languages."""
    near = _near(str(code), languages)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def _near(code: str, languages: list[str]) -> list[str]:
    """Up to three of `languages` that look like a code, or that users confuse with it."""
    parsed = {language: _parsed(language) for language in languages}
    first = re.split(r"[-_]", code.strip().lower())[0]
    meant = {_MISTAKES.get(first), _LANGUAGE_OF.get(first)} - {None}
    near = [language for language, has in parsed.items() if has is not None and has.language in meant]
    spellings: dict[str, str] = {language.lower(): language for language in languages}
    first_of = {has.language: language for language, has in reversed(parsed.items()) if has is not None}
    for alias, canonical in _LANGUAGE_OF.items():
        if canonical in first_of:
            spellings.setdefault(alias, first_of[canonical])
    close = difflib.get_close_matches(code.strip().lower(), spellings, n=6, cutoff=0.6)
    return list(dict.fromkeys([*near, *(spellings[spelling] for spelling in close)]))[:3]


__all__ = [
    "LanguageCode",
    "LanguagePair",
    "calls_take_languages",
    "did_you_mean",
    "encode_in",
    "find_language",
    "has_spaces_between_sentences",
    "is_right_to_left",
    "language_ids",
    "languages_kept",
    "parse_language",
    "parse_languages",
    "resolve_language",
    "sacrebleu_tokenizer",
    "unknown_languages",
]
