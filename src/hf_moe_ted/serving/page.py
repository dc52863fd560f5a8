"""The page of the server: Gradio, without anything loaded from the network.

It uses the same [`BatchedTranslator`] as all other clients. `page_drawing.py` draws the page, `page_work.py` does its
work, and `page_text.py` makes its HTML. Gradio takes seconds to import, so only a server with a page imports it.
"""

import atexit
import os
import shutil
import tempfile
from typing import TYPE_CHECKING, Any

from .api_keys import ApiKeys
from .batched_translator import BatchedTranslator
from .page_work import PageOptions, PageWork
from .rate_limit import RateLimit

if TYPE_CHECKING:
    from fastapi import FastAPI


def mount_page(
    app: "FastAPI",
    translator: BatchedTranslator,
    *,
    api_keys: ApiKeys | None = None,
    requests_per_minute: int | None = None,
    **options: Any,
) -> "FastAPI":
    """Put the page at `/` of a server, after all its existing routes.

    Args:
        app: app of the server.
        translator: shared with all other clients.
        api_keys: keys of the server. With keys, the page, its files and its events need a log-in: any name, with a key
            as the password.
        requests_per_minute: limit per address; by default unlimited.
        options: options of [`PageOptions`].

    Raises:
        ValueError: Gradio is not installed, or the statistics are of another model.
    """
    if requests_per_minute is not None:
        options["wait_s"] = RateLimit(requests_per_minute).wait_s
    work = PageWork(translator, PageOptions(**options))
    try:
        from .page_drawing import draw, mount
    except ImportError as error:
        raise ValueError("the page needs Gradio: pip install 'hf-moe-ted[serve]'") from error
    _keep_files_private()
    return mount(app, draw(work), work, None if api_keys is None else lambda name, key: key in api_keys)


def _keep_files_private() -> None:
    """Put uploads into a folder that only this user can read, unless the environment names another."""
    if "GRADIO_TEMP_DIR" not in os.environ:
        folder = os.environ["GRADIO_TEMP_DIR"] = tempfile.mkdtemp(prefix="hf-moe-ted-page-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)


__all__ = ["mount_page"]
