"""What a sweep searches: a space file, checked against the arguments that the script takes."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.arguments import Arguments
from benchmarks.jobs import RESERVED, UsageError, as_flags, dashed, near_miss, shortened
from benchmarks.suite import check_values, parse_toml, wrong

SPACES = Path(__file__).resolve().parent / "spaces"
KEYS = ("low", "high", "log", "step", "choices")


@dataclass(frozen=True)
class Space:
    """A space file as it was read; benchmarks/spaces/ppo.toml shows every key."""

    path: Path
    params: dict[str, dict[str, Any]]
    """low and high, with log or step, or choices, of each flag that is searched"""
    fixed: dict[str, Any]
    normalise: dict[str, list[float]]


def read_space(name: str) -> Space:
    """The space of a name in benchmarks/spaces, or of a TOML file; raises UsageError with the key that is wrong."""
    path = Path(name) if name.endswith(".toml") else SPACES / f"{name}.toml"
    if not os.path.isfile(path):
        shipped = ", ".join(sorted(path.stem for path in SPACES.glob("*.toml")))
        raise UsageError(f"there is no space {name}; give --space path/to/space.toml, or one of {shipped}.")
    content = parse_toml(path)
    for key in content:
        if "-" in key and key.replace("-", "_") in content:
            raise wrong(path, key, what="is there twice, with - and with _; keep one of the two")
    params = dashed(content)
    fixed, normalise = params.pop("fixed", {}), params.pop("normalise", {})
    for key, table in (("fixed", fixed), ("normalise", normalise)):
        if not isinstance(table, dict):
            raise wrong(path, key, what="must be a table")
    space = Space(path, params, dashed(fixed), normalise)
    check_space(space)
    return space


def check_space(space: Space) -> None:
    """Raises UsageError for what is wrong with a space, whatever the script."""
    path = space.path
    if not space.params:
        raise UsageError(f"{path} searches nothing; add a table such as [learning-rate] with low and high.")
    for flag, table in space.params.items():
        check_table(path, flag, table)
        if flag in RESERVED:
            raise wrong(path, flag, what="the sweep sets this flag itself")
    for flag in space.fixed:
        if flag in RESERVED:
            raise wrong(path, "fixed", flag, what="the sweep sets this flag itself")
        if flag in space.params:
            raise wrong(path, "fixed", flag, what="is searched as well; keep one of the two")
    check_values(path, ("fixed",), space.fixed)
    for flag, table in space.params.items():
        check_values(path, (), {flag: table.get("choices", 0)})
    for env_id, bounds in space.normalise.items():
        is_pair = isinstance(bounds, list) and len(bounds) == 2 and all(map(is_number, bounds))
        if not is_pair or bounds[0] >= bounds[1]:
            what = f"must be [score that counts as 0, score that counts as 1], not {shortened(bounds)}"
            raise wrong(path, "normalise", env_id, what=what)


def is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300


def is_whole(table: dict[str, Any]) -> bool:
    return all(isinstance(table.get(key, 1), int) for key in ("low", "high", "step"))


def check_table(path: Path, flag: str, table: Any) -> None:
    """Raises UsageError unless the table says what values a flag can take."""
    if not isinstance(table, dict):
        raise wrong(path, flag, what="must be a table with low and high, or with choices; one value belongs in [fixed]")
    for key in table:
        if key not in KEYS:
            raise wrong(path, flag, key, what=f"no such key; {near_miss(key, KEYS, 'there are ' + ', '.join(KEYS))}")
    if "choices" in table:
        choices = table["choices"]
        plain = isinstance(choices, list) and all(isinstance(choice, (bool, int, float, str)) for choice in choices)
        if not plain or len(set(map(str, choices))) != len(choices) or len(choices) < 2 or len(table) > 1:
            what = "must be a list of two or more different values, and the only key"
            raise wrong(path, flag, "choices", what=what)
        return
    for key in ("low", "high"):
        if not is_number(table.get(key)):
            raise wrong(path, flag, key, what="must be a number" if key in table else "is missing")
    if table["low"] >= table["high"]:
        raise wrong(path, flag, "high", what=f"must be greater than low, {table['low']}")
    if not isinstance(table.get("log", False), bool) or table.get("log") and table["low"] <= 0:
        raise wrong(path, flag, "log", what="must be true or false, and low greater than 0 where it is true")
    if "step" in table and (not is_number(table["step"]) or table["step"] <= 0 or table.get("log")):
        raise wrong(path, flag, "step", what="must be a number greater than 0, and goes without log")


def distributions_of(space: Space) -> dict[str, Any]:
    """The space as Optuna has it; whole numbers where low, high and step are whole."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    found: dict[str, Any] = {}
    for flag, table in space.params.items():
        if "choices" in table:
            found[flag] = CategoricalDistribution(table["choices"])
        elif is_whole(table):
            found[flag] = IntDistribution(**table)
        else:
            found[flag] = FloatDistribution(**table)
    return found


