"""Which arguments a script or a peer takes, with their types and their defaults in an environment.

A script is imported from its file, whatever folder that is in, and says it itself: parse_args(argv) returns a
dataclass, and the fields of that are the arguments. A peer says it in the same way, but its arguments have no types.
"""

import ast
import contextlib
import dataclasses
import functools
import hashlib
import io
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints
from unittest.mock import patch

from benchmarks.jobs import PEERS, UsageError, command_of

OF_PEERS = {"hyperparameters": Literal["theirs", "ours"], "device": Literal["auto", "cpu", "cuda"]}


class Argument(NamedTuple):
    """One argument of a script."""

    default: Any
    type: Any = Any
    """its annotation"""

    @property
    def kinds(self) -> list[Any]:
        """The types that its values may have, None left out: of `int | None` only int."""
        union = get_origin(self.type) in (Union, types.UnionType)
        return [kind for kind in get_args(self.type) if kind is not type(None)] if union else [self.type]

    def misfit(self, value: Any) -> str:
        """ "" if the argument takes a value of a TOML file; else what it takes, for the end of a sentence."""
        if value == "None" and type(None) in get_args(self.type):
            return ""
        problems = [misfit(kind, value) for kind in self.kinds]
        return "" if "" in problems else problems[0]


Arguments = dict[str, Argument]  # by the names of their flags, with dashes


def misfit(kind: Any, value: Any) -> str:
    """As Argument.misfit, for one type. Types that are no number, text, bool, choice or list take every value."""
    values = value if isinstance(value, list) else [value]
    if get_origin(kind) in (list, tuple):
        kind = get_args(kind)[0]
    elif len(values) > 1 and (kind in (bool, int, float, str) or get_origin(kind) is Literal):
        return f"takes one value, not {' '.join(map(spelled, values))}"
    for item in values:
        if takes := expected(kind, item):
            return f"takes {takes}, not {spelled(item)}"
    return ""


def expected(kind: Any, value: Any) -> str:
    """What a type takes, if a single value is not that; else ""."""
    if get_origin(kind) is Literal:
        choices = [spelled(choice) for choice in get_args(kind)]
        return "" if spelled(value) in choices else ", ".join(choices)
    if kind is bool:
        return "" if isinstance(value, bool) else "true or false"
    if kind is str:
        return "a text" if isinstance(value, bool) else ""
    if kind in (int, float):
        try:
            kind(str(value))  # a flag is text: "3" is as good as 3, and 3.0 is no whole number
        except ValueError:
            return "a whole number" if kind is int else "a number"
    return ""


def spelled(value: Any) -> str:
    """A value as a TOML file has it, without quotes."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def arguments_of(algo: str, env_id: str, ours: bool = False) -> Arguments:
    """The arguments of a script (ppo, path/to/script.py) or a peer, with the defaults of an environment.

    ours is for a peer with the hyperparameters "ours": it takes the arguments of our script. Raises UsageError.
    """
    ours = ours and algo.startswith("sb3:")
    if algo in PEERS and not ours:
        from benchmarks import peers

        defaults, kinds = dict(vars(peers.parse_args([algo, "--env-id", env_id]))), OF_PEERS
        del defaults["algo"], defaults["unmapped"]  # the first word of its command line, and what ours does not map
    else:
        defaults, kinds = ask_script(command_of(algo.removeprefix("sb3:"))[1].resolve(), env_id)
    if ours:
        defaults, kinds = defaults | {"hyperparameters": "ours"}, kinds | OF_PEERS
    return {name.replace("_", "-"): Argument(value, kinds.get(name, Any)) for name, value in defaults.items()}


def ask_script(path: Path, env_id: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields of what a script's parse_args returns for an environment: their values, and their types."""
    script = import_script(path, path.read_text(encoding="utf-8"))
    with one_sentence(f"parse_args of {path} fails"):
        args = script.parse_args(["--env-id", env_id])
        kinds = get_type_hints(type(args)) if dataclasses.is_dataclass(args) else {}
    if not kinds:
        raise UsageError(f"parse_args of {path} returns no dataclass whose fields are the arguments.")
    return {field.name: getattr(args, field.name) for field in dataclasses.fields(args)}, kinds


@functools.cache
def import_script(path: Path, text: str) -> types.ModuleType:
    """A script as a module, under a name that no other file and no other text has; raises UsageError.

    A text without a function parse_args is not executed: it could begin to train.
    """
    with one_sentence(f"{path} cannot be imported"):
        functions = [node.name for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
    if "parse_args" not in functions:
        raise UsageError(f"{path} has no function parse_args(argv) that says what arguments it takes.")
    name = f"script_{hashlib.sha256(f'{path} {text}'.encode()).hexdigest()}"
    module = sys.modules[name] = types.ModuleType(name)  # dataclasses and get_type_hints look for it there
    module.__file__ = str(path)
    try:
        with one_sentence(f"{path} cannot be imported"), patch.object(sys, "path", [str(path.parent), *sys.path]):
            exec(compile(text, str(path), "exec", dont_inherit=True), vars(module))
    except UsageError:
        del sys.modules[name]
        raise
    return module


@contextlib.contextmanager
def one_sentence(what: str) -> Iterator[None]:
    """Makes a UsageError of whatever a script raises, and of what it prints before it exits."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            yield
    except (Exception, SystemExit) as error:
        reason = f"{type(error).__name__}: {error}"
        if isinstance(error, SystemExit):
            reason = f"it exits. {said.getvalue()}"
        elif type(error).__name__ == "UsageError":  # the script's own class
            reason = str(error)
        raise UsageError(f"{what}: {' '.join(reason.split())[:300].rstrip('. ')}.") from None
