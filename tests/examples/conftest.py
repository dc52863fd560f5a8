import gc
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# The scripts import one another by name, as they do when they are run.
EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path[:0] = [str(EXAMPLES), str(EXAMPLES / "benchmarks")]


@pytest.fixture(scope="module", autouse=True)
def modules_are_no_garbage() -> Iterator[None]:
    """Each training collects garbage several times, which takes half a second where it looks at all that is loaded."""
    gc.freeze()
    yield
    gc.unfreeze()