def values_of(space: Space, params: dict[str, Any]) -> dict[str, Any]:
    """What the parameters of a trial are on the command line: floats with four digits, which is plenty."""
    values = dict(params)
    for flag, value in params.items():
        if isinstance(value, float) and "low" in space.params[flag]:
            values[flag] = min(max(float(f"{value:.4g}"), space.params[flag]["low"]), space.params[flag]["high"])
    return values


# ------------------------------------------------------------------------------------------------------- script
def check_flags(space: Space, script: str, known: Arguments) -> None:
    """Raises UsageError for a flag that the script does not have, or a value of one that it does not take."""

    def check(place: tuple[str, ...], values: list[Any]) -> None:
        flag = place[-1]
        if flag not in known:
            guess = near_miss(flag, known, "its --help names them")
            raise wrong(space.path, *place, what=f"{script} has no such flag; {guess}")
        for value in values:
            if problem := known[flag].misfit(value):
                where = place if len(place) > 1 else (flag, "choices")
                raise wrong(space.path, *where, what=f"{script} {problem}")

    for flag, table in space.params.items():
        check((flag,), table.get("choices", []))
        if "low" in table and known[flag].kinds == [int] and not is_whole(table):
            what = f"{script} takes whole numbers; low, high and step must be whole"
            raise wrong(space.path, flag, "low", what=what)
    for flag, value in space.fixed.items():
        check(("fixed", flag), [value])


def default_of(space: Space, known: Arguments) -> dict[str, Any]:
    """The script's defaults, or what is nearest to them in the space; a flag that has neither is left out."""
    params: dict[str, Any] = {}
    for flag, table in space.params.items():
        default = known[flag].default
        if "choices" in table:
            for choice in table["choices"]:
                if choice == default and is_number(choice) == is_number(default):  # True is not 1
                    params[flag] = choice
        elif is_number(default):
            params[flag] = nearest(table, default)
    return params


def nearest(table: dict[str, Any], number: float) -> float:
    """The number of a table with low and high that is nearest to another."""
    low, step = table["low"], table.get("step", 1 if is_whole(table) else 0)
    value = min(max(number, low), table["high"])
    if step:
        value = low + round((value - low) / step) * step
    return int(value) if is_whole(table) else float(value)


def write_wandb(space: Space, known: Arguments, program: str, study: str, env_ids: list[str], seeds: list[int]) -> str:
    """The space as a sweep file of Weights & Biases, whose agent starts one run per environment and seed."""
    import yaml

    parameters: dict[str, Any] = {}
    for flag, table in space.params.items():
        name = flag.replace("-", "_")
        if table.get("choices") in ([True, False], [False, True]) and known[flag].default is True:
            name = f"no_{name}"  # an agent passes --flag, or nothing
        parameters[name] = wandb_parameter(table)
    sweep = {
        "name": study,
        "program": program,
        "method": "random",
        "metric": {"name": "charts/train_last100", "goal": "maximize"},
        "parameters": parameters | {"env_id": {"values": env_ids}, "seed": {"values": seeds}},
        "command": [
            "${env}",
            "${interpreter}",
            "${program}",
            "--track",
            *as_flags(space.fixed),
            "${args_no_boolean_flags}",
        ],
    }
    why = "# random, not bayes: that would search for the luckiest seed and the environment with the largest returns\n"
    return why + yaml.safe_dump(sweep, sort_keys=False)


def wandb_parameter(table: dict[str, Any]) -> dict[str, Any]:
    """A table of the space as Weights & Biases has it."""
    if "choices" in table:
        return {"values": table["choices"]}
    low, high = table["low"], table["high"]
    if "step" in table:
        steps = np.arange(low, high + table["step"] / 2, table["step"])
        return {"values": steps.round(10).tolist()}
    bounds = {"min": low, "max": high}
    if table.get("log") and is_whole(table):
        return {"distribution": "q_log_uniform_values", "q": 1} | bounds
    if table.get("log"):
        return {"distribution": "log_uniform_values"} | bounds
    return {"distribution": "int_uniform" if is_whole(table) else "uniform"} | bounds
