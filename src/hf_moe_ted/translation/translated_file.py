"""Translate a file row by row: the output grows in order, and an interrupted run continues where it stopped."""

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm import tqdm

from ..models.language_codes import find_language, resolve_language
from ..models.language_detection import AUTO
from .arriving_lines import ArrivingLines
from .glossary import Glossary
from .text_rows import (
    CSV,
    LINES,
    PARQUET,
    TSV,
    TextRow,
    kind_of,
    num_parquet_rows,
    paragraphs,
    read_rows,
    to_parquet,
    written,
)
from .text_translator import TextTranslator, TranslatedText

ROWS_AT_ONCE = 512  # per process; sorted by length among each other
WAIT_S = 0.02  # for a further row of standard input, before those that are there are translated


@dataclass
class FileTranslation:
    """The result of translating a file.

    Attributes:
        num_rows: number of rows.
        num_resumed: number of rows that an earlier run had translated.
        errors: number of a row -> why it was not translated. Its translation is empty.
        problems: number of a row -> problems that a reader should check.
    """

    num_rows: int = 0
    num_resumed: int = 0
    errors: dict[int, str] = field(default_factory=dict)
    problems: dict[int, tuple[str, ...]] = field(default_factory=dict)


def translate_file(
    translator: TextTranslator,
    source: str | os.PathLike[str] | None,
    output: str | os.PathLike[str] | None,
    *,
    src_lang: str,
    tgt_lang: str,
    column: str | None = None,
    wrapped: bool = False,
    glossary: Glossary | None = None,
    overwrite: bool = False,
) -> FileTranslation:
    """Translate lines, or a column of a table.

    The end of a name gives the kind of a file: `.tsv`, `.csv`, `.jsonl`, `.parquet`; other files are lines of UTF-8. An
    output of lines has one line per input line, with its line end. An output table gets the columns `translation`,
    `problems` and, if requested, `alternatives`, also for a source of lines. A row that cannot be read has an empty
    translation and an entry in `errors`. All rows of a table go to `tgt_lang`; if it has columns `src_lang` and
    `tgt_lang`, they must agree with the arguments, or be empty.

    The output grows in `output.partial`, which is renamed to `output` once it is complete. If a run is interrupted, the
    same call continues it. With `torchrun` or `accelerate launch` processes share the rows, and the first process
    writes.

    Args:
        translator: translates the texts.
        source: file; `None` is standard input, whose lines are translated as they arrive.
        output: file; `None` is standard output.
        src_lang, tgt_lang: see [`TextTranslator.translate`].
        column: column with the texts; by default `source`, `text` or `sentence`.
        wrapped: whether the lines of a paragraph are one text, as in documents with lines of limited width. The output
            has one line per paragraph.
        glossary: see [`TextTranslator.translate`].
        overwrite: whether to replace `output` and any partial output.

    Raises:
        ValueError: `output` exists; a partial output is of another source or other settings; the source lacks the
            column; a language is unknown; a column `src_lang` or `tgt_lang` has another language, which shows before
            the first row is translated; `wrapped` for a table; alternatives for an output of lines; several processes
            for one standard input.
    """
    source, output = (None if path is None else Path(path) for path in (source, output))
    if wrapped and kind_of(source) != LINES:
        raise ValueError(
            f"wrapped is for text, but {source} is a table; leave wrapped out, cells may have several lines"
        )
    run = _Run(translator, source, output, src_lang, tgt_lang, column, wrapped, glossary, overwrite)
    with run.opened() as rows:
        run.translate(rows)
    return run.result


