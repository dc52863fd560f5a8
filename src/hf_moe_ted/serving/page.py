"""The page of the server: Gradio, without anything from the network.

The model's work goes through the same [`BatchedTranslator`] as that of other clients. `page_drawing.py` draws the page,
`page_work.py` does what it does, `page_text.py` has what it says. Gradio takes seconds to import, so that only a server
with a page does.
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
    """Put the page at `/` of a server, behind all routes that it has by now.

    Args:
        app: of the server.
        translator: shared with all other clients.
        api_keys: of the server. Where there are any, the page, its files and its events need a log-in, whose password
            is a key, whatever the name.
        requests_per_minute: of an address; by default as many as it likes.
        options: of [`PageOptions`].

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
    """Uploads go to a folder that only this user can read, unless the environment names one."""
    if "GRADIO_TEMP_DIR" not in os.environ:
        folder = os.environ["GRADIO_TEMP_DIR"] = tempfile.mkdtemp(prefix="hf-moe-ted-page-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)


__all__ = ["mount_page"]
