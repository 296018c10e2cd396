"""A suite: a TOML file that stands for a matrix of jobs. An error in a TOML file names the key that is wrong."""

import csv
import json
import os
import re
import sys
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from benchmarks.jobs import (
    MOST,
    RESERVED,
    ROOT,
    Job,
    UsageError,
    as_flags,
    cannot_play,
    check_environment,
    command_of,
    dashed,
    is_atari,
    json_damage,
    near_miss,
    out_of_range,
    printable,
    read_json,
    read_text,
    shortened,
    text_of,
)

LONGEST_NAME = 200  # bytes; a log has four more, a temporary file some more, and most file systems take 255
SUITES = Path(__file__).resolve().parent / "suites"


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


NOTE_KEYS = {  # keys of suite.json
    "name": ("a text", str),
    "description": ("a text", str),
    "commands": ("a list of texts", list),
    "published": ("a list of texts", list),
    "normalise": ("true or false", bool),
    "cells": ("a list of cells", list),
}
CELL_KEYS = {  # keys of a cell of suite.json
    "env_id": ("a text", str),
    "algo": ("a text", str),
    "seed": ("a whole number", int),
    "name": ("the name of a folder", str),
}


def damage_of(file: Path) -> str:
    """What is wrong with a suite.json, in which `run` notes what was asked for; "" if nothing is."""
    if damage := json_damage(file):
        return damage
    note = read_json(file)
    for key, value in note.items():
        what, kind = NOTE_KEYS.get(key, ("", object))
        if not isinstance(value, kind) or kind is list and key != "cells" and not is_texts(value):
            return f"{key} must be {what}, but is {shortened(value)}"
    for number, cell in enumerate(note.get("cells", [])):
        if damage := damage_of_cell(cell):
            return f"cells[{number}]{damage}"
    return ""


def damage_of_cell(cell: Any) -> str:
    """As damage_of, for a cell; begins with the key that is wrong."""
    if not isinstance(cell, dict):
        return f" must be a table, but is {shortened(cell)}"
    for key, (what, kind) in CELL_KEYS.items():
        value = cell.get(key)
        if not isinstance(value, kind) or isinstance(value, bool) or key == "name" and not is_plain_name(value):
            return f".{key} must be {what}, but is {shortened(value)}" if key in cell else f" has no {key}"
    return ""


def is_plain_name(name: str) -> bool:
    """Whether this names a folder in a folder, and nothing outside of it."""
    return name not in ("", ".", "..") and "/" not in name and "\0" not in name


