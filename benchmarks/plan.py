"""What a sweep is asked to do, checked before anything is created, and what follows from that for every trial."""

import hashlib
import json
import math
import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from benchmarks.arguments import arguments_of
from benchmarks.jobs import (
    PEERS,
    ROOT,
    Job,
    UsageError,
    cannot_play,
    check_environment,
    check_range,
    command_of,
    cores,
    default_is,
    is_atari,
    require,
    text_of,
)
from benchmarks.report import score_range
from benchmarks.space import Space, check_flags, default_of, read_space
from benchmarks.suite import LONGEST_NAME, Suite, jobs_of

TUNING = 1000  # seeds of tuning come after it, those of the final check before
FAILURE, FLOOR = -1.0, -0.5  # normalised scores: of a run that failed, and the lowest of the others


@dataclass
class Options:
    script: Annotated[str, tyro.conf.Positional]
    """script (ppo, path/to/my_ppo.py) or peer (sb3:ppo)"""
    env_ids: tuple[str, ...]
    """environments; the score of a trial is its mean over them, normalised"""
    study: str
    """name of the study; the name of an existing one joins it"""
    space: Annotated[str, default_is("the script's name")] = ""
    """what to search: a TOML file, or a name in benchmarks/spaces"""
    trials: int = 50
    """trials of the study, those of all workers and machines together"""
    workers: int = 1
    """runs at the same time, of this command"""
    seeds: int = 3
    """seeds of each trial in each environment, from 1001 on"""
    total_timesteps: Annotated[int, default_is("the script's")] = 0
    """steps of each run"""
    prune: float = 0.5
    """stop a trial that is below this quantile of the finished ones, over the runs it has so far (0: never)"""
    final_seeds: int = 5
    """seeds of the winner and of the default in the final check, from 1 on (0: no check)"""
    eval_episodes: int = 100
    """episodes of each of the two evaluations after a run of the final check; 0 for none"""
    sampler_seed: int = 0
    """seed of what the sampler draws"""
    storage: Annotated[str, default_is("RUNS_DIR/journal.log")] = ""
    """file of a journal, or URL of a database for several machines"""
    runs_dir: Annotated[str, default_is("runs/STUDY")] = ""
    """folder of the run directories"""
    out: Annotated[str, default_is("RUNS_DIR/report")] = ""
    """folder of report.md, tables, figures and winner.toml"""
    export_wandb: str = ""
    """write the space as a sweep file of Weights & Biases, and run nothing"""


