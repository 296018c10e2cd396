"""a3c.py: that it is a2c.py with the asynchrony, and that its processes start, stop, fail and save as one run."""

import ast
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import worker_envs
from test_run_directory import SCRIPT, checkpoints, here, newest, process, rows, same, summary, timeless

import a2c
import a3c

__all__ = ["here"]  # a fixture
ROOT = SCRIPT.parent
SMALL = "--num-envs 1 --num-steps 10 --gae-lambda 0.95 --learning-rate 2e-3 --device cpu --compile off"
PATH = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))


def flags(*more: str) -> list[str]:
    return " ".join((SMALL, *more)).split()


def train(*more: str, name: str = "run", script=a3c) -> Path:
    assert script.main([*flags(*more), "--run-name", name]) == 0
    return Path("runs") / name


def memory_of(pids: set[int]) -> list[str]:
    """The shared memory of processes; what has lost its name goes with the last of them, and ends with (deleted)."""
    lines = [line for pid in pids for line in Path(f"/proc/{pid}/maps").read_text().splitlines()]
    return [line for line in lines if "/dev/shm/" in line]


# ----------------------------------------------------------------------------------------- a2c.py, but asynchronous
SAME = ["Agent", "Batch", "compute_gae", "standardise", "estimate", "a2c_loss", "RMSprop", "update", "make_agent"]


@pytest.mark.parametrize("name", SAME)
def test_what_is_not_asynchronous_is_the_text_of_a2c(name):
    texts = [(ROOT / f"{script}.py").read_text(encoding="utf-8") for script in ("a2c", "a3c")]
    parts = [
        ast.get_source_segment(text, node)
        for text in texts
        for node in ast.parse(text).body
        if getattr(node, "name", "") == name
    ]
    assert len(parts) == 2 and parts[0] == parts[1]


ALIKE = {
    "CartPole": "--env-id CartPole-v1 --optimizer rmsprop --total-timesteps 3000",
    "several environments": "--env-id CartPole-v1 --num-envs 3 --optimizer adam --norm-adv --total-timesteps 6000",
    "normalisers": "--env-id Pendulum-v1 --norm-obs --norm-reward --gamma 0.9 --optimizer adam --total-timesteps 3000",
}


@pytest.mark.parametrize("case", ALIKE)
def test_one_worker_takes_the_steps_of_a2c(case, here):
    one = train(ALIKE[case], "--anneal-lr --seed 5", name="a2c", script=a2c)
    other = train(ALIKE[case], "--anneal-lr --seed 5 --num-workers 1", name="a3c")
    states = newest(one), newest(other)
    for part in ("agent", "optimizer"):
        assert states[0][part].keys() == states[1][part].keys()
        for key, x in states[0][part].items():
            torch.testing.assert_close(states[1][part][key], x, rtol=1e-5, atol=1e-5, msg=f"{part} {key}")
    assert len(timeless(one, "episodes")) > 10 and timeless(one, "episodes") == timeless(other, "episodes")
    progress = [[float(row["losses/policy_loss"]) for row in rows(run, "progress")] for run in (one, other)]
    assert len(progress[0]) >= 2 and progress[1] == pytest.approx(progress[0], rel=1e-4, abs=1e-5)
    assert summary(other)["reproducible"] is True


def test_all_workers_learn_one_policy(here):
    run = train("--env-id worker_envs:Workers/Choice-v0 --num-workers 2 --total-timesteps 10000 --learning-rate 1e-2")
    args = a3c.read_config(run)[0]
    with a3c.make_envs(args, 1, 0) as envs, torch.no_grad():
        agent = a3c.make_agent(envs, args)
        agent.load_state_dict(newest(run)["agent"])
        for seen, action in ((-1.0, 0), (1.0, 1)):
            log_prob = agent.policy(torch.tensor([[seen]])).log_prob(torch.tensor([[action]]))
            assert log_prob.exp().item() > 0.95
    told = summary(run)
    assert told["reproducible"] is False and "2 workers" in told["not_reproducible_because"]


