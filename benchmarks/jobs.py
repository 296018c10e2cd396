"""What the harness runs: a job is one run of an unmodified script.

A job is known by a hash of the script's text, environment, seed and flags. `execute` takes it from wherever it is to
its end, in processes of its own.
"""

import contextlib
import difflib
import fcntl
import functools
import hashlib
import importlib
import importlib.util
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import tyro

ROOT = Path(__file__).resolve().parent.parent
PEERS = ("sb3:ppo", "sb3:a2c", "sb3:trpo", "sb3:sac", "random")
BOXES_ONLY = ("sac", "sb3:sac")  # scripts and peers for real-valued actions, which have no cell elsewhere
# flags that run and sweep set themselves
RESERVED = ("env-id", "seed", "runs-dir", "run-name", "resume", "evaluate", "exp-name")
RESTARTS = 3  # of a run whose process was killed from outside
MOST = {  # the upper ends of what can be asked for; a seed is a seed of numpy
    "workers": 1000, "threads": 1024, "seeds": 10_000, "trials": 100_000, "pairs": 1000, "eval_episodes": 1_000_000,
    "episodes": 1_000_000, "every": 10**15, "jobs": 1000,
    "seed": 2**32 - 1, "sampler_seed": 2**32 - 1, "total_timesteps": 10**15, "runs": 100_000,
}  # fmt: skip
OWNER = f"{platform.node()} {os.getpid()}"  # the harness that starts a process


class UsageError(Exception):
    """What was asked for cannot work: one sentence, exit status 2, nothing created."""


# --------------------------------------------------------------------------------------------------------- jobs
@dataclass(frozen=True)
class Job:
    """One run of a script: what it is known by, and how to start it."""

    algo: str
    """the column of the report that it belongs to: the script's name, a variant's, or a peer's"""
    command: tuple[str, ...]
    """what starts the script, without its flags"""
    text: str = field(repr=False)
    """the text of the script"""
    env_id: str
    """ "" for a script that has no --env-id"""
    seed: int
    flags: tuple[str, ...] = ()
    """flags besides --env-id, --seed and those of the run directory"""
    eval_episodes: int = 100
    """episodes of each evaluation after the training, one with the most likely actions and one with sampled ones"""
    threads: int = 0
    """--num-threads (0: the script's own choice); no part of the key, as the episodes of evaluation are not"""

    @property
    def key(self) -> str:
        """Ten hexadecimal digits that differ where script text, environment, seed or flags do."""
        known_by = json.dumps([self.text, self.env_id, self.seed, self.flags])
        return hashlib.sha256(known_by.encode()).hexdigest()[:10]

    @property
    def recipe(self) -> str:
        """Ten hexadecimal digits that differ where script text or flags do."""
        return hashlib.sha256(json.dumps([self.text, self.flags]).encode()).hexdigest()[:10]

    @property
    def name(self) -> str:
        """Name of the run directory."""
        parts = [safe(self.env_id), safe(self.algo), str(self.seed), self.key]
        return "__".join(filter(None, parts))

    def __str__(self) -> str:
        return f"{self.env_id} {self.algo} seed {self.seed}".lstrip()

    def start(self, runs_dir: Path) -> list[str]:
        """The command that starts the run afresh."""
        command = [*self.command]
        if self.env_id:
            command += ["--env-id", self.env_id]
        command += ["--seed", str(self.seed), *self.flags]
        if self.threads:
            command += ["--num-threads", str(self.threads)]
        return [*command, "--runs-dir", str(runs_dir), "--run-name", self.name]


def safe(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name)


def default_is(words: str) -> Any:
    """For the help of an option whose default says nothing by itself: Annotated[str, default_is("the suite's")]."""
    return tyro.conf.arg(help_behavior_hint=f"(default: {words})")


def cores() -> int:
    """Processor cores that this process may use, as the scripts count them. This loads torch: ask where it matters."""
    import ppo

    return ppo.cores()


def out_of_range(name: str, number: Any, least: int) -> str:
    """What a number must be and is not, for the end of a sentence; "" if it is. Its upper end is in MOST."""
    if isinstance(number, int) and least <= number <= MOST[name]:
        return ""
    return f"must be a whole number from {least:,} to {MOST[name]:,}"


def check_range(options: Any, least: int, *names: str) -> None:
    """Raises UsageError for the first of these options that is out of its range."""
    for name in names:
        if must := out_of_range(name, vars(options)[name], least):
            raise UsageError(f"--{name.replace('_', '-')} is {vars(options)[name]}, but {must}.")


