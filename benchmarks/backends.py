"""Where runs go when one machine is not enough: arrays of Slurm jobs, through submitit, or a cluster that runs Ray.

The unit of work is `jobs.execute` on a node, and the truth stays in the run directories. So every node must see the run
directories, this repository and the Python environment at the same paths, on a file system that knows flock.
"""

import contextlib
import io
import logging
import os
import pickle
import platform
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.jobs import (
    RESTARTS,
    ROOT,
    Children,
    Job,
    UsageError,
    execute,
    log_of,
    make_folder,
    printable,
    progress_of,
    status_of,
)

CLUSTER = "slurm"  # submitit's name of it; tests take "local"
SECONDS, LOOKS = 5.0, 3  # between two looks at the queue; looks until what is not there counts as lost
ENDED = {"GONE", "COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "BOOT_FAIL"}
OURS = {"additional_parameters", "array_parallelism", "nodes", "ntasks_per_node", "srun_args", "teardown", "use_srun"}
KINDS = dict(time=int, signal_delay_s=int, cpus_per_task=int, gpus_per_node=int, mem_gb=float)  # the others are texts


def start(jobs: list[Job], runs_dir: Path, options: Any) -> "Slurm | Ray":
    """Starts what is not done yet; options are those of `run`. Raises UsageError where the cluster refuses."""
    backend, arguments = {"slurm": Slurm, "ray": Ray}[options.backend], check(options)
    return backend(jobs, runs_dir.absolute(), options, arguments)


def check(options: Any) -> dict[str, Any]:
    """The --backend-args. Raises UsageError for those that are unknown or wrong, and for a missing extra."""
    known: dict[str, type] = {}
    try:
        if options.backend == "slurm":
            import submitit

            known = dict.fromkeys(submitit.SlurmExecutor._valid_parameters() - OURS, str) | KINDS
        elif options.backend == "ray":
            os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")  # it would print into the view of the runs
            import ray  # noqa: F401

            known = dict(address=str, num_cpus=float, num_gpus=float)
    except ImportError as error:
        install = f'pip install -c constraints.txt -e ".[{options.backend}]"'
        raise UsageError(f"--backend {options.backend} needs {error.name}: {install}") from None
    arguments: dict[str, Any] = {}
    for item in options.backend_args:
        name, _, value = item.partition("=")
        if not value:
            raise UsageError(f"--backend-args takes NAME=VALUE, and {item} is not that.")
        if name not in known:
            names = f"there are {', '.join(sorted(known))}" if known else "it takes none"
            raise UsageError(f"--backend {options.backend} has no argument {name}; {names}.")
        try:
            arguments[name] = value == "true" or known[name](value)
        except ValueError:
            raise UsageError(f"--backend-args {name} must be a number, but is {value}.") from None
    if options.backend == "slurm" and not shutil.which("sbatch"):
        raise UsageError("there is no sbatch here; --backend slurm has to start where jobs are submitted.")
    return arguments


def failed(job: Job, runs_dir: Path, why: str) -> str:
    """ "failed", with the reason at the end of the job's log, where `run` shows it."""
    log_of(job, runs_dir).parent.mkdir(parents=True, exist_ok=True)
    with open(log_of(job, runs_dir), "a", encoding="utf-8") as log:
        log.write(why.rstrip() + "\n")
    return "failed"


# -------------------------------------------------------------------------------------------------------- Slurm
class Plain(pickle.Unpickler):
    """Reads what submitit and this file pickle, and nothing else: a pickle of somebody else can run any program."""

    KNOWN = {
        ("submitit.core.utils", "DelayedSubmission"),
        ("benchmarks.backends", "Task"),
        ("benchmarks.jobs", "Job"),
        ("pathlib", "PosixPath"),
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.KNOWN:
            raise pickle.UnpicklingError(f"it holds {module}.{name}")
        return super().find_class(module, name)


def unpickle(path: Path) -> Any:
    """What a pickle of ours holds; raises UsageError for any other."""
    try:
        with open(path, "rb") as file:
            return Plain(file).load()
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}).") from None
    except Exception as error:  # damage can surface as almost anything
        raise UsageError(f"{path} is not what Slurm's task has left there ({printable(str(error))}).") from None