def played(state: dict) -> list[float]:
    """Rewards of the Endless episode of each worker, which are its number plus 1."""
    players = [worker["player"]["episodes"]["in_play"] for worker in state["workers"]["states"]]
    return [torch.cat([rewards for _, rewards in in_play]) for in_play in players]


def unlogged(state: dict) -> int:
    """Steps of updates that a checkpoint holds, and that come into the logs later."""
    return sum(steps for steps, *_ in state["workers"]["updates"])


def test_the_shared_counter_stops_at_the_budget(here):
    """1,234 steps are 123 rollouts of 10, more than three workers can share evenly."""
    shape = "--env-id worker_envs:Workers/Endless-v0 --num-workers 3 --norm-obs --norm-reward"
    run = train(shape, "--total-timesteps 1234 --log-interval 1")
    state = newest(run)
    assert state["global_step"] == state["workers"]["taken"] == 1230 == summary(run)["global_step"]
    assert state["workers"]["updates"] == [] and state["iteration"] == 123
    rewards = played(state)
    assert [set(x.tolist()) for x in rewards] == [{1.0}, {2.0}, {3.0}]
    assert sum(len(x) for x in rewards) == 1230
    for norm in ("obs_norm", "return_norm"):  # they have seen what all workers have seen
        assert state["agent"][f"{norm}.count"] == 1230
    assert [int(row["global_step"]) for row in rows(run, "progress")] == list(range(10, 1231, 10))
    rates = [float(row["charts/learning_rate"]) for row in rows(run, "progress")]
    assert sorted(rates, reverse=True) == pytest.approx([2e-3 * (1 - n / 123) for n in range(123)])


def test_no_steps_are_taken_twice_however_fast_workers_take_them(here):
    """Without the lock two workers read the same counter again and again."""
    norm = a3c.RunningNorm(())
    norm.share_memory()
    shared = a3c.Shared(None, None, norm, torch.tensor([0, 40_005]).share_memory_(), a3c.Mutex())
    context, ends, processes = torch.multiprocessing.get_context("spawn"), [], []
    for _ in range(2):
        end, other = context.Pipe()
        processes.append(context.Process(target=worker_envs.take_all, args=(shared, 10, other, os.getpid())))
        processes[-1].start()
        ends.append(end)
    assert [end.recv() for end in ends] == ["ready"] * 2
    for end in ends:
        end.send("go")
    taken = [end.recv() for end in ends]
    for process_ in processes:
        process_.join()
    os.close(shared.lock.file)
    assert sum(taken) == 4000 == norm.count and min(taken) > 0 and shared.steps.tolist() == [40_000, 40_005]


