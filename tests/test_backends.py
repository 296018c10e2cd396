"""backends: what is wrong is said before anything starts; then Slurm's tasks, through submitit's stand-in for Slurm on
this machine, and a Ray cluster of two nodes. Both need their extra, and are skipped without it. The script is a fake.
"""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import backends
from benchmarks.__main__ import main
from benchmarks.jobs import ROOT, Job, UsageError, lock, log_of, status_of

# 20 steps, a checkpoint after each; it waits after the first until there is a file "go" beside the run.
SCRIPT = """
import json, os, signal, sys, time
from pathlib import Path

flags, signals = dict(zip(sys.argv[1::2], sys.argv[2::2])), []
run = Path(flags.get("--resume") or f"{flags['--runs-dir']}/{flags['--run-name']}")


def remember(number, frame):
    print(f"signal {number}", flush=True)
    signals.append(number)


signal.signal(signal.SIGTERM, remember)
(run / "checkpoints").mkdir(parents=True, exist_ok=True)
step = max([int(path.stem[5:]) for path in (run / "checkpoints").iterdir()], default=0)
print(f"from step {step}", flush=True)
while step < 20 and not signals:
    step += 1
    with open(run / "progress.csv", "a") as file:
        file.write(f"{step},1,10\\n")
    (run / "checkpoints" / f"step_{step:04}.pt").touch()
    while not (run.parent / "go").exists() and not signals:
        time.sleep(0.01)
time.sleep(0.3 * len(signals))  # a second signal would come now
status = "completed" if step == 20 else "interrupted"
(run / "summary.json").write_text(json.dumps(dict(status=status, global_step=step)))
sys.exit(128 + signals[0] if status == "interrupted" else 0)
"""


def options(backend="slurm", **changes):
    return SimpleNamespace(**dict(backend=backend, backend_args=(), suite="smoke", workers=2, retry=False) | changes)


@pytest.fixture
def jobs(tmp_path):
    script = tmp_path / "fake.py"
    script.write_text(SCRIPT)
    commands = dict(command=(sys.executable, str(script)), text=SCRIPT, eval_episodes=0)
    return [Job(algo="fake", env_id="CartPole-v1", seed=seed, **commands) for seed in (1, 2)]


@pytest.fixture
def runs(tmp_path):
    (tmp_path / "runs").mkdir()
    return tmp_path / "runs"


