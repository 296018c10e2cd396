"""run: the matrix of a suite, and what becomes of it when processes fail, die or are stopped. The script is a fake."""

import importlib
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from collections import Counter
from dataclasses import replace
from fcntl import ioctl
from pathlib import Path

import pytest
import tyro

from benchmarks import jobs, run
from benchmarks.__main__ import main
from benchmarks.jobs import UsageError, status_of
from benchmarks.records import read_runs
from benchmarks.suite import SUITES, jobs_of, read_suite

ROOT = Path(run.__file__).parent.parent

# A script that keeps the contract and learns nothing: 500 steps, 100 an iteration, each with a checkpoint. FAKE is a
# folder: processes write to FAKE/trace what they do, wait while there is FAKE/hold, and obey FAKE/<seed>.<order>.
SCRIPT = """
import argparse, fcntl, json, os, signal, sys, time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal


@dataclass
class Args:
    env_id: str = "CartPole-v1"
    seed: int = 1
    runs_dir: str = "runs"
    run_name: str = ""
    resume: str = ""
    evaluate: str = ""
    eval_episodes: int = 10
    eval_stochastic: bool = False
    num_threads: int = 0
    exp_name: str = "fake"
    total_timesteps: int = 500
    speed: float = 1.0
    turbo: bool = False


def parse_args(argv=None):
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for field in fields(Args):
        flag = "--" + field.name.replace("_", "-")
        if field.type is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=field.default)
        else:
            kind = field.type if field.type in (int, float) else str
            parser.add_argument(flag, type=kind, default=field.default)
    return Args(**vars(parser.parse_args(argv)))


def main():
    args, fake = parse_args(), Path(os.environ["FAKE"])
    run = Path(args.resume or args.evaluate or f"{args.runs_dir}/{args.run_name}")
    saved = json.loads((run / "config.json").read_text())["args"] if args.resume or args.evaluate else vars(args)
    seed, total, signals = saved["seed"], saved["total_timesteps"], []

    def told(order):
        return (fake / f"{seed}.{order}").exists()

    def is_alive(pid):
        try:
            return b"fake" in Path(f"/proc/{pid}/cmdline").read_bytes()  # empty for a zombie
        except OSError:
            return False

    def trace(event):
        with open(fake / "trace", "a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            (fake / "pids" / str(os.getpid())).touch()
            alive = sum(map(is_alive, os.listdir(fake / "pids")))
            file.write(json.dumps([os.getpid(), run.name, event, alive]) + "\\n")

    def write(name, content):
        (run / f"{name}.tmp").write_text(json.dumps(content))
        os.replace(run / f"{name}.tmp", run / name)

    def append(name, row):
        with open(run / name, "a") as file:
            file.write(row + "\\n")

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def stop(number, frame):
        if signals:
            os._exit(128 + number)
        signals.append(number)

    if told("usage"):
        print("error: --speed is wrong", file=sys.stderr)
        sys.exit(2)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    trace("evaluate" if args.evaluate else "resume" if args.resume else "start")
    if args.evaluate:
        while told("hold-evaluation"):
            time.sleep(0.01)
        if told("kill-evaluation"):
            (fake / f"{seed}.kill-evaluation").unlink()
            die()
        if told("fail-evaluation"):
            sys.exit("no games left")
        kind = "stochastic" if args.eval_stochastic else "deterministic"
        summary = json.loads((run / "summary.json").read_text())
        summary["eval"] = summary.get("eval", {}) | {kind: dict(mean=1.0, episodes=args.eval_episodes)}
        write("summary.json", summary)
        sys.exit(0)
    if not args.resume:
        (run / "checkpoints").mkdir(parents=True)
        write("config.json", dict(args=vars(args)))
        if told("kill-early"):
            (fake / f"{seed}.kill-early").unlink()
            (run / "checkpoints" / "step_0000.pt.tmp").touch()
            die()
        (run / "checkpoints" / "step_0000.pt").touch()
        append("episodes.csv", "global_step,wall_time,return,length")
        append("progress.csv", "global_step,wall_time,sps")
    step = max(int(path.stem[5:]) for path in (run / "checkpoints").glob("step_*.pt"))
    if told("crash"):
        raise RuntimeError("no wheels")
    status = "completed"
    while step < total and status == "completed":
        while ((fake / "hold").exists() or told("hold")) and not signals or told("deaf"):
            time.sleep(0.01)
        if told("fail") and step == 200:
            write("summary.json", dict(status="failed", global_step=step, error="the wheels came off"))
            sys.exit("error: the wheels came off")
        step += 100
        trace(f"step {step}")
        append("episodes.csv", f"{step},0.1,{step},10")
        append("progress.csv", f"{step},0.1,1234.5")
        print(f"{step} steps # {seed}")
        (run / "checkpoints" / f"step_{step:04}.pt").touch()
        for old in sorted((run / "checkpoints").glob("step_*.pt"))[:-2]:
            old.unlink()
        if told("kills") and step <= 100 * int((fake / f"{seed}.kills").read_text()):
            die()
        if told("term") and step == 200:
            os.kill(os.getpid(), signal.SIGTERM)
        if told("kill-at-end") and step == total:
            (fake / f"{seed}.kill-at-end").unlink()
            die()
        status = "interrupted" if signals and step < total else status
    if not told("no-summary"):
        write("summary.json", dict(status=status, global_step=step, train_last100=1234.5))
    sys.exit(128 + signals[0] if status == "interrupted" else 0)


if __name__ == "__main__":
    main()
"""
SHIPPED = {
    "smoke": 22,
    "classic": 160,
    "mujoco": 100,
    "mujoco-v4": 60,
    "atari": 48,
    "atari-sticky": 48,
    "ppo-table1": 231,
    "random": 34,
}
STEPS = [f"step {n}" for n in (100, 200, 300, 400, 500)]
WHOLE = ["start", *STEPS, "evaluate", "evaluate"]
SUITE = """
envs = ["CartPole-v1"]
algos = ["fake.py"]
seeds = 3
total_timesteps = 500
eval_episodes = 2
"""


class Lab:
    """A folder with a fake script, a suite of three runs of it, and what the processes have done."""

    def __init__(self, path):
        self.path, self.fake, self.runs, self.harnesses = path, path / "fake", path / "runs", []
        (self.fake / "pids").mkdir(parents=True)
        (path / "fake.py").write_text(SCRIPT)
        (path / "suite.toml").write_text(SUITE)

    def tell(self, order, content=""):
        (self.fake / order).write_text(content)

    def forget(self, order):
        (self.fake / order).unlink()

    def trace(self):
        """Per seed, what was done in this order."""
        events = {}
        for _, name, event, _ in self.lines():
            events.setdefault(int(name.split("__")[2]), []).append(event)
        return events

    def lines(self):
        trace = self.fake / "trace"
        return [json.loads(line) for line in trace.read_text().splitlines()] if trace.exists() else []

    def most_at_once(self):
        return max(alive for *_, alive in self.lines())

    def pids(self, seed):
        return [pid for pid, name, *_ in self.lines() if name.split("__")[2] == str(seed)]

    def started(self):
        return sum(event in ("start", "resume") for _, _, event, _ in self.lines())

    def jobs(self):
        return jobs_of(read_suite("suite.toml"))

    def statuses(self):
        return {job.seed: status_of(job, self.runs) for job in self.jobs()}

    def start(self, *flags, **options):
        """`run` as a process of its own, its output in a file."""
        command = [sys.executable, "-m", "benchmarks", "run", "suite.toml", "--runs-dir", str(self.runs), *flags]
        output = open(self.path / f"harness{len(self.harnesses)}", "w+")
        options = dict(stdout=output, stderr=output, env=os.environ | {"PYTHONPATH": str(ROOT)}) | options
        process = subprocess.Popen(command, cwd=self.path, **options)
        self.harnesses.append((process, output))
        return process

    def said(self, number=-1):
        return Path(self.harnesses[number][1].name).read_text()