def command_of(algo: str) -> tuple[tuple[str, ...], Path]:
    """What starts a script or a peer, and the file whose text it is; raises UsageError for anything else."""
    if algo in PEERS:
        return (sys.executable, "-m", "benchmarks.peers", algo), ROOT / "benchmarks" / "peers.py"
    path = Path(algo) if algo.endswith(".py") else ROOT / f"{algo}.py"
    if not os.path.isfile(path):
        known = sorted(path.stem for path in ROOT.glob("*.py") if keeps_contract(path)) + list(PEERS)
        guess = near_miss(algo, known, f"there are {', '.join(known)}, and any path/to/script.py.")
        raise UsageError(f"{algo} is no script, no peer and no variant of the suite; {guess}")
    if not keeps_contract(path):
        raise UsageError(f"{algo} is no script that can be run here: its text has no --env-id or no --run-name.")
    return (sys.executable, str(path.resolve())), path


def text_of(algo: str, ours: bool = False) -> str:
    """The text that a script or a peer is known by.

    To that of a peer belongs the lower half of ppo.py, which has its environments and its run directory, and, where
    ours says that it takes the hyperparameters of our script, the text of that.
    """
    text = read_text(command_of(algo)[1])
    if algo in PEERS:
        text += read_text(ROOT / "ppo.py").partition("# ==== The machine room")[2]
        text += read_text(ROOT / f"{algo.removeprefix('sb3:')}.py") if ours else ""
    return text


def keeps_contract(path: Path) -> bool:
    """Whether a script may know the flags that every job has: as fields, or spelled out. Only its text is read."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return all(
        re.search(rf"^\s+{one}_{two}\s*:|--{one}-{two}", text, re.MULTILINE)
        for one, two in (("env", "id"), ("run", "name"))
    )


def as_flags(options: dict[str, Any]) -> tuple[str, ...]:
    """Flags of a command line, sorted by name: {"clip-vloss": False, "seed": 1} -> --no-clip-vloss --seed 1."""
    flags: list[str] = []
    for name, value in sorted(options.items()):
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no-{name}")
        else:
            flags += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return tuple(flags)


def dashed(options: dict[str, Any]) -> dict[str, Any]:
    return {name.replace("_", "-"): value for name, value in options.items()}


def is_atari(env_id: str) -> bool:
    """Whether an environment is an Atari game, by the names that the two protocols have."""
    return env_id.startswith("ALE/") or env_id.endswith("NoFrameskip-v4")


def check_environment(env_id: str) -> None:
    """Raises UsageError, with the near miss, for an environment that gymnasium does not know."""
    import ale_py
    import gymnasium

    gymnasium.register_envs(ale_py)
    module, _, name = env_id.rpartition(":")
    if module:
        import_module_of(env_id, module)
    try:
        gymnasium.spec(name)
    except gymnasium.error.Error:
        guess = near_miss(
            name, gymnasium.registry, "python -c 'import gymnasium; gymnasium.pprint_registry()' lists all."
        )
        raise UsageError(f"environment {env_id} is not registered in gymnasium; {guess}") from None


@functools.cache
def acts_in_a_box(env_id: str) -> bool:
    """Whether an environment takes real-valued actions. True where it cannot be made, too, which its run will tell."""
    import gymnasium

    with contextlib.suppress(Exception), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.closing(gymnasium.make(env_id)) as env:
            return isinstance(env.action_space, gymnasium.spaces.Box)
    return True


def cannot_play(algo: str, env_id: str) -> str:
    """Why a script or a peer has nothing to do in an environment; "" where it has, or where its run will tell."""
    if Path(algo).stem not in BOXES_ONLY or acts_in_a_box(env_id):
        return ""
    return f"{algo} acts in boxes only, and {env_id} has other actions"


def import_module_of(env_id: str, module: str) -> None:
    """Imports the module in front of an environment's name; raises UsageError, whatever that module does."""
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        where = f"{error}; searched were PYTHONPATH and {os.getcwd()}"
        raise UsageError(f"environment {env_id}: {where}; install it, or drop the prefix.") from None
    except (Exception, SystemExit) as error:
        why = f"{type(error).__name__}: {printable(str(error))[:300]}".removesuffix(": ")
        raise UsageError(f"environment {env_id}: importing {module} fails ({why}).") from None


