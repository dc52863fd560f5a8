"""Several processes share the runs of an experiment."""

import multiprocessing
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import multitask_claims
import pytest
from multitask_claims import claimed_runs, failure_noted


@dataclass
class FakeRun:
    """What `claimed_runs` asks of a run."""

    folder: Path
    needs: "list[FakeRun]" = field(default_factory=list)
    pilots: "list[FakeRun]" = field(default_factory=list)

    def result(self) -> dict[str, Any] | None:
        return {} if (self.folder / "result.json").is_file() else None

    def check_settings(self) -> None:
        if (self.folder / "other").is_file():
            raise ValueError(f"{self.folder} was begun with other settings")

    def finish(self) -> None:
        (self.folder / "result.json").write_text("{}")


@pytest.fixture
def runs(tmp_path: Path) -> Any:
    """A teacher, its student, and one that needs neither."""
    teacher, other = (FakeRun(tmp_path / name) for name in ("teacher", "other"))
    return [teacher, FakeRun(tmp_path / "student", needs=[teacher]), other]


def names(runs: Any) -> list[str]:
    return [run.folder.name for run in runs]


def test_one_process_has_all_runs_in_their_order(runs: Any, capsys: pytest.CaptureFixture[str]) -> None:
    runs[2].folder.mkdir()
    runs[2].finish()
    begun = []
    for run in claimed_runs(runs):
        begun.append(run)
        run.finish()
    assert names(begun) == ["teacher", "student"]
    assert f"{runs[2].folder} is done" in capsys.readouterr().out


def test_a_student_comes_behind_its_teacher(runs: Any) -> None:
    begun = []
    for run in claimed_runs(runs[1::-1]):
        begun.append(run)
        run.finish()
    assert names(begun) == ["teacher", "student"]


def test_pilots_come_first_and_once(tmp_path: Path) -> None:
    pilots = [FakeRun(tmp_path / f"pilot_{rate}") for rate in (1, 2)]
    seeds = [FakeRun(tmp_path / f"seed_{seed}", needs=pilots, pilots=pilots) for seed in (0, 1)]
    begun = []
    for run in claimed_runs(seeds):
        begun.append(run)
        run.finish()
    assert names(begun) == ["pilot_1", "pilot_2", "seed_0", "seed_1"]


def test_each_run_is_had_by_one_process(
    runs: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(multitask_claims, "SECONDS_BETWEEN_LOOKS", 0.01)
    one, two = claimed_runs(runs), claimed_runs(runs)
    teacher = next(one)
    other = next(two)
    assert names([teacher, other]) == ["teacher", "other"]
    other.finish()
    monkeypatch.setattr(time, "sleep", lambda seconds: teacher.finish())
    assert names([next(two)]) == ["student"]
    assert "waiting for other processes: 2 runs are in work, or need those" in capsys.readouterr().out


def test_the_needed_run_of_another_command_is_waited_for(runs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = next(claiming := claimed_runs(runs[:1]))
    monkeypatch.setattr(time, "sleep", lambda seconds: teacher.finish())
    assert names([next(claimed_runs(runs[1:2]))]) == ["student"] and teacher.result() is not None
    claiming.close()


def test_a_run_whose_needed_one_nobody_has_is_begun_and_says_so_itself(runs: Any) -> None:
    assert names([next(claimed_runs(runs[1:2]))]) == ["student"]


def test_no_second_run_begins_when_the_time_is_over(runs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = []
    for run in claimed_runs(runs, deadline=time.perf_counter()):
        begun.append(run)
        run.finish()
    assert names(begun) == ["teacher"]
    monkeypatch.setattr(multitask_claims, "SECONDS_BETWEEN_LOOKS", 0.01)
    claiming = claimed_runs(runs[1:2])
    next(claiming)
    assert [*claimed_runs(runs[:2], deadline=time.perf_counter() + 0.1)] == []
    claiming.close()
    assert names([next(claimed_runs(runs))]) == ["student"]


def test_ranks_of_one_training_have_the_same_runs(runs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    ranks = [claimed_runs(runs), claimed_runs(runs)]
    assert [names([next(rank)]) for rank in ranks] == [["teacher"], ["teacher"]]


def test_what_fails_in_one_process_is_left_out_by_the_others(runs: Any) -> None:
    since = time.time() - 1
    with pytest.raises(ValueError, match="no such loss"):
        for run in claimed_runs(runs, since=since):
            with failure_noted(run):
                raise ValueError("no such loss")
    assert "no such loss" in (runs[0].folder / "failure.txt").read_text()
    begun = []
    with pytest.raises(RuntimeError, match=r"teacher, .*student: failed in another process, or need a run that failed"):
        for run in claimed_runs(runs, since=since):
            begun.append(run)
            run.finish()
    assert names(begun) == ["other"]
    for run in claimed_runs(runs, since=time.time() + 1):  # the same command again
        begun.append(run)
        run.finish()
    assert names(begun) == ["other", "teacher", "student"] and not (runs[0].folder / "failure.txt").exists()


def test_no_run_begins_when_one_has_other_settings(runs: Any) -> None:
    runs[2].folder.mkdir()
    runs[2].finish()
    (runs[2].folder / "other").touch()
    with pytest.raises(ValueError, match="other was begun with other settings"):
        next(claimed_runs(runs))


def hold(run: FakeRun, held: Any) -> None:
    for _ in claimed_runs([run]):  # type: ignore[list-item]
        held.set()
        time.sleep(60)


def test_a_process_that_dies_gives_its_run_back(runs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    context = multiprocessing.get_context("fork")
    held = context.Event()
    process = context.Process(target=hold, args=(runs[0], held))
    process.start()
    assert held.wait(30)
    monkeypatch.setattr(time, "sleep", lambda seconds: (process.kill(), process.join()))
    assert names([next(claimed_runs(runs[:1]))]) == ["teacher"] and process.exitcode == -9