def wait(what, seconds=60.0):
    """Until what() is true; what it returns."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if result := what():
            return result
        time.sleep(0.05)
    raise AssertionError("waited in vain")


def steps(job, runs):
    """What its log says about where its processes began, and every step that they have done."""
    log = log_of(job, runs).read_text()
    begun = [int(line.split()[-1]) for line in log.splitlines() if line.startswith("from step")]
    return begun, [int(line.split(",")[0]) for line in (runs / job.name / "progress.csv").read_text().splitlines()]


def children_of(pid):
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True)
    return [int(line) for line in found.stdout.split()]


def training(job):
    """The process that is training a job, and the one that watches over it."""
    found = subprocess.run(["pgrep", "-f", f"{job.command[1]} .*{job.name}"], capture_output=True, text=True)
    for pid in map(int, found.stdout.split()):
        try:
            return pid, int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            pass


# -------------------------------------------------------------------------------------------------- what is wrong
@pytest.mark.parametrize("backend, extra", [("slurm", "submitit"), ("ray", "ray")])
def test_a_missing_extra_is_named_and_nothing_is_created(monkeypatch, capsys, tmp_path, backend, extra):
    monkeypatch.setitem(sys.modules, extra, None)
    assert main(["run", "smoke", "--backend", backend, "--runs-dir", str(tmp_path / "runs")]) == 2
    assert f'needs {extra}: pip install -c constraints.txt -e ".[{backend}]"' in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "backend, argument, said",
    [
        ("local", "time=3", "--backend local has no argument time; it takes none"),
        ("slurm", "tme=3", "--backend slurm has no argument tme; there are account"),
        ("slurm", "array_parallelism=3", "has no argument array_parallelism"),  # it is --workers
        ("slurm", "time=1:00:00", "time must be a number, but is 1:00:00"),
        ("slurm", "time", "takes NAME=VALUE, and time is not that"),
        ("slurm", "time=", "takes NAME=VALUE"),
        ("ray", "partition=main", "has no argument partition; there are address, num_cpus, num_gpus"),
        ("ray", "num_gpus=one", "num_gpus must be a number"),
    ],
)
def test_wrong_arguments_of_a_backend(capsys, tmp_path, backend, argument, said):
    if backend != "local":
        pytest.importorskip({"slurm": "submitit", "ray": "ray"}[backend])
    runs = str(tmp_path / "runs")
    assert main(["run", "smoke", "--backend", backend, "--runs-dir", runs, "--backend-args", argument]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_the_arguments_become_those_of_the_backend(monkeypatch):
    pytest.importorskip("submitit")
    monkeypatch.setattr(backends.shutil, "which", lambda name: f"/usr/bin/{name}")
    given = ("partition=main", "time=90", "mem_gb=0.5", "exclusive=true", "account=0012", "setup=module load cuda=12")
    assert backends.check(options(backend_args=given)) == dict(
        partition="main", time=90, mem_gb=0.5, exclusive=True, account="0012", setup="module load cuda=12"
    )
    monkeypatch.setattr(backends.shutil, "which", lambda name: None)
    with pytest.raises(UsageError, match="no sbatch"):
        backends.check(options())


# ------------------------------------------------------------------------------------------------------- Slurm
def test_states_come_from_squeue_and_its_failure_is_said(monkeypatch, tmp_path):
    squeue = tmp_path / "squeue"
    squeue.write_text("#!/bin/sh\necho '12_0 RUNNING'; echo '12_1 PENDING'; echo '13 NODE_FAIL'\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert backends.queue() == {"12_0": "RUNNING", "12_1": "PENDING", "13": "NODE_FAIL"}
    squeue.write_text("#!/bin/sh\necho 'slurm_load_jobs error: no contact' >&2; exit 1\n")
    with pytest.raises(UsageError, match="squeue fails: slurm_load_jobs error: no contact"):
        backends.queue()


@pytest.fixture
def slurm(monkeypatch, tmp_path, jobs, runs):
    """Starts the backend with submitit's local cluster in the place of Slurm: a task is a process that puts itself back
    into the queue by starting again; squeue shows those that are alive, and scancel is a script that sends signals."""
    submitit = pytest.importorskip("submitit")
    started = []

    def queue(*which):
        tasks = [task for task in started if task._process.poll() is None]
        return {task.job_id: "RUNNING" for task in tasks} | {task.job_id: "FAILED" for task in set(started) - {*tasks}}

    submit = submitit.LocalExecutor._submit_command
    record = lambda self, command: started.append(submit(self, command)) or started[-1]  # noqa: E731
    monkeypatch.setattr(submitit.LocalExecutor, "_submit_command", record)
    scancel = tmp_path / "bin" / "scancel"
    scancel.parent.mkdir()
    scancel.write_text(
        '#!/bin/sh\necho "$@" >> $0.log\ncase "$1" in --signal=*) shift 2; for i; do pkill -USR1 -P $i; done; esac\n'
    )
    scancel.chmod(0o755)
    monkeypatch.setenv("PATH", f"{scancel.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(backends, "queue", queue)
    monkeypatch.setattr(backends, "CLUSTER", "local")
    monkeypatch.setattr(backends, "SECONDS", 0.2)
    monkeypatch.setattr(backends.shutil, "which", lambda name: name)
    yield lambda jobs=jobs, **changes: backends.start(jobs, runs, options(**changes))
    for task in started:
        if task._process.poll() is None:
            task._process.kill()
        for pid in children_of(task._process.pid):
            os.kill(pid, signal.SIGKILL)
    for job in jobs:
        if found := training(job):
            os.kill(found[0], signal.SIGKILL)


def test_slurm_runs_a_matrix_and_a_second_front_end_follows_it(slurm, jobs, runs):
    first = slurm()
    wait(lambda: all(status_of(job, runs) == "running" for job in jobs))
    second = slurm()
    assert second.ids == first.ids  # nothing was submitted again
    (runs / "go").touch()
    wait(lambda: first.is_finished() and second.is_finished())
    assert {*first.results.values()} == {*second.results.values()} == {"done"}
    assert [steps(job, runs) for job in jobs] == [([0], [*range(1, 21)])] * 2
    third = slurm()
    wait(third.is_finished)
    assert third.ids == {} and {*third.results.values()} == {"done"}


@pytest.mark.parametrize("signum", [signal.SIGUSR2, signal.SIGTERM])
def test_slurm_puts_a_task_back_into_the_queue_and_the_run_goes_on(slurm, jobs, runs, tmp_path, monkeypatch, signum):
    """A time limit or a preemption, a signal to every process: the training survives, and is told once to save."""
    squeue = tmp_path / "bin" / "squeue"
    squeue.write_text("#!/bin/sh\necho 7 RUNNING\n")  # preempted, not cancelled
    squeue.chmod(0o755)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    backend = slurm(jobs[:1])
    pid, task = wait(lambda: training(jobs[0]))
    wait(lambda: (runs / jobs[0].name / "progress.csv").exists())
    for process in (pid, task):
        os.kill(process, signum)
    wait(lambda: (again := training(jobs[0])) and again[0] != pid)
    (runs / "go").touch()
    wait(backend.is_finished)
    assert backend.results == {jobs[0].name: "done"}
    assert steps(jobs[0], runs) == ([0, 1], [*range(1, 21)])
    assert log_of(jobs[0], runs).read_text().count("signal 15") == 1


def test_slurm_loses_a_task_and_gets_another(slurm, jobs, runs):
    backend = slurm(jobs[:1])
    pid, task = wait(lambda: training(jobs[0]))
    wait(lambda: (runs / jobs[0].name / "progress.csv").exists())
    for process in (task, pid):
        os.kill(process, signal.SIGKILL)
    (runs / "go").touch()
    wait(backend.is_finished)
    assert backend.results == {jobs[0].name: "done"}
    assert steps(jobs[0], runs) == ([0, 1], [*range(1, 21)])


def test_slurm_stops_with_what_runs_saved(slurm, jobs, runs, tmp_path):
    backend = slurm(jobs[:1])
    wait(lambda: (runs / jobs[0].name / "progress.csv").exists())
    backend.stop()
    wait(backend.is_finished)
    identity = backend.ids[jobs[0].name]
    orders = (tmp_path / "bin" / "scancel.log").read_text().splitlines()
    assert orders[:2] == [f"--state=PENDING {identity}", f"--signal=USR1 --state=RUNNING {identity}"]
    assert backend.results == {jobs[0].name: "interrupted"}
    assert json.loads((runs / jobs[0].name / "summary.json").read_text())["status"] == "interrupted"
    assert status_of(jobs[0], runs) == "partial" and log_of(jobs[0], runs).read_text().count("signal 15") == 1


def test_slurm_says_what_a_task_died_of_and_gives_up_one_that_is_always_lost(slurm, jobs, runs, monkeypatch):
    monkeypatch.setattr(backends, "SECONDS", 0.05)
    monkeypatch.setattr(backends.Slurm, "submit", lambda self, jobs, free: self.ids.update({jobs[0].name: "1"}))
    backend = slurm(jobs[:1])
    wait(backend.is_finished)
    assert backend.results == {jobs[0].name: "failed"}
    assert "Slurm's task ended 4 times without a result, at last with GONE" in log_of(jobs[0], runs).read_text()
    (runs / "slurm" / "1_0_result.pkl").write_bytes(backends.pickle.dumps(("error", "Traceback: no disk")))
    backend = slurm(jobs[:1])
    wait(backend.is_finished)
    assert backend.results == {jobs[0].name: "failed"}
    assert log_of(jobs[0], runs).read_text().endswith("Traceback: no disk\n")


class Bomb:
    """What runs a program when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_slurm_does_not_run_what_somebody_has_put_into_a_pickle(slurm, jobs, runs, tmp_path, monkeypatch):
    monkeypatch.setattr(backends, "SECONDS", 0.05)
    monkeypatch.setattr(backends.Slurm, "submit", lambda self, jobs, free: self.ids.update({jobs[0].name: "1"}))
    (runs / "slurm").mkdir(parents=True)
    for content in (backends.pickle.dumps(("success", Bomb(tmp_path / "ran"))), b"", b"\x80", backends.pickle.dumps(3)):
        (runs / "slurm" / "1_0_result.pkl").write_bytes(content)
        backend = slurm(jobs[:1])
        wait(backend.is_finished)
        assert backend.results == {jobs[0].name: "failed"} and not (tmp_path / "ran").exists()
    monkeypatch.setattr(backends, "queue", lambda *which: {"2": "RUNNING"})
    (runs / "slurm" / "2_submitted.pkl").write_bytes(backends.pickle.dumps(Bomb(tmp_path / "ran")))
    with pytest.raises(UsageError, match="2_submitted.pkl is not what Slurm's task has left there .*mkdir"):
        slurm(jobs[:1])
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("mode", [0o777, 0o775])
def test_slurm_reads_no_pickles_from_a_folder_that_others_may_write(slurm, jobs, runs, mode):
    (runs / "slurm").mkdir(parents=True)
    (runs / "slurm").chmod(mode)
    with pytest.raises(UsageError, match="others may write it"):
        slurm(jobs[:1])


