"""The command that serves a model over HTTP."""

import logging
from pathlib import Path
from typing import Annotated

import typer

from .options import (
    BatchTokens,
    Beams,
    Device,
    Dtype,
    ExpertLanguages,
    ExpertMemorySize,
    ExpertMemoryStatistics,
    ExpertsIn,
    KeepPlaceholders,
    MaxNewTokens,
    ModelWithTokenizer,
    expert_memory,
)

_LOG_FORMAT = "%(asctime)s %(levelname)s %(message)s"


def serve(
    model: ModelWithTokenizer,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines connect.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 chooses a free one.")] = 5000,
    api_keys: Annotated[
        Path | None, typer.Option(help="File of API keys, one per line; default: requests need no key.")
    ] = None,
    cors: Annotated[
        list[str] | None,
        typer.Option(help="Site whose pages may call the server, such as https://a.org; or * for all."),
    ] = None,
    proxy: Annotated[str | None, typer.Option(help="Address of a proxy whose X-Forwarded-For is trusted.")] = None,
    beams: Beams = 4,
    batch_tokens: BatchTokens = 4096,
    max_new_tokens: MaxNewTokens = None,
    max_characters: Annotated[int, typer.Option(help="Characters of a request; more gets status 413.")] = 100_000,
    max_texts: Annotated[int, typer.Option(help="Texts in a request; more gets status 413.")] = 1_000,
    max_file_bytes: Annotated[int, typer.Option(help="Bytes of a file; more gets status 413.")] = 5_000_000,
    max_requests: Annotated[int, typer.Option(help="Requests at once; more gets status 503.")] = 256,
    max_waiting_characters: Annotated[
        int, typer.Option(help="Characters that wait for the model; more gets status 503.")
    ] = 1_000_000,
    requests_per_minute: Annotated[
        int, typer.Option(help="Requests per minute of a key or an address; more gets status 429.")
    ] = 6_000,
    request_timeout: Annotated[
        int, typer.Option(help="Seconds that a translation may take; longer gets status 503.")
    ] = 600,
    glossary: Annotated[Path | None, typer.Option(help="TSV file of terms for requests that bring none.")] = None,
    keep_placeholders: KeepPlaceholders = True,
    log_texts: Annotated[bool, typer.Option("--log-texts", help="Write the texts of users to the log.")] = False,
    page: Annotated[bool, typer.Option(help="Serve a page at / to translate in a browser.")] = True,
    statistics: Annotated[
        Path | None,
        typer.Option(help="Folder written by `expert-statistics`: the page shows which languages are routed alike."),
    ] = None,
    dtype: Dtype = None,
    device: Device = None,
    expert_memory_size: ExpertMemorySize = None,
    expert_statistics: ExpertMemoryStatistics = None,
    expert_languages: ExpertLanguages = None,
    experts_in: ExpertsIn = None,
) -> None:
    """Serve a model with LibreTranslate's HTTP API. After SIGTERM it finishes running requests, then ends."""
    from .. import ApiKeys, Glossary, ServerSettings, bind_address

    settings = ServerSettings(
        max_characters=max_characters,
        max_texts=max_texts,
        max_file_bytes=max_file_bytes,
        max_requests=max_requests,
        requests_per_minute=requests_per_minute,
        request_timeout_s=request_timeout,
        api_keys=None if api_keys is None else ApiKeys.from_file(api_keys),
        cors_origins=tuple(cors or ()),
        glossary=None if glossary is None else Glossary.from_file(glossary),
        log_texts=log_texts,
    )
    address = bind_address(host, port)
    from .. import (
        create_app,
        run_server,
    )  # check for the extra first: a user need not wait for the model to learn that it is missing

    logging.basicConfig(level=logging.INFO, format=_LOG_FORMAT)
    from .. import BatchedTranslator, ExpertStatistics, TextTranslator, load_model_and_tokenizer

    memory = expert_memory(expert_memory_size, expert_statistics, expert_languages, experts_in)
    texts = TextTranslator(
        *load_model_and_tokenizer(model, dtype or "auto", device, "MODEL", expert_memory=memory),
        num_beams=beams,
        batch_tokens=batch_tokens,
        max_new_tokens=max_new_tokens,
        keep_placeholders=keep_placeholders,
    )
    translator = BatchedTranslator(texts, max_waiting_characters=max_waiting_characters)
    app = create_app(translator, settings)
    if page:
        from .. import mount_page

        app = mount_page(
            app,
            translator,
            api_keys=settings.api_keys,
            requests_per_minute=requests_per_minute,
            max_characters=max_characters,
            max_file_bytes=max_file_bytes,
            statistics=None if statistics is None else ExpertStatistics.load(statistics),
        )
    texts.warm_up()
    run_server(app, address, proxy=proxy, stop_timeout_s=request_timeout)
