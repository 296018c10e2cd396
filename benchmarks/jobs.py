"""What the harness runs. A job is one run of an unmodified script, known by a hash of the script's text, environment,
seed and flags; a suite is a TOML file that stands for a matrix of jobs; `execute` takes one job from wherever it is to
its end, in processes of its own.
"""

import csv
import difflib
import fcntl
import hashlib
import importlib
import importlib.util
import json
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
from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, BinaryIO

import tyro

ROOT = Path(__file__).resolve().parent.parent
SUITES = Path(__file__).resolve().parent / "suites"
PEERS = ("sb3:ppo", "sb3:a2c", "sb3:trpo", "random")
RESTARTS = 3  # of a run whose process was killed from outside
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
    def name(self) -> str:
        """Name of the run directory."""
        return f"{safe(self.env_id)}__{safe(self.algo)}__{self.seed}__{self.key}"

    def start(self, runs_dir: Path) -> list[str]:
        """The command that starts the run afresh."""
        where = ["--runs-dir", str(runs_dir), "--run-name", self.name]
        threads = ["--num-threads", str(self.threads)] if self.threads else []
        return [*self.command, "--env-id", self.env_id, "--seed", str(self.seed), *self.flags, *threads, *where]


def safe(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name)


def default_is(words: str) -> Any:
    """For the help of an option whose default says nothing by itself: Annotated[str, default_is("the suite's")]."""
    return tyro.conf.arg(help_behavior_hint=f"(default: {words})")


def command_of(algo: str) -> tuple[tuple[str, ...], Path]:
    """What starts a script or a peer, and the file whose text it is; raises UsageError for anything else."""
    if algo in PEERS:
        return (sys.executable, "-m", "benchmarks.peers", algo), ROOT / "benchmarks" / "peers.py"
    path = Path(algo) if algo.endswith(".py") else ROOT / f"{algo}.py"
    if not path.is_file():
        known = sorted(path.stem for path in ROOT.glob("*.py") if keeps_contract(path)) + list(PEERS)
        guess = near_miss(algo, known, f"there are {', '.join(known)}, and any path/to/script.py.")
        raise UsageError(f"{algo} is no script, no peer and no variant of the suite; {guess}")
    if not keeps_contract(path):
        raise UsageError(f"{algo} is no script that can be run here: its text has no --env-id or no --run-name.")
    return (sys.executable, str(path.resolve())), path


def keeps_contract(path: Path) -> bool:
    """Whether a script may know the flags of every job, by its text: running it could do anything."""
    text = path.read_text(errors="replace")
    return all(re.search(rf"(?<![a-z]){flag}(?![a-z])", text) for flag in ("env[-_]id", "run[-_]name"))


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


# ------------------------------------------------------------------------------------------------------- suites
@dataclass(frozen=True)
class Suite:
    """A suite file as it was read; benchmarks/suites/smoke.toml shows every key."""

    name: str
    envs: list[str]
    algos: list[str]
    description: str = ""
    seeds: int | list[int] = 5
    total_timesteps: int | None = None
    eval_episodes: int = 100
    arguments: list[dict[str, Any]] = field(default_factory=list)
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    published: list[str] = field(default_factory=list)
    """source_keys of benchmarks/references/published.csv that the report puts beside the scores"""
    normalise: bool = True
    """whether the report aggregates scores over the environments"""


# flags that the harness and sweeps set themselves
RESERVED = ("env-id", "seed", "runs-dir", "run-name", "resume", "evaluate", "exp-name")
# keys of a suite file and of its tables: what their values are, in words and as types
Keys = dict[str, tuple[str, Any]]
SUITE_KEYS: Keys = {
    "envs": ("a list of environment ids", list),
    "algos": ("a list of scripts, peers or variants", list),
    "description": ("a text", str),
    "seeds": ("a number of seeds, or a list of them", (int, list)),
    "total_timesteps": ("a whole number", int),
    "eval_episodes": ("a whole number", int),
    "arguments": ("written as [[arguments]] tables", list),
    "variants": ("written as [variants.NAME] tables", dict),
    "published": ("a list of source keys", list),
    "normalise": ("true or false", bool),
}
RULE_KEYS: Keys = {
    "envs": ("a list of patterns", list),
    "algos": ("a list of patterns", list),
    "flags": ("a table of flags", dict),
}
VARIANT_KEYS: Keys = {"algo": ("a script or a peer", str), "flags": ("a table of flags", dict)}