def wait_for(condition, what="condition", seconds=60):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"no {what} within {seconds} s"
        time.sleep(0.02)


@pytest.fixture
def lab(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lab = Lab(tmp_path)
    monkeypatch.setenv("FAKE", str(lab.fake))
    yield lab
    for order in lab.fake.glob("*hold*"):
        order.unlink()
    for process, output in lab.harnesses:
        process.kill()
        process.wait()
        output.close()
    for pid in {pid for pid, *_ in lab.lines()}:
        if b"fake" in (Path(f"/proc/{pid}/cmdline").read_bytes() if Path(f"/proc/{pid}").exists() else b""):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture
def go(lab, monkeypatch, capsys):
    """go(*flags) is `run` in this process, without its naps: (exit status, stdout)."""
    sleep = time.sleep
    monkeypatch.setattr("time.sleep", lambda seconds: sleep(min(seconds, 0.02)))

    def command(*flags):
        status = main(["run", "suite.toml", "--runs-dir", str(lab.runs), *flags])
        captured = capsys.readouterr()
        assert not captured.err or captured.err.startswith("error: "), captured.err
        return status, captured.out + captured.err

    return command


# ------------------------------------------------------------------------------------------------ what is left to do
def test_every_cell_is_run_and_evaluated_once_and_then_never_again(lab, go):
    status, out = go("--workers", "2")
    assert status == 0 and lab.trace() == {1: WHOLE, 2: WHOLE, 3: WHOLE}
    assert lab.most_at_once() <= 2
    assert "done     CartPole-v1 fake seed 2: 1,234.5\n" in out and f"3 of 3 runs are done: {lab.runs}\n" in out
    before = lab.lines()
    status, out = go("--workers", "2")
    assert status == 0 and lab.lines() == before and "3 of 3 runs are done" in out and "done     " not in out
    assert go("--seeds", "4")[0] == 0
    assert lab.trace() == {seed: WHOLE for seed in (1, 2, 3, 4)}


def test_dry_run_starts_and_writes_nothing(lab, go):
    status, out = go("--dry-run")
    assert status == 0 and not lab.runs.exists() and not lab.lines()
    lines = out.splitlines()
    assert len(lines) == 3 and all(line.startswith("new ") for line in lines)
    assert (
        f"{sys.executable} {lab.path}/fake.py --env-id CartPole-v1 --seed 2 --total-timesteps 500 --runs-dir"
        in lines[1]
    )
    lab.tell("2.fail")
    assert go("--seeds", "2")[0] == 1
    assert [line.split()[0] for line in go("--dry-run")[1].splitlines()] == ["done", "failed", "new"]


def test_printed_commands_are_the_ones_that_run(lab, go):
    (command, *_) = go("--dry-run")[1].splitlines()
    subprocess.run(command.split()[1:], check=True)
    assert lab.statuses() == {1: "partial", 2: "new", 3: "new"}
    assert go()[0] == 0 and lab.trace()[1] == WHOLE  # trained by hand, evaluated by the harness


def test_what_was_cut_off_goes_on(lab, go):
    assert go("--seeds", "1", "--eval-episodes", "0")[0] == 0
    (directory,) = lab.runs.glob("*__1__*")
    (directory / "summary.json").unlink()
    (directory / "checkpoints" / "step_0500.pt").unlink()
    assert lab.statuses()[1] == "partial"
    assert go("--seeds", "1")[0] == 0
    assert lab.trace()[1] == ["start", *STEPS, "resume", "step 500", "evaluate", "evaluate"]


def test_more_episodes_of_evaluation_are_played_without_training(lab, go):
    assert go("--seeds", "1", "--eval-episodes", "0")[0] == 0
    assert lab.trace()[1] == ["start", *STEPS]
    assert go("--seeds", "1")[0] == 0 and lab.trace()[1] == WHOLE
    assert go("--seeds", "1", "--eval-episodes", "5")[0] == 0
    assert lab.trace()[1] == [*WHOLE, "evaluate", "evaluate"]
    assert go("--seeds", "1", "--eval-episodes", "3")[0] == 0 and lab.trace()[1].count("evaluate") == 4


def test_an_evaluation_of_an_earlier_checkpoint_does_not_stand_for_the_last(lab, go):
    """As `--evaluate RUN` of a run that is stopped half-way leaves one, and `--evaluate RUN/checkpoints/best.pt`."""
    assert go("--seeds", "1")[0] == 0 and lab.trace()[1] == WHOLE
    (file,) = lab.runs.glob("*__1__*/summary.json")
    summary = json.loads(file.read_text())
    summary["eval"]["deterministic"] |= {"global_step": 200}
    summary["eval"]["stochastic"] |= {"global_step": summary["global_step"]}
    file.write_text(json.dumps(summary))
    assert lab.statuses()[1] == "partial"
    assert go("--seeds", "1")[0] == 0 and lab.trace()[1] == [*WHOLE, "evaluate"]


def test_a_script_that_changes_meanwhile_is_not_run_under_its_old_text(lab, go):
    lab.tell("hold")
    harness = lab.start("--seeds", "2", "--eval-episodes", "0")
    wait_for(lambda: 1 in lab.trace(), "start")
    (lab.path / "fake.py").write_text(SCRIPT + "\n# another learning rate\n")
    lab.forget("hold")
    assert harness.wait() == 1
    assert lab.trace() == {1: ["start", *STEPS]}
    assert "the script has changed" in next((lab.runs / "logs").glob("*__2__*")).read_text()
    assert go("--seeds", "2", "--eval-episodes", "0")[0] == 0  # of the new text


def test_fewer_seeds_of_another_text_leave_no_seeds_of_the_old_one_behind(lab, go):
    def reported():
        runs, problems, missing = read_runs([lab.runs])
        return [run.seed for run in runs], missing, " ".join(problems)

    assert go("--eval-episodes", "0")[0] == 0
    assert go("--seeds", "2", "--eval-episodes", "0")[0] == 0
    assert reported()[0] == [1, 2, 3]  # the same text, so all count
    (lab.path / "fake.py").write_text(SCRIPT + "\n# another learning rate\n")
    assert go("--seeds", "2", "--eval-episodes", "0")[0] == 0
    seeds, missing, problems = reported()
    assert seeds == [1, 2] and missing == {}
    assert problems.partition("Left out, because another script text")[2].count("__3__") == 1


def test_directory_without_a_checkpoint_starts_afresh(lab, go):
    lab.tell("1.kill-early")  # leaves a folder and half a checkpoint
    status, _ = go("--seeds", "1")
    assert status == 0 and lab.trace()[1] == ["start", *WHOLE]
    rows = (next(lab.runs.glob("*__1__*")) / "progress.csv").read_text().splitlines()
    assert len(rows) == 6


def test_other_text_or_flags_are_another_run(lab, go):
    assert go("--seeds", "1", "--eval-episodes", "0")[0] == 0
    first = {path.name for path in lab.runs.glob("CartPole*")}
    (lab.path / "fake.py").write_text(SCRIPT + "\n# another learning rate\n")
    assert go("--seeds", "1", "--eval-episodes", "0")[0] == 0
    assert go("--seeds", "1", "--eval-episodes", "0", "--total-timesteps", "400")[0] == 0
    names = {path.name for path in lab.runs.glob("CartPole*")}
    assert len(names) == 3 and first < names
    assert lab.trace()[1] == ["start", *STEPS, "start", *STEPS, "start", *STEPS[:4]]


# ------------------------------------------------------------------------------------------------ failures and kills
def test_failed_run_is_shown_and_counted_and_the_others_go_on(lab, go):
    lab.tell("2.fail")
    status, out = go()
    assert status == 1 and lab.trace() == {1: WHOLE, 2: WHOLE[:3], 3: WHOLE}
    log = next((lab.runs / "logs").glob("*__2__*"))
    assert f"FAILED   CartPole-v1 fake seed 2: the end of {log}:\n" in out
    assert "    200 steps # 2\n    error: the wheels came off\n" in out
    assert "2 of 3 runs are done, 1 failed: " in out
    status, out = go()  # it stays so, and is shown again
    assert status == 1 and lab.trace()[2] == WHOLE[:3]
    assert "error: the wheels came off" in out
    assert "2 of 3 runs are done, 1 failed (--retry goes on with those): " in out


def test_retry_goes_on_with_what_failed(lab, go):
    lab.tell("2.fail")
    assert go()[0] == 1
    assert go("--retry")[0] == 1 and lab.trace()[2] == ["start", *STEPS[:2], "resume"]
    lab.forget("2.fail")
    status, out = go("--retry")
    assert status == 0 and "3 of 3 runs are done" in out
    assert lab.trace()[2] == ["start", *STEPS[:2], "resume", "resume", *STEPS[2:], "evaluate", "evaluate"]


@pytest.mark.parametrize("order, end", [("usage", "error: --speed is wrong"), ("crash", "RuntimeError: no wheels")])
def test_run_that_cannot_start_is_tried_again_next_time(order, end, lab, go):
    lab.tell(f"1.{order}")
    status, out = go()
    assert status == 1 and f"    {end}\n" in out and "2 of 3 runs are done, 1 failed" in out
    lab.forget(f"1.{order}")
    assert go()[0] == 0 and lab.statuses() == {1: "done", 2: "done", 3: "done"}


def test_failed_evaluation_is_a_failure_and_is_repeated_next_time(lab, go):
    lab.tell("1.fail-evaluation")
    status, out = go("--seeds", "1")
    assert status == 1 and "    no games left\n" in out and lab.trace()[1] == WHOLE[:-1]
    lab.forget("1.fail-evaluation")
    assert go("--seeds", "1")[0] == 0 and lab.trace()[1] == [*WHOLE[:-1], "evaluate", "evaluate"]


def test_script_that_ends_well_without_saying_so_has_failed(lab, go):
    lab.tell("1.no-summary")
    status, out = go("--seeds", "1")
    assert status == 1 and "summary.json" in out and "FAILED" in out and "killed" not in out
    assert lab.started() <= 3


def test_killed_runs_go_on_from_their_checkpoints(lab, go):
    lab.tell("1.kills", "1")
    lab.tell("2.kills", "3")  # and the fourth process ends well
    lab.tell("3.kill-evaluation")
    status, out = go()
    assert status == 0, out
    assert lab.trace()[1] == ["start", "step 100", "resume", *STEPS[1:], "evaluate", "evaluate"]
    assert lab.trace()[2] == [
        *["start", "step 100", "resume", "step 200", "resume", "step 300", "resume"],
        *STEPS[3:],
        *WHOLE[-2:],
    ]
    assert lab.trace()[3] == [*WHOLE, "evaluate"]


def test_run_that_somebody_else_stops_is_left_for_next_time(lab, go):
    lab.tell("2.term")
    status, out = go()
    assert status == 1 and lab.trace() == {1: WHOLE, 2: WHOLE[:3], 3: WHOLE}
    assert "2 of 3 runs are done, 1 are left, and the same command goes on" in out and "FAILED" not in out
    lab.forget("2.term")
    assert go()[0] == 0 and lab.trace()[2] == [*WHOLE[:3], "resume", *WHOLE[3:]]


def test_four_kills_are_enough(lab, go):
    lab.tell("1.kills", "9")
    status, out = go()
    assert status == 1 and lab.trace() == {
        1: ["start", "step 100", "resume", "step 200", "resume", "step 300", "resume", "step 400"],
        2: WHOLE,
        3: WHOLE,
    }
    assert "killed by SIGKILL" in out and "given up" in out and "2 of 3 runs are done, 1 failed" in out
    lab.forget("1.kills")
    assert go()[0] == 0 and lab.trace()[1][-4:] == ["resume", "step 500", "evaluate", "evaluate"]


def test_killed_between_the_last_checkpoint_and_the_summary(lab, go):
    lab.tell("1.kill-at-end")
    status, out = go("--seeds", "1")
    assert status == 0, out
    assert lab.statuses()[1] == "done" and Counter(lab.trace()[1])["step 100"] == 1
    assert lab.trace()[1] == ["start", *STEPS, "resume", "evaluate", "evaluate"]


def test_job_that_cannot_be_worked_on_is_a_failure_and_the_others_go_on(lab, go, monkeypatch):
    execute = run.execute

    def broken(job, *args, **options):
        if job.seed == 2:
            raise OSError(28, "No space left on device")
        return execute(job, *args, **options)

    monkeypatch.setattr(run, "execute", broken)
    status, out = go()
    assert status == 1 and lab.trace() == {1: WHOLE, 3: WHOLE}
    assert "FAILED   CartPole-v1 fake seed 2" in out and "No space left on device" in out
    assert "2 of 3 runs are done, 1 failed" in out


def test_same_cell_twice_is_one_run(lab, go):
    status, out = go("--algos", "fake.py", str(lab.path / "fake.py"), "--env-ids", "CartPole-v1", "CartPole-v1")
    assert status == 0 and "3 of 3 runs are done" in out and lab.trace() == {1: WHOLE, 2: WHOLE, 3: WHOLE}


# ----------------------------------------------------------------------------------------------- harnesses that die
def test_killed_harness_leaves_runs_that_the_next_one_waits_for(lab):
    lab.tell("hold")
    first = lab.start("--workers", "2")
    wait_for(lambda: lab.started() == 2, "two runs")
    first.kill()
    first.wait()
    second = lab.start("--workers", "2")
    wait_for(lambda: lab.said().count("running") == 2, "orphans in the view")
    time.sleep(1.0)
    assert lab.started() == 2 and second.poll() is None  # no third run beside the two
    lab.forget("hold")
    assert second.wait(60) == 0, lab.said()
    assert lab.trace() == {1: WHOLE, 2: WHOLE, 3: WHOLE} and lab.most_at_once() == 2
    assert "3 of 3 runs are done" in lab.said()


def test_harness_killed_during_an_evaluation_and_its_orphan_too(lab):
    lab.tell("1.hold-evaluation")
    lab.tell("2.hold")
    first = lab.start("--workers", "2")
    wait_for(lambda: "evaluate" in lab.trace().get(1, []) and lab.started() == 2, "an evaluation and a run")
    first.kill()
    first.wait()
    second = lab.start("--workers", "2")
    wait_for(lambda: lab.said().count("running") == 2, "orphans in the view")
    os.kill(lab.pids(2)[-1], signal.SIGKILL)
    wait_for(lambda: lab.trace()[2] == ["start", "resume"], "the run to go on")
    lab.forget("1.hold-evaluation")
    lab.forget("2.hold")
    assert second.wait(60) == 0, lab.said()
    assert lab.trace() == {1: WHOLE, 2: ["start", "resume", *WHOLE[1:]], 3: WHOLE} and lab.most_at_once() == 2


def test_two_harnesses_share_the_work_and_no_run(lab):
    lab.tell("hold")
    harnesses = [lab.start("--workers", "1", "--seeds", "4") for _ in range(2)]
    wait_for(lambda: lab.started() == 2, "a run of each")
    lab.forget("hold")
    assert [harness.wait(60) for harness in harnesses] == [0, 0], lab.said(0) + lab.said(1)
    assert lab.trace() == {seed: WHOLE for seed in (1, 2, 3, 4)} and lab.most_at_once() == 2
    logs = "".join(log.read_text() for log in (lab.runs / "logs").iterdir())
    assert {int(pid) for pid in re.findall(r"--run-name \S+ # \S+ (\d+)", logs)} == {h.pid for h in harnesses}
    assert all("4 of 4 runs are done" in lab.said(number) for number in (0, 1))


def test_second_harness_takes_over_when_the_first_is_killed(lab):
    lab.tell("1.hold")
    first = lab.start("--seeds", "2")
    wait_for(lambda: lab.started() == 1, "a run")
    second = lab.start("--seeds", "2")
    wait_for(lambda: lab.trace().get(2) == WHOLE, "the other run")  # while the first one's is left to it
    first.kill()
    lab.forget("1.hold")
    assert second.wait(60) == 0, lab.said()
    assert lab.trace() == {1: WHOLE, 2: WHOLE}


# ------------------------------------------------------------------------------------------------------------ signals
@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_stops_the_runs_which_go_on_later(number, status, lab):
    lab.tell("hold")
    lab.tell("1.deaf")  # so that its iteration outlasts the signal
    harness = lab.start("--workers", "2", start_new_session=True)
    wait_for(lambda: lab.started() == 2, "two runs")
    os.killpg(harness.pid, number)  # as a terminal does
    wait_for(lambda: "stops:" in lab.said(), "answer")
    time.sleep(0.2)
    lab.forget("1.deaf")
    assert harness.wait(60) == status
    assert "stops: every run finishes its iteration and saves" in lab.said()
    assert "0 of 3 runs are done, 3 are left, and the same command goes on" in lab.said()
    assert lab.trace() == {1: WHOLE[:2], 2: WHOLE[:2]}
    assert lab.statuses() == {1: "partial", 2: "partial", 3: "new"}
    lab.forget("hold")
    assert lab.start("--workers", "2").wait(60) == 0, lab.said()
    resumed = [*WHOLE[:2], "resume", *WHOLE[2:]]
    assert lab.trace() == {1: resumed, 2: resumed, 3: WHOLE}


def test_second_ctrl_c_does_not_wait(lab):
    lab.tell("1.deaf")  # in an iteration that never ends
    harness = lab.start()
    wait_for(lambda: lab.started() == 1, "a run")
    harness.send_signal(signal.SIGINT)
    wait_for(lambda: "stops:" in lab.said(), "answer")
    assert harness.poll() is None
    harness.send_signal(signal.SIGINT)
    assert harness.wait(60) == 130 and lab.trace() == {1: ["start"]}
    wait_for(lambda: lab.statuses()[1] == "partial", "end of the run")
    lab.forget("1.deaf")
    assert lab.start().wait(60) == 0 and lab.trace()[1] == ["start", "resume", *WHOLE[1:]]


def test_signal_in_the_first_moment_is_heard(lab, go, monkeypatch):
    lab.tell("hold")
    monkeypatch.setattr(
        run.View, "__init__", lambda *args, init=run.View.__init__: (signal.raise_signal(2), init(*args))[1]
    )
    status, out = go()
    assert status == 130 and "3 are left" in out
    assert set(lab.statuses().values()) <= {"new", "partial"} and lab.started() <= 1


def test_handlers_are_put_back(lab, go):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    assert go("--seeds", "1")[0] == 0
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


# --------------------------------------------------------------------------------------------------------------- view
def screen(text, columns):
    """What a terminal shows after this text, of which no line may be longer than the terminal is wide."""
    lines, row = [""], 0
    for part in re.findall(r"\x1b\[\d*[A-Za-z]|\r|\n|[^\x1b\r\n]+", text):
        if part == "\n":
            row += 1
            lines += [""] * (row == len(lines))
        elif part == "\x1b[J":
            del lines[row + 1 :]
            lines[row] = ""
        elif move := re.fullmatch(r"\x1b\[(\d+)F", part):
            row -= int(move[1])
            assert row >= 0
        elif part != "\r":
            assert not lines[row], "written over"
            lines[row] = part
            assert len(part) < columns or part.startswith(("done    ", "3 of 3 runs")), part
    return "\n".join(lines)


def test_view_on_a_terminal_fits_and_leaves_nothing_behind(lab):
    name = "a-variant-with-a-name-that-is-much-too-long-for-a-terminal-of-eighty-columns"
    suite = SUITE.replace('"fake.py"', f'"{name}"') + f'[variants.{name}]\nalgo = "fake.py"\n'
    (lab.path / "suite.toml").write_text(suite)
    lab.tell("hold")
    ours, theirs = pty.openpty()
    ioctl(ours, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    harness = lab.start("--workers", "2", stdout=theirs, stderr=theirs)
    os.close(theirs)
    text = ""
    while True:
        try:
            text += os.read(ours, 65536).decode()
        except OSError:  # the other end is closed
            break
        if "0 of 3 done, 2 running, 0 failed" in text and (lab.fake / "hold").exists():
            lab.forget("hold")
    os.close(ours)
    assert harness.wait(60) == 0
    assert re.search(r"\n  \[[#.]{10}\] +\d+% +[\d,]+/s  CartPole-v1 a-variant", text), text
    shown = screen(text, 80).rstrip().splitlines()
    assert [line[:8] for line in shown[:-1]] == ["done    "] * 3, shown
    assert shown[-1].startswith("3 of 3 runs are done")


def test_view_is_no_higher_than_the_terminal(lab, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setattr("shutil.get_terminal_size", lambda: os.terminal_size((80, 10)))
    (job, *_) = lab.jobs()
    view = run.View([replace(job, seed=seed) for seed in range(30)], lab.runs)
    monkeypatch.setattr(run, "is_running", lambda *args: True)
    view.update({})
    view.update({})
    lines = capsys.readouterr().out.splitlines()
    assert (
        len(lines) == 18
        and lines[0].startswith("0 of 30 done, 30 running")
        and lines[9].startswith("\x1b[9F\x1b[J0 of")
    )


def test_view_in_a_pipe_is_a_line_per_event(lab, go):
    lab.tell("2.fail")
    _, out = go("--workers", "2")
    assert "\x1b" not in out and "\r" not in out
    assert Counter(line.split()[0] for line in out.splitlines()) >= Counter(["done", "done", "FAILED"])
    assert len(out.splitlines()) <= 12


# ------------------------------------------------------------------------------------------------------------- suites
@pytest.mark.parametrize("name, number", SHIPPED.items())
def test_shipped_suite_has_its_runs_and_the_scripts_take_its_flags(name, number):
    suite = read_suite(name)
    matrix = jobs_of(suite, threads=2)
    assert len(matrix) == number == len({job.name for job in matrix}) == len({job.key for job in matrix})
    assert suite.description
    cells = {(env, algo) for env in suite.envs for algo in suite.algos} - {("CartPole-v1", "sac")}
    first = matrix[: len(cells)]
    assert {(job.env_id, job.algo) for job in first} == cells
    assert {job.seed for job in first} == {1}  # seed by seed
    for job in first if name != "random" else ():
        script = importlib.import_module(Path(job.command[-1]).stem)
        args = script.parse_args(job.start(Path("runs"))[2:])
        script.check_args(args)
        getattr(script, "check_batch", lambda args: None)(args)
        assert (args.env_id, args.seed, args.run_name, args.exp_name) == (job.env_id, 1, job.name, job.algo)
        assert args.total_timesteps == suite.total_timesteps
        assert args.num_threads == job.threads == (2 if name.startswith("atari") else 0)


def test_every_shipped_suite_is_in_this_test():
    assert set(SHIPPED) == {path.stem for path in SUITES.glob("*.toml")}


def refusal(lab, text, suite=SUITE):
    """What `run` says of a suite with this text behind (or instead)."""
    (lab.path / "suite.toml").write_text(suite + text)
    with pytest.raises(UsageError) as error:
        jobs_of(read_suite("suite.toml"))
    assert not lab.runs.exists()
    return str(error.value)


RULE = "[[arguments]]\nflags = { speed = 1 }\n"


@pytest.mark.parametrize(
    "text, message",
    [
        ("seed = 3", "suite.toml: seed: no such key; did you mean seeds?"),
        ("colour = 3", "suite.toml: colour: no such key; there are envs, algos, "),
        ("normalise = 3", "suite.toml: normalise: must be true or false, but is 3."),
        ("description = [1]", "suite.toml: description: must be a text, but is [1]."),
        ("published = 'x'", "suite.toml: published: must be a list of source keys, but is 'x'."),
        ("envs = ['x']", "suite.toml: Cannot overwrite a value (at line 7"),
        ("x = ", "suite.toml: Invalid value (at "),
        ("arguments = [3]", "suite.toml: arguments[0]: must be a table, but is 3; write [[arguments]]."),
        ("arguments = 3", "suite.toml: arguments: must be written as [[arguments]] tables, but is 3."),
        ("[[arguments]]\nenvs = ['*']", "suite.toml: arguments[0]: has no flags."),
        (RULE + "[[arguments]]\nenvs = 'x'", "suite.toml: arguments[1].envs: must be a list of patterns, but is 'x'."),
        (RULE + "env = ['*']", "suite.toml: arguments[0].env: no such key; did you mean envs?"),
        (RULE + "envs = [1]", "suite.toml: arguments[0].envs: must be a list of patterns, but is [1]."),
        (RULE + RULE + "algo = ['*']", "suite.toml: arguments[1].algo: no such key; did you mean algos?"),
        (RULE + "[[arguments]]\nflags = 3", "suite.toml: arguments[1].flags: must be a table of flags, but is 3."),
        ("[[arguments]]\nflags = { seed = 5 }", "suite.toml: arguments[0].flags.seed: is set for each run"),
        ("[[arguments]]\nflags = { runs_dir = 'x' }", "suite.toml: arguments[0].flags.runs_dir: is set for each run"),
        ("[variants.x]\nflags = {}", "suite.toml: variants.x: a variant needs algo"),
        ("[variants]\nx = 3", "suite.toml: variants.x: a variant needs algo"),
        ("[variants.'x+y']\nflags = {}", 'suite.toml: variants."x+y": a variant needs algo'),
        ("[variants.x]\nalgo = 3", "suite.toml: variants.x.algo: must be a script or a peer, but is 3."),
        ("[variants.x]\nalgo = 'ppo'\nflag = {}", "suite.toml: variants.x.flag: no such key; did you mean flags?"),
        (
            "[variants.x]\nalgo = 'ppo'\n[variants.y]\nalgo = 'ppo'\nflags = 3",
            "suite.toml: variants.y.flags: must be a table of flags, but is 3.",
        ),
        ("[variants.x]\nalgo = 'ppo'\nflags.env-id = 'x'", "suite.toml: variants.x.flags.env-id: is set for each run"),
        (
            "[variants.x]\nalgo = 'ppo'\nflags = { speed = { fast = 1 } }",
            "suite.toml: variants.x.flags.speed: must be a number, a text, true",
        ),
        (
            "[variants.x]\nalgo = 'ppo'\nflags = { speed = [[1]] }",
            "suite.toml: variants.x.flags.speed: must be a number, a text, true",
        ),
        (
            "[variants.x]\nalgo = 'ppo'\n[variants.y]\nalgo = 'pppo'",
            "suite.toml: variants.y.algo: pppo is no script, no peer and no",
        ),
        (
            "[[arguments]]\nflags = { learning-rate = ['0.001', '--seed', '7'] }",
            "suite.toml: arguments[0].flags.learning-rate: '--seed' would be a flag of its own.",
        ),
        ("[[arguments]]\nflags = { speed = '--seed=7' }", "flags.speed: '--seed=7' would be a flag of its own."),
        ("[[arguments]]\nflags = { speed = '-s' }", "flags.speed: '-s' would be a flag of its own."),
        ("[[arguments]]\nflags = { 'seed=7' = 1 }", '"seed=7": is no name of a flag.'),
        ("[[arguments]]\nflags = { '' = 1 }", '"": is no name of a flag.'),
        ("[[arguments]]\nflags = { no-resume = true }", "flags.no-resume: is set for each run"),
        ("x = " + 5000 * "[" + 5000 * "]", "suite.toml: lists or tables are nested too deep."),
        ("[variants.x]\nalgo = 'gone.py'", "suite.toml: variants.x.algo: gone.py is no script"),
        ("published = ['slm_lib']", "suite.toml: published: there is no source slm_lib; did you mean slm_lab?"),
        (
            RULE + "[[arguments]]\nenvs = ['CartPol-*']\nflags = {}",
            "suite.toml: arguments[1]: matches none of the suite's",
        ),
        (RULE + "algos = ['fake']", "suite.toml: arguments[0]: matches none of the suite's environments and algos."),
    ],
)
def test_error_behind_a_suite_names_file_and_key(text, message, lab):
    assert message in refusal(lab, text + "\n")


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("envs = ", "# ", "envs: is missing or empty"),
        ("algos = ", "# ", "algos: is missing or empty"),
        ('["CartPole-v1"]', "[]", "suite.toml: envs: is missing or empty"),
        ('["CartPole-v1"]', "[1]", "suite.toml: envs: "),
        (
            '["CartPole-v1"]',
            "'CartPole-v1'",
            "suite.toml: envs: must be a list of environment ids, but is 'CartPole-v1'.",
        ),
        ('["CartPole-v1"]', "['CartPol-v1']", "CartPol-v1 is not registered in gymnasium; did you mean CartPole-v"),
        ('["CartPole-v1"]', "['nowhere:CartPole-v1']", "environment nowhere:CartPole-v1: No module named 'nowhere'"),
        ('"fake.py"', '"pppo"', "pppo is no script, no peer and no variant of the suite; did you mean ppo?"),
        ('"fake.py"', '"sb3:pp"', "sb3:pp is no script, no peer and no variant of the suite; did you mean sb3:ppo?"),
        ('"fake.py"', '"gone.py"', "gone.py is no script"),
        ('"fake.py"', '"grpo_toy"', "grpo_toy is no script that can be run here: its text has no --env-id or no --run"),
        (
            '"fake.py"',
            f'"{ROOT}/benchmarks/run.py"',
            "run.py is no script that can be run here: its text has no --env-id",
        ),
        ("seeds = 3", "seeds = 0", "suite.toml: seeds: must be a whole number from 1 to 10,000"),
        ("seeds = 3", "seeds = 100_000_000", "suite.toml: seeds: must be a whole number from 1 to 10,000"),
        ("seeds = 3", "seeds = [1_099_511_627_776]", "suite.toml: seeds: must be whole numbers of 0 or more, less"),
        ("timesteps = 500", f"timesteps = {10**30}", "suite.toml: total_timesteps: must be a whole number from 1"),
        ("timesteps = 500", f"timesteps = {'9' * 5000}", "suite.toml: Exceeds the limit"),
        ("episodes = 2", f"episodes = {10**12}", "suite.toml: eval_episodes: must be a whole number from 0"),
        (
            "3\ntotal_timesteps = 500\neval_episodes = 2",
            "0\neval_episodes = 0",
            "suite.toml: seeds: must be a whole number",
        ),
        ("seeds = 3", "seeds = [true]", "suite.toml: seeds: must be whole numbers of 0 or more"),
        ("seeds = 3", "seeds = -1", "suite.toml: seeds: must be"),
        ("seeds = 3", "seeds = []", "suite.toml: seeds: must be"),
        ("seeds = 3", "seeds = [1, -1]", "suite.toml: seeds: must be"),
        ("seeds = 3", "seeds = [1, 'x']", "suite.toml: seeds: must be"),
        ("seeds = 3", "seeds = 2.5", "suite.toml: seeds: must be a number of seeds, or a list of them"),
        ("seeds = 3", "seeds = true", "suite.toml: seeds: must be a number of seeds, or a list of them"),
        ("timesteps = 500", "timesteps = 0", "suite.toml: total_timesteps: must be"),
        ("timesteps = 500", "timesteps = 5e5", "suite.toml: total_timesteps: must be a whole number"),
        (
            "seeds = 3\ntotal_timesteps = 500",
            "seeds = [1]\ntotal_timesteps = 0",
            "suite.toml: total_timesteps: must be",
        ),
        ("episodes = 2", "episodes = -2", "suite.toml: eval_episodes: must be"),
    ],
)
def test_error_in_a_suite_names_file_and_key(old, new, message, lab):
    assert message in refusal(lab, "", SUITE.replace(old, new))


def test_files_that_are_no_suites(lab):
    with pytest.raises(UsageError, match="there is no suite clasic; there are atari, .*classic"):
        read_suite("clasic")
    with pytest.raises(UsageError, match="there is no suite gone.toml"):
        read_suite("gone.toml")
    (lab.path / "suite.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match=r"suite.toml cannot be read as UTF-8 \(byte 0: invalid start byte\)"):
        read_suite("suite.toml")


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--workers", "0"], "--workers is 0"),
        (["--workers", "1000000"], "--workers is 1000000, but must be a whole number from 1 to 1,000."),
        (["--threads", "100000"], "--threads is 100000, but must be a whole number from 0 to 1,024."),
        (["--seeds", "-1"], "--seeds is -1, but must be a whole number from 0 to 10,000."),
        (["--seeds", "100000000"], "--seeds is 100000000, but must be"),
        (["--seeds", "10000", "--env-ids", *(f"CartPole-v{n % 2}" for n in range(11))], "these are 110,000 runs"),
        (["--total-timesteps", "-1"], "--total-timesteps is -1, but must be a whole number from 0"),
        (["--total-timesteps", str(10**30)], "but must be a whole number from 0 to 1,000,000,000,000,000."),
        (["--eval-episodes", "-2"], "--eval-episodes is -2, but must be a whole number from 0"),
        (["--algos", f"{'x' * 300}"], "xxx is no script, no peer"),
        (["--algos", f"{'x' * 300}.py"], "xxx.py is no script, no peer"),
        (["--env-ids", "..:CartPole-v1"], "environment ..:CartPole-v1: importing .. fails (TypeError"),
        (["--runs-dir", f"new/{'x' * 300}"], "cannot be a folder of runs (File name too long)"),
        (["--env-ids", "CartPole"], "did you mean CartPole-v"),
        (["--algos", "fakee.py"], "fakee.py is no script"),
        (["--algos", "other/fake.py", "fake.py"], "would be one column, fake; rename one"),
        (["--runs-dir", "fake.py"], "fake.py is no folder; move it away, or choose another --runs-dir."),
        (["--runs-dir", "/proc/nowhere"], "/proc/nowhere cannot be a folder of runs"),
    ],
)
def test_wrong_usage_starts_nothing(flags, message, lab, go):
    (lab.path / "other").mkdir()
    (lab.path / "other" / "fake.py").write_text(SCRIPT + "# mine\n")
    status, out = go(*flags)
    assert status == 2 and out.startswith("error: ") and message in out and out.count("\n") == 1
    assert not lab.runs.exists() and not lab.lines()