def own_folder(path: Path) -> None:
    """Makes the folder of pickles, which nobody else may write; raises UsageError where somebody can."""
    make_folder(path.parent)
    path.mkdir(mode=0o755, exist_ok=True)
    found = path.stat()
    if found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise UsageError(
            f"{path} belongs to somebody else, or others may write it, and pickles in it run: chmod go-w it."
        )


class Task:
    """What a node of Slurm runs: `execute` in a thread, while the main thread answers Slurm.

    Slurm sends its signals to every process on the node. SIGUSR2 announces a time limit or a preemption, and submitit
    then calls `checkpoint` and puts the task back into the queue. SIGTERM comes with scancel, or with a preemption.
    SIGUSR1 is our own front end, which stops.
    """

    def __init__(self, job: Job, runs_dir: Path, retry: bool, stuck: int = 0):
        self.job, self.runs_dir, self.retry = job, runs_dir, retry
        self.stuck = stuck  # how often in a row Slurm has stopped it before it got any further

    def __call__(self) -> str:
        self.children, self.first_step = Children(), progress_of(self.job, self.runs_dir)[0]

        def work() -> str:  # the children inherit the mask of this thread; SIGUSR2 would kill them
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGUSR2})
            return execute(self.job, self.runs_dir, self.children, self.retry)

        with ThreadPoolExecutor(1) as pool:
            self.future = pool.submit(work)
            signal.signal(signal.SIGUSR1, self.stop)
            signal.signal(signal.SIGTERM, self.stop)
            while not self.future.done():
                time.sleep(0.1)
        return self.future.result()

    def stop(self, signum: int, frame: Any = None) -> None:
        """Lets the run save and exits, without a result; a task that is being preempted goes back into the queue."""
        if self.children.stopped:
            return
        self.save(signum)
        with contextlib.suppress(UsageError):  # without squeue the task ends, and the front end submits it again
            if signum == signal.SIGTERM and "RUNNING" in queue(f"--jobs={os.environ['SLURM_JOB_ID']}").values():
                signal.raise_signal(signal.SIGUSR2)  # it was not scancel; submitit puts the task back
        sys.exit(128 + signum)

    def save(self, signum: int) -> None:
        if signum == signal.SIGTERM:
            self.children.stopped = True  # the child has had this signal from Slurm; a second one ends it at once
        elif not self.children.stopped:
            self.children.stop()
        while not self.future.done():
            time.sleep(0.1)

    def checkpoint(self) -> Any:
        """What goes back into the queue, saved; raises RuntimeError instead of going round for ever."""
        from submitit.helpers import DelayedSubmission

        self.save(signal.SIGUSR2)
        stuck = 0 if progress_of(self.job, self.runs_dir)[0] > self.first_step else self.stuck + 1
        if stuck > RESTARTS:
            raise RuntimeError(f"stopped {stuck} times before it got any further; give it more --backend-args time=")
        return DelayedSubmission(Task(self.job, self.runs_dir, self.retry, stuck))


def queue(*which: str) -> dict[str, str]:
    """The states of this user's Slurm jobs, {"12_3": "RUNNING"}, with those that ended some minutes ago."""
    command = ["squeue", "--noheader", "--array", "--states=all", f"--user={os.getuid()}", "--format=%i %T", *which]
    process = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
    if process.returncode:
        raise UsageError(f"squeue fails: {' '.join(process.stderr.split())}")
    return dict(line.split(maxsplit=1) for line in process.stdout.splitlines())