def parse_toml(path: Path) -> dict[str, Any]:
    """What a file says; raises UsageError, for wrong syntax with the line."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: {error}.") from None


def wrong(path: Path, *keys: str | int, what: str) -> UsageError:
    """The error about a value of a TOML file: wrong(path, "arguments", 0, "envs", what=...) -> arguments[0].envs."""
    place = ""
    for key in keys:
        if isinstance(key, int):
            place += f"[{key}]"
        else:
            name = key if re.fullmatch(r"[\w-]+", key, re.ASCII) else json.dumps(key)
            place += f".{name}" if place else name
    end = "" if what.endswith(("?", ".")) else "."
    return UsageError(f"{path}: {place}: {what}{end}")


def require(who: str, extra: str, *packages: str) -> None:
    """Raises UsageError where a package is not installed; the extra is the one that installs it."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise UsageError(f'{who} needs {package}: pip install -c constraints.txt -e ".[{extra}]"')


def near_miss(name: str, known: Iterable[str], otherwise: str) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else otherwise


def suite_file(name: str) -> Path:
    return Path(name) if name.endswith(".toml") else SUITES / f"{name}.toml"


def read_suite(name: str) -> Suite:
    """The suite of a name in benchmarks/suites, or of a TOML file; raises UsageError with the key that is wrong."""
    path = suite_file(name)
    if not path.is_file():
        shipped = ", ".join(sorted(path.stem for path in SUITES.glob("*.toml")))
        raise UsageError(f"there is no suite {name}; there are {shipped}, and any path/to/suite.toml.")
    content = parse_toml(path)
    check_keys(path, (), content, SUITE_KEYS)
    for key in ("envs", "algos"):
        if not content.get(key) or not is_texts(content[key]):
            raise wrong(path, key, what="is missing or empty; a suite needs a list of texts here")
    check_numbers(path, content)
    check_published(path, content.get("published", []))
    for number, rule in enumerate(content.get("arguments", [])):
        check_rule(path, number, rule)
    for variant, table in content.get("variants", {}).items():
        check_variant(path, variant, table)
    suite = Suite(name=path.stem, **content)
    for number, rule in enumerate(suite.arguments):
        columns = [*suite.algos, *suite.variants]
        if not any(applies(rule, suite, env_id, algo) for env_id in suite.envs for algo in columns):
            raise wrong(path, "arguments", number, what="matches none of the suite's environments and algos")
    return suite


def is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def check_keys(path: Path, place: tuple[str | int, ...], table: dict[str, Any], keys: Keys) -> None:
    """Raises UsageError for an unknown key in a table, and for a value of another type; place is where the table is."""
    for key, value in table.items():
        if key not in keys:
            raise wrong(path, *place, key, what=f"no such key; {near_miss(key, keys, 'there are ' + ', '.join(keys))}")
        what, kind = keys[key]
        if not isinstance(value, kind) or isinstance(value, bool) and kind is not bool:
            raise wrong(path, *place, key, what=f"must be {what}, but is {value!r}")


def check_numbers(path: Path, content: dict[str, Any]) -> None:
    """Raises UsageError for numbers of seeds, steps or episodes that are no whole numbers or too small."""
    seeds = content.get("seeds", 5)
    if isinstance(seeds, list):
        if not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds):
            raise wrong(path, "seeds", what="must be whole numbers of 0 or more")
    elif seeds < 1:
        raise wrong(path, "seeds", what="must be a whole number of 1 or more")
    for key, least in (("total_timesteps", 1), ("eval_episodes", 0)):
        if content.get(key, least) < least:
            raise wrong(path, key, what=f"must be a whole number of {least} or more")


