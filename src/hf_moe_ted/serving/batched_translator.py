"""One model for many clients: waiting sentences of all clients go in batches of similar length."""

import asyncio
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace

from ..models.execution_device import execution_device
from ..translation.glossary import Glossary
from ..translation.sentence_translator import SourceSentence
from ..translation.text_translator import PlannedText, TextTranslator, TranslatedSentence, TranslatedText
from .turns import Turns

MAX_WAITS = 5  # times wait_s: longest wait for others to join a batch
MIN_RETRY_S = 1.0
MAX_LENGTH_RATIO = 2.0  # tokens of a batch on a CPU


class QueueFullError(Exception):
    """A request was refused because too much is waiting.

    Attributes:
        retry_after_s: estimated seconds until it may be accepted, from the speed of earlier requests.
    """

    def __init__(self, retry_after_s: float):
        super().__init__(f"too many texts wait to be translated; try again in {retry_after_s:.0f} s")
        self.retry_after_s = retry_after_s


class ClosedError(Exception):
    """The translator finishes accepted requests and accepts no new ones."""


@dataclass(eq=False)
class _Request:
    """A request of a client in progress.

    Attributes:
        waiting: sentences that are not in a batch yet, the longest first.
        open: sentences without a translation.
        arrival_s: time at which its sentences were known.
        num_characters: number of characters of all its sentences.
    """

    plans: list[PlannedText]
    waiting: list[SourceSentence]
    open: set[SourceSentence]
    arrival_s: float
    num_characters: int
    done: Future[list[TranslatedText]]
    translated: dict[SourceSentence, TranslatedSentence] = field(default_factory=dict)


class _AbandonedError(Exception):
    """No client waits for a batch any more."""


class _Lane:
    """Requests of one kind, and the thread that translates them."""

    def __init__(self, translate: Callable[["_Lane"], None], name: str):
        self.requests: list[_Request] = []
        self.is_ended = False
        self.thread = threading.Thread(target=translate, args=(self,), name=name, daemon=True)


