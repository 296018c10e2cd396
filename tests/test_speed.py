"""The verb speed: pairs, what is made of them and kept, and the ceilings of the real scripts. No time is asserted."""

import importlib
import json
import math
import subprocess

import numpy as np
import pytest
import torch

from benchmarks import speed
from benchmarks.__main__ import main
from benchmarks.jobs import UsageError

# A script that takes no time: says that it ran, and reads its steps per second from a file.
OURS = """
import json, pathlib, sys
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
log = pathlib.Path({log!r})
done = log.read_text().split().count("ours")
log.open("a").write("ours ")
if "--fail" in flags:
    sys.exit("first line\\nno such flag: --fail")
run = pathlib.Path(flags["--runs-dir"]) / flags["--run-name"]
run.mkdir(parents=True)
summary = dict(sps=[10, 40, 30][done % 3], startup_time=1.5, peak_memory_mb=100 + int(flags["--num-threads"]))
(run / "summary.json").write_text(json.dumps(summary))
rows = ["global_step,wall_time", "600,2.0", "900,3.0", "1100,4.5"]
(run / "progress.csv").write_text("".join(f"{{row}}\\n" for row in rows))
"""
THEIRS = """
import json, pathlib
log = pathlib.Path({log!r})
done = log.read_text().split().count("theirs")
log.open("a").write("theirs ")
print("a line before")
print(json.dumps(dict(sps=[5, 10, 10][done % 3], memory=300)))
"""