def check_published(path: Path, keys: list[Any]) -> None:
    """Raises UsageError for a source that is not in benchmarks/references."""
    with open(ROOT / "benchmarks" / "references" / "sources.csv", newline="", encoding="utf-8") as file:
        sources = [row["source_key"] for row in csv.DictReader(file)]
    for key in keys:
        if key not in sources:
            guess = near_miss(str(key), sources, "benchmarks/references/sources.csv has them all")
            raise wrong(path, "published", what=f"there is no source {key}; {guess}")


def check_rule(path: Path, number: int, rule: Any) -> None:
    """Raises UsageError for a table of [[arguments]] that is wrong by itself."""
    if not isinstance(rule, dict):
        raise wrong(path, "arguments", number, what=f"must be a table, but is {rule!r}; write [[arguments]]")
    check_keys(path, ("arguments", number), rule, RULE_KEYS)
    for key in ("envs", "algos"):
        if not is_texts(rule.get(key, [])):
            raise wrong(path, "arguments", number, key, what=f"must be {RULE_KEYS[key][0]}, but is {rule[key]!r}")
    if "flags" not in rule:
        raise wrong(path, "arguments", number, what="has no flags")
    check_values(path, ("arguments", number, "flags"), rule["flags"])


def check_variant(path: Path, name: str, table: Any) -> None:
    """Raises UsageError for a table of [variants] that is wrong by itself."""
    if not isinstance(table, dict) or "algo" not in table:
        raise wrong(path, "variants", name, what="a variant needs algo = a script or a peer")
    check_keys(path, ("variants", name), table, VARIANT_KEYS)
    check_values(path, ("variants", name, "flags"), table.get("flags", {}))
    try:
        command_of(table["algo"])
    except UsageError as error:
        raise wrong(path, "variants", name, "algo", what=str(error)) from None


def check_values(path: Path, place: tuple[str | int, ...], flags: dict[str, Any]) -> None:
    """Raises UsageError for a flag that the harness sets itself, and for a value that no command line can have."""
    for name, value in flags.items():
        if name.replace("_", "-") in RESERVED:
            raise wrong(path, *place, name, what="is set for each run and cannot be a flag")
        values = value if isinstance(value, list) else [value]
        if not values or not all(isinstance(item, (str, int, float)) for item in values):
            what = f"must be a number, a text, true, false or a list of them, but is {value!r}"
            raise wrong(path, *place, name, what=what)


def applies(rule: dict[str, Any], suite: Suite, env_id: str, algo: str) -> bool:
    """Whether a table of [[arguments]] is for an environment and an algo, or for the script of the variant algo."""
    names = {algo, script_of(suite, algo)}
    in_env = any(fnmatchcase(env_id, pattern) for pattern in rule.get("envs", ["*"]))
    return in_env and any(fnmatchcase(name, pattern) for pattern in rule.get("algos", ["*"]) for name in names)


def script_of(suite: Suite, algo: str) -> str:
    """The script or peer of a column."""
    return suite.variants[algo]["algo"] if algo in suite.variants else algo


def tables_of(suite: Suite, env_id: str, algo: str) -> list[tuple[tuple[str | int, ...], dict[str, Any]]]:
    """The tables of flags for a cell, each with its place in the suite file; a later one wins."""
    found: list[tuple[tuple[str | int, ...], dict[str, Any]]] = []
    for number, rule in enumerate(suite.arguments):
        if applies(rule, suite, env_id, algo):
            found.append((("arguments", number, "flags"), rule["flags"]))
    if "flags" in suite.variants.get(algo, {}):
        found.append((("variants", algo, "flags"), suite.variants[algo]["flags"]))
    return found


