"""The suite "smoke" from end to end: the real scripts as processes, their report, and a check against itself."""

import csv
import json
from collections import Counter

from benchmarks.__main__ import main

ALGOS = ("ppo", "a2c", "a3c", "trpo", "reinforce")


def test_smoke_runs_to_a_report_and_passes_its_own_check(tmp_path, capsys):
    runs = tmp_path / "runs"
    command = ["run", "smoke", "--seeds", "1", "--runs-dir", str(runs), "--workers", "2"]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert out.startswith("left out: sac acts in boxes only, and CartPole-v1 has other actions\n")
    assert "11 of 11 runs are done" in out
    written = {path: path.stat().st_mtime_ns for path in runs.glob("*/summary.json")}
    assert len(written) == 11
    for path in written:
        evaluations = json.loads(path.read_text())["eval"]
        assert {kind: result["episodes"] for kind, result in evaluations.items()} == dict(
            deterministic=10, stochastic=10
        )
    assert main(command) == 0  # nothing is left to do
    assert {path: path.stat().st_mtime_ns for path in runs.glob("*/summary.json")} == written
    capsys.readouterr()

    assert main(["report", str(runs)]) == 0
    assert capsys.readouterr().out.startswith("11 of 11 runs are complete")
    out = runs / "report"
    with open(out / "scores.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert Counter((row["env_id"], row["algo"]) for row in rows) == {
        (env_id, algo): 1 for env_id in ("CartPole-v1", "Pendulum-v1") for algo in ALGOS
    } | {("Pendulum-v1", "sac"): 1}
    for row in rows:
        summary = json.loads(
            (runs / f"{row['env_id']}__{row['algo']}__{row['seed']}__{row['key']}" / "summary.json").read_text()
        )
        assert abs(float(row["train_last100"]) - summary["train_last100"]) < 1e-4 * abs(summary["train_last100"])
    text = (out / "report.md").read_text()
    assert "## Over 2 environments" in text and "## Problems" not in text
    assert {path.name for path in out.glob("*.png")} == {
        "curves.png",
        "curves_time.png",
        "aggregates.png",
        "profiles.png",
    }

    assert main(["check", str(runs), "--against", str(out)]) == 0
