"""What a sweep searches: a space file, checked against the flags that the script's --help names."""

import math
import os
import re
import shlex
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.jobs import RESERVED, ROOT, UsageError, as_flags, near_miss, parse_toml

SPACES = Path(__file__).resolve().parent / "spaces"
KEYS = ("low", "high", "log", "step", "choices")


class Flag(NamedTuple):
    """What a script's --help says of a flag."""

    default: str
    choices: list[str] = []
    kind: str = ""
    """INT, FLOAT, "bool" for a pair --flag and --no-flag; "" for all others"""

    def misfit(self, words: list[str]) -> str:
        """What the flag takes, where the words that follow it on a command line are not that; else ""."""
        if self.kind == "bool":
            return f"takes true or false, not {' '.join(words)}" if words else ""
        if len(words) > 1 and (self.choices or self.kind):
            return f"takes one value, not {' '.join(words)}"
        for word in words or ["true"] * bool(self.choices or self.kind):
            if self.choices and word not in self.choices:
                return f"takes {', '.join(self.choices)}, not {word}"
            try:
                {"INT": int, "FLOAT": float}.get(self.kind, str)(word)
            except ValueError:
                return f"takes a {'whole ' * (self.kind == 'INT')}number, not {word}"
        return ""


Flags = dict[str, Flag]


@dataclass(frozen=True)
class Space:
    """A space file as it was read; benchmarks/spaces/ppo.toml shows every key."""

    path: Path
    text: str = field(repr=False)
    params: dict[str, dict[str, Any]]
    """low and high, with log or step, or choices, of each flag that is searched"""
    fixed: dict[str, Any]
    normalise: dict[str, list[float]]

    def wrong(self, table: str, key: str, what: str) -> UsageError:
        """The error with file, line and key; without a table the key is itself a table, or belongs to none."""
        lines, found = self.text.splitlines(), 0
        for name in filter(None, (table, key)):
            spelled = "[-_]".join(map(re.escape, re.split("[-_]", name)))
            for n in range(found, len(lines)):
                if name == key and table and n > found and lines[n].lstrip().startswith("["):
                    break
                if re.match(rf"\s*\[?\s*[\"']?{spelled}[\"']?\s*[].=]", lines[n]):
                    found = n
                    break
        end = "" if what.endswith("?") else "."
        return UsageError(f"{self.path}, line {found + 1}, {' '.join(filter(None, (table, key)))}: {what}{end}")


def read_space(name: str) -> Space:
    """The space of a name in benchmarks/spaces, or of a TOML file; raises UsageError with the line and the key."""
    path = Path(name) if name.endswith(".toml") else SPACES / f"{name}.toml"
    if not path.is_file():
        shipped = ", ".join(sorted(path.stem for path in SPACES.glob("*.toml")))
        raise UsageError(f"there is no space {name}; give --space path/to/space.toml, or one of {shipped}.")
    text, content = parse_toml(path)
    for key in content:
        if key.replace("-", "_") in content and "-" in key:
            raise Space(path, text, {}, {}, {}).wrong("", key, "is there twice, with - and with _; keep one of the two")
    content = {key.replace("_", "-"): table for key, table in content.items()}
    fixed, normalise = content.pop("fixed", {}), content.pop("normalise", {})
    for key, table in (("fixed", fixed), ("normalise", normalise)):
        if not isinstance(table, dict):
            raise Space(path, text, {}, {}, {}).wrong("", key, "must be a table")
    space = Space(path, text, content, {flag.replace("_", "-"): value for flag, value in fixed.items()}, normalise)
    if not content:
        raise UsageError(f"{path} searches nothing; add a table such as [learning-rate] with low and high.")
    for flag, table in content.items():
        check_table(space, flag, table)
    for flag in RESERVED:
        if flag in content or flag in space.fixed:
            raise space.wrong("" if flag in content else "fixed", flag, "the sweep sets this flag itself")
    for flag in content.keys() & space.fixed.keys():
        raise space.wrong("fixed", flag, "is searched as well; keep one of the two")
    for env_id, bounds in normalise.items():
        if (
            not isinstance(bounds, list)
            or len(bounds) != 2
            or not all(map(is_number, bounds))
            or bounds[0] >= bounds[1]
        ):
            raise space.wrong(
                "normalise", env_id, f"must be [score that counts as 0, score that counts as 1], not {bounds}"
            )
    return space


def is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def is_whole(table: dict[str, Any]) -> bool:
    return all(isinstance(table.get(key, 1), int) for key in ("low", "high", "step"))


def check_table(space: Space, flag: str, table: Any) -> None:
    """Raises UsageError unless the table says what values a flag can take."""
    if not isinstance(table, dict):
        raise space.wrong("", flag, "must be a table with low and high, or with choices; one value belongs in [fixed]")
    for key in table:
        if key not in KEYS:
            raise space.wrong(flag, key, f"no such key; {near_miss(key, KEYS, f'there are {KEYS}')}")
    if "choices" in table:
        choices = table["choices"]
        plain = isinstance(choices, list) and all(isinstance(choice, (bool, int, float, str)) for choice in choices)
        if not plain or len(set(map(str, choices))) != len(choices) or len(choices) < 2 or len(table) > 1:
            raise space.wrong(flag, "choices", "must be a list of two or more different values, and the only key")
        return
    for key in ("low", "high"):
        if not is_number(table.get(key)):
            raise space.wrong(flag, key, "must be a number" if key in table else "is missing")
    if table["low"] >= table["high"]:
        raise space.wrong(flag, "high", f"must be greater than low, {table['low']}")
    if not isinstance(table.get("log", False), bool) or table.get("log") and table["low"] <= 0:
        raise space.wrong(flag, "log", "must be true or false, and low greater than 0 where it is true")
    if "step" in table and (not is_number(table["step"]) or table["step"] <= 0 or table.get("log")):
        raise space.wrong(flag, "step", "must be a number greater than 0, and goes without log")