def test_slurm_waits_for_what_a_killed_task_has_left_behind(slurm, jobs, runs):
    log_of(jobs[0], runs).parent.mkdir()
    with open(log_of(jobs[0], runs), "ab") as log:
        assert lock(log)
        backend = slurm(jobs[:1])
        time.sleep(1.0)
        assert backend.ids == {} and not backend.is_finished()
    (runs / "go").touch()
    wait(backend.is_finished)
    assert backend.results == {jobs[0].name: "done"} and len(backend.ids) == 1


def test_a_task_that_never_gets_further_is_not_put_back_for_ever(jobs, runs):
    pytest.importorskip("submitit")
    task = backends.Task(jobs[0], runs, False, stuck=3)
    task.children, task.first_step = backends.Children(), 5
    task.future = SimpleNamespace(done=lambda: True)
    (runs / jobs[0].name).mkdir()
    (runs / jobs[0].name / "progress.csv").write_text("global_step,wall_time,sps\n5,1,10\n")
    with pytest.raises(RuntimeError, match="stopped 4 times before it got any further"):
        task.checkpoint()
    (runs / jobs[0].name / "progress.csv").write_text("global_step,wall_time,sps\n6,1,10\n")
    assert task.checkpoint().function.stuck == 0


@pytest.mark.skipif(not (shutil.which("squeue") and os.environ.get("SLURM_CONF")), reason="no Slurm here")
def test_a_real_slurm_and_a_killed_task(jobs, runs):
    pytest.importorskip("submitit")
    backend = backends.start(jobs, runs, options(backend_args=("time=5",)))
    pid, task = wait(lambda: training(jobs[0]))
    wait(lambda: (runs / jobs[0].name / "progress.csv").exists())
    for process in (task, pid):
        os.kill(process, signal.SIGKILL)
    (runs / "go").touch()
    wait(backend.is_finished, 120.0)
    assert {*backend.results.values()} == {"done"}
    assert steps(jobs[0], runs) == ([0, 1], [*range(1, 21)]) and steps(jobs[1], runs) == ([0], [*range(1, 21)])