def parse_toml(path: Path) -> dict[str, Any]:
    """What a file says. Raises UsageError; the parser's message about wrong syntax has the line."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    try:
        return tomllib.loads(read_text(path))
    except RecursionError:
        raise UsageError(f"{path}: lists or tables are nested too deep.") from None
    except ValueError as error:  # its syntax, or a number of too many digits
        raise UsageError(f"{path}: {printable(str(error))}.") from None


def wrong(path: Path, *keys: str | int, what: str) -> UsageError:
    """The error about a value of a TOML file: wrong(path, "arguments", 0, "envs", what=...) -> arguments[0].envs."""
    place = ""
    for key in keys:
        if isinstance(key, int):
            place += f"[{key}]"
        else:
            place += "." + (key if re.fullmatch(r"[\w-]+", key, re.ASCII) else json.dumps(key))
    place = place.removeprefix(".")
    end = "" if what.endswith(("?", ".")) else "."
    return UsageError(f"{path}: {place}: {what}{end}")


def suite_file(name: str) -> Path:
    return Path(name) if name.endswith(".toml") else SUITES / f"{name}.toml"


def read_suite(name: str) -> Suite:
    """The suite of a name in benchmarks/suites, or of a TOML file; raises UsageError with the key that is wrong."""
    path = suite_file(name)
    if not os.path.isfile(path):
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
            raise wrong(path, *place, key, what=f"must be {what}, but is {shortened(value)}")


def check_numbers(path: Path, content: dict[str, Any]) -> None:
    """Raises UsageError for numbers of seeds, steps or episodes that are no whole numbers or too small."""
    seeds = content.get("seeds", 5)
    if isinstance(seeds, list):
        if not seeds or not all(type(seed) is int and not out_of_range("seed", seed, 0) for seed in seeds):
            raise wrong(path, "seeds", what="must be whole numbers of 0 or more, less than 2**32")
    elif must := out_of_range("seeds", seeds, 1):
        raise wrong(path, "seeds", what=must)
    for key, least in (("total_timesteps", 1), ("eval_episodes", 0)):
        if must := out_of_range(key, content.get(key, least), least):
            raise wrong(path, key, what=must)


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
        what = f"must be a table, but is {shortened(rule)}; write [[arguments]]"
        raise wrong(path, "arguments", number, what=what)
    check_keys(path, ("arguments", number), rule, RULE_KEYS)
    for key in ("envs", "algos"):
        if not is_texts(rule.get(key, [])):
            what = f"must be {RULE_KEYS[key][0]}, but is {shortened(rule[key])}"
            raise wrong(path, "arguments", number, key, what=what)
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
        if name.replace("_", "-").removeprefix("no-") in RESERVED:
            raise wrong(path, *place, name, what="is set for each run and cannot be a flag")
        if "=" in name or not name.strip("-_ "):
            raise wrong(path, *place, name, what="is no name of a flag")
        values = value if isinstance(value, list) else [value]
        if not values or not all(isinstance(item, (str, int, float)) for item in values):
            what = f"must be a number, a text, true, false or a list of them, but is {shortened(value)}"
            raise wrong(path, *place, name, what=what)
        if hidden := next((item for item in values if is_flag(item)), ""):
            raise wrong(path, *place, name, what=f"{shortened(hidden)} would be a flag of its own")


def is_flag(value: Any) -> bool:
    """Whether a command line would take a value for a flag: it begins with a dash and is no number."""
    if not isinstance(value, str) or not value.startswith("-"):
        return False
    try:
        float(value)
    except ValueError:
        return True
    return False


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

    A cell whose script cannot play its environment is left out.

    threads is --num-threads of Atari runs; other runs keep the script's default, one thread. total_timesteps wins over
    all budgets of the suite. Raises UsageError for what is neither script nor peer nor variant, for two scripts of one
    name and for environments that are not registered.
    """
    seeds = range(1, suite.seeds + 1) if isinstance(suite.seeds, int) else suite.seeds
    if (runs := len(suite.envs) * len(suite.algos) * len(seeds)) > MOST["runs"]:
        raise UsageError(f"these are {runs:,} runs; ask for {MOST['runs']:,} at most.")
    for env_id in suite.envs:
        check_environment(env_id)
    jobs: dict[str, Job] = {}  # by their names: what is listed twice is one job
    columns: dict[str, tuple[str, ...]] = {}
    for seed in seeds:
        for env_id in suite.envs:
            for algo in suite.algos:
                if cannot_play(script_of(suite, algo), env_id):
                    continue
                job = job_of(suite, env_id, algo, seed, threads, total_timesteps)
                if columns.setdefault(job.algo, job.command) != job.command:
                    both = f"{columns[job.algo][-1]} and {job.command[-1]}"
                    raise UsageError(f"{both} would be one column, {job.algo}; rename one, or make it a variant.")
                if (length := len(os.fsencode(job.name))) > LONGEST_NAME:
                    shorter = f"is {length} bytes long, and {LONGEST_NAME} is the most: choose shorter names"
                    raise UsageError(f"the name of the run directory, {job.name[:60]}..., {shorter}.")
                jobs[job.name] = job
    if not jobs:
        raise UsageError(f"{left_out(suite)[0]}.")
    return list(jobs.values())


def left_out(suite: Suite) -> list[str]:
    """Why cells of the matrix are left out, a line for each environment and algorithm."""
    cells = [(script_of(suite, algo), env_id) for env_id in suite.envs for algo in suite.algos]
    return [reason for cell in dict.fromkeys(cells) if (reason := cannot_play(*cell))]


def job_of(suite: Suite, env_id: str, algo: str, seed: int, threads: int, total_timesteps: int) -> Job:
    """One job of a matrix; the arguments are those of jobs_of."""
    script = script_of(suite, algo)
    options: dict[str, Any] = {}
    if suite.total_timesteps:
        options["total-timesteps"] = suite.total_timesteps
    options |= options_of(suite, env_id, algo)
    if total_timesteps:
        options["total-timesteps"] = total_timesteps
    if algo in suite.variants:
        options["exp-name"] = algo
    return Job(
        algo=Path(algo).stem if algo.endswith(".py") else algo,
        command=command_of(script)[0],
        text=text_of(script, ours=options.get("hyperparameters") == "ours"),
        env_id=env_id,
        seed=seed,
        flags=as_flags(options),
        eval_episodes=suite.eval_episodes,
        threads=threads if is_atari(env_id) else 0,
    )
