"""The code of the models in saved folders, for users who do not have this package."""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files


def save_code(references: Iterable[str | None], folder: str | os.PathLike[str]) -> None:
    """Copy the files of this package that a config names, and all files that they import, to a folder.

    Args:
        references: as in `auto_map`: `"modeling_zcode_m3.ZCodeM3Model"`. References to another repository (with `--`)
            and to files outside of this package are left out.
        folder: folder of the config; it is made if it does not exist.
    """
    local = [reference.split(".")[0] for reference in references if reference and "--" not in reference]
    files = [file for name in local if (file := Path(__file__).with_name(f"{name}.py")).is_file()]
    if not files:
        return
    os.makedirs(folder, exist_ok=True)
    for path in {*files, *(Path(needed) for file in files for needed in get_relative_import_files(file))}:
        shutil.copyfile(path, Path(folder) / path.name)


__all__ = ["save_code"]