def options_of(suite: Suite, env_id: str, algo: str) -> dict[str, Any]:
    """The flags that the tables set for a cell, by their names with dashes."""
    options: dict[str, Any] = {}
    for _, flags in tables_of(suite, env_id, algo):
        options |= dashed(flags)
    return options


def jobs_of(suite: Suite, threads: int = 0, total_timesteps: int = 0) -> list[Job]:
    """The matrix of a suite, seed by seed, so that every cell has a first result early.

    threads is --num-threads of Atari runs; a run of an MLP takes one of its own accord. total_timesteps wins over all
    budgets of the suite. Raises UsageError for what is neither script nor peer nor variant, for two scripts of one name
    and for environments that are not registered.
    """
    seeds = range(1, suite.seeds + 1) if isinstance(suite.seeds, int) else suite.seeds
    for env_id in suite.envs:
        check_environment(env_id)
    jobs: dict[str, Job] = {}  # by their names: what is listed twice is one job
    columns: dict[str, tuple[str, ...]] = {}
    for seed in seeds:
        for env_id in suite.envs:
            for algo in suite.algos:
                job = job_of(suite, env_id, algo, seed, threads, total_timesteps)
                if columns.setdefault(job.algo, job.command) != job.command:
                    both = f"{columns[job.algo][-1]} and {job.command[-1]}"
                    raise UsageError(f"{both} would be one column, {job.algo}; rename one, or make it a variant.")
                jobs[job.name] = job
    return list(jobs.values())


def job_of(suite: Suite, env_id: str, algo: str, seed: int, threads: int, total_timesteps: int) -> Job:
    """One job of a matrix; the arguments are those of jobs_of."""
    script = script_of(suite, algo)
    command, path = command_of(script)
    options: dict[str, Any] = {}
    if suite.total_timesteps:
        options["total-timesteps"] = suite.total_timesteps
    options |= options_of(suite, env_id, algo)
    if total_timesteps:
        options["total-timesteps"] = total_timesteps
    if algo in suite.variants:
        options["exp-name"] = algo
    text = path.read_text()
    if options.get("hyperparameters") == "ours":  # a peer with the arguments of our script
        text += (ROOT / f"{script.removeprefix('sb3:')}.py").read_text()
    return Job(
        algo=Path(algo).stem if algo.endswith(".py") else algo,
        command=command,
        text=text,
        env_id=env_id,
        seed=seed,
        flags=as_flags(options),
        eval_episodes=suite.eval_episodes,
        threads=threads if is_atari(env_id) else 0,
    )


def is_atari(env_id: str) -> bool:
    """Whether an environment is a game, by the two protocols' names."""
    return env_id.startswith("ALE/") or env_id.endswith("NoFrameskip-v4")


def check_environment(env_id: str) -> None:
    """Raises UsageError, with the near miss, for an environment that gymnasium does not know."""
    import ale_py
    import gymnasium

    gymnasium.register_envs(ale_py)
    module, _, name = env_id.rpartition(":")
    try:
        if module:
            importlib.import_module(module)
        gymnasium.spec(name)
    except ImportError as error:
        raise UsageError(f"environment {env_id}: {error}; install it, or drop the prefix.") from None
    except gymnasium.error.Error:
        guess = near_miss(
            name, gymnasium.registry, "python -c 'import gymnasium; gymnasium.pprint_registry()' lists all."
        )
        raise UsageError(f"environment {env_id} is not registered in gymnasium; {guess}") from None


# ---------------------------------------------------------------------------------------------- run directories
def read_json(path: Path) -> dict[str, Any]:
    """The content of a JSON file; {} where there is none or it is damaged."""
    try:
        content = json.loads(path.read_text())
        return content if isinstance(content, dict) else {}
    except (OSError, ValueError, RecursionError):
        return {}


def log_of(job: Job, runs_dir: Path) -> Path:
    """What the processes of a job print; whoever works on the job holds a lock on this file."""
    return runs_dir / "logs" / f"{job.name}.log"


