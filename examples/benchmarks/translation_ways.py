"""Ways to translate, in this process or one each, which loads a model and translates what it is sent."""

import multiprocessing
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Direction:
    """Sentences of one direction; with `num_new_tokens` each translation gets as many."""

    src_lang: str
    tgt_lang: str
    sources: list[str]
    references: list[str]
    num_new_tokens: int | None = None

    def __str__(self) -> str:
        return f"{self.src_lang}-{self.tgt_lang}"


@dataclass(frozen=True)
class Settings:
    num_beams: int
    batch_size: int
    threads: int
    device: str


@dataclass(frozen=True)
class Way:
    """A model's folder, and how it translates.

    Attributes:
        generate_options: besides the number of beams.
        is_ctranslate2: whether the folder is one of CTranslate2.
        tokens: ids of all that it may generate.
        dtype: that the model is loaded in.
        expert_bytes: of the experts that are on the device; by default all are.
    """

    name: str
    folder: Path
    generate_options: dict[str, Any] = field(default_factory=dict)
    tokens: tuple[int, ...] | None = None
    is_ctranslate2: bool = False
    dtype: str | None = None
    expert_bytes: int | None = None

    @property
    def weights_mb(self) -> float:
        files = [path for path in self.folder.iterdir() if path.suffix == ".safetensors" or path.name == "model.bin"]
        return sum(path.stat().st_size for path in files) / 1e6


@dataclass(frozen=True)
class Round:
    """What a process answers.

    Attributes:
        seconds, processor_s: of all directions, by the clock and of all threads.
        translations: those of each direction.
        libraries_mb: peak memory of the process before the model was loaded.
        peak_mb: its peak memory until now.
        peak_gpu_mb: of tensors on the GPU.
    """

    seconds: float
    processor_s: float
    translations: list[list[str]]
    libraries_mb: float
    peak_mb: float
    peak_gpu_mb: float | None


Translate = Callable[[Direction], list[str]]


def pipeline_translate(way: Way, settings: Settings) -> tuple[Translate, float]:
    """A function that translates, and the memory that the libraries took."""
    import torch
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    from hf_moe_ted import ExpertMemory, ZCodeM3TranslationPipeline

    torch.set_num_threads(settings.threads)
    libraries_mb = peak_memory_mb()
    load_options = {} if way.expert_bytes is None else {"expert_memory": ExpertMemory(way.expert_bytes)}
    model = AutoModelForSeq2SeqLM.from_pretrained(way.folder, dtype=way.dtype or "auto", **load_options)
    tokenizer = AutoTokenizer.from_pretrained(way.folder)
    if way.tokens is not None:
        mask = torch.full((model.config.vocab_size,), -torch.inf, device=settings.device)
        mask[list(way.tokens)] = 0
        model.to(settings.device).lm_head.register_forward_hook(lambda module, inputs, logits: logits + mask)
    translator = ZCodeM3TranslationPipeline(model=model, tokenizer=tokenizer, device=settings.device)
    options = {"batch_size": settings.batch_size, "num_beams": settings.num_beams, **way.generate_options}

    def translate(direction: Direction) -> list[str]:
        languages = {"src_lang": direction.src_lang, "tgt_lang": direction.tgt_lang}
        results = translator(direction.sources, split=False, **languages, **options)
        return [result["translation_text"] for result in results]

    return translate, libraries_mb


def ctranslate2_translate(way: Way, settings: Settings) -> tuple[Translate, float]:
    """As `pipeline_translate`; the tags of languages are tokens of the text."""
    sys.modules["torch"] = None  # type: ignore[assignment]  # which it would import and does not need
    import ctranslate2
    from tokenizers import Tokenizer

    libraries_mb = peak_memory_mb()
    tokenizer = Tokenizer.from_file(str(way.folder / "tokenizer.json"))
    translator = ctranslate2.Translator(
        str(way.folder), compute_type="int8", inter_threads=1, intra_threads=settings.threads
    )

    def translate(direction: Direction) -> list[str]:
        sources = [tokenizer.encode(f"__{direction.src_lang}__{text}").tokens for text in direction.sources]
        results = translator.translate_batch(
            sources, target_prefix=[[f"__{direction.tgt_lang}__"]] * len(sources), beam_size=settings.num_beams,
            max_batch_size=settings.batch_size, min_decoding_length=direction.num_new_tokens,
            max_decoding_length=direction.num_new_tokens,
        )  # fmt: skip
        return [tokenizer.decode(list(map(tokenizer.token_to_id, result.hypotheses[0]))) for result in results]

    return translate, libraries_mb


def serve(connection: Any, way: Way, settings: Settings) -> None:
    """Load the model, and translate what comes, until nothing does."""
    load = ctranslate2_translate if way.is_ctranslate2 else pipeline_translate
    translate, libraries_mb = load(way, settings)
    for directions in iter(connection.recv, None):
        connection.send(timed_round(translate, directions, libraries_mb, settings))


def timed_round(translate: Translate, directions: list[Direction], libraries_mb: float, settings: Settings) -> Round:
    start, processor_start = time.perf_counter(), time.process_time()
    translations = [translate(direction) for direction in directions]
    seconds, processor_s = time.perf_counter() - start, time.process_time() - processor_start
    return Round(seconds, processor_s, translations, libraries_mb, peak_memory_mb(), peak_gpu_mb(settings))


def peak_memory_mb() -> float:
    """Peak resident memory of this process."""
    status = Path("/proc/self/status")
    if status.exists():  # where getrusage counts the program that started this one, too
        kibibytes = next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(kibibytes) * 1024 / 1e6
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # bytes on macOS


def peak_gpu_mb(settings: Settings) -> float | None:
    if settings.device != "cuda":
        return None
    import torch

    return torch.cuda.max_memory_allocated() / 1e6


class WayProcess:
    """The process of a way.

    Args:
        way: what it loads.
        settings: of all ways.
    """

    def __init__(self, way: Way, settings: Settings):
        self.way = way
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=serve, args=(other, way, settings))
        self._process.daemon = True
        self._process.start()
        other.close()  # so that its end is noticed

    def round(self, directions: list[Direction]) -> Round:
        try:
            self._connection.send(directions)
            return self._connection.recv()
        except (EOFError, ConnectionError):
            raise RuntimeError(f"the process of {self.way.name!r} has ended, see above") from None

    def end(self) -> None:
        self._connection.send(None)
        self._process.join()


class WayHere:
    """A way in this process, where starting others takes longer than to translate; see [`WayProcess`].

    Peak memory is that of all ways so far.
    """

    def __init__(self, way: Way, settings: Settings):
        self.way, self._settings = way, settings
        self._translate, self._libraries_mb = pipeline_translate(way, settings)

    def round(self, directions: list[Direction]) -> Round:
        return timed_round(self._translate, directions, self._libraries_mb, self._settings)

    def end(self) -> None:
        del self._translate