@dataclass(frozen=True)
class Plan:
    """What does not change while a study runs."""

    options: Options
    space: Space
    algo: str
    """the script, as a suite file can name it from anywhere"""
    shown: tuple[str, ...]
    """what starts the script, for people"""
    text: str = field(repr=False)
    bounds: dict[str, list[float]]
    """scores that count as 0 and as 1, by environment; empty where scores stay as they are"""
    defaults: list[dict[str, Any]]
    """the script's defaults within the space, as they are in the environments; usually one"""
    runs_dir: Path
    out: Path

    @property
    def threads(self) -> int:
        """Of an Atari run; 0 where there is none."""
        return max(1, cores() // self.options.workers) if any(map(is_atari, self.options.env_ids)) else 0

    @property
    def identity(self) -> dict[str, Any]:
        """What all who work on a study must agree on."""
        digest = hashlib.sha256(self.text.encode()).hexdigest()[:10]
        known = {
            "text of the script": digest,
            "env-ids": self.options.env_ids,
            "seeds": self.options.seeds,
            "space": self.space.params,
            "fixed": self.space.fixed,
            "normalise": self.bounds,
        }
        return json.loads(json.dumps(known))  # as the storage gives it back

    @property
    def seeds(self) -> list[int]:
        """Those of the trials."""
        return list(range(TUNING + 1, TUNING + 1 + self.options.seeds))

    def score(self, env_id: str, value: float | None) -> float:
        """The score of a return. A run that failed has the return None and the lowest score.

        Normalised scores end at FLOOR. In some environments returns have no lower end, and one run below the random
        policy must not drown the others in the mean of a trial.
        """
        if env_id not in self.bounds:
            return -math.inf if value is None else value
        if value is None:
            return FAILURE
        low, high = self.bounds[env_id]
        return max((value - low) / (high - low), FLOOR)

    def jobs(self, name: str, values: dict[str, Any]) -> list[Job]:
        """The runs of a trial, seed by seed."""
        variants = {name: {"algo": self.algo, "flags": self.space.fixed | values}}
        suite = Suite(name, [*self.options.env_ids], [name], seeds=self.seeds, eval_episodes=0, variants=variants)
        return jobs_of(suite, self.threads)


def make_plan(options: Options) -> Plan:
    """Checks all that can be checked before anything is created; raises UsageError."""
    check_options(options)
    options = replace(options, env_ids=tuple(dict.fromkeys(options.env_ids)))
    for env_id in options.env_ids:
        check_environment(env_id)
        if reason := cannot_play(options.script, env_id):
            raise UsageError(f"{reason}.")
    command, path = command_of(options.script)
    space = read_space(options.space or Path(options.script).stem)
    if options.total_timesteps:
        space.fixed["total-timesteps"] = options.total_timesteps
    bounds = bounds_of(space, options.env_ids)
    defaults: list[dict[str, Any]] = []
    for env_id in options.env_ids:
        known = arguments_of(options.script, env_id)
        check_flags(space, options.script, known)
        default = default_of(space, known)
        if default not in defaults:
            defaults.append(default)
    algo, shown = options.script, ("python", *command[1:])
    if options.script not in PEERS:
        ours = path.resolve().parent == ROOT
        algo = path.stem if ours else str(path.resolve())
        shown = ("python", path.name if ours else str(path))
    runs_dir = Path(options.runs_dir or f"runs/{options.study}")
    return Plan(
        options=options,
        space=space,
        algo=algo,
        shown=shown,
        text=text_of(options.script, ours=space.fixed.get("hyperparameters") == "ours"),
        bounds=bounds,
        defaults=defaults,
        runs_dir=runs_dir,
        out=Path(options.out) if options.out else runs_dir / "report",
    )


def check_options(options: Options) -> None:
    """Raises UsageError for what is wrong whatever the script and the space."""
    if not options.export_wandb:
        require("a sweep", "sweep", "optuna")
        require("a sweep", "bench", "matplotlib", "scipy")
    if not options.env_ids or not 0 <= options.final_seeds <= TUNING or not 0 <= options.prune <= 1:
        raise UsageError(f"--env-ids must name one or more, --final-seeds be from 0 to {TUNING}, --prune from 0 to 1.")
    check_range(options, 1, "trials", "workers", "seeds")
    check_range(options, 0, "total_timesteps", "eval_episodes", "sampler_seed")
    if not re.fullmatch(r"\w[\w.-]*", options.study):
        raise UsageError(f"--study is {options.study!r}, but must be a name of letters, digits, dots and dashes.")
    if len(os.fsencode(options.study)) > LONGEST_NAME:
        raise UsageError(f"--study is longer than {LONGEST_NAME} bytes; choose a shorter name.")
    if options.export_wandb and options.script in PEERS:
        raise UsageError(f"{options.script} cannot log to Weights & Biases; --export-wandb is for scripts.")
    if options.storage.startswith("sqlite") and options.workers > 1:
        raise UsageError(
            "SQLite locks its whole file for a writer, so that several workers fail with 'database is locked'; leave"
            " --storage out for a journal file, or give the URL of a PostgreSQL or MySQL server."
        )


def bounds_of(space: Space, env_ids: tuple[str, ...]) -> dict[str, list[float]]:
    """The scores that count as 0 and as 1, by environment. Only a single environment may have none; UsageError."""
    bounds: dict[str, list[float]] = {}
    for env_id in env_ids:
        if env_id in space.normalise:
            bounds[env_id] = space.normalise[env_id]
        elif scale := score_range(env_id):
            bounds[env_id] = list(scale[:2])
        elif len(env_ids) > 1:
            raise UsageError(
                f"{env_id} has no scores that count as 0 and as 1, so its returns cannot be averaged with others; add"
                f' to {space.path}, under [normalise]: "{env_id}" = [return of a random policy, good return]'
            )
    return bounds