def lock(file: BinaryIO) -> bool:
    """Whether nobody else works on the job whose log this is. A child inherits the lock, so that an orphan keeps it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False


def is_orphan(job: Job, runs_dir: Path) -> bool:
    """Whether a job that is running was started by a harness on this machine that is dead."""
    try:
        starts = re.findall(r"\$ .* # (\S*) (\d+)$", log_of(job, runs_dir).read_text(errors="replace"), re.MULTILINE)
        host, pid = starts[-1]
        if host == OWNER.split(" ")[0]:
            os.kill(int(pid), 0)
        return False
    except ProcessLookupError:
        return True
    except (OSError, IndexError):
        return False


def has_checkpoint(run: Path) -> bool:
    """Whether it has a whole checkpoint to go on from."""
    return any(path.suffix != ".tmp" for path in (run / "checkpoints").glob("step_*"))


def missing_evaluations(job: Job, run: Path) -> list[str]:
    """Those of "deterministic" and "stochastic" that summary.json lacks, or has over too few episodes."""
    done = read_json(run / "summary.json").get("eval") or {}
    kinds = ("deterministic", "stochastic") if job.eval_episodes else ()
    return [kind for kind in kinds if done.get(kind, {}).get("episodes", 0) < job.eval_episodes]


def is_running(job: Job, runs_dir: Path) -> bool:
    """Whether somebody works on the job."""
    try:
        with open(log_of(job, runs_dir), "rb") as file:
            return not lock(file)
    except FileNotFoundError:
        return False


def status_of(job: Job, runs_dir: Path) -> str:
    """One of "new", "partial", "running" (somebody works on it), "failed" and "done"."""
    run = runs_dir / job.name
    if is_running(job, runs_dir):
        return "running"
    status = read_json(run / "summary.json").get("status")
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
        return int(row[0]), float(row[2])
    except (OSError, ValueError, IndexError):
        return 0, 0.0


def end_of_log(job: Job, runs_dir: Path, lines: int = 5) -> str:
    """The last lines that the processes of a job printed."""
    try:
        text = log_of(job, runs_dir).read_text(errors="replace")
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
        """Exit status of a process that writes to the log; 128 + SIGTERM at once, without a process, after stop()."""
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        with self.guard:
            if self.stopped:
                return 128 + signal.SIGTERM
            # A session of its own, so that Ctrl-C reaches it through stop() and not twice.
            options = dict(stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)
            options |= dict(pass_fds=[log.fileno()], env=os.environ | {"PYTHONPATH": path})
            process = subprocess.Popen(command, **options)
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

    A run that failed stays so unless retry. One whose process was killed goes on from its checkpoint, three times at
    most. If somebody else works on the job, waits for them, or, without wait, returns "running".
    """
    children, run = children or Children(), runs_dir / job.name
    log_of(job, runs_dir).parent.mkdir(parents=True, exist_ok=True)
    with open(log_of(job, runs_dir), "ab") as log:
        tries = 0
        while not lock(log):
            tries += 1  # whoever only looks holds the lock for an instant
            if children.stopped or not wait and tries >= 5:
                return "running"
            time.sleep(0.05 if tries < 5 else 1.0)
        if read_json(run / "summary.json").get("status") in ("failed", "diverged") and not retry:
            return "failed"
        kills = 0
        while command := next_command(job, runs_dir):
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


def next_command(job: Job, runs_dir: Path) -> list[str] | None:
    """What is to be run next for a job: to start, to go on or to evaluate; None when it is done."""
    run = runs_dir / job.name
    if read_json(run / "summary.json").get("status") != "completed":
        return [*job.command, "--resume", str(run)] if has_checkpoint(run) else job.start(runs_dir)
    for kind in missing_evaluations(job, run):
        stochastic = ["--eval-stochastic"] if kind == "stochastic" else []
        return [*job.command, "--evaluate", str(run), "--eval-episodes", str(job.eval_episodes), *stochastic]
    return None
