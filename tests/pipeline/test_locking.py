"""A folder belongs to one process at a time, which is named to others, and to nobody once that process is gone."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from hybridize import cli
from hybridize.pipeline import locking
from hybridize.pipeline.artifacts import make_artifact
from hybridize.pipeline.locking import alone_in
from hybridize.pipeline.progress import Reporter
from hybridize.pipeline.runner import run_recipe
from hybridize.spec.recipe import parse_recipe

HOLDER = """
import os, sys, time
from pathlib import Path
from hybridize.pipeline.locking import alone_in
file = Path(sys.argv[1])
with alone_in(file.parent, file, print):
    child = os.fork()
    if child == 0:
        os.close(1)
        time.sleep(600)
        os._exit(0)
    print(child, flush=True)
    sys.stdin.read()
os.kill(child, 9)
"""


@contextmanager
def holder(file: Path):
    """A process that holds the lock of a file and has a child that outlives it: both of their numbers."""
    command = [sys.executable, "-c", HOLDER, str(file)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    child = int(process.stdout.readline())
    try:
        yield process, child
    finally:
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        process.kill()
        process.stdin.close()
        process.stdout.close()
        process.wait()


def silent(text):
    raise AssertionError(text)


def test_a_second_process_is_told_of_the_first(tmp_path):
    file = tmp_path / "deep" / ".lock"
    with holder(file) as (process, _):
        expected = rf"{tmp_path}/deep: process {process.pid} on \S+, begun at \d{{4}}-.*; wait .* give another folder"
        for _ in range(2):
            with pytest.raises(ValueError, match=expected), alone_in(file.parent, file, silent):
                pass
        assert json.loads(file.read_text())["process"] == process.pid
        process.stdin.close()
        assert process.wait(30) == 0
        assert not file.exists()
        with alone_in(file.parent, file, silent):
            assert json.loads(file.read_text())["process"] == os.getpid()
    assert not file.exists()


def test_a_killed_process_holds_nothing_though_its_child_lives(tmp_path):
    file = tmp_path / ".lock"
    with holder(file) as (process, child):
        process.send_signal(signal.SIGKILL)
        process.wait(30)
        assert file.exists()
        os.kill(child, 0)
        with alone_in(tmp_path, file, silent):
            assert json.loads(file.read_text())["process"] == os.getpid()
    assert not file.exists()


def test_a_process_is_shut_out_from_its_own_folder_too(tmp_path):
    file = tmp_path / ".lock"
    with alone_in(tmp_path, file, silent):
        for _ in range(2):
            with (
                pytest.raises(ValueError, match=f"very process, {os.getpid()},"),
                alone_in(tmp_path, file, silent),
            ):
                pass
        done = subprocess.run([sys.executable, "-c", HOLDER, str(file)], capture_output=True, text=True)
        assert f"process {os.getpid()} on" in done.stderr, "the vain attempts did not give the lock up"


def test_a_lock_ends_with_an_error(tmp_path):
    file = tmp_path / ".lock"
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt), alone_in(tmp_path, file, silent):
            raise KeyboardInterrupt
        assert not file.exists()


CONTENDER = """
import os, sys, time
from pathlib import Path
from hybridize.pipeline.locking import alone_in
file, mark = Path(sys.argv[1]), sys.argv[2]
end, times = time.monotonic() + 1.5, 0
while time.monotonic() < end:
    try:
        with alone_in(file.parent, file, print):
            os.close(os.open(mark, os.O_CREAT | os.O_EXCL))
            os.unlink(mark)
            times += 1
    except ValueError:
        continue
print(times)
"""


def test_only_one_of_many_gets_in_though_the_file_comes_and_goes(tmp_path):
    command = [sys.executable, "-c", CONTENDER, str(tmp_path / ".lock"), str(tmp_path / "mark")]
    contenders = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    times = [int(contender.communicate(timeout=60)[0]) for contender in contenders]
    assert all(contender.returncode == 0 for contender in contenders)
    assert sum(times) > 100
    assert sum(count > 0 for count in times) > 1


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_without_locks_it_is_said_once_and_the_work_goes_on(tmp_path, monkeypatch, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    monkeypatch.setattr(locking, "_told", set())
    said = []
    for name in ("a", "b"):
        with alone_in(tmp_path / name, tmp_path / name / ".lock", said.append):
            (tmp_path / name / "work").touch()
        assert [path.name for path in (tmp_path / name).iterdir()] == ["work"]
    assert len(said) == 1
    assert f"{tmp_path / 'a'}: its filesystem keeps no locks ({os.strerror(number)}); see to it" in said[0]


def test_other_failures_of_locking_are_not_swallowed(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with pytest.raises(OSError, match="Input/output"), alone_in(tmp_path, tmp_path / ".lock", silent):
        pass


def test_a_stage_is_made_by_one_process_at_a_time(tmp_path):
    def work(partial):
        raise AssertionError("it must not begin")

    with (
        holder(tmp_path / ".a.lock") as (process, _),
        pytest.raises(ValueError, match=rf"/a: process {process.pid} on .* is working in it"),
    ):
        make_artifact(tmp_path / "a", kind="test", key="k", spec={}, inputs={}, work=work)


def test_a_stage_that_came_to_stand_meanwhile_is_not_overwritten(tmp_path):
    def work(partial):
        with pytest.raises(ValueError, match="is working in it"):
            make_artifact(tmp_path / "a", kind="test", key="k", spec={}, inputs={}, work=silent)
        return {"times": 1}

    make_artifact(tmp_path / "a", kind="test", key="k", spec={}, inputs={}, work=work)
    with pytest.raises(ValueError, match="exists already and nothing is overwritten"):
        make_artifact(tmp_path / "a", kind="test", key="k", spec={}, inputs={}, work=silent)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_second_run_in_a_folder_stops_at_once(tiny_recipe):
    output = Path(tiny_recipe["output"])
    with (
        holder(output / ".lock") as (process, _),
        pytest.raises(ValueError, match=rf"{output}: process {process.pid} on .* is working in it"),
    ):
        run_recipe(parse_recipe(tiny_recipe), Reporter(quiet=True))
    assert [path.name for path in output.iterdir()] == [".lock"], "it has not even written its recipe over the other's"


def test_a_second_call_of_a_verb_for_the_same_folder_stops_before_any_work(tiny_teacher, tmp_path, capsys, monkeypatch):
    words = ["traces", str(tiny_teacher), str(tmp_path / "out"), "--num-prompts", "1", "--verifier", "none"]
    monkeypatch.setattr(sys, "argv", ["hybridize", *words])
    with holder(tmp_path / ".out.lock") as (process, _), pytest.raises(SystemExit, match="2"):
        cli.main()
    assert f"{tmp_path / 'out'}: process {process.pid} on " in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [".out.lock"]
