"""Damage the files that the commands read, and kill the commands that write: what does a user get then?

    python tests/fault_injection.py --mutations 500 --kills 60 --seed 0

A damaged input has one of these outcomes; those in capitals are faults, are listed, and give exit code 1:
    refused     exit code 1 and a line that begins with "Error:"; nothing is left of the output
    same        the output is that of the undamaged input, so the damage is in nothing that the command reads
    faithful    weights are those of the undamaged input, and settings or text differ, which the damaged file now says
    unchecked   other weights from another valid number in a format that has no checksum (safetensors), or from another
                valid setting
    SILENT      the command succeeded with another model, though the file could tell
    TRACE       a stack trace, or an exit code that is neither 0 nor 1
    HANG        more than `--seconds` of CPU time
    MEMORY      more than 2 GB
    LITTER      refused, but files are left
    LOSS        an input changed or is gone
A kill must leave the final name as it was before or complete; the same command then succeeds and leaves no litter.
"""

import argparse
import hashlib
import json
import math
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false", TQDM_DISABLE="1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import datasets  # noqa: F401  # here and below: loaded before the processes of the commands are forked
import torch
from safetensors.torch import load_file, save_file
from transformers import M2M100Config, M2M100ForConditionalGeneration

from hf_moe_ted import ZCodeM3ForConditionalGeneration, ZCodeM3Tokenizer, cli
from hf_moe_ted.testing import tiny_config

FIXTURES = Path(__file__).parent / "fixtures"
MEMORY_BYTES = 2 << 30
FAULTS = ("SILENT", "TRACE", "HANG", "MEMORY", "LITTER", "LOSS")


@dataclass(frozen=True)
class Scenario:
    """A command on small inputs.

    Attributes:
        name: of the command.
        arguments: of it; `{in}` stands for the folder of inputs and `{out}` for the output.
        inputs: files and folders below the folder of inputs that are damaged.
        can_overwrite: whether the command has `--overwrite`.
    """

    name: str
    arguments: tuple[str, ...]
    inputs: tuple[str, ...]
    can_overwrite: bool = True

    def argv(self, inputs: Path, out: Path, *more: str) -> list[str]:
        return [item.replace("{in}", str(inputs)).replace("{out}", str(out)) for item in self.arguments] + list(more)


_DEEPSPEED = ("convert", "deepspeed", "{in}/deepspeed", "{out}", "--base-config", "{in}/base.json")
_TOP2 = ("--config-overrides", '{"num_experts_per_tok": 2}', "--rules", "{in}/rules.yaml")
_STATISTICS = ("--statistics", "{in}/statistics")
SCENARIOS = (
    Scenario("init", ("init", "{out}", "--config", "{in}/model/config.json"), ("model/config.json",)),
    Scenario("convert nllb-moe", ("convert", "nllb-moe", "{in}/nllb", "{out}"), ("nllb",)),
    Scenario("convert deepspeed", (*_DEEPSPEED, *_TOP2), ("deepspeed", "base.json", "rules.yaml")),
    Scenario("convert deepspeed, masters", (*_DEEPSPEED, *_TOP2, "--weights", "master"), ("deepspeed",)),
    Scenario("convert upcycle", ("convert", "upcycle", "{in}/dense", "{out}", "--num-experts", "4"), ("dense",)),
    Scenario(
        "export deepspeed", ("export", "deepspeed", "{in}/model", "{out}", "--rules", "{in}/rules.yaml"), ("model",)
    ),
    Scenario(
        "prune", ("prune", "{in}/model", "--keep", "0.5", *_STATISTICS, "--output", "{out}"), ("model", "statistics")
    ),
    Scenario(
        "merge", ("merge", "{in}/model", "--keep", "0.5", *_STATISTICS, "--output", "{out}"), ("model", "statistics")
    ),
    Scenario("aggregate", ("aggregate", "{in}/model", "{in}/model2", "--output", "{out}"), ("model", "model2")),
    Scenario("quantize", ("quantize", "{in}/model", "--output", "{out}"), ("model",)),
    Scenario(
        "expert-statistics",
        ("expert-statistics", "{in}/model", "{in}/text.jsonl", "{out}"),
        ("model", "text.jsonl"),
    ),
    Scenario(
        "evaluate",
        ("evaluate", "{in}/model", "{in}/text.jsonl", "--output", "{out}", "--max-new-tokens", "4"),
        ("model", "text.jsonl"),
    ),
    Scenario(
        "report",
        ("report", "{out}", "--before", "{in}/before.json", "--after", "{in}/after.json", *_STATISTICS),
        ("before.json", "after.json", "statistics"),
        can_overwrite=False,
    ),
    Scenario("inspect", ("inspect", "{in}/deepspeed"), ("deepspeed",), can_overwrite=False),
)