@pytest.mark.parametrize("variant", [False, True])
@pytest.mark.parametrize(
    "flag, message",
    [
        ("speeed = 1", "speeed: fake.py has no such flag; did you mean speed?"),
        ("colour = 'red'", "colour: fake.py has no such flag; see its --help."),
        ("no_turb = true", "no_turb: fake.py has no such flag; did you mean turbo?"),
        ("width = 'wide'", "width: fake.py takes a whole number, not wide."),
        ("width = true", "width: fake.py takes a whole number, not true."),
        ("turbo = 'false'", "turbo: fake.py takes true or false, not false."),
        ("width = [1, 2]", "width: fake.py takes one value, not 1 2."),
        ('"width(" = 2', '"width(": fake.py has no such flag; did you mean width?'),
        ("mode = 'slo'", "mode: fake.py takes quick, slow, not slo."),
    ],
)
def test_flag_that_a_script_has_not_starts_nothing(variant, flag, message, lab, go):
    fields = 'mode: Literal["quick", "slow"] = "quick"\n    width: int | None = None\n'
    (lab.path / "fake.py").write_text(SCRIPT.replace("turbo: bool", f"{fields}    turbo: bool"))
    suite = SUITE.replace('"fake.py"', '"fake.py", "fast"' if variant else '"fake.py"')
    table = "[variants.fast]\nalgo = 'fake.py'\n" if variant else "[[arguments]]\n"
    (lab.path / "suite.toml").write_text(f"{suite}{table}flags = {{ {flag}, speed = -1 }}\n")
    status, out = go()
    place = "variants.fast" if variant else "arguments[0]"
    assert status == 2 and out == f"error: suite.toml: {place}.flags.{message}\n"
    assert not lab.runs.exists() and not lab.lines()


