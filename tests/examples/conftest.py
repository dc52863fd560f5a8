import sys
from pathlib import Path

# The scripts import one another by name, as they do when they are run.
EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path[:0] = [str(EXAMPLES), str(EXAMPLES / "benchmarks")]
