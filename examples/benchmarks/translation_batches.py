"""Parallel text without *datasets*, and its fast greedy translation: what the benchmarks of compression share."""

import lzma
import time
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

SPEED_TOKENS = 32  # per sentence, whatever the model has to say
SPEED_RUNS = 3


class Sentence(NamedTuple):
    """A text, its translation, and their languages."""

    src_lang: str
    tgt_lang: str
    source: str
    target: str

    @property
    def direction(self) -> str:
        return f"{self.src_lang}-{self.tgt_lang}"

    @property
    def english(self) -> str:
        return self.source if self.src_lang == "en" else self.target


def read_sentences(
    split: str, data_dir: Path, languages: list[str], max_sentences: int | None = None
) -> list[Sentence]:
    """English to each language and back, the first `max_sentences` of each direction.

    Raises:
        ValueError: there is no text of the split, or of a language.
    """
    pairs: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for path in sorted(data_dir.glob(f"*.{split}.tsv.xz")):
        for row in lzma.decompress(path.read_bytes()).decode("utf-8").removesuffix("\n").split("\n")[1:]:
            language, english, target = row.split("\t")
            pairs[language].append((english, target))
    if missing := sorted({*languages} - {*pairs}):
        raise ValueError(
            f"no text in {', '.join(missing)} in {data_dir}/*.{split}.tsv.xz; there is text in "
            f"{', '.join(sorted(pairs)) or 'no language'}"
        )
    sentences = []
    for language in languages:
        of_language = pairs[language][:max_sentences]
        sentences += [Sentence("en", language, english, target) for english, target in of_language]
        sentences += [Sentence(language, "en", target, english) for english, target in of_language]
    return sentences


def encode(tokenizer: Any, sentences: list[Sentence]) -> list[dict[str, list[int]]]:
    """`input_ids`, `attention_mask` and `labels` of each sentence."""
    indices_of: dict[tuple[str, str], list[int]] = defaultdict(list)
    for index, sentence in enumerate(sentences):
        indices_of[sentence.src_lang, sentence.tgt_lang].append(index)
    encoded: list[dict[str, list[int]]] = [{}] * len(sentences)
    for (src_lang, tgt_lang), indices in indices_of.items():
        columns = tokenizer(
            [sentences[index].source for index in indices],
            text_target=[sentences[index].target for index in indices],
            src_lang=src_lang,
            tgt_lang=tgt_lang,
            truncation=True,
        )
        for position, index in enumerate(indices):
            encoded[index] = {name: values[position] for name, values in columns.items()}
    return encoded


class Translator:
    """Greedy translation of the same sentences by one model after another: longest first, all directions in a batch."""

    def __init__(self, tokenizer: Any, sentences: list[Sentence], *, batch_size: int, max_new_tokens: int):
        self.tokenizer, self.batch_size, self.max_new_tokens = tokenizer, batch_size, max_new_tokens
        self._sources = [torch.tensor(ids["input_ids"]) for ids in encode(tokenizer, sentences)]
        self._targets = torch.tensor([tokenizer.get_lang_id(sentence.tgt_lang) for sentence in sentences])

    @torch.inference_mode()
    def translate(self, model: Any) -> list[str]:
        """Translations in the order of the sentences."""
        order = sorted(range(len(self._sources)), key=lambda index: -len(self._sources[index]))
        outputs = [""] * len(order)
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            ids = model.generate(**self._inputs(model, batch), max_new_tokens=self.max_new_tokens, do_sample=False)
            for index, text in zip(batch, self.tokenizer.batch_decode(ids, skip_special_tokens=True), strict=True):
                outputs[index] = text
        return outputs

    @torch.inference_mode()
    def speed(self, model: Any) -> dict[str, Any]:
        """Sentences per second over one batch, `SPEED_TOKENS` tokens each, and on a GPU the most memory it takes."""
        batch = list(range(min(self.batch_size, len(self._sources))))
        inputs = self._inputs(model, batch)
        seconds = []
        if model.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        for _ in range(1 + SPEED_RUNS):  # the first one to warm up
            start = time.perf_counter()
            ids = model.generate(**inputs, min_new_tokens=SPEED_TOKENS, max_new_tokens=SPEED_TOKENS, do_sample=False)
            ids.cpu()  # waits for the device
            seconds.append(time.perf_counter() - start)
        peak_mb = torch.cuda.max_memory_allocated() / 1e6 if model.device.type == "cuda" else None
        return {
            "num_sentences": len(batch),
            "sentences_per_s": [len(batch) / run_s for run_s in seconds[1:]],
            "peak_memory_mb": peak_mb,
        }

    def _inputs(self, model: Any, batch: list[int]) -> dict[str, Tensor]:
        sources = [self._sources[index] for index in batch]
        source_ids = pad_sequence(sources, batch_first=True, padding_value=self.tokenizer.pad_token_id)
        lengths = torch.tensor([len(source) for source in sources])
        targets = self._targets[batch]
        start_ids = torch.full_like(targets, model.config.decoder_start_token_id)
        inputs = {
            "input_ids": source_ids,
            "attention_mask": (torch.arange(source_ids.shape[1]) < lengths.unsqueeze(1)).long(),
            "decoder_input_ids": torch.stack([start_ids, targets], dim=1),  # forced_bos_token_id is one for all
        }
        return {name: tensor.to(model.device) for name, tensor in inputs.items()}
