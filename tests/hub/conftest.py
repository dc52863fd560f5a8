import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# For local_hub.py, which serves several folders of tests.
sys.path.insert(0, str(Path(__file__).parents[1]))

from local_hub import LocalHub


@pytest.fixture
def local_hub(tmp_path: Path) -> Iterator[LocalHub]:
    """An empty Hub on the loopback interface; run its clients with `run_python(script, local_hub.env())`."""
    with LocalHub(home=tmp_path / "hf_home") as hub:
        yield hub