def require(who: str, extra: str, *packages: str) -> None:
    """Raises UsageError where a package is not installed; the extra is the one that installs it."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise UsageError(f'{who} needs {package}: pip install -c constraints.txt -e ".[{extra}]"')


def near_miss(name: str, known: Iterable[str], otherwise: str) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else otherwise


# -------------------------------------------------------------------------------------------- files and folders
def printable(text: str) -> str:
    """Text from outside on one line, without characters that a terminal obeys or a file cannot take."""
    return "".join(char if char.isprintable() else "\ufffd" for char in " ".join(text.split()))


def shortened(value: Any) -> str:
    """A value of a file, for a sentence about it."""
    try:
        text = printable(repr(value))
    except (ValueError, RecursionError):  # too many digits, too deep
        text = f"a {type(value).__name__} beyond all bounds"
    return text if len(text) <= 80 else f"{text[:77]}..."


def read_text(path: Path) -> str:
    """What a file says that somebody has named; raises UsageError where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} cannot be read as UTF-8 (byte {error.start}: {error.reason}).") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}).") from None


def make_folder(path: Path) -> None:
    """Makes a folder and its parents. Where the last cannot be made, the others are not left behind either."""
    made = [folder for folder in (path, *path.parents) if not os.path.exists(folder)]
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError:
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def read_json(path: Path) -> dict[str, Any]:
    """The content of a JSON file; {} where there is none or it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return content if isinstance(content, dict) else {}
    except (OSError, ValueError, RecursionError):
        return {}


def json_damage(path: Path) -> str:
    """Why a JSON file cannot be read, for the end of a sentence; "" if it can."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    except json.JSONDecodeError as error:
        return f"is no JSON: {error.msg} in line {error.lineno}" if path.stat().st_size else "is empty"
    except (ValueError, RecursionError) as error:
        return f"is no JSON: {printable(str(error))}"
    return "" if isinstance(content, dict) else f"must hold a table, but holds {shortened(content)}"


def read_value(path: Path, *keys: str, kind: Any = (int, float)) -> Any:
    """What stands under these keys of a JSON file; None where it is missing or of another kind."""
    value: Any = read_json(path)
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, kind) and not isinstance(value, bool) else None


# ---------------------------------------------------------------------------------------------- run directories
def log_of(job: Job, runs_dir: Path) -> Path:
    """What the processes of a job print. A harness that works on the job holds a lock on this file."""
    return runs_dir / "logs" / f"{job.name}.log"


