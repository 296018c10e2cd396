"""What is not the method must be the same text in every control script; the name of what drifted is in the failure."""

import ast
import itertools
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = ("ppo", "a2c", "trpo", "reinforce")
# Names that carry the method and so may differ between the scripts that have them.
METHOD = {
    "Args",
    "FAMILIES",
    "POSITIVE",
    "AT_MOST_ONE",
    "STATS",
    "Batch",
    "make_gradient",
    "rollout",
    "update",
    "train",
}
METHOD |= {"surrogate_objective", "fit_value", "check_batch", "Agent.__init__", "Agent.features", "Agent"}
WHOLE_EPISODES = {"Steps", "play"}  # reinforce.py's own
SECTIONS = ["arguments", "environments", "networks", "playing", "optimising", "the method", "the run directory"]
SECTIONS += ["evaluate, train, main"]


def blocks(script: str) -> dict[str, str]:
    """The text of every definition and assignment at the top level, of every method of Agent, of half of Args."""
    text = (ROOT / f"{script}.py").read_text()
    lines, found = text.splitlines(), {}

    def take(name: str, node: ast.AST) -> None:
        first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])
        found[name] = "\n".join(lines[first - 1 : node.end_lineno])

    for node in ast.parse(text).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            take(node.name, node)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
            take(ast.unparse(target), node)
        if isinstance(node, ast.ClassDef) and node.name in ("Agent", "Run"):
            for method in node.body:
                if isinstance(method, ast.FunctionDef):
                    take(f"{node.name}.{method.name}", method)
    found["arguments of run and environment"] = found["Args"].split("    # Algorithm\n")[0]
    return found


BLOCKS = {script: blocks(script) for script in SCRIPTS}


@pytest.mark.parametrize("one, other", list(itertools.combinations(SCRIPTS, 2)))
def test_blocks_that_are_not_the_method_are_the_same_text(one, other):
    free = METHOD | (WHOLE_EPISODES if "reinforce" in (one, other) else set())
    common = (BLOCKS[one].keys() & BLOCKS[other].keys()) - free
    drifted = [name for name in BLOCKS[one] if name in common and BLOCKS[one][name] != BLOCKS[other][name]]
    assert not drifted, f"{one}.py and {other}.py differ in {', '.join(drifted)}"


def test_no_script_lacks_a_shared_block():
    """Or else one could drift by being renamed."""
    shared = "UsageError Failed Stopped environment_family parse_args check_args Bare make_envs reset_envs whole_games"
    shared += " Episodes RunningNorm Categorical Gaussian layer_init MLP nature_cnn is_image check_finite"
    shared += " flatten_parameters Adam compile_for write_atomically write_json run_dir_of read_config versions"
    shared += " create_run_dir Run save_checkpoint load_checkpoint restore resolve film evaluate main compute_gae"
    shared += " values_of_final_obs"
    for script in SCRIPTS:
        lacking = [name for name in shared.split() if name not in BLOCKS[script]]
        allowed = {"compute_gae"} if script == "reinforce" else set()
        assert set(lacking) <= allowed, f"{script}.py lacks {', '.join(lacking)}"


def test_what_the_language_scripts_share_with_the_control_scripts_is_the_same_text():
    shared = "UsageError Stopped write_atomically write_json run_dir_of read_config load_checkpoint Run.__enter__"
    for name in [*shared.split(), "Run.write_scalars", "Run.wall_time", "Run.score"]:
        assert blocks("grpo_toy")[name] == BLOCKS["ppo"][name], name


@pytest.mark.parametrize("script", SCRIPTS)
def test_sections_stand_in_the_same_order(script):
    lines = (ROOT / f"{script}.py").read_text().splitlines()
    assert [line.lstrip("# -") for line in lines if line.startswith("# ------")] == SECTIONS


@pytest.mark.parametrize("script", SCRIPTS)
def test_definitions_stand_in_the_order_of_ppo(script):
    order = [name for name in BLOCKS[script] if name in BLOCKS["ppo"]]
    assert order == [name for name in BLOCKS["ppo"] if name in BLOCKS[script]]


@pytest.mark.parametrize("script", SCRIPTS)
def test_train_fits_on_a_screen(script):
    assert len(BLOCKS[script]["train"].splitlines()) <= 66


@pytest.mark.parametrize("script", [*SCRIPTS, "grpo_toy"])
def test_no_script_imports_another(script):
    tree = ast.parse((ROOT / f"{script}.py").read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not {name.split(".")[0] for name in names} & {*SCRIPTS, "grpo_toy", "benchmarks"}