def distributions_of(space: Space) -> dict[str, Any]:
    """The space as Optuna has it; whole numbers where low, high and step are whole."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    found: dict[str, Any] = {}
    for flag, table in space.params.items():
        number = IntDistribution if is_whole(table) else FloatDistribution
        found[flag] = CategoricalDistribution(table["choices"]) if "choices" in table else number(**table)
    return found


def values_of(space: Space, params: dict[str, Any]) -> dict[str, Any]:
    """What the parameters of a trial are on the command line: floats with four digits, which is plenty."""
    values = dict(params)
    for flag, value in params.items():
        if isinstance(value, float) and "low" in space.params[flag]:
            values[flag] = min(max(float(f"{value:.4g}"), space.params[flag]["low"]), space.params[flag]["high"])
    return values


# ------------------------------------------------------------------------------------------------------- script
def help_of(command: tuple[str, ...], env_id: str) -> Flags:
    """The flags that a script's --help names for an environment; raises UsageError where it fails."""
    asked = [*command, "--help", "--env-id", env_id]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environ = os.environ | {"PYTHONPATH": path, "COLUMNS": "160"}
    done = subprocess.run(asked, capture_output=True, text=True, env=environ)
    if done.returncode:
        raise UsageError(f"{shlex.join(asked)} fails: {' '.join((done.stderr or done.stdout).split())[-300:]}")
    flags: Flags = {}
    for entry in re.split(r"\n(?=-)", "\n".join(line.strip(" │") for line in done.stdout.splitlines())):
        pattern = r"(?:-\w,? )?--([\w-]+)(, --no-[\w-]+)?\s*(?:\{([^}]*)\}(?:\s|$)|(INT|FLOAT)(?:\s|$))?"
        if found := re.match(pattern, entry):
            default = " ".join(entry.rpartition("(default: ")[2].split()).rpartition(")")[0]
            kind = "bool" if found[2] else found[4] or ""
            flags[found[1].replace("_", "-")] = Flag(default, found[3].split(",") if found[3] else [], kind)
    return flags


def check_flags(space: Space, script: str, known: Flags) -> None:
    """Raises UsageError for a flag, or a choice of one, that the script has not."""
    searched = [("", flag, table.get("choices", [])) for flag, table in space.params.items()]
    for table, flag, values in searched + [("fixed", flag, [value]) for flag, value in space.fixed.items()]:
        if flag not in known:
            guess = near_miss(flag, known, "its --help names them")
            raise space.wrong(table, flag, f"{script} has no such flag; {guess}")
        if not table and known[flag].kind == "INT" and "low" in space.params[flag] and not is_whole(space.params[flag]):
            raise space.wrong(flag, "low", f"{script} takes whole numbers; low, high and step must be whole")
        for value in values:
            if problem := known[flag].misfit(as_flags({flag: value})[1:]):
                raise space.wrong(*((table, flag) if table else (flag, "choices")), f"{script} {problem}")


def default_of(space: Space, known: Flags) -> dict[str, Any]:
    """The script's defaults, or what is nearest to them in the space; a flag that has neither is left out."""
    params: dict[str, Any] = {}
    for flag, table in space.params.items():
        text = known[flag][0]
        try:
            if "choices" in table:
                same = (choice for choice in table["choices"] if str(choice) == text or is_number(choice))
                params[flag] = next(choice for choice in same if str(choice) == text or choice == float(text))
            else:
                low, step = table["low"], table.get("step", 1 if is_whole(table) else 0)
                value = min(max(float(text), low), table["high"])
                value = low + round((value - low) / step) * step if step else value
                params[flag] = int(value) if is_whole(table) else value
        except (StopIteration, ValueError):
            continue
    return params


def write_wandb(space: Space, known: Flags, program: str, study: str, env_ids: list[str], seeds: list[int]) -> str:
    """The space as a sweep file of Weights & Biases, whose agent starts one run per environment and seed."""
    import yaml

    several, parameters = len(env_ids) > 1, {}
    for flag, table in space.params.items():
        name, whole = flag.replace("-", "_"), is_whole(table)
        if "choices" in table:
            parameters[name] = {"values": table["choices"]}
            if (
                set(table["choices"]) == {True, False} and known[flag][0] == "True"
            ):  # an agent passes --flag, or nothing
                parameters[f"no_{name}"] = parameters.pop(name)
        elif "step" in table:
            steps = np.arange(table["low"], table["high"] + table["step"] / 2, table["step"])
            parameters[name] = {"values": steps.round(10).tolist()}
        elif table.get("log"):
            parameters[name] = {"distribution": "q_log_uniform_values", "q": 1} if whole else {}
            parameters[name] = {"distribution": "log_uniform_values"} | parameters[name]
            parameters[name] |= {"min": table["low"], "max": table["high"]}
        else:
            kind = "int_uniform" if whole else "uniform"
            parameters[name] = {"distribution": kind, "min": table["low"], "max": table["high"]}
    parameters["env_id"] = {"values": env_ids}
    parameters["seed"] = {"values": seeds}
    sweep: dict[str, Any] = dict(name=study, program=program, method="random" if several else "bayes")
    sweep |= dict(metric=dict(name="charts/episodic_return", goal="maximize"), parameters=parameters)
    start = ["${env}", "${interpreter}", "${program}", "--track"]
    sweep |= dict(command=[*start, *as_flags(space.fixed), "${args_no_boolean_flags}"])
    note = (
        "# random, not bayes: a run is of one environment, and returns of several do not compare\n" if several else ""
    )
    return note + yaml.safe_dump(sweep, sort_keys=False)
