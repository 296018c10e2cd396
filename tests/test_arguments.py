"""What a script's arguments are: asked of the script itself, wherever it is and whatever it raises."""

import shutil
import sys
from pathlib import Path
from typing import Any, Literal

import pytest

from benchmarks.arguments import Argument, arguments_of
from benchmarks.jobs import ROOT, UsageError

HEAD = """
from dataclasses import dataclass
from typing import Literal

# --env-id and --run-name
@dataclass
class Args:
    env_id: str = "CartPole-v1"
    width: int = 64
    rate: float | None = None

"""
SCRIPT = (
    HEAD
    + """
def parse_args(argv=None):
    return Args(*argv[1:], width=3 if argv[1] == "Acrobot-v1" else 64)
"""
)


@pytest.fixture
def write(tmp_path):
    """write(text, name) makes a script of it; returns its path."""

    def write(text, name="fake.py"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return str(path)

    return write


def refusal(path):
    with pytest.raises(UsageError) as error:
        arguments_of(path, "CartPole-v1")
    assert "\n" not in str(error.value) and str(error.value).endswith(".")
    return str(error.value)


def test_fields_are_flags_with_types_and_the_defaults_of_the_environment(write):
    path = write(SCRIPT)
    assert arguments_of(path, "CartPole-v1") == {
        "env-id": Argument("CartPole-v1", str),
        "width": Argument(64, int),
        "rate": Argument(None, float | None),
    }
    assert arguments_of(path, "Acrobot-v1")["width"] == Argument(3, int)


def test_arguments_may_be_spread_over_two_classes_and_have_postponed_types(write):
    text = "from __future__ import annotations\n" + SCRIPT
    text += "\n@dataclass\nclass RunArgs(Args):\n    device: Literal['cpu', 'cuda'] = 'cpu'\n"
    path = write(text.replace("return Args(", "return RunArgs("))
    found = arguments_of(path, "CartPole-v1")
    assert list(found) == ["env-id", "width", "rate", "device"]
    assert found["device"] == Argument("cpu", Literal["cpu", "cuda"]) and found["width"].type is int


def test_scripts_of_one_name_and_new_texts_do_not_collide(write):
    one, other = write(SCRIPT), write(SCRIPT.replace("width", "height"), "other/fake.py")
    assert "width" in arguments_of(one, "CartPole-v1") and "height" in arguments_of(other, "CartPole-v1")
    assert "width" in arguments_of(one, "CartPole-v1") and "fake" not in sys.modules
    write(SCRIPT.replace("width", "depth"))
    assert "depth" in arguments_of(one, "CartPole-v1")
    assert not list(Path(one).parent.rglob("__pycache__"))


@pytest.mark.parametrize("name", ["ppo", "a2c", "a3c", "trpo", "reinforce"])
def test_a_copy_of_a_script_is_asked_as_the_script_is(name, tmp_path):
    copy = shutil.copy(ROOT / f"{name}.py", tmp_path / "my_copy.py")
    ours, mine = arguments_of(name, "HalfCheetah-v4"), arguments_of(str(copy), "HalfCheetah-v4")
    assert mine == ours | {"exp-name": Argument("my_copy", str)}
    assert ours["norm-obs"] == Argument(True, bool) and arguments_of(name, "CartPole-v1")["norm-obs"].default is False


def test_peers_are_asked_too():
    pytest.importorskip("stable_baselines3")
    theirs, ours = arguments_of("sb3:ppo", "CartPole-v1"), arguments_of("sb3:ppo", "CartPole-v1", ours=True)
    assert theirs["n-steps"] == Argument(2048) and "algo" not in theirs and "clip-coef" not in theirs
    assert theirs["hyperparameters"].misfit("our") == "takes theirs, ours, not our"
    assert ours == arguments_of("ppo", "CartPole-v1") | {"hyperparameters": Argument("ours", Literal["theirs", "ours"])}
    assert arguments_of("random", "CartPole-v1", ours=True) == arguments_of("random", "CartPole-v1")


def test_a_script_without_parse_args_is_not_executed(write):
    path = write(HEAD + "open('trained', 'w')\n")
    assert refusal(path) == f"{path} has no function parse_args(argv) that says what arguments it takes."
    assert not Path("trained").exists()


@pytest.mark.parametrize(
    "text, message",
    [
        (SCRIPT + "import nowhere\n", "cannot be imported: ModuleNotFoundError: No module named 'nowhere'."),
        (SCRIPT + "print('usage: none')\nraise SystemExit(2)\n", "cannot be imported: it exits. usage: none."),
        (SCRIPT + "def broken(:\n", "cannot be imported: SyntaxError: "),
        (
            SCRIPT.replace("return Args(*argv[1:], ", "return dict("),
            "returns no dataclass whose fields are the arguments.",
        ),
        (SCRIPT.replace("return Args(", "return 1 / 0 or Args("), "fails: ZeroDivisionError: division by zero."),
        (SCRIPT.replace("(argv=None)", "()"), "fails: TypeError: parse_args() takes 0 positional arguments but 1 was"),
        (
            SCRIPT.replace(
                "    return", "    class UsageError(Exception): pass\n    raise UsageError('no.')\n    return"
            ),
            "fails: no.",
        ),
    ],
)
def test_whatever_a_script_raises_is_one_sentence(text, message, write, capsys):
    modules = set(sys.modules)
    path = write(text)
    told = refusal(path)
    assert path in told and message in told and capsys.readouterr() == ("", "")
    if "cannot be imported" in message:
        assert not {name for name in set(sys.modules) - modules if name.startswith("script_")}


@pytest.mark.parametrize(
    "kind, value, problem",
    [
        (int, 3, ""),
        (int, "3", ""),
        (int, 3.0, "takes a whole number, not 3.0"),
        (int, True, "takes a whole number, not true"),
        (int, [1, 2], "takes one value, not 1 2"),
        (float, 3, ""),
        (float, "x", "takes a number, not x"),
        (float | None, 0.1, ""),
        (float | None, "None", ""),
        (float | None, "none", "takes a number, not none"),
        (bool, False, ""),
        (bool, "false", "takes true or false, not false"),
        (bool, 1, "takes true or false, not 1"),
        (str, "x y", ""),
        (str, True, "takes a text, not true"),
        (Literal["a", "b"], "b", ""),
        (Literal["a", "b"], "c", "takes a, b, not c"),
        (Literal["a", "b"], ["a", "b"], "takes one value, not a b"),
        (tuple[int, ...], [1, 2], ""),
        (list[int], 1, ""),
        (list[int], [1, "x"], "takes a whole number, not x"),
        (list, ["x"], ""),
        (Any, [1, "x"], ""),
    ],
)
def test_what_an_argument_does_not_take(kind, value, problem):
    assert Argument(None, kind).misfit(value) == problem
