"""The page of hf_moe_ted as a Space of the Hub; it runs anywhere: `python app.py`.

The variables of the Space:
    MODEL       a folder, or a model of the Hub; by default the demo model, beside this file or in the repository
    STATISTICS  folder of `hf-moe-ted expert-statistics`, for the languages that are routed alike; by default none
    TITLE       of the page
    DEVICE      such as cuda; by default a GPU if there is one
"""

import os
from pathlib import Path

import uvicorn
from fastapi import FastAPI
from huggingface_hub import snapshot_download

from hf_moe_ted import BatchedTranslator, ExpertStatistics, TextTranslator, load_model_and_tokenizer, mount_page

HERE = Path(__file__).resolve().parent
DEMO = [HERE / "zcode_m3_demo", HERE.parent / "checkpoints" / "zcode_m3_demo"]


def model_folder() -> Path:
    """Where the model is; one of the Hub is downloaded first."""
    name = os.environ.get("MODEL")
    if not name:
        return next((folder for folder in DEMO if folder.is_dir()), DEMO[0])
    return Path(name) if Path(name).is_dir() else Path(snapshot_download(name))


def make_app() -> FastAPI:
    translator = BatchedTranslator(
        TextTranslator(*load_model_and_tokenizer(model_folder(), device=os.getenv("DEVICE")))
    )
    folder = os.environ.get("STATISTICS")
    statistics = ExpertStatistics.load(folder) if folder else None
    return mount_page(FastAPI(), translator, title=os.environ.get("TITLE", "Translate"), statistics=statistics)


if __name__ == "__main__":
    # a Space says where it wants its app
    host = os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1")
    uvicorn.run(make_app(), host=host, port=int(os.environ.get("GRADIO_SERVER_PORT", "7860")))