def lock(file: BinaryIO) -> bool:
    """Whether nobody else works on the job of this log. A child inherits the lock, so that an orphan keeps it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False


def is_orphan(job: Job, runs_dir: Path) -> bool:
    """Whether a dead harness of this machine has started a job that is running."""
    try:
        text = log_of(job, runs_dir).read_text(encoding="utf-8", errors="replace")
        starts = re.findall(r"\$ .* # (\S*) (\d+)$", text, re.MULTILINE)
        host, pid = starts[-1]
        if host == OWNER.split(" ")[0]:
            os.kill(int(pid), 0)
        return False
    except ProcessLookupError:
        return True
    except (OSError, IndexError):
        return False


def has_checkpoint(run: Path) -> bool:
    """Whether a run has a whole checkpoint to go on from."""
    return any(path.suffix != ".tmp" for path in (run / "checkpoints").glob("step_*"))


def missing_evaluations(job: Job, run: Path) -> list[str]:
    """Those of "deterministic" and "stochastic" that summary.json lacks, or has over too few episodes.

    One of an earlier checkpoint, which somebody has played by hand, does not count.
    """
    kinds, summary = ("deterministic", "stochastic") if job.eval_episodes else (), run / "summary.json"
    last = (None, read_value(summary, "global_step"))  # None: from before this was recorded
    played = {kind: read_value(summary, "eval", kind, "episodes") or 0 for kind in kinds}
    early = [kind for kind in kinds if read_value(summary, "eval", kind, "global_step") not in last]
    return [kind for kind in kinds if kind in early or played[kind] < job.eval_episodes]


def is_running(job: Job, runs_dir: Path) -> bool:
    """Whether somebody works on the job."""
    try:
        with open(log_of(job, runs_dir), "rb") as file:
            return not lock(file)
    except OSError:
        return False


def status_of(job: Job, runs_dir: Path) -> str:
    """One of "new", "partial", "running" (somebody works on it), "failed" and "done"."""
    run = runs_dir / job.name
    if is_running(job, runs_dir):
        return "running"
    status = read_value(run / "summary.json", "status", kind=str)
    if status in ("failed", "diverged"):
        return "failed"
    if status == "completed" and not missing_evaluations(job, run):
        return "done"
    return "partial" if run.exists() else "new"


def progress_of(job: Job, runs_dir: Path) -> tuple[int, float]:
    """Steps so far, and steps per second, from the last whole row of progress.csv; (0, 0) before there is one."""
    try:
        with open(runs_dir / job.name / "progress.csv", "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
            row = file.read().decode().rsplit("\n", 2)[-2].split(",")
        step, sps = int(row[0]), float(row[2])
        return (step, sps) if math.isfinite(sps) else (step, 0.0)
    except (OSError, ValueError, IndexError):
        return 0, 0.0


def end_of_log(job: Job, runs_dir: Path, lines: int = 5) -> str:
    """The last lines that the processes of a job printed."""
    try:
        text = log_of(job, runs_dir).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return "\n".join([line.rsplit("\r", 1)[-1] for line in text.splitlines() if line.strip()][-lines:])


# ------------------------------------------------------------------------------------------------------ one job
class Children:
    """The processes that are running, and a way to stop them; one for all threads that execute jobs."""

    def __init__(self) -> None:
        self.running: set[subprocess.Popen] = set()
        self.guard, self.stopped = threading.Lock(), False

    def run(self, command: list[str], log: BinaryIO) -> int:
        """Runs a process that writes to the log; its exit status. After stop() none starts, and it is 128 + SIGTERM."""
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        with self.guard:
            if self.stopped:
                return 128 + signal.SIGTERM
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[log.fileno()],  # the child keeps the lock
                env=os.environ | {"PYTHONPATH": path},
                start_new_session=True,  # Ctrl-C reaches it through stop() alone, and not twice
            )
            self.running.add(process)
        try:
            return process.wait()
        finally:
            with self.guard:
                self.running.discard(process)

    def stop(self) -> None:
        """Asks every process to save and end; asked again, they end at once. Nothing new starts."""
        with self.guard:
            self.stopped = True
            for process in self.running:
                process.terminate()


def execute(job: Job, runs_dir: Path, children: Children | None = None, retry: bool = False, wait: bool = True) -> str:
    """Trains a job, or goes on with it, and evaluates it; returns "done", "failed", "interrupted" or "running".

    A run that failed stays so, unless retry is set. A run whose process was killed goes on from its checkpoint, three
    times at most. If somebody else works on the job, this waits for them; without wait it returns "running".
    """
    children, run = children or Children(), runs_dir / job.name
    log_of(job, runs_dir).parent.mkdir(parents=True, exist_ok=True)
    with open(log_of(job, runs_dir), "ab") as log:
        tries = 0
        while not lock(log):
            tries += 1  # somebody who only looks holds the lock for an instant
            if children.stopped or not wait and tries >= 5:
                return "running"
            time.sleep(0.05 if tries < 5 else 1.0)
        if read_value(run / "summary.json", "status", kind=str) in ("failed", "diverged") and not retry:
            return "failed"
        kills = 0
        while command := next_command(job, runs_dir):
            if not is_present(job):
                log.write(b"the script has changed since this run was asked for; give the command again\n")
                return "failed"
            if command == job.start(runs_dir) and run.exists():
                shutil.rmtree(run)  # killed before its first checkpoint, which comes before the first iteration
            log.write(f"$ {shlex.join(command)} # {OWNER}\n".encode())
            log.flush()
            exit_status = children.run(command, log)
            if exit_status in (128 + signal.SIGINT, 128 + signal.SIGTERM) or children.stopped:
                return "interrupted"
            if exit_status > 0:
                return "failed"
            if exit_status < 0:
                kills += 1
                log.write(f"killed by {signal.Signals(-exit_status).name}, {kills} times\n".encode())
                if kills > RESTARTS:
                    log.write(b"given up (out of memory?)\n")
                    return "failed"
            elif next_command(job, runs_dir) == command:
                log.write(b"exit status 0, but summary.json does not have what this command was for\n")
                return "failed"
    return "done"


def is_present(job: Job) -> bool:
    """Whether the script still has the text that the job is known by, which a process would read now."""
    script = Path(job.command[1])
    return job.command[1] == "-m" or not script.is_file() or read_text(script) == job.text


def next_command(job: Job, runs_dir: Path) -> list[str] | None:
    """What is to be run next for a job: to start, to go on or to evaluate; None when it is done."""
    run = runs_dir / job.name
    if read_value(run / "summary.json", "status", kind=str) != "completed":
        return [*job.command, "--resume", str(run)] if has_checkpoint(run) else job.start(runs_dir)
    for kind in missing_evaluations(job, run):
        stochastic = ["--eval-stochastic"] if kind == "stochastic" else []
        return [*job.command, "--evaluate", str(run), "--eval-episodes", str(job.eval_episodes), *stochastic]
    return None