class _Run:
    def __init__(
        self,
        translator: TextTranslator,
        source: Path | None,
        output: Path | None,
        src_lang: str,
        tgt_lang: str,
        column: str | None,
        wrapped: bool,
        glossary: Glossary | None,
        overwrite: bool,
    ):
        self.translator, self.source, self.output = translator, source, output
        self.src_lang, self.tgt_lang, self.glossary = src_lang, tgt_lang, glossary
        self.column, self.wrapped = column, wrapped
        self.arriving: ArrivingLines | None = None  # standard input
        self.result = FileTranslation()
        self.kind = kind_of(output)
        self.state = PartialState(cpu=translator.model.device.type == "cpu")
        self.partial = None if output is None else output.with_name(f"{output.name}.partial")
        self.record = None if output is None else output.with_name(f"{output.name}.partial.json")
        self.num_bytes = 0
        self.columns: list[str] = []  # of a table with a header
        if source is None and self.state.num_processes > 1:
            raise ValueError(f"standard input cannot be shared by {self.state.num_processes} processes: give a file")
        if output is not None and output.exists() and not overwrite:
            raise ValueError(f"output ({output}) exists; choose another name, or overwrite it (--overwrite)")
        if self.kind == LINES and translator.num_sequences > 1:
            raise ValueError(
                f"alternatives ({translator.num_sequences - 1}) need an output with columns, such as output.jsonl; "
                f"{output or 'standard output'} has one line per text"
            )
        if output is not None and not output.parent.is_dir():
            raise ValueError(f"output ({output}): the folder {output.parent} does not exist")
        translator.translate([], src_lang, tgt_lang)  # unknown languages show before anything is written
        self.languages = {
            name: resolve_language(language, translator.languages, name=name)
            for name, language in (("src_lang", src_lang), ("tgt_lang", tgt_lang))
            if language != AUTO
        }
        self._find_partial(overwrite)

    def _settings(self) -> dict[str, Any]:
        translator = self.translator
        found = None if self.source is None else self.source.stat()
        return {
            "source": None if found is None else [str(self.source), found.st_size, found.st_mtime_ns],
            "model": translator.model.name_or_path,
            "languages": [self.src_lang, self.tgt_lang],
            "column": self.column,
            "wrapped": self.wrapped,
            "glossary": None if self.glossary is None else self.glossary.sha256,
            "options": [
                translator.num_beams,
                translator.num_sequences,
                translator.max_new_tokens,
                translator.split,
                translator.keep_placeholders,
            ],
        }

    def _find_partial(self, overwrite: bool) -> None:
        """Find the partial output of an earlier run, and how far it got."""
        if self.record is None or self.partial is None or not self.record.exists():
            return
        if overwrite:
            return
        record = json.loads(self.record.read_text(encoding="utf-8"))
        settings = self._settings()
        if self.source is None or record["settings"] != settings:
            differing = [name for name, value in settings.items() if record["settings"].get(name) != value]
            raise ValueError(
                f"{self.partial} was begun with other settings ({', '.join(differing) or 'input'}); give the same "
                "again to continue, or overwrite it (--overwrite) to begin again"
            )
        self.result.num_resumed, self.num_bytes = record["num_rows"], record["num_bytes"]
        self.columns = record["columns"]
        self.result.errors = {int(number): error for number, error in record["errors"].items()}
        self.result.problems = {int(number): tuple(problems) for number, problems in record["problems"].items()}

    @contextlib.contextmanager
    def opened(self) -> Iterator[Iterator[TextRow]]:
        with contextlib.ExitStack() as stack:
            if self.source is None:
                file: Any = ArrivingLines(sys.stdin.buffer)
                self.arriving = file
            else:
                file = stack.enter_context(self.source.open("rb"))
                if kind_of(self.source) != LINES and self.source.is_file():
                    for _ in self._rows(file):
                        pass  # a row in another language shows before work that it would make useless
                    file.seek(0)
            rows = self._rows(file)
            yield paragraphs(rows, self.src_lang) if self.wrapped else rows

    def _rows(self, file: Any) -> Iterator[TextRow]:
        """The rows of the source.

        Raises:
            ValueError: the columns `src_lang` and `tgt_lang` of a row have another language.
        """
        for row in read_rows(file, kind_of(self.source), self.column):
            for name, language in self.languages.items():
                code = row.fields.get(name)
                if isinstance(code, str) and code.strip() and not self._means(code.strip(), language):
                    raise ValueError(
                        f"{name} of row {row.number} of {self.source} is {code[:40]!r}, but all rows are translated "
                        f"with {name} {language!r}: give a table that has only these rows, or no column {name}"
                    )
            yield row

    def _means(self, code: str, language: str) -> bool:
        try:
            return find_language(code, self.translator.languages) == language
        except ValueError:  # it means several
            return find_language(code, [language]) is not None

    def translate(self, rows: Iterator[TextRow]) -> None:
        start = time.perf_counter()
        num_tokens = 0
        self.result.num_rows = sum(1 for _ in islice(rows, self.result.num_resumed))
        with self._bar() as bar, self._written() as write:
            while chunk := self._next(rows):
                translated, of_chunk = self._translated(chunk)
                num_tokens += of_chunk
                self._note(chunk, translated)
                write(self._text(chunk, translated))
                self.result.num_rows += len(chunk)
                self._save_record()
                bar.set_postfix_str(f"{num_tokens / (time.perf_counter() - start):,.0f} tokens/s", refresh=False)
                bar.update(len(chunk))
            bar.total = bar.n  # for a table whose cells have line ends it was an estimate
            bar.refresh()

    def _bar(self) -> tqdm:
        """A progress bar over rows, with tokens per second and remaining time; off if translations go to the screen."""
        is_on_screen = self.output is None and sys.stdout.isatty()
        return tqdm(
            desc="Translating",
            unit="row",
            total=self._total(),
            initial=self.result.num_rows,
            disable=is_on_screen or not self.state.is_main_process,
        )

    def _next(self, rows: Iterator[TextRow]) -> list[TextRow]:
        """The next rows to translate together; for standard input those that have arrived, at least one."""
        limit = ROWS_AT_ONCE * self.state.num_processes
        if self.arriving is None:
            return list(islice(rows, limit))
        chunk = list(islice(rows, 1))
        while chunk and len(chunk) < limit and self.arriving.has_line(WAIT_S):
            further = list(islice(rows, 1))
            chunk += further
            if not further:
                break
        return chunk

    def _total(self) -> int | None:
        """Number of rows; for a table estimated by its lines."""
        if self.source is None:
            return None if self.arriving is None or self.wrapped else self.arriving.num_lines()
        kind = kind_of(self.source)
        if self.wrapped or not self.source.is_file():
            return None
        if kind == PARQUET:
            return num_parquet_rows(self.source)
        with self.source.open("rb") as file:
            num_lines = ArrivingLines(file).num_lines() or 0
        return max(0, num_lines - (kind in (TSV, CSV)))  # without the header

    def _translated(self, chunk: list[TextRow]) -> tuple[list[TranslatedText], int]:
        """Translations of rows, and the number of tokens; each process translates its share."""
        num_tokens = 0

        def count(_: int, of_batch: int) -> None:
            nonlocal num_tokens
            num_tokens += of_batch

        # rows of similar length go to different processes, which then take about the same time
        order = sorted(range(len(chunk)), key=lambda index: len(chunk[index].text or ""))
        mine = order[self.state.process_index :: self.state.num_processes]
        texts = self.translator.translate(
            [chunk[index].text or "" for index in mine], self.src_lang, self.tgt_lang, count, glossary=self.glossary
        )
        if self.state.num_processes == 1:
            return [text for _, text in sorted(zip(mine, texts, strict=True), key=lambda pair: pair[0])], num_tokens
        everyone = gather_object([(mine, texts, num_tokens)])
        by_index = {index: text for share, of_share, _ in everyone for index, text in zip(share, of_share, strict=True)}
        return [by_index[index] for index in range(len(chunk))], sum(tokens for *_, tokens in everyone)

    def _note(self, chunk: list[TextRow], translated: list[TranslatedText]) -> None:
        for row, text in zip(chunk, translated, strict=True):
            if row.error is not None:
                self.result.errors[row.number] = row.error
            elif text.problems:
                self.result.problems[row.number] = text.problems

    def _text(self, chunk: list[TextRow], translated: list[TranslatedText]) -> str:
        rows = [self._row(row, text) for row, text in zip(chunk, translated, strict=True)]
        if self.kind in (TSV, CSV):
            rows = self._in_columns(chunk, rows)
        return written(self.kind, rows, header=self.result.num_rows == 0)

    def _in_columns(self, chunk: list[TextRow], rows: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """Give all rows the same columns: rows of JSON Lines may have others, and unreadable rows have none."""
        if not self.columns:
            new = ("translation", "alternatives", "problems")
            names = dict.fromkeys(name for row in rows for name in row)
            self.columns = [*(name for name in names if name not in new), *(name for name in new if name in names)]
        in_columns: list[Mapping[str, Any]] = []
        for source, row in zip(chunk, rows, strict=True):
            if further := [name for name in row if name not in self.columns]:
                problem = f"left out, because the first rows have no such column: {', '.join(further)}"
                self.result.problems[source.number] = (*self.result.problems.get(source.number, ()), problem)
                row = {**row, "problems": [*row["problems"], problem]}
            in_columns.append({name: row.get(name) for name in self.columns})
        return in_columns

    def _row(self, row: TextRow, text: TranslatedText) -> Mapping[str, Any]:
        if self.kind == LINES:
            return {"translation": text.text, "end": row.end}
        fields = {"source": row.text} if kind_of(self.source) == LINES else dict(row.fields)
        new: dict[str, Any] = {"translation": text.text}
        if self.translator.num_sequences > 1:
            new["alternatives"] = list(text.alternatives)
        new["problems"] = [row.error] if row.error is not None else list(text.problems)
        return {**fields, **new}

    @contextlib.contextmanager
    def _written(self) -> Iterator[Any]:
        """A function that appends text to the output; the output gets its final name at the end."""
        if not self.state.is_main_process:
            yield lambda text: None
            return
        if self.output is None or self.partial is None or self.record is None:
            yield lambda text: (sys.stdout.write(text), sys.stdout.flush())
            return
        with self.partial.open("r+b" if self.num_bytes else "wb") as file:
            file.truncate(self.num_bytes)  # text that was written after the last record
            file.seek(self.num_bytes)

            def write(text: str) -> None:
                self.num_bytes += file.write(text.encode("utf-8", errors="surrogateescape"))
                file.flush()
                os.fsync(file.fileno())

            yield write
        if self.kind == PARQUET:
            complete = self.partial.with_name(f"{self.partial.name}.parquet")
            to_parquet(self.partial, complete)
            complete.replace(self.output)
            self.partial.unlink()
        else:
            self.partial.replace(self.output)
        self.record.unlink(missing_ok=True)

    def _save_record(self) -> None:
        if self.record is None or not self.state.is_main_process:
            return
        record = {
            "settings": self._settings(),
            "num_rows": self.result.num_rows,
            "num_bytes": self.num_bytes,
            "columns": self.columns,
            "errors": self.result.errors,
            "problems": self.result.problems,
        }
        temporary = self.record.with_name(f"{self.record.name}.tmp")
        temporary.write_text(json.dumps(record, ensure_ascii=False), encoding="utf-8")
        temporary.replace(self.record)


__all__ = ["FileTranslation", "translate_file"]