class Slurm:
    """Runs jobs as arrays of Slurm jobs; results gathers what became of each, by its name.

    Tasks that an earlier front end has queued are followed and not queued again: submitit keeps what it submits in
    runs_dir/slurm/ID_submitted.pkl, and does nothing in a task that has no such file.
    """

    def __init__(self, jobs: list[Job], runs_dir: Path, options: Any, arguments: dict[str, Any]):
        import submitit

        self.jobs, self.runs_dir, self.options, self.folder = jobs, runs_dir, options, runs_dir / "slurm"
        self.results: dict[str, str] = {}
        self.ids: dict[str, str] = {}  # Slurm's, of the latest task of each job
        self.looks: Counter[str] = Counter()
        self.stops, self.wake = 0, threading.Event()
        setup = [f"export PYTHONPATH={shlex.quote(str(ROOT))}:$PYTHONPATH"]
        if "setup" in arguments:
            setup.append(arguments["setup"])
        parameters = {
            "job_name": Path(options.suite).stem,
            "time": 60,
            "cpus_per_task": max(job.threads or 1 for job in jobs),
            **arguments,
            "setup": setup,
            "additional_parameters": {"requeue": True},
        }
        own_folder(self.folder)
        self.executor = submitit.AutoExecutor(self.folder, cluster=CLUSTER, slurm_max_num_timeout=10**6)
        self.executor.update_parameters(**{f"slurm_{name}": value for name, value in parameters.items()})
        for identity, state in queue().items():
            submitted = self.folder / f"{identity}_submitted.pkl"
            if state not in ENDED and submitted.exists():
                self.ids[unpickle(submitted).function.job.name] = identity
        self.thread = threading.Thread(target=self.watch, args=(self.look(),), daemon=True)
        self.thread.start()

    def watch(self, left: bool) -> None:
        said = ""
        while left:
            self.wake.wait(SECONDS)
            self.wake.clear()
            try:
                left, said = self.look(), ""
            except UsageError as error:  # Slurm is busy, or at the limit of what a user may submit
                if str(error) != said:
                    said = str(error)
                    print(f"{said} Tries again every {SECONDS:g} s.", file=sys.stderr)

    def look(self) -> bool:
        """Gathers what has ended and submits what is not in the queue; whether there is anything left to wait for."""
        states, active, orphans, waiting = queue(), [], 0, []
        for job in self.jobs:
            if job.name in self.results:
                continue
            identity = self.ids.get(job.name, "")
            state = states.get(identity, "GONE")
            if state not in ENDED:
                active.append(identity)
            elif status_of(job, self.runs_dir) == "running":  # what a killed task has left behind, or somebody else
                orphans += bool(identity)
            elif outcome := self.outcome(job, identity, state):
                self.results[job.name] = outcome
            elif job.name not in self.ids:
                waiting.append(job)
        if self.stops and active:
            self.cancel(active)
        elif self.stops:
            return False
        elif waiting and (free := self.options.workers - len(active) - orphans) > 0:
            self.submit(waiting, free)
        return len(self.results) < len(self.jobs)

    def cancel(self, active: list[str]) -> None:
        """Cancels what waits and lets what runs save; asked again, cancels all. Without ids scancel takes every job."""
        ways = [["--state=PENDING"], ["--signal=USR1", "--state=RUNNING"]]
        for way in ways if self.stops == 1 else [[]]:
            subprocess.run(["scancel", *way, *active], capture_output=True)

    def outcome(self, job: Job, identity: str, state: str) -> str:
        """What became of a job that is not in the queue; "" if it must still be queued, or once more."""
        status = status_of(job, self.runs_dir)
        if not identity:
            return status if status == "done" or status == "failed" and not self.options.retry else ""
        result = self.folder / f"{identity}_0_result.pkl"
        if result.exists():
            try:
                kind, value = unpickle(result)
            except (UsageError, TypeError, ValueError) as error:
                return failed(job, self.runs_dir, str(error))
            return str(value) if kind == "success" else failed(job, self.runs_dir, str(value))
        if status == "done":  # by what a killed task has left behind
            return "done"
        if self.stops or state == "CANCELLED":
            return "interrupted"
        self.looks[job.name] += 1
        if self.looks[job.name] == LOOKS * (1 + RESTARTS):
            times = f"{1 + RESTARTS} times without a result, at last with {state}"
            return failed(job, self.runs_dir, f"Slurm's task ended {times}; see {self.folder}/{identity}_*")
        if self.looks[job.name] % LOOKS == 0:  # until then the file system may be late with the result
            del self.ids[job.name]
        return ""

    def submit(self, jobs: list[Job], parallel: int) -> None:
        self.executor.update_parameters(slurm_array_parallelism=parallel)
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # submitit prints what sbatch says, and raises it too
                tasks = self.executor.submit_array([Task(job, self.runs_dir, self.options.retry) for job in jobs])
        except RuntimeError as error:
            raise UsageError(f"Slurm refuses the jobs: {' '.join(str(error).split())}") from None
        self.ids |= {job.name: task.job_id for job, task in zip(jobs, tasks)}

    def stop(self) -> None:
        """Takes what waits out of the queue and lets every run save; asked again, they end at once."""
        self.stops += 1
        self.wake.set()

    def is_finished(self) -> bool:
        return not self.thread.is_alive()


