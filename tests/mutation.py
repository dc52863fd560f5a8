"""Change a module in small ways, one at a time, and see which changes its tests do not notice.

    pip install cosmic-ray==8.7.0
    python tests/mutation.py data/mixture.py tests/data/test_mixture.py --sample 40

The changes are those of cosmic-ray's operators: at each place one of each family, drawn at random; no annotations.
The tests run in a fork of a process that has imported everything but the package, over a copy of the repository.
"""

import argparse
import ast
import difflib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names

REPOSITORY = Path(__file__).parents[1]
LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "runs", "demo_out", "*.png")


def places(code: str) -> Iterator[tuple[tuple[int, int], str, int]]:
    """Line and column, operator, and number of the place among the operator's."""
    annotations = []
    for node in ast.walk(ast.parse(code)):
        for name in ("annotation", "returns"):
            found = getattr(node, name, None)
            if isinstance(found, ast.AST):
                annotations.append(((found.lineno, found.col_offset), (found.end_lineno, found.end_col_offset)))
    nodes = list(ast_nodes(get_ast(code)))
    for name in sorted(operator_names()):
        if get_operator(name).arguments():
            continue
        starts = [tuple(start) for node in nodes for start, _ in get_operator(name)().mutation_positions(node)]
        for occurrence, start in enumerate(starts):
            if not any(first <= start < last for first, last in annotations):
                yield start, name, occurrence


def sampled(code: str, sample: int) -> tuple[int, int, list[tuple[int, str, str]]]:
    """Numbers of all mutants and of all places; and line, operator and code of those that are drawn."""
    by_place: dict[tuple[tuple[int, int], str], list[tuple[str, int]]] = {}
    for start, name, occurrence in places(code):
        by_place.setdefault((start, name.split("_")[0]), []).append((name, occurrence))
    generator = random.Random(0)
    chosen = sorted(by_place)
    if len(chosen) > sample:
        chosen = sorted(generator.sample(chosen, sample))
    mutants = []
    for place in chosen:
        name, occurrence = generator.choice(by_place[place])
        mutants.append((place[0][0], name, mutate_code(code, get_operator(name)(), occurrence)))
    return sum(map(len, by_place.values())), len(by_place), mutants


def outcome(tests: list[str], timeout_s: float, log: Path, names: Path | None = None) -> str:
    """Of the tests, in a fork; `names` takes those of the modules that it has imported."""
    child = os.fork()
    if child == 0:
        os.setsid()
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        code = pytest.main(["-q", "-x", "-p", "no:cacheprovider", *tests])
        if names is not None:
            names.write_text("\n".join(name for name in sys.modules if not name.startswith(("hf_moe_ted", "test"))))
        os._exit(int(code))
    end = time.monotonic() + timeout_s
    while not (done := os.waitpid(child, os.WNOHANG))[0] and time.monotonic() < end:
        time.sleep(0.05)
    if not done[0]:
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return "out of time"
    return "killed" if os.waitstatus_to_exitcode(done[1]) else "survived"


def import_again(names: list[str]) -> None:
    torch.set_num_threads(1)  # there must be no second thread at a fork
    for name in names:
        try:
            __import__(name)
        except Exception as error:  # such as a module of pytest's own loader; the forks import it then
            print(f"not imported before the forks: {name} ({type(error).__name__})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("module", help="path below src/hf_moe_ted")
    parser.add_argument("tests", nargs="+", help="files, or names of tests, from the repository's root")
    parser.add_argument("--sample", type=int, default=60)
    parser.add_argument("--timeout_s", type=float, default=180.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(REPOSITORY, tree, ignore=LEFT_OUT)
        os.chdir(tree)
        sys.path.insert(0, str(tree / "src"))
        os.environ |= {"PYTHONPATH": str(tree / "src"), "OMP_NUM_THREADS": "1"}
        sys.dont_write_bytecode = True
        module = tree / "src" / "hf_moe_ted" / options.module
        code = module.read_text()
        log, names = Path(folder) / "log", Path(folder) / "names"
        if outcome(options.tests, 10 * options.timeout_s, log, names) != "survived":
            raise SystemExit(f"the tests do not pass without a change:\n{log.read_text()[-2000:]}")
        import_again(names.read_text().split())
        num_mutants, num_places, mutants = sampled(code, options.sample)
        counts: Counter[str] = Counter()
        for line, name, mutant in mutants:
            module.write_text(mutant)
            result = outcome(options.tests, options.timeout_s, log)
            counts[result] += 1
            if result != "killed":
                print(f"{options.module}:{line} {name}: {result}")
                print("\n".join(difflib.unified_diff(code.splitlines(), mutant.splitlines(), n=0, lineterm="")))
        print(f"{options.module}: {len(mutants)} of {num_mutants} mutants at {num_places} places: {dict(counts)}")


if __name__ == "__main__":
    main()
