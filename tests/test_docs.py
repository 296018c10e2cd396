"""The README and the pages: their length, and whether what they name is there."""

import ast
import importlib
import re
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "README.md"]
METHODS = {"ppo": "ppo", "a2c": "a2c", "trpo": "trpo", "reinforce": "reinforce", "grpo": "grpo_toy"}
METHODS |= {"rlhf": "rlhf_toy", "dpo": "dpo_toy", "runs": "ppo"}


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def anchors(page: Path) -> set[str]:
    """The names that headings have in links."""
    headings = re.findall(r"^#+ (.+)$", text_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def names_in(script: str) -> set[str]:
    """Functions, classes, methods as Class.method, and names assigned at the top, such as FAMILIES."""
    found = set()
    for node in ast.parse((ROOT / f"{script}.py").read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


def flags_of(script: str) -> set[str]:
    """The flags of a script: the fields of its Args and RunArgs. Read, not imported, which takes seconds."""
    flags = {"--help"}
    for node in ast.parse((ROOT / f"{script}.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name in ("Args", "RunArgs"):
            for field in node.body:
                if isinstance(field, ast.AnnAssign):
                    name = field.target.id.replace("_", "-")
                    flags |= {f"--{name}", f"--no-{name}"} if ast.unparse(field.annotation) == "bool" else {f"--{name}"}
    return flags


def commands(text: str) -> list[str]:
    """What is behind "python" or "uv run" in code, without comments."""
    code = re.findall(r"```bash\n(.*?)```", text, re.DOTALL) + re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)
    lines = [line.split("  #")[0] for part in code for line in part.splitlines()]
    found = [re.search(r"(?:^|&& )(?:python|uv run) (.+)$", line) for line in lines]
    return [match[1] for match in found if match]


def test_readme_has_at_most_1300_words():
    assert len(text_of(ROOT / "README.md").split()) <= 1300


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_images_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", text_of(page))
    assert links
    for link in links:
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_name_scripts_modules_and_flags_that_exist(page):
    for command in commands(text_of(page)):
        first, *rest = command.split()
        if first == "-m":
            if rest[0].startswith("benchmarks."):
                assert (ROOT / f"{rest[0].replace('.', '/')}.py").exists(), command
            elif rest[0] == "benchmarks" and len(rest) > 1:
                assert (ROOT / "benchmarks" / f"{rest[1]}.py").exists(), command
            continue
        assert (ROOT / first).exists(), command
        if "/" not in first:
            unknown = {word for word in rest if word.startswith("--")} - flags_of(first.removesuffix(".py"))
            assert not unknown, command


@pytest.mark.parametrize("page", METHODS)
def test_flags_in_the_text_exist(page):
    flags = re.findall(r"(?<!`)`(--[\w-]+)[^`\n]*`(?!`)", text_of(ROOT / "docs" / f"{page}.md"))
    more = {"runs": ["a2c"], "a2c": ["a3c"]}.get(page, [])
    known = [flags_of(script) for script in (METHODS[page], *more)]
    assert set(flags) <= set.union(*known)


@pytest.mark.parametrize("page", METHODS)
def test_implementation_details_name_functions_that_exist(page):
    details = text_of(ROOT / "docs" / f"{page}.md").split("## Implementation details\n")[1].split("\n## ")[0]
    items = [line for line in details.splitlines() if line.startswith("- ")]
    assert len(items) >= 10
    there = names_in(METHODS[page])
    for item in items:
        named = re.findall(r"`([^`]+)`", item.rpartition(": ")[2])
        assert named, item
        assert set(named) <= there, item


def test_readme_quotes_ppo_letter_for_letter():
    script = (ROOT / "ppo.py").read_text(encoding="utf-8")
    (quoted,) = re.findall(r"```python\n(.*?)```", text_of(ROOT / "README.md"), re.DOTALL)
    for function in quoted.strip("\n").split("\n\n\n"):
        assert function in script


@pytest.mark.parametrize("script, env_id", [("ppo", "Pendulum-v1"), ("reinforce", "CartPole-v1")])
def test_a_trained_policy_plays_from_python_as_runs_md_says(script, env_id, tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", text_of(ROOT / "docs" / "runs.md"), re.DOTALL)
    module = importlib.import_module(script)
    small = ["--total-timesteps", "512", "--num-envs", "2", "--num-steps", "128", "--device", "cpu"]
    run = module.train(module.parse_args(["--env-id", env_id, "--runs-dir", str(tmp_path), *small]))
    names = {}
    exec(code.replace("runs/<run>", str(run)).replace("ppo", script), names)
    space = names["agent"].action_space
    assert space.contains(module.to_env(space, names["action"].numpy())[0]) and np.isfinite(names["reward"]).all()


def test_readme_says_where_the_lower_halves_begin():
    """Nearly, so that not every edit of a script has to touch the README."""
    rows = dict(re.findall(r"^\| \[(\w+\.py)\].*?\| (\d+) \|", text_of(ROOT / "README.md"), re.MULTILINE))
    assert len(rows) == 9
    for script, line in rows.items():
        lines = (ROOT / script).read_text(encoding="utf-8").splitlines()
        begins = next(i for i, text in enumerate(lines, 1) if text.startswith("# ==== The machine room"))
        assert abs(begins - int(line)) <= 10, f"{script}: {begins}"