def test_workers_have_seeds_of_their_own_and_the_first_that_of_the_run(here):
    run = train("--env-id Pendulum-v1 --num-workers 3 --total-timesteps 600 --checkpoint-interval 1000")
    states = newest(run)["workers"]["states"]
    observations = [state["player"]["obs"] for state in states]
    noise = [state["rng"]["torch"] for state in states]
    for some in (observations, noise):
        assert not any(torch.equal(some[i], some[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


@pytest.mark.slow
def test_two_workers_learn_cartpole(tmp_path):
    scores = []
    for seed in (1, 2, 3):
        common = ["--num-workers", "2", "--seed", str(seed), "--runs-dir", str(tmp_path), "--run-name", str(seed)]
        assert a3c.main(common) == 0
        scores.append(summary(tmp_path / str(seed))["train_last100"])
    assert min(scores) >= 475, scores


@pytest.mark.slow
def test_workers_find_what_the_parent_has_compiled(here):
    run = train("--num-workers 2 --total-timesteps 2000 --compile on")
    assert json.loads((run / "config.json").read_text())["args"]["compile"] == "on"
    one = newest(train("--num-workers 1 --total-timesteps 2000 --compile on", name="one"))["agent"]
    other = newest(train("--num-workers 1 --total-timesteps 2000", name="other"))["agent"]
    for key, x in one.items():
        torch.testing.assert_close(other[key], x, rtol=1e-2, atol=1e-2)


# -------------------------------------------------------------------------------------------------- checkpoints
def test_a_checkpoint_holds_no_half_of_an_update(here, monkeypatch):
    """The Spy counts the updates of worker n in v[n] and, a while later, in parameters[n]."""
    states, save = [], a3c.Run.save

    def keep(run, *values, **groups):
        save(run, *values, **groups)
        states.append(newest(run.path))

    monkeypatch.setattr(a3c.Run, "save", keep)
    shape = "--env-id worker_envs:Workers/Spy-v0 --num-workers 2 --total-timesteps 1500 --checkpoint-interval 7"
    train(shape, "--optimizer rmsprop")
    assert len(states) > 15
    first, waiting = states[0], 0
    names = [name for name in first["agent"] if "norm" not in name]
    start = torch.cat([first["agent"][name].flatten() for name in names])[:2]
    for state in states:
        updates = state["optimizer"]["v"][:2] - 1
        parameters = torch.cat([state["agent"][name].flatten() for name in names])[:2]
        torch.testing.assert_close(parameters - start, updates, rtol=0, atol=1e-4)
        waiting += unlogged(state)
        assert 10 * updates.sum() == state["workers"]["taken"]
        assert state["workers"]["taken"] == state["global_step"] + unlogged(state)
        if state is not first:
            assert [len(x) for x in played(state)] == (10 * updates).tolist()
    assert waiting > 0  # or the last assertions say nothing of them


KILL = """
import os, signal, sys
import a3c
log = a3c.Run.log
def log_then_die(run, *values, **groups):
    log(run, *values, **groups)
    if run.iteration >= {iteration}: os.kill(os.getpid(), signal.SIGKILL)
a3c.Run.log = log_then_die
a3c.main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    "env_id, more",
    [("CartPole-v1", ""), pytest.param("Pendulum-v1", "--norm-obs --norm-reward", marks=pytest.mark.slow)],
)
def test_run_of_one_worker_that_was_killed_goes_on_exactly(env_id, more, here, capsys):
    size = f"--env-id {env_id} --num-workers 1 --total-timesteps 3000 --checkpoint-interval 40 --log-interval 7 {more}"
    whole = train(size, name="whole")
    done = process("-c", KILL.format(iteration=150), *flags(size), "--run-name", "killed", cwd=".", PYTHONPATH=PATH)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert 0 < newest(here / "runs/killed")["iteration"] < 150
    assert a3c.main(["--resume", "runs/killed"]) == 0
    assert "exactly as if it had never stopped" in capsys.readouterr().out
    one, other = newest(whole), newest(here / "runs/killed")
    for key in one.keys() - {"wall_time", "csv"}:  # the clock's digits also count in the length of a csv file
        assert same(one[key], other[key]), key
    assert len(timeless(whole, "episodes")) > 5
    for name in ("episodes", "progress"):
        assert timeless(whole, name) == timeless(here / "runs/killed", name)


def forget_the_end(run: Path) -> None:
    """Leaves the run as it was at the last checkpoint but one."""
    max((run / "checkpoints").glob("step_*.pt")).unlink()
    (run / "summary.json").unlink()


@pytest.mark.slow
def test_one_worker_says_what_it_cannot_repeat(here, capsys):
    run = train("--env-id odd_envs:Odd/Tally-v0 --num-workers 1 --total-timesteps 6000 --checkpoint-interval 200")
    forget_the_end(run)
    assert a3c.main(["--resume", str(run)]) == 0
    assert "not exactly: environment 0 does not repeat its rewards\n" in capsys.readouterr().out


def test_two_workers_go_on_with_their_episodes_and_say_not_exactly(here, capsys):
    """No episode is cut: all have 2,000 steps, also those in which the run was stopped."""
    shape = "--env-id odd_envs:Odd/Long-v0 --num-workers 2 --total-timesteps 8000 --checkpoint-interval 300"
    run = train(shape)
    forget_the_end(run)
    before = newest(run)
    assert before["workers"]["taken"] < 8000 and any(len(x) % 2000 for x in played(before))  # in the middle of episodes
    assert a3c.main(["--resume", str(run)]) == 0
    sentence = f"goes on from step {before['global_step']:,}, but not exactly: its workers do not wait for each other\n"
    assert sentence in capsys.readouterr().out
    assert {(float(row["return"]), int(row["length"])) for row in rows(run, "episodes")} == {(2000, 2000)}
    state = newest(run)
    assert summary(run)["status"] == "completed" and state["global_step"] == state["workers"]["taken"] == 8000
    begun = [one["player"]["episodes"]["begun"][0] for one in state["workers"]["states"]]
    assert 2000 * len(rows(run, "episodes")) + sum(map(len, played(state))) - sum(begun) == 8000


def test_resume_of_a_completed_run_starts_no_process(here, capsys, monkeypatch):
    run = train("--num-workers 2 --total-timesteps 400")
    before = [(run / f"{name}.csv").read_bytes() for name in ("episodes", "progress")], checkpoints(run)
    (run / "summary.json").unlink()
    monkeypatch.setattr(a3c.multiprocessing, "get_context", None)
    assert a3c.main(["--resume", str(run)]) == 0 == a3c.main(["--resume", str(run)])
    assert "is complete" in capsys.readouterr().out
    assert summary(run)["status"] == "completed" and summary(run)["reproducible"] is False
    assert ([(run / f"{name}.csv").read_bytes() for name in ("episodes", "progress")], checkpoints(run)) == before


# ------------------------------------------------------------------------------------------------ what goes wrong
def fails(capsys, *more: str) -> tuple[str, dict]:
    """The one sentence of a run of two workers that fails, and its summary."""
    capsys.readouterr()
    assert a3c.main([*flags("--num-workers 2 --total-timesteps 100000", *more), "--run-name", "run"]) == 1
    err = capsys.readouterr().err
    assert re.fullmatch(r"error: [^\n]+\n", err), err
    told = summary(Path("runs/run"))
    assert f"error: {told['error']}\n" == err
    assert not multiprocessing.active_children()
    return err, told


BAD = {
    "raises": (
        "from step .* in step 0 of the rollout environment 0 of .* raised ValueError: the gripper broke",
        "failed",
    ),
    "exits": (r"worker 1 of \S+ ended with status 3, near step", "failed"),
    "pays-nan": ("the reward of environment 0 in step 0 of the rollout is NaN or infinite", "diverged"),
    "cannot-be-made": ("cannot be made, it raised ValueError: the gripper is gone", "failed"),
}


@pytest.mark.parametrize("how", [pytest.param(x, marks=pytest.mark.slow) if x == "exits" else x for x in BAD])
def test_worker_that_fails_ends_the_run_with_its_reason(how, here, capsys):
    reason, status = BAD[how]
    err, told = fails(capsys, f"--env-id worker_envs:Bad/{how}-v0")
    assert re.search(rf"worker 1 of worker_envs:Bad/{how}-v0\W", err) and re.search(reason, err)
    assert told["status"] == status and "the last good checkpoint is runs/run/checkpoints/step_" in err


def test_loss_that_is_not_finite_ends_the_run(here, capsys):
    err, told = fails(capsys, "--env-id CartPole-v1 --learning-rate 1e30 --checkpoint-interval 1")
    assert re.search(r"worker \d of CartPole-v1, in its rollout from step [\d,]+ on: \w+ is (nan|-?inf);", err)
    assert told["status"] == "diverged"
    state = a3c.load_checkpoint(Path("runs/run"))
    assert all(x.isfinite().all() for x in [*state["optimizer"].values(), *state["agent"].values()])


def test_worker_that_is_killed_ends_the_run(here, capsys, monkeypatch):
    log = a3c.Run.log

    def log_then_kill(run, *values, **groups):
        log(run, *values, **groups)
        if run.iteration == 50:
            [child] = [child for child in multiprocessing.active_children() if child.name == "worker 1"]
            os.kill(child.pid, signal.SIGKILL)

    monkeypatch.setattr(a3c.Run, "log", log_then_kill)
    err, told = fails(capsys, "--env-id CartPole-v1")
    assert re.search(r"worker 1 of CartPole-v1 was killed by SIGKILL, near step [\d,]+;", err)
    assert told["status"] == "failed" and told["global_step"] >= 500


# --------------------------------------------------------------------------------------------- signals and orphans
def children_of(pid: int) -> set[int]:
    """The processes below a process."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(path.read_text().rpartition(")")[2].split()[1]) == pid:
                found |= {int(path.parent.name)} | children_of(int(path.parent.name))
        except OSError:
            continue
    return found


def alive(pids: set[int]) -> set[int]:
    """Those that run, and are no zombies."""
    found = set()
    for pid in pids:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX":
                found.add(pid)
        except OSError:
            continue
    return found


class Process:
    """a3c.py as it is started from a shell: the leader of a process group, which Ctrl-C reaches as a whole."""

    def __init__(self, *more: str):
        command = [sys.executable, ROOT / "a3c.py", *flags("--num-workers 2 --run-name run", *more)]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.it = subprocess.Popen(command, start_new_session=True, env=os.environ | {"PYTHONPATH": PATH}, **pipes)

    def wait_for(self, condition) -> None:
        while not condition():
            assert self.it.poll() is None, self.it.communicate()
            time.sleep(0.01)

    def is_training(self) -> bool:
        path = Path("runs/run/episodes.csv")
        return path.exists() and path.read_bytes().count(b"\n") > 1

    def ends(self, status: int) -> str:
        """Its stderr, after all processes are gone."""
        below = self.below
        try:
            out, err = self.it.communicate(timeout=60)
            assert self.it.returncode == status, err
            deadline = time.monotonic() + 30
            while alive(below) and time.monotonic() < deadline:
                time.sleep(0.01)
            assert not alive(below)
            return err
        finally:
            self.it.kill()

    def signal(self, signum: int, group: bool = False) -> None:
        self.below = children_of(self.it.pid)
        assert len(self.below) >= 2
        os.killpg(self.it.pid, signum) if group else os.kill(self.it.pid, signum)


LONG = "--env-id CartPole-v1 --total-timesteps 10000000 --log-interval 10 --checkpoint-interval 50"


@pytest.mark.parametrize(
    "signum, group",
    [(signal.SIGINT, True), pytest.param(signal.SIGTERM, False, marks=pytest.mark.slow), (signal.SIGKILL, False)],
)
def test_signal_leaves_no_process_and_no_memory_behind_and_the_run_goes_on(signum, group, here, capsys, monkeypatch):
    run = Process(LONG)
    run.wait_for(lambda: run.is_training() and len(list(Path("runs/run/checkpoints").glob("step_*.pt"))) > 1)
    memory = memory_of({run.it.pid, *children_of(run.it.pid)})
    assert len(memory) >= 6 and all(line.endswith(" (deleted)") for line in memory)
    run.signal(signum, group)
    killed = signum == signal.SIGKILL
    assert run.ends(-signum if killed else 128 + signum) == ""
    state = newest(Path("runs/run"))
    assert 0 < state["workers"]["taken"] == state["global_step"] + unlogged(state)
    if not killed:
        assert summary(Path("runs/run"))["status"] == "interrupted"
        assert summary(Path("runs/run"))["global_step"] == state["global_step"]
    # It goes on, and is stopped again.
    log = a3c.Run.log

    def log_then_stop(run, *values, **groups):
        log(run, *values, **groups)
        if run.iteration == state["iteration"] + 200:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(a3c.Run, "log", log_then_stop)
    capsys.readouterr()
    assert a3c.main(["--resume", "runs/run"]) == 143
    out, err = capsys.readouterr()
    assert f"goes on from step {state['global_step']:,}, but not exactly" in out and err == ""
    assert newest(Path("runs/run"))["global_step"] == state["global_step"] + 200 * 10


@pytest.mark.slow
def test_ctrl_c_while_the_workers_start_prints_no_traceback(here):
    run = Process(LONG)
    run.wait_for(lambda: len(children_of(run.it.pid)) >= 3)  # with the tracker of multiprocessing
    run.signal(signal.SIGINT, group=True)
    assert run.ends(130) == ""
    assert summary(Path("runs/run"))["status"] == "interrupted"


@pytest.mark.slow
def test_parent_that_dies_while_the_workers_start_leaves_none(here):
    run = Process(LONG)
    run.wait_for(lambda: len(children_of(run.it.pid)) >= 3)
    run.signal(signal.SIGKILL)
    run.ends(-signal.SIGKILL)


@pytest.mark.slow
def test_second_signal_does_not_wait_for_a_worker(here):
    """Worker 1 sleeps for ten minutes in a step."""
    run = Process("--env-id worker_envs:Bad/sleeps-v0 --total-timesteps 2000 --checkpoint-interval 1000000")
    run.wait_for(run.is_training)
    time.sleep(0.2)
    run.signal(signal.SIGINT)
    time.sleep(0.2)
    assert run.it.poll() is None
    run.signal(signal.SIGINT)
    assert run.ends(130) == "" and summary(Path("runs/run"))["status"] == "interrupted"


# ------------------------------------------------------------------------------------------------------ wrong input
REFUSED = {
    "--device cuda": "use --device cpu",
    "--num-threads 2": "each worker has one thread",
    "--num-workers -1": "--num-workers is -1, but must be 0 or more",
    "--num-workers 1000000": "workers would take",
    "--total-timesteps 9": "1 x 10 = 10; ask for 10 or more",
}


@pytest.mark.parametrize("wrong", REFUSED)
def test_what_cannot_be_is_refused_in_one_sentence(wrong, here, capsys, monkeypatch):
    command = [*SMALL.replace("--device cpu ", "").split(), *wrong.split()]
    if "threads" in wrong or "timesteps" in wrong:
        monkeypatch.setattr(a3c, "cores", lambda: 4)
        status, (out, err) = a3c.main(command), capsys.readouterr()
    else:
        done = process(ROOT / "a3c.py", *command, cwd=here)
        status, out, err = done.returncode, done.stdout, done.stderr
    assert (status, out) == (2, "") and re.fullmatch(r"error: [^\n]+\n", err) and REFUSED[wrong] in err
    assert not list(here.iterdir())


def test_threads_are_refused_on_resume_too(here, capsys, monkeypatch):
    monkeypatch.setattr(a3c, "cores", lambda: 4)
    run = train("--num-workers 1 --total-timesteps 400")
    assert a3c.main(["--resume", str(run), "--num-threads", "2"]) == 2
    assert "each worker has one thread" in capsys.readouterr().err


def test_script_in_no_file_is_refused(monkeypatch, here, capsys):
    monkeypatch.setattr(a3c, "SCRIPT", here / "notebook")
    assert a3c.main(flags("--total-timesteps 400")) == 2
    assert "save it as one" in capsys.readouterr().err and not list(here.iterdir())


# ---------------------------------------------------------------------------------------------------- the command
@pytest.mark.slow
def test_two_workers_of_a_copy_play_from_another_folder(tmp_path):
    shutil.copy(ROOT / "a3c.py", tmp_path / "mine.py")
    (tmp_path / "elsewhere").mkdir()
    size = "--num-workers 2 --num-steps 4 --total-timesteps 80 --log-interval 2 --run-name run"
    done = process(
        "-W", "default", "../mine.py", "--env-id", "HalfCheetah-v5", *size.split(), cwd=tmp_path / "elsewhere"
    )
    assert (done.returncode, done.stderr) == (0, "")
    first, understood, *progress, last = done.stdout.splitlines()
    assert first == "runs/run (cpu, threads: 1)" and understood.startswith("observes Box(") and progress
    assert last == "completed after 80 steps: runs/run"
    state = newest(tmp_path / "elsewhere/runs/run")
    assert len(state["workers"]["states"]) == 2 and state["workers"]["taken"] == 80
    done = process("../mine.py", "--evaluate", "runs/run", "--eval-episodes", "1", cwd=tmp_path / "elsewhere")
    assert done.returncode == 0 and "1 deterministic episodes: mean" in done.stdout


def test_importing_does_nothing(here):
    done = process("-c", "import a3c, multiprocessing as m; print(m.active_children())", cwd=here, PYTHONPATH=PATH)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "") and not list(here.iterdir())