def test_flags_are_refused_where_they_are_and_not_where_another_table_wins(lab):
    text = SUITE + "[[arguments]]\nflags = { speed = 1 }\n[[arguments]]\nflags = { speed = 'x', turbo = 1 }\n"
    with pytest.raises(UsageError, match=r"suite.toml: arguments\[1\].flags.speed: fake.py takes a number, not x."):
        flags_of(lab, text)


@pytest.mark.parametrize(
    "text, message",
    [
        (SCRIPT + "import nowhere\n", "cannot be imported: ModuleNotFoundError: No module named 'nowhere'."),
        (SCRIPT.replace("parse_args", "parse"), "has no function parse_args(argv) that says what arguments it takes."),
    ],
)
def test_script_that_does_not_say_its_arguments_starts_nothing(text, message, lab, go):
    (lab.path / "fake.py").write_text(text)
    (lab.path / "suite.toml").write_text(SUITE + RULE)
    assert go() == (2, f"error: {lab.path}/fake.py {message}\n")
    assert not lab.runs.exists() and not lab.lines()


def test_scripts_without_flags_in_the_suite_are_not_asked_for_their_arguments(lab, monkeypatch):
    asked = []
    ask = run.arguments_of
    monkeypatch.setattr(run, "arguments_of", lambda *whose, **more: asked.append(whose) or ask(*whose, **more))
    flags_of(lab, SUITE + "[variants.same]\nalgo = 'fake.py'\n", "--algos", "fake.py", "same")
    assert not asked
    flags_of(lab, MATRIX)
    assert len(asked) == 1