class BatchedTranslator:
    """Translates for many clients at once.

    Sentences of all waiting requests go through the model together, in batches of similar length within the
    translator's `batch_tokens`. A short request does not wait for a long document: its batch runs between two tokens of
    the document's batch. Both kinds get the same share of time, so neither waits forever. Requests of one kind run in
    order of arrival, but a small request overtakes a much larger one. If a sentence of a short request needs a search
    for terms, it then counts as long.

    Args:
        translator: the translator with the model; no other code should use the model at the same time.
        wait_s: how long a batch waits for other requests after the last one that joined; at most five times as long
            after the first.
        max_waiting_characters: most characters of all texts that are not translated yet; further requests are refused.
            A single request may be longer.
        short_tokens: most source tokens of a short request; by default a quarter of the translator's `batch_tokens`.

    Raises:
        ValueError: a number is out of its range.
    """

    def __init__(
        self,
        translator: TextTranslator,
        *,
        wait_s: float = 0.005,
        max_waiting_characters: int = 1_000_000,
        short_tokens: int | None = None,
    ):
        for name, number in {"wait_s": wait_s, "max_waiting_characters": max_waiting_characters}.items():
            if number < 0:
                raise ValueError(f"{name} ({number}) must be at least 0")
        self.translator = translator
        self.max_waiting_characters = max_waiting_characters
        self._wait_s = wait_s
        self._short_tokens = translator.batch_tokens // 4 if short_tokens is None else short_tokens
        self._changed = threading.Condition()
        # on a GPU a batch takes as long as its longest sentence; on a CPU every sentence adds to the time
        self._mixes_lengths = execution_device(translator.model).type != "cpu"
        self._turns = Turns()
        self._short = _Lane(self._run, "short texts")
        self._long = _Lane(self._run, "long texts")
        self._is_closed = False
        self._num_planning = self._num_characters = 0
        self._seconds_per_character = 0.0
        self._planners = ThreadPoolExecutor(4, "planning")
        for lane in (self._short, self._long):
            lane.thread.start()

    @property
    def num_waiting_characters(self) -> int:
        """Characters of all texts that are not translated yet."""
        return self._num_characters

    async def translate(
        self,
        texts: Sequence[str],
        src_lang: str,
        tgt_lang: str,
        *,
        glossary: Glossary | None = None,
        num_alternatives: int = 0,
    ) -> list[TranslatedText]:
        """Like [`TextTranslator.translate`]. If the waiting task is cancelled, the work is cancelled, too.

        Raises:
            ValueError: see there.
            QueueFullError: too much is waiting already.
            ClosedError: after `close`.
        """
        num_characters = sum(len(text) for text in texts if isinstance(text, str))
        self._accept(num_characters)
        done: Future[list[TranslatedText]] = Future()
        try:
            planning = self._planners.submit(
                self._plan, list(texts), src_lang, tgt_lang, glossary, num_alternatives, done
            )
            planning.add_done_callback(self._planned)
            return await asyncio.wrap_future(done)
        finally:
            done.cancel()
            self._leave(num_characters)

    async def close(self) -> None:
        """Finish accepted requests and refuse new ones."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        for lane in (self._short, self._long):
            await asyncio.to_thread(lane.thread.join)
        self._planners.shutdown()

    # what happens to a request

    def _accept(self, num_characters: int) -> None:
        with self._changed:
            if self._is_closed:
                raise ClosedError("the translator is closed")
            if self._num_characters and self._num_characters + num_characters > self.max_waiting_characters:
                raise QueueFullError(max(MIN_RETRY_S, self._num_characters * self._seconds_per_character))
            self._num_characters += num_characters
            self._num_planning += 1

    def _plan(
        self,
        texts: list[str],
        src_lang: str,
        tgt_lang: str,
        glossary: Glossary | None,
        num_alternatives: int,
        done: Future[list[TranslatedText]],
    ) -> None:
        if done.cancelled():
            return
        try:
            plans = self.translator.plan(
                texts, src_lang, tgt_lang, glossary=glossary, num_alternatives=num_alternatives
            )
        except Exception as error:  # cancelled for this request, by any caller
            _give(done, error)
            return
        sentences = {sentence: None for plan in plans for parts in plan.sentences for sentence in parts}
        waiting = sorted(sentences, key=lambda sentence: -len(sentence.input_ids))
        num_tokens = sum(len(sentence.input_ids) for sentence in waiting)
        num_characters = sum(len(sentence.text) for sentence in waiting)
        request = _Request(plans, waiting, set(waiting), time.perf_counter(), num_characters, done)
        if not waiting:
            _give_whole(done, plans, {})
            return
        with self._changed:
            lane = self._short if num_tokens <= self._short_tokens else self._long
            lane.requests.append(request)

    def _planned(self, _: Future[None]) -> None:
        with self._changed:
            self._num_planning -= 1
            self._changed.notify_all()

    def _leave(self, num_characters: int) -> None:
        """Remove a request that is done, has failed or was cancelled."""
        with self._changed:
            self._num_characters -= num_characters
            self._changed.notify_all()

    # what happens in a lane

    def _run(self, lane: _Lane) -> None:
        while batch := self._next_batch(lane):
            with self._turns.short() if lane is self._short else self._turns.long():
                start = time.perf_counter()
                try:
                    self._translate(batch, lane)
                except Exception as error:  # the thread continues: without it no client would get an answer
                    for request in _unique(request for requests in batch.values() for request in requests):
                        _give(request.done, error)
                of_batch = (time.perf_counter() - start) / sum(len(sentence.text) for sentence in batch)
            self._seconds_per_character = 0.8 * (self._seconds_per_character or of_batch) + 0.2 * of_batch
            del batch  # its texts are not needed while nothing waits
        with self._changed:
            lane.is_ended = True
            self._changed.notify_all()

    def _next_batch(self, lane: _Lane) -> dict[SourceSentence, list[_Request]]:
        """Sentences and the requests that wait for them; none when the translator is closed and nothing is left."""
        with self._changed:
            while True:
                self._changed.wait_for(lambda: lane.requests or self._is_over(lane))
                if not lane.requests:
                    return {}
                if lane is self._short:
                    self._wait_for_others(lane)
                if batch := self._take(lane):
                    return batch

    def _is_over(self, lane: _Lane) -> bool:
        """Whether a lane gets no more work; short requests may become long ones."""
        return self._is_closed and self._num_planning == 0 and (lane is self._short or self._short.is_ended)

    def _wait_for_others(self, lane: _Lane) -> None:
        first_s = min(request.arrival_s for request in lane.requests)
        while True:
            last_s = max((request.arrival_s for request in lane.requests), default=first_s)
            until = first_s + MAX_WAITS * self._wait_s
            if not self._num_planning:
                until = min(until, last_s + self._wait_s)
            left = until - time.perf_counter()
            if left <= 0:
                return
            self._changed.wait(left)

    def _take(self, lane: _Lane) -> dict[SourceSentence, list[_Request]]:
        lane.requests = [request for request in lane.requests if request.waiting and not request.done.done()]
        order = sorted(
            lane.requests, key=lambda request: request.arrival_s + request.num_characters * self._seconds_per_character
        )
        batch: dict[SourceSentence, list[_Request]] = {}
        shortest, longest = sys.maxsize, 0
        for request in order:
            left = []
            for sentence in request.waiting:
                low, high = min(shortest, len(sentence.input_ids)), max(longest, len(sentence.input_ids))
                if sentence in batch or not batch or self._fits(len(batch) + 1, low, high):
                    batch.setdefault(sentence, []).append(request)
                    shortest, longest = low, high
                else:
                    left.append(sentence)
            request.waiting = left
        return batch

    def _fits(self, num_sentences: int, shortest: int, longest: int) -> bool:
        is_like = self._mixes_lengths or longest <= MAX_LENGTH_RATIO * shortest
        return is_like and num_sentences * longest <= self.translator.batch_tokens

    def _translate(self, batch: dict[SourceSentence, list[_Request]], lane: _Lane) -> None:
        def on_step() -> None:
            if lane is self._long:
                self._turns.between_tokens()
            if all(request.done.done() for requests in batch.values() for request in requests):
                raise _AbandonedError

        try:
            on_step()
            results = self.translator.translate_batch(list(batch), on_step, search=lane is self._long)
        except _AbandonedError:
            return
        except Exception as error:  # errors of the model go to the clients of the batch; others continue
            self._failed(batch, error, lane)
            return
        for (sentence, requests), translated in zip(batch.items(), results, strict=True):
            if lane is self._short and sentence.lacks_terms(translated.text):
                self._search_for(sentence, requests)
                continue
            for request in requests:
                self._deliver(request, sentence, translated)

    def _search_for(self, sentence: SourceSentence, requests: Iterable[_Request]) -> None:
        with self._changed:
            self._long.requests += [replace(request, waiting=[sentence]) for request in requests]
            self._changed.notify_all()

    def _failed(self, batch: dict[SourceSentence, list[_Request]], error: Exception, lane: _Lane) -> None:
        """Repeat each request of a failed batch alone, so that only the one that cannot be translated fails."""
        requests = _unique(request for requests in batch.values() for request in requests)
        if len(requests) == 1:
            requests[0].waiting.clear()
            _give(requests[0].done, error)
            return
        for request in requests:
            own = {sentence: [request] for sentence, concerned in batch.items() if request in concerned}
            self._translate(own, lane)

    def _deliver(self, request: _Request, sentence: SourceSentence, translated: TranslatedSentence) -> None:
        with self._changed:  # short and long sentences of a request may finish at the same time
            request.translated[sentence] = translated
            request.open.discard(sentence)
            is_whole = not request.open
        if is_whole:
            _give_whole(request.done, request.plans, request.translated)


def _unique(requests: Iterable[_Request]) -> list[_Request]:
    return list(dict.fromkeys(requests))


def _give_whole(
    done: Future[list[TranslatedText]],
    plans: Iterable[PlannedText],
    translated: dict[SourceSentence, TranslatedSentence],
) -> None:
    """An error here is an error for one client; the thread continues for the others."""
    try:
        texts = [plan.whole(translated) for plan in plans]
    except Exception as error:
        _give(done, error)
    else:
        _give(done, texts)


def _give(done: Future[list[TranslatedText]], result: list[TranslatedText] | Exception) -> None:
    """Give the result to the client if it still waits; a failed request may still have sentences in the long lane."""
    if done.done() or not done.set_running_or_notify_cancel():
        return
    if isinstance(result, Exception):
        done.set_exception(result)
    else:
        done.set_result(result)


__all__ = ["BatchedTranslator", "ClosedError", "QueueFullError"]