@dataclass(frozen=True)
class Result:
    """How a process ended: its exit code (negative: the signal), what it printed, peak memory and time."""

    code: int
    text: str
    peak_bytes: int
    seconds: float


def run_command(argv: list[str], log: Path, *, seconds: int = 20, prepare: Callable[[], None] | None = None) -> Result:
    """Run `hf-moe-ted` in a fork of this process, which has everything imported."""
    start = time.monotonic()
    process = os.fork()
    if process == 0:
        _become_command(argv, log, seconds, prepare)
    while True:
        ended, status, usage = os.wait4(process, os.WNOHANG)
        if ended:
            break
        if time.monotonic() - start > 6 * seconds:  # a process that waits uses no CPU time
            os.kill(process, signal.SIGKILL)
        time.sleep(0.01)
    text = log.read_text(errors="replace") if log.exists() else ""
    return Result(os.waitstatus_to_exitcode(status), text, usage.ru_maxrss * 1024, time.monotonic() - start)


def _become_command(argv: list[str], log: Path, seconds: int, prepare: Callable[[], None] | None) -> None:
    code = 70
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        address_space = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (address_space + MEMORY_BYTES + (1 << 30),) * 2)
        if prepare is not None:
            prepare()
        sys.argv = ["hf-moe-ted", *argv]
        cli.run()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def make_inputs(folder: Path, log: Path) -> None:
    """Small inputs of every command."""
    tokenizer = ZCodeM3Tokenizer(languages=["en", "de", "fr"])
    for seed, name in enumerate(("model", "model2")):
        torch.manual_seed(seed)
        config = tiny_config(vocab_size=len(tokenizer), init_std=0.3, num_experts_per_tok=2)
        ZCodeM3ForConditionalGeneration(config).save_pretrained(folder / name, max_shard_size="150KB")
        tokenizer.save_pretrained(folder / name)
    pairs = [("Open settings", "Einstellungen", "de"), ("Close all tabs", "Fermer les onglets", "fr")] * 6
    rows = [{"source": s, "target": t, "src_lang": "en", "tgt_lang": lang} for s, t, lang in pairs]
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copytree(FIXTURES / "deepspeed/m2m_ep2_zero1_top2_fp32", folder / "deepspeed")
    expected = torch.load(folder / "deepspeed/expected.pt", weights_only=True)
    (folder / "deepspeed/expected.pt").unlink()
    (folder / "base.json").write_text(json.dumps(expected["base_config"]))
    shutil.copy(Path(cli.__file__).parent / "conversion/rules/m2m100.yaml", folder / "rules.yaml")
    shutil.copytree(FIXTURES / "nllb_moe/tiny_a", folder / "nllb", ignore=shutil.ignore_patterns("golden.pt"))
    torch.manual_seed(2)
    sizes = {"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    dense = M2M100Config(vocab_size=96, d_model=16, max_position_embeddings=32, **sizes, **heads)
    M2M100ForConditionalGeneration(dense).save_pretrained(folder / "dense")
    text, short = f"{folder}/text.jsonl", ("--max-new-tokens", "4", "--output")
    for argv in (
        ["expert-statistics", f"{folder}/model", text, f"{folder}/statistics"],
        ["prune", f"{folder}/model", "--keep", "0.5", "--criterion", "random", "--output", f"{folder}/pruned"],
        ["evaluate", f"{folder}/model", text, *short, f"{folder}/before.json"],
        ["evaluate", f"{folder}/pruned", text, *short, f"{folder}/after.json"],
    ):
        result = run_command(argv, log, seconds=120)
        if result.code:
            raise RuntimeError(f"{argv}: {result.text}")


# Damage. A mutation changes one file and returns what it did.


def files_below(folder: Path, inputs: tuple[str, ...]) -> list[Path]:
    found = []
    for name in inputs:
        path = folder / name
        found += sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return found


def damage_bytes(path: Path, rng: random.Random) -> str:
    content = bytearray(path.read_bytes())
    place = rng.randrange(max(len(content), 1))
    kind = rng.choice(["flip a bit", "flip a bit", "16 random bytes", "512 zeros", "truncate", "append", "empty"])
    if kind == "flip a bit" and content:
        content[place] ^= 1 << rng.randrange(8)
    elif kind == "16 random bytes":
        content[place : place + 16] = rng.randbytes(16)
    elif kind == "512 zeros":
        content[place : place + 512] = bytes(min(512, len(content) - place))
    elif kind == "truncate":
        del content[place:]
    elif kind == "append":
        content += rng.randbytes(64)
    else:
        content.clear()
    path.write_bytes(content)
    return f"{kind} at {place}"


def damage_file(path: Path, rng: random.Random) -> str:
    others = [other for other in path.parent.iterdir() if other.is_file() and other != path]
    kind = rng.choice(["delete", "folder", "pipe", "other file"] if others else ["delete", "folder", "pipe"])
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "other file":
        other = rng.choice(sorted(others))
        shutil.copyfile(other, path)
        return f"content of {other.name}"
    return kind


JUNK = (None, [], {}, [[1]], "x", "", -1, 0, 1, 10**9, 10**30, 1.5, math.nan, math.inf, True, {"a": None}, "../x")


def damage_json(path: Path, rng: random.Random) -> str:
    text = path.read_text()
    is_lines = path.suffix == ".jsonl"
    documents = [json.loads(line) for line in text.splitlines()] if is_lines else [json.loads(text)]
    place = rng.randrange(len(documents))
    places = list(_places(documents[place]))
    value = rng.choice(JUNK)
    if not places or rng.random() < 0.05:
        documents[place] = value
        done = f"document {place} = {value!r}"
    else:
        parent, key = rng.choice(places[:200])
        if rng.random() < 0.2:
            del parent[key]
            done = f"{key!r} deleted"
        else:
            done = f"{key!r}: {str(parent[key])[:30]!r} -> {value!r}"
            parent[key] = value
    path.write_text("".join(json.dumps(document) + "\n" for document in documents))
    return done


def _places(document: Any) -> Iterator[tuple[Any, Any]]:
    items = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    for key, value in list(items):
        yield document, key
        yield from _places(value)


def damage_tensors(path: Path, rng: random.Random) -> str:
    is_safetensors = path.suffix == ".safetensors"
    content = load_file(path) if is_safetensors else torch.load(path, weights_only=True)
    parents = [(content, name) for name in content] if is_safetensors else _tensor_places(content)
    if not parents:
        return damage_bytes(path, rng)
    parent, name = rng.choice(parents)
    tensor = parent[name].clone()
    kind = rng.choice(["nan", "inf", "int32", "bool", "drop", "rename", "reshape", "cut", "complex"])
    if kind in ("nan", "inf") and tensor.is_floating_point() and tensor.numel():
        tensor.view(-1)[rng.randrange(tensor.numel())] = float(kind)
    elif kind in ("int32", "bool"):
        tensor = tensor.to(getattr(torch, kind))
    elif kind == "complex":
        tensor = tensor.to(torch.complex64)
    elif kind == "reshape":
        tensor = tensor.flatten()[None]
    elif kind == "cut":
        tensor = tensor[:-1].clone() if tensor.ndim else tensor
    if kind in ("drop", "rename"):
        del parent[name]
    if kind != "drop":
        parent[f"{name}x" if kind == "rename" else name] = tensor
    if is_safetensors:
        save_file(content, path, metadata={"format": "pt"})
    else:
        torch.save(content, path)
    return f"{kind}: {name}"


def _tensor_places(content: Any) -> list[tuple[Any, Any]]:
    return [(parent, key) for parent, key in _places(content) if isinstance(parent[key], torch.Tensor)]


def damage(path: Path, rng: random.Random) -> str:
    """Change one file in a random way that fits it."""
    ways = [damage_bytes, damage_bytes, damage_file]
    if path.suffix in (".json", ".jsonl"):
        ways += [damage_json] * 6
    if path.suffix == ".safetensors" or path.name.endswith("model_states.pt"):
        ways += [damage_tensors] * 4
    return rng.choice(ways)(path, rng)


# What a command left.


def digest(path: Path) -> dict[str, str]:
    """SHA-256 by file of a folder, or of one file; empty if there is none."""
    if path.is_file():
        return {"": hashlib.sha256(path.read_bytes()).hexdigest()}
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else []
    return {str(p.relative_to(path)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def is_weights(name: str) -> bool:
    return name.endswith((".safetensors", ".pt", ".bin"))


@dataclass(frozen=True)
class Reference:
    """What a command makes of undamaged inputs: digests without the files that differ from run to run, and seconds."""

    files: dict[str, str]
    volatile: frozenset[str]
    seconds: float
    text: str

    def of(self, path: Path) -> dict[str, str]:
        return {name: value for name, value in digest(path).items() if name not in self.volatile}


def fresh(scenario: Scenario, inputs: Path, out: Path) -> None:
    """The output as it is before the command: not there, but for `report`, which adds to a folder."""
    if scenario.name == "report":
        shutil.copytree(inputs / "pruned", out)


def reference_of(scenario: Scenario, inputs: Path, work: Path) -> Reference:
    made, results = [], []
    for attempt in range(2):
        out = work / f"reference{attempt}" / "out"
        out.parent.mkdir(parents=True)
        fresh(scenario, inputs, out)
        results.append(run_command(scenario.argv(inputs, out), work / "log", seconds=120))
        if results[-1].code:
            raise RuntimeError(f"{scenario.name}: {results[-1].text}")
        made.append(digest(out))
        shutil.rmtree(out.parent)
    volatile = frozenset(name for name in made[0] if made[0][name] != made[1].get(name))
    files = {name: value for name, value in made[0].items() if name not in volatile}
    return Reference(files, volatile, min(result.seconds for result in results), results[0].text)


@dataclass(frozen=True)
class Case:
    """One damaged input or one kill, and its outcome."""

    scenario: str
    what: str
    outcome: str
    message: str


def run_mutation(
    scenario: Scenario, reference: Reference, inputs: Path, work: Path, rng: random.Random, seconds: int
) -> Case:
    """Damage a copy of the inputs, run the command on it, and judge."""
    folder = work / "mutation"
    shutil.rmtree(folder, ignore_errors=True)
    damaged, out = folder / "in", folder / "result" / "out"
    shutil.copytree(inputs, damaged)
    out.parent.mkdir()
    path = rng.choice(files_below(damaged, scenario.inputs))
    done = damage(path, rng)
    before = digest(damaged)
    fresh(scenario, inputs, out)
    was = digest(out)
    result = run_command(scenario.argv(damaged, out), folder / "log", seconds=seconds)
    lines = [line for line in result.text.splitlines() if line.strip()]
    outcome = _judge(scenario, reference, result, path, done, out, was)
    if digest(damaged) != before:
        outcome = "LOSS"
    return Case(scenario.name, f"{path.relative_to(damaged)}: {done}", outcome, lines[-1][:200] if lines else "")


def _judge(
    scenario: Scenario, reference: Reference, result: Result, path: Path, done: str, out: Path, was: dict[str, str]
) -> str:
    if result.code in (-signal.SIGXCPU, -signal.SIGKILL):
        return "HANG"
    if result.peak_bytes > _own_peak() + MEMORY_BYTES or "MemoryError" in result.text:
        return "MEMORY"
    if "Traceback (most recent call last)" in result.text or result.code not in (0, 1):
        return "TRACE"
    if result.code == 1:
        is_clean = digest(out) == was and (bool(was) or not list(out.parent.iterdir()))
        says_why = "Error:" in result.text or scenario.name == "inspect"
        return ("refused" if says_why else "TRACE") if is_clean else "LITTER"
    if scenario.name == "inspect":
        return "same" if result.text == reference.text else "faithful"
    made = reference.of(out)
    if made == reference.files:
        return "same"
    changed = {name for name in made.keys() | reference.files.keys() if made.get(name) != reference.files.get(name)}
    if not any(is_weights(name) for name in changed):
        return "faithful"
    has_checksum = path.name.endswith(".pt")
    is_plain_damage = ":" not in done or path.suffix in (".json", ".jsonl", ".yaml")
    return "unchecked" if is_plain_damage and not has_checksum and _all_finite(out) else "SILENT"


def _all_finite(folder: Path) -> bool:
    tensors = [tensor for file in folder.rglob("*.safetensors") for tensor in load_file(file).values()]
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def _own_peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# Kills.

WRITING_EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.truncate", "shutil.rmtree")


def kill_at_event(number: int, kind: signal.Signals, root: Path) -> Callable[[], None]:
    """A function for `run_command`: the process gets a signal before its n-th change to the file system below root."""

    def prepare() -> None:
        seen = 0

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal seen
            if event not in WRITING_EVENTS or not str(arguments[0]).startswith(str(root)):
                return
            if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
                return
            seen += 1
            if seen == number:
                os.kill(os.getpid(), kind)

        sys.addaudithook(hook)

    return prepare


def kill_after(seconds: float, kind: signal.Signals) -> Callable[[], None]:
    """A function for `run_command`: the process gets a signal after some time."""

    def prepare() -> None:
        command = os.getpid()
        if os.fork() == 0:
            time.sleep(seconds)
            if os.getppid() == command:
                os.kill(command, kind)
            os._exit(0)

    return prepare


def run_kill(scenario: Scenario, reference: Reference, inputs: Path, work: Path, rng: random.Random) -> Case:
    """Kill a command somewhere, look at what is there, and run it again."""
    folder = work / "kill"
    shutil.rmtree(folder, ignore_errors=True)
    out = folder / "result" / "out"
    out.parent.mkdir(parents=True)
    fresh(scenario, inputs, out)
    overwrite = ["--overwrite"] if scenario.can_overwrite else []
    is_repeat = bool(overwrite) and rng.random() < 0.5
    if is_repeat:
        run_command(scenario.argv(inputs, out), folder / "log", seconds=120)
    was = digest(out)
    kind = rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
    if rng.random() < 0.7:
        number = rng.randrange(1, 25)
        prepare, place = kill_at_event(number, kind, out.parent), f"before change {number}"
    else:
        after_s = rng.random() * reference.seconds
        prepare, place = kill_after(after_s, kind), f"after {after_s:.2f} s"
    argv = scenario.argv(inputs, out, *overwrite)
    result = run_command(argv, folder / "log", seconds=120, prepare=prepare)
    what = f"{kind.name} {place}{', over an earlier output' if is_repeat else ''}"
    problems = _problems_after_kill(scenario, reference, result, out, was)
    again = run_command(argv, folder / "log", seconds=120)
    if again.code or reference.of(out) != reference.files:
        problems.append(f"the next run: exit code {again.code}, {again.text[-200:]}")
    if rest := sorted(path.name for path in out.parent.iterdir() if path != out):
        problems.append(f"left after the next run: {rest}")
    outcome = "LOSS" if problems else "finished before" if result.code == 0 else "clean"
    return Case(scenario.name, what, outcome, "; ".join(problems))


def _problems_after_kill(
    scenario: Scenario, reference: Reference, result: Result, out: Path, was: dict[str, str]
) -> list[str]:
    problems = []
    now, complete = digest(out), reference.of(out)
    if scenario.name == "report":  # it replaces files one by one
        ours = {name: value for name, value in complete.items() if not name.startswith(".")}  # it works in there
        whole = all(value in (was.get(name), reference.files.get(name)) for name, value in ours.items())
    else:
        aside = digest(out.parent / f".{out.name}.previous")  # between two renames; the next run takes it back
        whole = now == was or complete == reference.files or (not now and aside == was)
    if not whole:
        problems.append(f"incomplete under its final name: {sorted(now)}")
    rest = sorted(path.name for path in out.parent.iterdir() if path != out)
    if scenario.name == "report":
        rest += sorted(name for name in now if name.startswith("."))
    if result.code != -signal.SIGKILL and rest:
        problems.append(f"left after the signal: {rest}")
    if result.code not in (0, -signal.SIGKILL) and "Traceback" in result.text:
        problems.append(f"stack trace after the signal: {result.text[-200:]}")
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutations", type=int, default=500)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=int, default=20, help="of CPU time for one command")
    parser.add_argument("--only", nargs="*", help="names of commands")
    parser.add_argument("--output", type=Path, help="JSON with every case")
    args = parser.parse_args()
    scenarios = [scenario for scenario in SCENARIOS if not args.only or scenario.name in args.only]
    writing = [scenario for scenario in scenarios if scenario.name != "inspect"]
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary).resolve()
        inputs = work / "inputs"
        inputs.mkdir()
        make_inputs(inputs, work / "log")
        references = {scenario.name: reference_of(scenario, inputs, work) for scenario in scenarios}
        cases = []
        for index in range(args.mutations):
            rng, scenario = random.Random(f"{args.seed} {index}"), scenarios[index % len(scenarios)]
            cases.append(run_mutation(scenario, references[scenario.name], inputs, work, rng, args.seconds))
            _show(index, cases[-1])
        for index in range(args.kills):
            rng, scenario = random.Random(f"{args.seed} kill {index}"), writing[index % len(writing)]
            cases.append(run_kill(scenario, references[scenario.name], inputs, work, rng))
            _show(index, cases[-1])
    if args.output:
        args.output.write_text(json.dumps([vars(case) for case in cases], indent=1) + "\n")
    print(table(cases))
    return int(any(case.outcome in FAULTS for case in cases))


def _show(index: int, case: Case) -> None:
    if case.outcome in FAULTS:
        print(f"{case.outcome} {index} {case.scenario}: {case.what}: {case.message}", flush=True)


def table(cases: list[Case]) -> str:
    """Outcomes by command, as Markdown."""
    outcomes = sorted({case.outcome for case in cases})
    lines = [f"| | {' | '.join(outcomes)} |", "|---" * (len(outcomes) + 1) + "|"]
    counts = Counter((case.scenario, case.outcome) for case in cases)
    for name in dict.fromkeys(case.scenario for case in cases):
        lines.append(f"| {name} | {' | '.join(str(counts[name, outcome] or '') for outcome in outcomes)} |")
    totals = Counter(case.outcome for case in cases)
    lines.append(f"| all | {' | '.join(str(totals[outcome]) for outcome in outcomes)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