def test_budget_that_is_no_whole_number_is_refused(lab):
    text = SUITE.replace('"fake.py"', '"ppo"') + "[[arguments]]\nflags = { total_timesteps = 'many' }\n"
    message = r"suite.toml: arguments\[0\].flags.total_timesteps: ppo.py takes a whole number, not many."
    with pytest.raises(UsageError, match=message):
        flags_of(lab, text)


def test_peer_with_the_arguments_of_our_script_takes_its_flags(lab, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    text = SUITE.replace("fake.py", "sb3:ppo")
    ours = "hyperparameters = 'ours', "
    rule = "[[arguments]]\nflags = {{ {}clip-coef = 0.1 }}\n"
    (flags,) = flags_of(lab, text + rule.format(ours)).values()
    assert flags == "--clip-coef 0.1 --hyperparameters ours --total-timesteps 500"
    with pytest.raises(UsageError, match="flags.clip-coef: sb3:ppo has no such flag; did you mean clip-"):
        flags_of(lab, text + rule.format(""))


@pytest.mark.parametrize(
    "peer, package", [("sb3:ppo", "stable_baselines3"), ("sb3:a2c", "stable_baselines3"), ("sb3:trpo", "sb3_contrib")]
)
def test_peer_without_its_package_starts_nothing(peer, package, lab, go, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    status, out = go("--algos", "fake.py", peer)
    assert status == 2 and out == f'error: {peer} needs {package}: pip install -c constraints.txt -e ".[peers]"\n'
    assert not lab.runs.exists() and not lab.lines()
    assert go("--algos", "random", "--dry-run")[0] == 0


def test_cells_that_a_script_cannot_play_are_left_out(lab, go, capsys):
    text = (
        SUITE.replace('["CartPole-v1"]', '["CartPole-v1", "Pendulum-v1"]').replace("fake.py", "soft")
        + """
    [variants.soft]
    algo = "sac"
    """
    )
    assert {*flags_of(lab, text)} == {("Pendulum-v1", "soft")}
    status, out = go("--algos", "soft", "sb3:sac", "fake.py", "--dry-run")
    assert status == 0 and out.count(" --env-id CartPole-v1") == 3 and out.count(" --env-id Pendulum-v1") == 9
    for name in ("sac", "sb3:sac"):
        assert f"left out: {name} acts in boxes only, and CartPole-v1 has other actions\n" in out
    status, out = go("--algos", "sac", "--env-ids", "CartPole-v1", "Acrobot-v1")
    assert status == 2 and out == "error: sac acts in boxes only, and CartPole-v1 has other actions.\n"
    assert not lab.runs.exists()


def test_an_environment_that_cannot_be_made_is_left_to_its_run(monkeypatch):
    monkeypatch.setattr("gymnasium.make", lambda env_id: 1 / 0)
    jobs.acts_in_a_box.cache_clear()
    assert jobs.cannot_play("sac", "CartPole-v1") == ""
    jobs.acts_in_a_box.cache_clear()
    assert jobs.cannot_play("ppo", "CartPole-v1") == ""


def flags_of(lab, text, *flags):
    """{(environment, algorithm): flags} of a suite."""
    (lab.path / "suite.toml").write_text(text)
    options = tyro.cli(run.Options, args=["suite.toml", *flags])
    return {(job.env_id, job.algo): " ".join(job.flags) for job in run.plan(options)[2]}


MATRIX = """
envs = ["CartPole-v1", "Acrobot-v1"]
algos = ["fake.py", "fast", "slow"]
seeds = [7]
total_timesteps = 500

[[arguments]]
flags = { speed = 1, turbo = true }

[[arguments]]
envs = ["Acro*", "Nothing-v0"]
flags = { speed = 2, total-timesteps = 900 }

[[arguments]]
algos = ["slow"]
flags = { turbo = false }

[variants.fast]
algo = "fake.py"
flags = { speed = 3 }

[variants.slow]
algo = "fake.py"
"""


def test_later_rules_win_and_variants_come_last(lab):
    assert flags_of(lab, MATRIX) == {
        ("CartPole-v1", "fake"): "--speed 1 --total-timesteps 500 --turbo",
        ("CartPole-v1", "fast"): "--exp-name fast --speed 3 --total-timesteps 500 --turbo",
        ("CartPole-v1", "slow"): "--exp-name slow --speed 1 --total-timesteps 500 --no-turbo",
        ("Acrobot-v1", "fake"): "--speed 2 --total-timesteps 900 --turbo",
        ("Acrobot-v1", "fast"): "--exp-name fast --speed 3 --total-timesteps 900 --turbo",
        ("Acrobot-v1", "slow"): "--exp-name slow --speed 2 --total-timesteps 900 --no-turbo",
    }


def test_rule_for_a_script_holds_for_its_variants(lab):
    text = MATRIX.replace('algos = ["slow"]', 'algos = ["fake.py"]')
    assert all(flags.endswith("--no-turbo") for flags in flags_of(lab, text).values())


def test_command_line_wins_over_the_suite(lab):
    changes = ["--env-ids", "Acrobot-v1", "--algos", "fast", "--total-timesteps", "200", "--seeds", "2"]
    assert flags_of(lab, MATRIX, *changes) == {
        ("Acrobot-v1", "fast"): "--exp-name fast --speed 3 --total-timesteps 200 --turbo"
    }
    options = tyro.cli(run.Options, args=["suite.toml", *changes])
    assert [job.seed for job in run.plan(options)[2]] == [1, 2]
    assert {job.eval_episodes for job in run.plan(options)[2]} == {100}
    options = tyro.cli(run.Options, args=["suite.toml", "--eval-episodes", "0"])
    assert {(job.seed, job.eval_episodes) for job in run.plan(options)[2]} == {(7, 0)}


def test_underscores_are_dashes_when_flags_are_merged(lab):
    text = MATRIX.replace("total-timesteps = 900", "total_timesteps = 900").replace(
        "speed = 3", "total-timesteps = 100"
    )
    flags = flags_of(lab, text)
    assert flags["Acrobot-v1", "fake"] == "--speed 2 --total-timesteps 900 --turbo"
    assert flags["Acrobot-v1", "fast"] == "--exp-name fast --speed 2 --total-timesteps 100 --turbo"


def test_seeds_may_be_listed(lab):
    (lab.path / "suite.toml").write_text(SUITE.replace("seeds = 3", "seeds = [0, 12, 5]"))
    assert [job.seed for job in lab.jobs()] == [0, 12, 5]


def test_underscores_and_lists_and_numbers_in_flags():
    assert jobs.as_flags({"b": [1, 2], "a-rate": 3e-4, "c": True, "d": False, "e": "x y"}) == (
        *("--a-rate", "0.0003", "--b", "1", "2", "--c", "--no-d", "--e", "x y"),
    )


def test_suite_without_a_budget_leaves_it_to_the_script(lab, go):
    (lab.path / "suite.toml").write_text(SUITE.replace("total_timesteps", "# total_timesteps"))
    assert "--total-timesteps" not in go("--dry-run", "--seeds", "1")[1]
    assert go("--seeds", "1")[0] == 0 and lab.trace() == {1: WHOLE}


def test_key_depends_on_what_makes_the_result_and_on_nothing_else(lab):
    (job, *_) = lab.jobs()
    changes = dict(text="x", env_id="Acrobot-v1", seed=9, flags=("--speed", "1"))
    keys = {replace(job, **{name: value}).key for name, value in changes.items()}
    assert len(keys | {job.key}) == 5
    same = dict(algo="other", command=("python3", "elsewhere/fake.py"), eval_episodes=7, threads=3)
    assert {replace(job, **{name: value}).key for name, value in same.items()} == {job.key}
    assert replace(job, env_id="ALE/Pong-v5", algo="sb3:ppo").name.startswith("ALE-Pong-v5__sb3-ppo__1__")


def test_a_peer_is_another_one_where_its_environments_change(lab, monkeypatch):
    text = jobs.text_of("sb3:ppo")
    read = jobs.read_text
    for old, new, same in (("class SyncEnvs", "class Envs", False), ("def surrogate_objective", "def l_clip", True)):
        monkeypatch.setattr(jobs, "read_text", lambda path: read(path).replace(old, new))  # noqa: B023
        assert (jobs.text_of("sb3:ppo") == text) == same
    assert jobs.text_of("random") != jobs.text_of("ppo")


@pytest.mark.parametrize(
    "text, says",
    [
        (
            "raise ValueError('no\\nlicence')",
            "environment odd_module:X-v0: importing odd_module fails (ValueError: no licence)",
        ),
        ("import sys; sys.exit(3)", "importing odd_module fails (SystemExit: 3)"),
        ("x = (", "importing odd_module fails (SyntaxError: "),
        ("import nowhere", "No module named 'nowhere'; searched were PYTHONPATH and "),
        ("", "X-v0 is not registered in gymnasium"),
    ],
)
def test_a_module_of_environments_that_cannot_be_imported(text, says, lab, go, monkeypatch):
    (lab.path / "odd_module.py").write_text(text + "\n")
    monkeypatch.syspath_prepend(lab.path)
    monkeypatch.delitem(sys.modules, "odd_module", raising=False)
    status, out = go("--env-ids", "odd_module:X-v0")
    assert status == 2 and out.startswith("error: ") and says in out and out.count("\n") == 1
    assert not lab.runs.exists()


def test_a_run_whose_name_would_be_too_long_starts_nothing(lab, go):
    (lab.path / "suite.toml").write_text(
        SUITE.replace('"fake.py"', f'"{"x" * 220}"') + f"[variants.{'x' * 220}]\nalgo='fake.py'"
    )
    status, out = go()
    assert status == 2 and "the name of the run directory, CartPole-v1__xxx" in out and out.count("\n") == 1
    assert not lab.runs.exists()


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("logs", "", "logs is no folder"),
        ("logs/JOB.log/", "", ".log is no file"),
        ("JOB", "", "is no folder"),
        ("suite.json", "", "suite.json: is empty"),
        ("suite.json", "{", "suite.json: is no JSON: "),
        ("suite.json", "\xff", "suite.json: is no JSON: "),
        ("suite.json", "[" * 100_000, "suite.json: is no JSON: "),
        ("suite.json", "[]", "suite.json: must hold a table, but holds []"),
        ("suite.json", '{"commands": 3}', "suite.json: commands must be a list of texts, but is 3"),
        ("suite.json", '{"commands": [[1]]}', "suite.json: commands must be a list of texts, but is [[1]]"),
        ("suite.json", '{"cells": {"a": 1}}', "suite.json: cells must be a list of cells, but is {'a': 1}"),
        ("suite.json", '{"cells": [3]}', "suite.json: cells[0] must be a table, but is 3"),
        ("suite.json", '{"cells": [{}]}', "suite.json: cells[0] has no env_id"),
        (
            "suite.json",
            '{"cells": [{"env_id": "a", "algo": "b", "seed": [1], "name": "c"}]}',
            "suite.json: cells[0].seed must be a whole number, but is [1]",
        ),
        ("suite.json/", "", "suite.json: cannot be read (Is a directory)"),
    ],
)
def test_a_folder_with_what_run_has_not_written_is_refused(name, content, says, lab, go):
    path = lab.runs / name.replace("JOB", lab.jobs()[0].name)
    (path if name.endswith("/") else path.parent).mkdir(parents=True)
    if not name.endswith("/"):
        path.write_bytes(content.encode("latin-1"))
    before = sorted(lab.runs.rglob("*"))
    status, out = go()
    assert status == 2 and out.startswith("error: ") and says in out and out.count("\n") == 1
    assert sorted(lab.runs.rglob("*")) == before