# ---------------------------------------------------------------------------------------------------------- Ray
def work(job: Job, runs_dir: Path, retry: bool, proof: Path) -> str:
    """What a worker of Ray runs; ray.cancel sends it SIGINT, which lets the run save."""
    if not proof.exists():
        raise RuntimeError(f"{platform.node()} does not see {runs_dir}, which has to be a folder that all nodes share")
    children = Children()
    signal.signal(signal.SIGINT, lambda *_: children.stop())  # ignored until now if Ray was started in the background
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(execute, job, runs_dir, children, retry)
        while not future.done():
            time.sleep(0.1)
    return future.result()


class Ray:
    """Runs jobs as tasks of Ray, so many at a time; results gathers what became of each, by its name.

    Ray repeats a task whose worker or node has died, and the run goes on from its checkpoint.
    """

    def __init__(self, jobs: list[Job], runs_dir: Path, options: Any, arguments: dict[str, Any]):
        import ray

        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        address = arguments.get("address", "auto")
        try:
            if address != "auto":  # ray.init would try for minutes
                socket.create_connection((address.rpartition(":")[0], address.rpartition(":")[2]), 10.0).close()
            runtime_env, handler = {"env_vars": {"PYTHONPATH": path}}, signal.getsignal(signal.SIGTERM)
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR, runtime_env=runtime_env)
            signal.signal(signal.SIGTERM, handler)  # ray.init has set its own
        except (OSError, ValueError, RuntimeError) as error:  # nobody there, no address, another version of Ray
            why = f"{' '.join(str(error).split())} --backend-args address=HOST:PORT names a cluster."
            raise UsageError(f"cannot use a Ray cluster at {address}: {why}") from None
        self.runs_dir, self.options, self.arguments, self.stops = runs_dir, options, arguments, 0
        self.proof = runs_dir / f".ray-{uuid.uuid4().hex}"
        self.proof.touch()
        self.results: dict[str, str] = {}
        # First what is running, left behind by a killed front end: its tasks wait for it and take workers meanwhile.
        self.queue = deque(sorted(jobs, key=lambda job: status_of(job, runs_dir) != "running"))
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()

    def watch(self) -> None:
        import ray

        tasks, stopped = {}, 0
        resources = dict(num_gpus=self.arguments.get("num_gpus"), max_retries=RESTARTS)
        while self.queue or tasks:
            while self.queue and len(tasks) < self.options.workers and not self.stops:
                job = self.queue.popleft()
                remote = ray.remote(num_cpus=self.arguments.get("num_cpus", job.threads or 1), **resources)(work)
                tasks[remote.remote(job, self.runs_dir, self.options.retry, self.proof)] = job
            if self.stops > stopped:
                stopped = self.stops
                self.queue.clear()
                for task in tasks:
                    ray.cancel(task)
            for task in ray.wait([*tasks], timeout=1.0)[0]:
                job = tasks.pop(task)
                try:
                    self.results[job.name] = ray.get(task)
                except ray.exceptions.TaskCancelledError:
                    self.results[job.name] = "interrupted"
                except ray.exceptions.RayError as error:
                    self.results[job.name] = failed(job, self.runs_dir, str(error))
        self.proof.unlink(missing_ok=True)
        ray.shutdown()

    def stop(self) -> None:
        """Lets every run finish its iteration and save; asked again, they end at once."""
        self.stops += 1

    def is_finished(self) -> bool:
        return not self.thread.is_alive()
