"""What the scripts have in common, and that they have nothing to do with each other."""

import ast
import difflib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
CONTROL = ("ppo", "a2c", "a3c", "trpo", "reinforce", "sac")
SCRIPTS = (*CONTROL, "grpo_toy", "rlhf_toy", "dpo_toy")
every_script = pytest.mark.parametrize("script", SCRIPTS)


def text_of(script: str) -> str:
    return (ROOT / f"{script}.py").read_text(encoding="utf-8")


def length_of_the_upper_half(text: str) -> int:
    """Lines before the banner of the machine room."""
    [banner] = [i for i, line in enumerate(text.splitlines()) if line.startswith("# ==== The machine room")]
    return banner


def hunks(one: str, other: str) -> list[tuple[int, int, int, int]]:
    """Where two scripts differ: lines of the one from, to, of the other from, to."""
    matcher = difflib.SequenceMatcher(None, text_of(one).splitlines(), text_of(other).splitlines(), autojunk=False)
    return [where for kind, *where in matcher.get_opcodes() if kind != "equal"]


# ------------------------------------------------------------------------------------------------- the same text
def shared(folder: Path, *flags: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, folder / "tools/shared.py", *flags], capture_output=True, text=True)


@pytest.fixture
def tree(tmp_path):
    """A copy of the scripts and the tool."""
    for path in (*ROOT.glob("*.py"), ROOT / "tools/shared.py"):
        (tmp_path / path.relative_to(ROOT)).parent.mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / path.relative_to(ROOT))
    return tmp_path


def test_shared_sections_are_the_same_text():
    done = shared(ROOT, "--check")
    assert done.returncode == 0, done.stdout


DRIFT = [
    ("a2c", "environments", "        self.numbers += where\n"),
    ("reinforce", "main", "        return 130\n"),
    ("grpo_toy", "run directory", "        self.gathered = []\n"),
    ("dpo_toy", "main", "        return 130\n"),
    ("sac", "episodes", '        problem = "an environment does not repeat its observations"\n'),
]


@pytest.mark.parametrize("script, section, line", DRIFT)
def test_a_changed_line_is_named_and_copying_repairs_it(script, section, line, tree):
    path = tree / f"{script}.py"
    assert path.read_text().count(line) == 1
    path.write_text(path.read_text().replace(line, "        pass\n"))
    done = shared(tree, "--check")
    assert done.returncode == 1
    assert done.stdout == f"{script}.py: the section 'shared: {section}' is not that of ppo.py\n1 sections differ\n"
    assert shared(tree).returncode == 0
    assert {path.name: path.read_text() for path in tree.glob("*.py")} == {
        path.name: path.read_text() for path in ROOT.glob("*.py")
    }


def test_a_change_in_the_source_reaches_every_script_that_has_the_section(tree):
    line, changed = "        self.numbers += where\n", "        self.numbers += where  # changed\n"
    (tree / "ppo.py").write_text((tree / "ppo.py").read_text().replace(line, changed))
    assert shared(tree, "--check").returncode == 1
    assert shared(tree).returncode == 0 == shared(tree, "--check").returncode
    assert all((changed in (tree / f"{script}.py").read_text()) == (script in CONTROL) for script in SCRIPTS)


SECTIONS = ["shared: run flags", "shared: command line", "shared: environments", "shared: settling"]
SECTIONS += ["shared: networks and policies", "shared: episodes", "shared: acting", "shared: playing"]
SECTIONS += ["shared: optimising", "shared: run directory", "shared: evaluation", "shared: main"]
LANGUAGE = ["shared: language run flags", "shared: command line", "shared: language task", "shared: language model"]
LANGUAGE += ["checks", "reporting", "shared: run directory", "shared: language warm start and evaluation"]
LANGUAGE += ["shared: main"]
ORDER = dict.fromkeys(CONTROL, SECTIONS)
ORDER["a3c"] = [*SECTIONS[:9], "workers", *SECTIONS[9:]]
ORDER["grpo_toy"] = [*LANGUAGE[:4], "completions and their rewards", *LANGUAGE[4:]]
ORDER["rlhf_toy"] = [*LANGUAGE[:4], "shared: language preferences", *LANGUAGE[4:]]
ORDER["dpo_toy"] = [*LANGUAGE[:4], "shared: language preferences", "checks", "pairs", *LANGUAGE[5:]]
ORDER["reinforce"] = [section.replace("shared: playing", "playing whole episodes") for section in SECTIONS]
OWN = {"shared: settling": "settling", "shared: networks and policies": "networks"}
OWN |= {"shared: acting": "acting", "shared: playing": "playing"}
ORDER["sac"] = [OWN.get(section, section) for section in SECTIONS]


@every_script
def test_sections_stand_in_the_same_order(script):
    found = re.findall(r"^# ==== (?!The machine room)(.+) ====$", text_of(script), re.MULTILINE)
    assert found == ORDER[script]


@pytest.mark.parametrize("other", ["a2c", "trpo"])
def test_scripts_differ_in_the_upper_half_alone(other):
    ends = length_of_the_upper_half(text_of("ppo")), length_of_the_upper_half(text_of(other))
    below = [where for where in hunks("ppo", other) if where[1] > ends[0] or where[3] > ends[1]]
    assert not below


# ------------------------------------------------------------------------------------------------ how long it is
@every_script
def test_the_upper_half_is_read_in_one_sitting(script):
    assert length_of_the_upper_half(text_of(script)) <= {"ppo": 430, "sac": 400}.get(script, 480)


@every_script
def test_train_fits_on_a_screen(script):
    [train] = [node for node in ast.parse(text_of(script)).body if getattr(node, "name", "") == "train"]
    assert train.end_lineno - train.lineno + 1 <= 40


def test_the_difference_between_ppo_and_a2c_is_short():
    changed = sum(a_end - a + b_end - b for a, a_end, b, b_end in hunks("ppo", "a2c"))
    assert changed <= 230  # removed and added


# ------------------------------------------------------------------------------------------------------ on its own
@every_script
def test_no_script_imports_another(script):
    tree = ast.parse(text_of(script))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not {name.split(".")[0] for name in names} & {*SCRIPTS, "benchmarks", "tools"}


def dependencies_at_the_head_of(script: str) -> dict:
    [block] = re.findall(r"^# /// script\n((?:#.*\n)+?)# ///\n", text_of(script), re.MULTILINE)
    assert text_of(script).startswith("# /// script\n")
    return tomllib.loads("".join(line[2:] for line in block.splitlines(keepends=True)))


@every_script
def test_dependencies_at_the_head_are_those_of_the_project(script):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    head = dependencies_at_the_head_of(script)
    theirs = [name for name in project["dependencies"] if not name.startswith("tomli")]  # that is for benchmarks
    assert head["requires-python"] == project["requires-python"]
    if script in CONTROL:
        assert head["dependencies"] == theirs
    else:
        assert head["dependencies"] == [name for name in theirs if name in head["dependencies"]]


@every_script
def test_all_that_is_imported_is_at_the_head(script):
    packages = {
        re.match(r"[\w-]+", name)[0].replace("-", "_") for name in dependencies_at_the_head_of(script)["dependencies"]
    }
    tree = ast.parse(text_of(script))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    foreign = {name.split(".")[0] for name in names} - set(sys.stdlib_module_names)
    assert foreign - {"moviepy"} <= packages  # moviepy is an extra
