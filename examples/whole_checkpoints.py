"""Checkpoints of a Trainer that were written to their end."""

import json
import shutil
from pathlib import Path

from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint


def last_checkpoint(folder: Path) -> Path | None:
    """The last whole checkpoint in the `output_dir` of a training, which exists; `None` if there is none.

    What a process has left that was killed while it wrote a checkpoint is removed.
    """
    for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        try:
            TrainerState.load_from_json(str(path / TRAINER_STATE_NAME))  # which is written last
        except (FileNotFoundError, json.JSONDecodeError):
            print(f"{path} is not whole and is removed: a process ended while it wrote it", flush=True)
            shutil.rmtree(path, ignore_errors=True)
    found = get_last_checkpoint(str(folder))
    return None if found is None else Path(found)
