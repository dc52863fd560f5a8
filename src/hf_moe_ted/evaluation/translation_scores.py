"""Scores of the translations of a test set: BLEU, chrF, length ratio, language, copies and repetitions."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ..models.language_codes import parse_language, sacrebleu_tokenizer
from ..models.language_detection import detector_code
from .copied_parts import copied_parts, repeating_share
from .corpus_metrics import bleu, chrf, length_ratio, off_target


@dataclass(frozen=True, kw_only=True)
class TranslationScores:
    """Scores of the translations of a test set from one language to another.

    Attributes:
        num_sentences: number of sentences in the test set.
        bleu: corpus BLEU, 0 to 100; `None` where no reference has four tokens, as with texts of one or two words. There
            are no 4-grams then, and sacreBLEU gives 0 to perfect translations. Its `effective_order` is no way out,
            because it counts those orders that the translations have, which differ between models.
        bleu_tokenizer: tokenizer of sacreBLEU.
        chrf: corpus chrF, 0 to 100.
        source_chrf: chrF of the unchanged sources, the score of a model that only copies.
        length_ratio: characters of all translations over those of all references.
        off_target: share of translations whose detected language is not the target language, of those with 25 letters
            or more, because in shorter ones the detector is too often wrong; `None` if there are none, or for a
            language that the detector does not know. In older files it counts translations of any length.
        reference_off_target: the same for the references, which is the detector's own error.
        copied: `"numbers"`, `"placeholders"` and `"names"` -> how many of them source and reference have in common, and
            how many of these the translations have; see `copied_parts`. Empty in older files without this measurement.
        repeating: share of translations that repeat something three times in a row, see `repeats_itself`; `None` in
            older files without this measurement.
        reference_repeating: the same for the references.
    """

    num_sentences: int
    bleu: float | None
    bleu_tokenizer: str
    chrf: float
    source_chrf: float
    length_ratio: float
    off_target: float | None
    reference_off_target: float | None
    copied: dict[str, tuple[int, int]] = field(default_factory=dict)
    repeating: float | None = None
    reference_repeating: float | None = None


def score_translations(
    sources: Sequence[str],
    translations: Sequence[str],
    references: Sequence[str],
    *,
    tgt_lang: str,
    languages: Iterable[str] | None = None,
) -> TranslationScores:
    """Score the translations of one direction.

    Args:
        sources, translations, references: one of each per sentence; references are not empty.
        tgt_lang: the target language: a code of ISO 639 or NLLB in any form (`"zh"`, `"zh-CN"`, `"ZH"`, `"zho_Hans"`),
            or a name of `languages`. It chooses sacreBLEU's tokenizer.
        languages: all languages in which the model can answer; py3langid chooses among those that it knows. By default
            it chooses among all languages that it knows, with more errors.

    Raises:
        ValueError: there are no sentences, their numbers differ, or a reference is empty; `tgt_lang` is neither a known
            language nor among `languages`; py3langid is not installed.
    """
    languages = None if languages is None else list(languages)
    bleu_tokenizer = _bleu_tokenizer(tgt_lang, languages or ())

    language_shares: dict[str, float | None] = {}
    if detector_code(tgt_lang) is not None:
        candidates = None
        if languages is not None:
            candidates = [language for language in {tgt_lang, *languages} if detector_code(language) is not None]
        language_shares = off_target(translations, references, language=tgt_lang, candidates=candidates)
    return TranslationScores(
        num_sentences=len(translations),
        bleu=_defined_bleu(translations, references, bleu_tokenizer),
        bleu_tokenizer=bleu_tokenizer,
        chrf=chrf(translations, references)["score"],
        source_chrf=chrf(sources, references)["score"],
        length_ratio=length_ratio(translations, references)["corpus_ratio"],
        off_target=language_shares.get("off_target_share"),
        reference_off_target=language_shares.get("reference_off_target_share"),
        copied=copied_parts(sources, translations, references),
        repeating=repeating_share(translations),
        reference_repeating=repeating_share(references),
    )


def _defined_bleu(translations: Sequence[str], references: Sequence[str], tokenizer: str) -> float | None:
    num_4_grams = bleu(references, references, tokenize=tokenizer)["totals"][-1]
    return bleu(translations, references, tokenize=tokenizer)["score"] if num_4_grams else None


def _bleu_tokenizer(tgt_lang: str, languages: Iterable[str]) -> str:
    """The tokenizer for a language; an unknown language is assumed to have spaces between words."""
    if tgt_lang in languages:
        try:
            parse_language(tgt_lang)
        except ValueError:
            return "13a"
    return sacrebleu_tokenizer(tgt_lang)


__all__ = ["TranslationScores", "score_translations"]