@pytest.mark.parametrize(
    "summary",
    [
        3,
        {"status": ["completed"]},
        {"status": "completed", "eval": {"deterministic": 3}},
        {"status": "completed", "eval": {"deterministic": {"episodes": "many"}, "stochastic": None}},
        {
            "status": "completed",
            "train_last100": "high",
            "eval": {k: {"episodes": 2} for k in ("deterministic", "stochastic")},
        },
    ],
)
def test_a_damaged_summary_is_no_traceback_and_the_run_is_done_in_the_end(summary, lab, go):
    assert go()[0] == 0
    (lab.runs / lab.jobs()[0].name / "summary.json").write_text(json.dumps(summary))
    status, out = go()
    assert status == 0 and "3 of 3 runs are done" in out


def test_text_is_utf_8_whatever_the_locale(lab):
    """In the C locale, and Python names each place where the locale would have been asked."""
    (lab.path / "suite.toml").write_text(
        SUITE.replace("seeds = 3", 'seeds = 1\ndescription = "Größe 测试"'), encoding="utf-8"
    )
    (lab.path / "fake.py").write_text(SCRIPT + "# Größe\n", encoding="utf-8")
    place = {"PYTHONPATH": str(ROOT), "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    options = dict(cwd=lab.path, env=os.environ | place, capture_output=True, encoding="utf-8")
    warned = [
        sys.executable,
        "-X",
        "warn_default_encoding",
        "-W",
        "error::EncodingWarning:benchmarks",
        "-m",
        "benchmarks",
    ]
    for words in (["run", "suite.toml"], ["report", "runs/suite", "--title", "Größe"]):
        done = subprocess.run([*warned, *words], **options)
        assert done.returncode == 0, done.stderr
        assert "EncodingWarning" not in "".join(line for line in done.stderr.splitlines() if "benchmarks" in line)
    assert "Größe 测试" in (lab.path / "runs" / "suite" / "report" / "report.html").read_text(encoding="utf-8")


def test_threads_are_for_atari_alone(lab, monkeypatch):
    monkeypatch.setattr("ppo.cores", lambda: 12)  # what this process may use, whatever the machine has
    options = tyro.cli(run.Options, args=["atari", "--env-ids", "ALE/Pong-v5", "CartPole-v1", "--workers", "1"])
    threads = {job.env_id: job.threads for job in run.plan(options)[2]}
    assert threads == {"ALE/Pong-v5": 12, "CartPole-v1": 0}
    assert {job.threads for job in run.plan(replace(options, threads=3))[2]} == {3, 0}
    assert {job.threads for job in run.plan(replace(options, workers=999))[2]} == {1, 0}