# --------------------------------------------------------------------------------------------------------- Ray
@pytest.fixture(scope="module")
def cluster():
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    logging.getLogger("ray").setLevel(logging.ERROR)
    cluster = Cluster(initialize_head=True, head_node_args=dict(num_cpus=1, include_dashboard=False))
    cluster.add_node(num_cpus=1)
    yield cluster.address
    cluster.shutdown()


def start_ray(cluster, jobs, runs, **changes):
    return backends.start(jobs, runs, options("ray", backend_args=(f"address={cluster}",), **changes))


def test_ray_runs_a_matrix_and_repeats_what_a_killed_worker_had(cluster, jobs, runs):
    backend = start_ray(cluster, jobs, runs)
    pid, worker = wait(lambda: training(jobs[0]))
    wait(lambda: all((runs / job.name / "progress.csv").exists() for job in jobs))  # two nodes, each with one
    for process in (worker, pid):
        os.kill(process, signal.SIGKILL)
    wait(lambda: (again := training(jobs[0])) and again[0] != pid)
    (runs / "go").touch()
    wait(backend.is_finished)
    assert {*backend.results.values()} == {"done"}
    assert steps(jobs[0], runs) == ([0, 1], [*range(1, 21)]) and steps(jobs[1], runs) == ([0], [*range(1, 21)])


def test_ray_stops_with_what_runs_saved_and_goes_on(cluster, jobs, runs):
    backend = start_ray(cluster, jobs, runs, workers=1)
    wait(lambda: (runs / jobs[0].name / "progress.csv").exists())
    backend.stop()
    wait(backend.is_finished)
    assert backend.results == {jobs[0].name: "interrupted"} and status_of(jobs[0], runs) == "partial"
    assert not (runs / jobs[1].name).exists()
    assert log_of(jobs[0], runs).read_text().count("signal 15") == 1
    (runs / "go").touch()
    backend = start_ray(cluster, jobs, runs)
    wait(backend.is_finished)
    assert {*backend.results.values()} == {"done"} and steps(jobs[0], runs) == ([0, 1], [*range(1, 21)])


def test_ray_without_a_cluster_or_without_the_folder(jobs, runs, tmp_path):
    pytest.importorskip("ray")
    with pytest.raises(UsageError, match="cannot use a Ray cluster at 127.0.0.1:1"):
        start_ray("127.0.0.1:1", jobs, runs)
    with pytest.raises(RuntimeError, match="which has to be a folder that all nodes share"):
        backends.work(jobs[0], runs, False, tmp_path / "elsewhere")