THEIRS_OF_THE_FILE = speed.THEIRS


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(*rows, **options) is the verb with two fast rows, each side of which writes its name into the file log."""
    log = str(tmp_path / "log")
    (tmp_path / "log").write_text("")
    (tmp_path / "ppo.py").write_text(OURS.format(log=log))
    row = speed.Row("PPO, Fake-v0, 1 x 2", f"{tmp_path}/ppo.py --x 1", 100, "fake PPO n_steps=2", "make()", 50)
    rows = {"first": row, "second": row._replace(threads=7), "broken": row._replace(ours=row.ours + " --fail 1")}
    rows["late"] = row._replace(random=500)
    monkeypatch.setattr(speed, "ROWS", rows)
    theirs = THEIRS.format(log=log).replace("{", "{{").replace("}", "}}")
    monkeypatch.setattr(speed, "THEIRS", theirs)
    monkeypatch.setattr(speed, "NEEDED", ())
    monkeypatch.setattr("os.getloadavg", lambda: (0.0, 0.0, 0.0))
    parts = {"environment": 100.0, "inference": 200.0, "update": 200.0, "serial": 50.0}
    monkeypatch.setattr(speed, "call", lambda name, *flags: dict(parts) if name == "ceilings" else 0.625)

    def verb(*rows, **options):
        status = speed.main(speed.Speed(rows=rows, out=tmp_path / "made" / "speed", **options))
        return status, json.loads((tmp_path / "made" / "speed.json").read_text())

    return verb


def test_pairs_alternate_and_become_a_median_and_a_range(run, tmp_path, capsys):
    status, table = run("first", pairs=3)
    assert status == 0 and list(table) == ["first"]
    assert (tmp_path / "log").read_text() == "ours theirs theirs ours ours theirs "
    row = table["first"]
    assert row["ratios"] == [2.0, 4.0, 3.0] and row["ratio"] == 3.0
    assert row["median"]["ours"] == {"sps": 30, "startup": 1.5, "memory": 101}
    assert row["median"]["sb3"] == {"sps": 10, "memory": 300}
    assert row["median"]["ceilings"]["reached"] == 30 / 50 and row["median"]["ceilings"]["update"] == 200
    assert len(row["pairs"]) == 3 and row["pairs"][1]["ours"]["sps"] == 40 and row["pairs"][1]["sb3"]["sps"] == 10
    text = (tmp_path / "made" / "speed.md").read_text()
    line = "| first | PPO, Fake-v0, 1 x 2 | 30 | 10 | **3.00** (2.00 to 4.00) | 1.5 | 101 (300) "
    assert line + "| 100 | 200 | 200 | 50 | 60% | " in text and text in capsys.readouterr().out
    assert len({row.count("|") for row in text.splitlines() if row}) == 1
    assert (tmp_path / "made" / "speed.png").read_bytes().startswith(b"\x89PNG")
    machine = row["machine"]
    assert machine["cores"] >= 1 and machine["hardware"] and machine["versions"]["torch"] == torch.__version__
    assert {"date", "load", "command", "git_commit", "git_dirty"} <= machine.keys() and "python" in machine["versions"]


def test_steps_before_the_first_update_count_on_neither_side(run, monkeypatch):
    assert run("late", pairs=1)[1]["late"]["median"]["ours"]["sps"] == (1100 - 600) / (4.5 - 2.0)
    commands = []
    monkeypatch.setattr(speed, "last_line", lambda command: commands.append(command[-1]) or "{}")
    monkeypatch.setattr(speed, "THEIRS", THEIRS_OF_THE_FILE)
    speed.run_theirs(speed.ROWS["late"], "cpu")
    speed.run_theirs(speed.ROWS["first"], "cpu")
    late, first = commands
    assert "model.learn(501)\nbefore = model.num_timesteps" in late and "model.learn(1)\n" in first
    assert "model.learn(50, reset_num_timesteps=False)\nsps = (model.num_timesteps - before) /" in late


def test_rows_of_earlier_are_kept_and_rows_without_ceilings_or_peer_are_shown(run, tmp_path):
    _, before = run("first", pairs=1)
    status, table = run("second", "environment", pairs=2, ceilings=False)
    assert status == 0 and list(table) == ["first", "second", "environment"] and table["first"] == before["first"]
    assert "ceilings" not in table["second"]["median"] and table["second"]["median"]["ours"]["memory"] == 107
    assert table["environment"]["measured"] == [0.625, 0.625]
    text = (tmp_path / "made" / "speed.md").read_text()
    assert "| 107 (300) | - | - | - | - | - | " in text and "| first |" in text
    assert "\nenvironment: part of reinforce.py's wall time" in text and " 0.625 (0.625 to 0.625); " in text
    _, table = run("first", pairs=2)
    assert len(table["first"]["pairs"]) == 2 and len(table) == 3


def test_a_row_without_a_peer_needs_no_figure(run, tmp_path):
    assert run("environment", pairs=1)[0] == 0
    assert not (tmp_path / "made" / "speed.png").exists()


def test_a_script_that_fails_is_named_and_the_rest_is_measured(run, capsys):
    status, table = run("broken", "second", pairs=1)
    error = capsys.readouterr().err
    assert status == 1 and list(table) == ["second"]
    assert "error: broken: exit status 1 of " in error and "ppo.py --x 1 --fail 1 --device cpu" in error
    assert error.endswith("first line\nno such flag: --fail\n")


@pytest.mark.parametrize("per_core, warned", [(0.4, False), (0.6, True)])
def test_a_busy_machine_is_said_and_recorded(per_core, warned, run, monkeypatch, capsys):
    monkeypatch.setattr("os.getloadavg", lambda: (per_core * 8, 0.0, 0.0))
    monkeypatch.setattr(speed, "cores", lambda: 8)
    _, table = run("first", pairs=1)
    assert ("warning: the load is" in capsys.readouterr().out) == warned
    assert table["first"]["machine"]["load"] == round(per_core * 8, 2)


@pytest.mark.parametrize(
    "rows, options, message",
    [
        (("nothing",), {}, "there is no row nothing; choose from ppo, a2c, .*cartpole, .*environment"),
        (("first",), {"pairs": 0}, "--pairs is 0, but must be a whole number from 1 to 1,000"),
        (("first",), {"device": "cuda"}, "torch sees no CUDA device"),
    ],
)
def test_wrong_usage_is_refused_before_anything_starts(rows, options, message, run, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UsageError, match=message):
        run(*rows, **options)
    assert (tmp_path / "log").read_text() == "" and not (tmp_path / "made").exists()


@pytest.mark.parametrize("out", ["", ".", "..", "/"])
def test_a_path_that_names_no_files_is_refused(out, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["speed", "process", "--out", out]) == 2
    assert "but must be a path of files, without their endings" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_missing_peer_is_refused_with_what_installs_it(run, tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "NEEDED", ("json", "no_such_peer"))
    with pytest.raises(
        UsageError, match=r'^speed needs no_such_peer: pip install -c constraints.txt -e "\.\[bench,peers\]"'
    ):
        run("first")
    assert (tmp_path / "log").read_text() == "" and not (tmp_path / "made").exists()


@pytest.mark.parametrize("content", ['{"first": {"what": "cut off', '{"name": "of something else"}', "[1]"])
def test_a_file_of_something_else_is_not_overwritten(content, run, tmp_path):
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "speed.json").write_text(content)
    with pytest.raises(UsageError, match="speed.json is no table of this command"):
        run("first")
    assert (tmp_path / "made" / "speed.json").read_text() == content


def test_a_script_stands_for_its_rows_and_a_gpu_for_more(tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "NEEDED", ())

    def planned(*rows, cuda=False, device="auto"):
        monkeypatch.setattr("torch.cuda.is_available", lambda: cuda)
        return speed.plan(speed.Speed(rows=rows, device=device, out=tmp_path / "speed"))[1]

    a2c = [("a2c-cartpole", "cpu"), ("a2c-breakout", "cpu")]
    assert planned("a2c") == a2c and planned("a2c", "a2c-cartpole") == a2c
    assert [name for name, _ in planned("ppo")] == ["cartpole", "cheetah", "cheetah-default", "breakout", "process"]
    assert planned("sac") == [("sac-cheetah", "cpu")] and planned("a3c") == [("workers", "cpu")]
    assert planned("reinforce") == [("environment", "cpu")] and planned("trpo") == [("trpo-cheetah", "cpu")]
    assert [name for name, _ in planned()] == [*speed.ROWS, *speed.ALONE]
    assert planned("a2c", cuda=True) == a2c + [(name, "cuda") for name, _ in a2c]
    assert planned("cartpole", "process", cuda=True, device="cuda") == [("cartpole", "cuda")]
    with pytest.raises(UsageError, match="these rows run on the CPU only"):
        planned("process", cuda=True, device="cuda")


@pytest.mark.parametrize("name", speed.ROWS)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_both_sides_of_a_row_are_what_their_programs_take(name, device, monkeypatch):
    script, *flags = speed.ROWS[name].command(device)
    args = importlib.import_module(script.removesuffix(".py")).parse_args(flags)
    assert args.device == device and args.num_threads == speed.threads_of(speed.ROWS[name])
    assert args.compile == "on" or "Breakout" in args.env_id  # the CNN is never compiled; for the rest, see ceilings
    commands = []
    monkeypatch.setattr(speed, "last_line", lambda command: commands.append(command) or "{}")
    speed.run_theirs(speed.ROWS[name], device)
    compile(commands[0][-1], name, "exec")
    assert f'device="{device}"' in commands[0][-1] and f".learn({speed.ROWS[name].their_steps}, " in commands[0][-1]


def test_the_table_of_the_repository_can_be_read():
    table = json.loads((speed.ROOT / "benchmarks" / "results" / "speed.json").read_text())
    text = speed.markdown(table)
    assert all(f"| {name} |" in text for name in speed.ROWS)
    assert all(f"\n{name}: " in text for name in speed.ALONE)


def test_workers_are_compared_with_a2c(monkeypatch):
    commands = []
    monkeypatch.setattr(
        speed, "run_ours", lambda row, device: commands.append(row.command(device)) or {"sps": 60 / len(commands)}
    )
    assert speed.workers() == 2.0  # 60 over 30
    assert [command[0] for command in commands] == ["a3c.py", "a2c.py"]
    for script, *flags in commands:
        args = importlib.import_module(script.removesuffix(".py")).parse_args(flags)
        assert (args.env_id, args.device, args.num_threads) == ("CartPole-v1", "cpu", 1)


def check(rates):
    assert list(rates) == ["environment", "inference", "update", "serial"]
    assert all(math.isfinite(rate) and rate > 0 for rate in rates.values())
    *parts, serial = rates.values()
    assert serial < min(parts) and serial == pytest.approx(1 / sum(1 / part for part in parts))


@pytest.mark.parametrize("name", ["ppo", "a2c", "trpo", "reinforce"])
@pytest.mark.parametrize("env_id", ["CartPole-v1", "HalfCheetah-v5"])
def test_ceilings_of_the_scripts_own_functions(name, env_id, monkeypatch):
    module, agents, starts = importlib.import_module(name), [], []
    make, play, update = module.make_agent, module.Player.play, module.update

    def watched(*arguments):
        starts.append([parameter.detach().clone() for parameter in agents[0].parameters()])
        return update(*arguments)

    monkeypatch.setattr(module, "make_agent", lambda *arguments: agents.append(make(*arguments)) or agents[0])
    monkeypatch.setattr(module, "update", watched)
    flags = ["--env-id", env_id, "--num-envs", "2", "--num-steps", "8", "--compile", "off"]
    flags += ["--num-minibatches", "2", "--update-epochs", "2"] if name in ("ppo", "trpo") else []
    flags += ["--recompute-advantages"] if name == "ppo" else []
    check(speed.ceilings(f"{name}.py", *flags, seconds=0.02))
    assert module.Player.play is play and module.update is watched  # the spies are gone
    _, _, *timed = starts  # after that of the training and one that warms up
    assert timed and all(torch.equal(*pair) for start in timed for pair in zip(start, timed[0]))


@pytest.mark.parametrize("more", [[], ["--updates-per-step", "0.5", "--policy-frequency", "2"]])
def test_ceilings_of_sac(more, monkeypatch):
    import sac

    starts, drawn, played = [], [], []
    step, update, sample = sac.Player.step, sac.update, sac.Replay.sample

    def watched(learner, *arguments):
        starts.append([parameter.detach().clone() for parameter in learner.agent.parameters()])
        return update(learner, *arguments)

    def drawing(replay, *arguments):
        drawn.append((len(replay), np.isfinite(replay.rows).all() and len(replay.rows)))
        return sample(replay, *arguments)

    def playing(player, agent, replay):
        count = replay.count
        step(player, agent, replay)
        played.append(replay.count - count)

    monkeypatch.setattr(sac, "update", watched)
    monkeypatch.setattr(sac.Replay, "sample", drawing)
    monkeypatch.setattr(sac.Player, "step", playing)
    flags = ["--env-id", "HalfCheetah-v5", "--num-envs", "2", "--learning-starts", "8", "--batch-size", "4"]
    flags += ["--compile", "off", "--buffer-size", "1000", *more]
    check(speed.ceilings("sac.py", *flags, seconds=0.02))
    assert sac.Player.step is playing and sac.update is watched  # the spies are gone
    trained = [rows for rows in drawn if rows[0] < 1000]
    assert trained and len(drawn) > len(trained) + 1 and set(drawn[len(trained) :]) == {(1000, 1000)}  # a full buffer
    _, *timed = starts[len(trained) :]  # after one that warms up
    assert timed and all(torch.equal(*pair) for start in timed for pair in zip(start, timed[0]))
    assert set(played) == {2} and len(played) > 5


def test_ceilings_come_from_a_process_of_their_own():
    flags = ["--env-id", "CartPole-v1", "--num-steps", "8", "--compile", "off", "--num-threads", "1"]
    check(speed.call("ceilings", "a2c.py", *flags))
    with pytest.raises(subprocess.CalledProcessError) as failure:
        speed.call("ceilings", "a2c.py", "--env-id", "NoSuchEnv-v1")
    assert "NoSuchEnv-v1" in failure.value.stderr
