"""What a script makes of its command line, its machine and its own random numbers."""

import contextlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from test_run_directory import BAD_ARGUMENTS, SCRIPT, here, newest, refused, same, timeless

import a2c
import grpo_toy
import ppo
import reinforce
import sac
import trpo
from benchmarks import __main__ as harness

__all__ = ["here"]  # a fixture
SMALL = ["--num-envs", "2", "--num-steps", "40", "--total-timesteps", "160", "--compile", "off"]
OF_SAC = [*SMALL[:2], *SMALL[4:], "--learning-starts", "60", "--log-interval", "20", "--batch-size", "16"]


# --------------------------------------------------------------------------------------------------- the machine
def files(folder, **contents):
    """Writes files under folder, the double underscores of their names being those of folders."""
    for name, text in contents.items():
        path = folder / name.replace("__", "/").replace("--", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


GROUPS = {  # contents of files, cores and bytes that they grant to a process with 16 cores and a lot of memory
    "no groups": ({}, 16, None),
    "no limit": ({"proc": "0::/job\n", "fs__job__cpu--max": "max 100000\n", "fs__job__memory--max": "max\n"}, 16, None),
    "two cores": ({"proc": "0::/job\n", "fs__job__cpu--max": "200000 100000\n"}, 2, None),
    "two and a half": ({"proc": "0::/job\n", "fs__job__cpu--max": "250000 100000\n"}, 2, None),
    "less than one": ({"proc": "0::/job\n", "fs__job__cpu--max": "50000 100000\n"}, 1, None),
    "more than the machine": ({"proc": "0::/job\n", "fs__job__cpu--max": "6400000 100000\n"}, 16, None),
    "the parent's": (
        {"proc": "0::/a/b/c\n", "fs__a__cpu--max": "300000 100000\n", "fs__a__b__cpu--max": "max 1\n"},
        3,
        None,
    ),
    "container": ({"proc": "0::/\n", "fs__cpu--max": "400000 100000\n", "fs__memory--max": "1048576\n"}, 4, 2**20),
    "memory": ({"proc": "0::/a/b\n", "fs__a__memory--max": "4096\n", "fs__a__b__memory--max": "8192\n"}, 16, 4096),
    "version 1": (
        {
            "proc": "7:memory:/job\n4:cpu,cpuacct:/job\n1:name=systemd:/job\n",
            "fs__cpu__job__cpu--cfs_quota_us": "300000\n",
            "fs__cpu__job__cpu--cfs_period_us": "100000\n",
            "fs__memory__job__memory--limit_in_bytes": "12345\n",
        },
        3,
        12345,
    ),
    "version 1 without limit": (
        {
            "proc": "4:cpu,cpuacct:/\n3:cpuset:/\n",
            "fs__cpu__cpu--cfs_quota_us": "-1\n",
            "fs__cpu__cpu--cfs_period_us": "100000\n",
        },
        16,
        None,
    ),
}


@pytest.mark.parametrize("case", GROUPS)
def test_cores_and_memory_are_those_that_the_control_groups_grant(case, tmp_path, monkeypatch):
    contents, cores, memory = GROUPS[case]
    files(tmp_path, **contents)
    monkeypatch.setattr(ppo, "CGROUPS", (tmp_path / "fs", tmp_path / "proc"))
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(16)))
    monkeypatch.setattr(os, "process_cpu_count", lambda: 16, raising=False)
    assert ppo.cores() == cores
    assert ppo.memory() == memory or (memory is None and ppo.memory() > 2**30)


def test_cores_are_those_of_the_affinity(monkeypatch):
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert ppo.cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)
    monkeypatch.setattr(ppo, "cores", lambda: 1)
    args = ppo.parse_args(["--env-id", "ALE/Pong-v5", "--num-envs", "2"])
    envs = ppo.make_envs(args, 2, 1)
    ppo.settle(args, envs)
    assert args.num_threads == 1


def test_run_of_a_larger_machine_goes_on_with_the_cores_that_there_are(here):
    assert ppo.main([*SMALL, "--run-name", "run"]) == 0
    config = here / "runs/run/config.json"
    config.write_text(config.read_text().replace('"num_threads": 1', '"num_threads": 4096'))
    assert ppo.main(["--resume", "runs/run"]) == 0
    assert ppo.main(["--evaluate", "runs/run", "--eval-episodes", "1"]) == 0


# --------------------------------------------------------------------------------------- refused in one sentence
FLAGS = {
    "--learning-rate abc": "--learning-rate takes a number, not 'abc'.",
    "--num-envs 2.5": "--num-envs takes a whole number, not '2.5'.",
    "--num-envs=": "--num-envs takes a whole number, not ''.",
    "--total-timesteps 1e6": "--total-timesteps takes a whole number, not '1e6'.",
    "--target-kl x": "--target-kl takes a number, not 'x'.",
    "--objective clop": "invalid choice 'clop' for argument '--objective'",
    "--num-envs": "Missing value for argument '--num-envs'",
    "--learnin-rate 0.1": "'--learnin-rate' is no flag and no value of one; did you mean --learning-rate?",
    "--learnin_rate=0.1": "did you mean --learning-rate?",
    "--no-anneal": "did you mean --no-anneal-lr?",
    "stray": "'stray' is no flag and no value of one; --help lists the flags.",
    "--anneal-lr no": "'no' is no flag",
    "--resume": "Missing value for argument '--resume'",
    "--num-threads 100000": f"--num-threads is 100000, but this process may use {ppo.cores()} cores; ask for fewer.",
    "--num-envs 1099511627776": "--num-envs is 1099511627776, but must be at most 65,536.",
    "--total-timesteps 1000000000000000000000000000000": "must be at most 2**53.",
    "--num-steps 1099511627776 --total-timesteps 9000000000000000": "GiB of memory, and there are",
    "--num-steps 1000000000 --total-timesteps 8000000000 --num-minibatches 3": "--num-minibatches 2 or 4 or 1 would do",
    "--env-id Pendulum-v1 --log-std-init 1e308": "--log-std-init is 1e+308, but must be at most 1e30.",
    "--resume runs/a --evaluate runs/b": "give one of them",
}


@pytest.mark.parametrize("argv", FLAGS)
def test_flag_is_refused_in_one_sentence(argv, here, capsys):
    assert argv not in BAD_ARGUMENTS
    assert FLAGS[argv] in refused(capsys, *argv.split(), here=here)


def test_size_that_would_fit_is_named_and_fits(here, capsys, monkeypatch):
    monkeypatch.setattr(ppo, "memory", lambda: 2**20)
    flags = ["--num-steps", "100000", "--num-envs", "1", "--num-minibatches", "1", "--total-timesteps", "100000"]
    size = refused(capsys, *flags, here=here).split("--num-steps ")[-1].split()[0]
    assert 100 < int(size) < 2**20 / 1000
    args = ppo.parse_args(["--num-steps", size, "--num-envs", "1"])
    ppo.settle(args, ppo.make_envs(args, 1, 1))


SIZES = {
    "--n-embd 1099511627776": "--n-embd ",
    "--n-layer 1099511627776": "--n-layer ",
    "--max-completion-length 100000000": "--max-completion-length ",
    "--eval-prompts 1000000000": "--eval-prompts ",
    "--generation-batch-size 1073741824": "--generation-batch-size ",
    "--num-digits 5000 --max-completion-length 6000": "--num-digits is 5000, but must be at most 1,000",
    "--reward-weights 1 x": "not 'x'",
    "--methud grpo": "did you mean --method?",
}


@pytest.mark.parametrize("argv", SIZES)
def test_language_size_is_refused_before_its_memory_is_taken(argv, here, capsys):
    assert grpo_toy.main(argv.split()) == 2
    sentence = capsys.readouterr().err
    assert sentence.startswith("error: ") and sentence.count("\n") == 1 and SIZES[argv] in sentence
    assert not list(here.iterdir())


def test_estimated_memory_is_near_what_is_taken(here):
    code = "import ppo, sys; ppo.main(sys.argv[1:]); print(open('/proc/self/status').read())"
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parent)}
    peaks = []
    for steps in (1_000, 100_000):
        flags = f"--num-steps {steps} --total-timesteps {2 * steps} --num-envs 2 --num-minibatches 100 --compile off"
        command = [sys.executable, "-c", code, *flags.split(), "--update-epochs", "1"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        peaks.append(1024 * int(done.stdout.split("VmHWM:")[1].split()[0]))
    taken = (peaks[1] - peaks[0]) / 198_000
    assert 2000 / 4 < taken < 2 * 2000


@pytest.mark.parametrize("mode, refused", [("nonsense", True), ("offline", False)])
def test_wandb_mode_that_does_not_exist_is_refused(mode, refused, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", mode)
    with pytest.raises(ppo.UsageError, match="but must be one of online") if refused else contextlib.nullcontext():
        ppo.check_args(ppo.parse_args(["--track"]))


# ------------------------------------------------------------------------------------------- notebooks and threads
NOTEBOOK = """
import sys, types
source, name = open(sys.argv[1]).read(), sys.argv[2]
sys.argv = ["ipykernel_launcher.py", "-f", "kernel.json"]
main = sys.modules["__main__"] = types.ModuleType("__main__")
exec(compile(source, "<cell>", "exec"), vars(main))
assert main.main(["--run-name", "called", *{small}]) == 0
args = main.parse_args(["--run-name", "trained", *{small}])
assert str(main.train(args)).endswith("trained")
"""


def test_script_pasted_into_a_notebook_trains_and_does_not_read_the_arguments_of_the_kernel(here):
    source = SCRIPT.read_text().replace("total_timesteps: int = 200_000", "total_timesteps: int = 1_024")
    (here / "cell.txt").write_text(source)
    command = [sys.executable, "-c", NOTEBOOK.format(small=SMALL), "cell.txt", "x"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert {"called", "trained"} < {path.name for path in (here / "runs").iterdir()}
    assert len(list((here / "runs").iterdir())) == 3  # pasting it has trained with the defaults


def test_imported_script_does_not_read_the_arguments_of_another_program(here, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
    assert ppo.parse_args().env_id == "CartPole-v1"


def test_main_works_in_a_thread(here):
    statuses = []
    thread = threading.Thread(target=lambda: statuses.append(ppo.main([*SMALL, "--run-name", "run"])))
    thread.start()
    thread.join()
    assert statuses == [0]


# --------------------------------------------------------------------------------------- telling is not training
def stalled() -> io.TextIOWrapper:
    """The end of a pipe that is full and that nobody reads."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, bytes(4096))
    os.set_blocking(writer, True)
    return open(writer, "w")


def not_ready() -> io.TextIOWrapper:
    """A pipe that does not wait, and has no place for a line."""
    stream = stalled()
    os.set_blocking(stream.fileno(), False)
    return stream


def cut() -> io.TextIOWrapper:
    """A pipe whose reader has gone, as that of `| head -1`."""
    reader, writer = os.pipe()
    os.close(reader)
    return open(writer, "w")


def closed() -> io.StringIO:
    stream = io.StringIO()
    stream.close()
    return stream


STREAMS = {
    "none": lambda: None,
    "closed": closed,
    "cut": cut,
    "full": lambda: open("/dev/full", "w"),
    "stalled": stalled,
    "not ready": not_ready,
    "ascii": lambda: io.TextIOWrapper(io.BytesIO(), encoding="ascii"),
}


@pytest.mark.parametrize("kind", STREAMS)
def test_run_is_complete_whatever_happens_to_what_it_prints(kind, here, monkeypatch):
    stream = STREAMS[kind]()
    monkeypatch.setattr(sys, "stdout", stream)
    status = ppo.main([*SMALL, "--run-name", "überall"])
    evaluated = ppo.main(["--evaluate", "runs/überall", "--eval-episodes", "1"])
    if kind == "ascii":
        assert "berall" in stream.buffer.getvalue().decode()
    monkeypatch.undo()
    if kind in ("cut", "full"):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # so that closing it does not fail
    run = here / "runs/überall"
    assert (status, evaluated, json.loads((run / "summary.json").read_text())["status"]) == (0, 0, "completed")


# ------------------------------------------------------------------------------------------- its own random numbers
class Quiet(gym.Env):
    """Rewards that depend on the actions."""

    observation_space = gym.spaces.Box(-1, 1, (2,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.np_random.random(2, dtype=np.float32), {}

    def step(self, action):
        self.t += 1
        return self.np_random.random(2, dtype=np.float32), float(action[0]), False, self.t == 7, {}


class Seeding(Quiet):
    """Seeds all that is global in each reset and step, "for reproducibility"."""

    def reset(self, **options):
        torch.manual_seed(42), np.random.seed(42), random.seed(42)
        return super().reset(**options)

    def step(self, action):
        torch.manual_seed(42), np.random.seed(42), random.seed(42)
        return super().step(action)


class Global(Quiet):
    """Changes how torch and numpy compute, in its constructor, in reset or in step."""

    where = ""

    def change(self, where):
        if where == self.where:
            torch.set_default_dtype(torch.float64)
            torch.set_grad_enabled(False)
            torch.set_num_threads(3)
            np.seterr(all="raise")

    def __init__(self):
        self.change("init")

    def reset(self, **options):
        self.change("reset")
        return super().reset(**options)

    def step(self, action):
        self.change("step")
        return super().step(action)


@pytest.mark.parametrize("script", [ppo, reinforce, sac], ids=lambda script: script.__name__)
@pytest.mark.parametrize("where", ["init", "reset", "step"])
def test_environment_that_changes_how_everything_is_computed_changes_nothing(where, script, here, monkeypatch):
    monkeypatch.setattr(Global, "where", where)
    for kind in (Quiet, Global):
        spec = gym.envs.registration.EnvSpec(f"{kind.__name__}-v0", kind)
        monkeypatch.setitem(gym.registry, f"{kind.__name__}-v0", spec)
        flags = ["--env-id", f"{kind.__name__}-v0", "--run-name", kind.__name__, "--num-threads", "1"]
        assert script.main([*(OF_SAC if script is sac else SMALL), *flags]) == 0
    assert torch.get_default_dtype() == torch.float32 and torch.is_grad_enabled() and torch.get_num_threads() == 1
    assert np.geterr()["under"] != "raise"
    assert same(newest(here / "runs/Quiet")["agent"], newest(here / "runs/Global")["agent"])


BIG = 2**40
SPACES = {
    "choices": dict(action_space=gym.spaces.Discrete(BIG)),
    "uneven choices": dict(action_space=gym.spaces.MultiDiscrete([2, BIG])),
    "states": dict(observation_space=gym.spaces.Discrete(BIG)),
    "other byte order": dict(observation_space=gym.spaces.Box(-1, 1, (2,), np.dtype(">f4"))),
    "long double": dict(observation_space=gym.spaces.Box(-1, 1, (2,), np.longdouble)),
}


@pytest.mark.parametrize("kind", SPACES)
def test_space_that_no_network_can_have_is_refused(kind, here, monkeypatch, capsys):
    env = type("Env", (Quiet,), SPACES[kind])
    monkeypatch.setitem(gym.registry, "Space-v0", gym.envs.registration.EnvSpec("Space-v0", env))
    assert "Space-v0" in refused(capsys, "--env-id", "Space-v0", here=here)


@pytest.mark.parametrize("shape, image", [((3, 40, 40), 1), ((40, 40, 3), 1), ((40, 3, 40), 0), ((40, 40, 40), 1)])
def test_images_have_their_channels_first_or_last(shape, image):
    assert ppo.is_image(gym.spaces.Box(0, 255, shape, np.uint8)) == bool(image)


def test_clock_that_stands_still_is_no_reason_to_fail(here, monkeypatch):
    monkeypatch.setattr(time, "perf_counter", lambda: 1.0)
    assert ppo.main([*SMALL, "--run-name", "run"]) == 0
    assert json.loads((here / "runs/run/summary.json").read_text())["sps"] == 0


class Foreign(Quiet):
    """Calls what the test sets, once, in the hundredth step."""

    steps = 0

    def step(self, action):
        Foreign.steps += 1
        if Foreign.steps == 100:
            self.act()
        return super().step(action)


def foreign(monkeypatch, act):
    monkeypatch.setattr(Foreign, "steps", 0)
    monkeypatch.setattr(Foreign, "act", lambda env: act(), raising=False)
    monkeypatch.setitem(gym.registry, "Foreign-v0", gym.envs.registration.EnvSpec("Foreign-v0", Foreign))
    return ppo.main([*SMALL, "--env-id", "Foreign-v0", "--run-name", "run", "--checkpoint-interval", "1"])


def test_ctrl_c_where_an_environment_has_taken_the_handler_away_interrupts(here, monkeypatch):
    def interrupt():
        raise KeyboardInterrupt

    assert foreign(monkeypatch, interrupt) == 130
    assert json.loads((here / "runs/run/summary.json").read_text())["status"] == "interrupted"
    assert ppo.main(["--resume", "runs/run"]) == 0


def test_csv_file_that_was_replaced_ends_the_run(here, monkeypatch, capsys):
    def replace():
        Path("runs/run/copy").write_text(Path("runs/run/episodes.csv").read_text())
        os.replace("runs/run/copy", "runs/run/episodes.csv")

    assert foreign(monkeypatch, replace) == 1
    assert "episodes.csv was replaced; the last good checkpoint is" in capsys.readouterr().err
    assert json.loads((here / "runs/run/summary.json").read_text())["status"] == "failed"


def test_child_that_an_environment_forks_does_not_end_the_run(here, monkeypatch):
    parent = os.getpid()

    def fork():
        if not os.fork():
            raise ValueError("in the child")

    try:
        status = foreign(monkeypatch, fork)
    finally:
        if os.getpid() != parent:
            os._exit(0)
    assert status == 0 and json.loads((here / "runs/run/summary.json").read_text())["status"] == "completed"
    assert not (here / "runs/run/error.txt").exists()
    os.wait()


def test_what_foreign_code_prints_to_a_closed_stdout_goes_into_no_file(here):
    code = f"""if 1:
        import os, sys
        sys.path.insert(0, {str(SCRIPT.parent)!r})
        import gymnasium as gym, ppo
        from gymnasium.envs.classic_control import CartPoleEnv
        class Printing(CartPoleEnv):
            def step(self, action):
                os.write(1, b"printf")
                return super().step(action)
        gym.register("Printing-v0", Printing)
        sys.exit(ppo.main("--env-id Printing-v0 --run-name run {" ".join(SMALL)}".split()))"""
    (here / "code.py").write_text(code)
    done = subprocess.run(["bash", "-c", f"{sys.executable} code.py <&- >&- 2>&-"])
    assert done.returncode == 0
    assert all("printf" not in path.read_text() for path in (here / "runs/run").glob("*.csv"))


@pytest.mark.parametrize("script", [ppo, a2c, trpo, reinforce, sac], ids=lambda script: script.__name__)
def test_environment_that_seeds_everything_changes_nothing(script, here, monkeypatch):
    for kind in (Quiet, Seeding):
        monkeypatch.setitem(
            gym.registry, f"{kind.__name__}-v0", gym.envs.registration.EnvSpec(f"{kind.__name__}-v0", kind)
        )
        flags = ["--env-id", f"{kind.__name__}-v0", "--run-name", kind.__name__]
        assert script.main([*(OF_SAC if script is sac else SMALL), *flags]) == 0
    quiet, seeding = here / "runs/Quiet", here / "runs/Seeding"
    assert same(newest(quiet)["agent"], newest(seeding)["agent"])
    assert timeless(quiet, "episodes") == timeless(seeding, "episodes")
    returns = [row["return"] for row in timeless(quiet, "episodes")]
    assert len(set(returns)) == len(returns) > 15


def test_reward_that_seeds_everything_changes_no_completion(here, monkeypatch):
    def seeding(prompt, completion, args):
        torch.manual_seed(42), np.random.seed(42), random.seed(42)
        return float(len(completion))

    small = "--num-digits 2 --n-layer 1 --n-embd 16 --n-head 2 --sft-steps 3 --eval-prompts 8 --num-threads 1"
    small += " --generation-batch-size 16 --num-generations 4 --max-steps 3 --max-completion-length 8 --rewards length"
    for name, reward in (("quiet", lambda prompt, completion, args: float(len(completion))), ("seeding", seeding)):
        monkeypatch.setattr(grpo_toy, "reward_length", reward, raising=False)
        assert grpo_toy.main([*small.split(), "--run-name", name]) == 0
    quiet, other = here / "runs/quiet", here / "runs/seeding"
    assert same(newest(quiet)["model"], newest(other)["model"])
    assert timeless(quiet, "episodes") == timeless(other, "episodes")


def test_random_numbers_go_on_where_they_were_saved():
    rng, later = ppo.Rng(3, "cpu"), ppo.Rng(4, "cpu")
    rng.python.random(), rng.permutation(5)
    later.load_state_dict(rng.state_dict())
    assert later.python.random() == rng.python.random()
    assert torch.equal(later.permutation(100), rng.permutation(100))
    assert sorted(rng.permutation(100).tolist()) == list(range(100))
    drawn = rng.integers(3, 1000)
    assert drawn.shape == (1000,) and set(drawn.tolist()) == {0, 1, 2}


def test_seeds_give_other_numbers():
    first = {tuple(ppo.Rng(seed, "cpu").permutation(20).tolist()) for seed in (0, 1, 2, "a", "b")}
    assert len(first) == 5


# ------------------------------------------------------------------------------------------------------- leaving
@pytest.mark.parametrize("name", ["ppo", "grpo_toy"])
def test_ctrl_c_during_the_imports_leaves_without_a_traceback(name, here):
    child = subprocess.Popen([sys.executable, SCRIPT.parent / f"{name}.py"], stderr=subprocess.PIPE, text=True)
    maps = Path(f"/proc/{child.pid}/maps")
    while "libtorch" not in maps.read_text():  # it is about to be imported
        time.sleep(0.01)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate()
    assert (child.returncode, err, list(here.iterdir())) == (-signal.SIGINT, "", [])


def test_two_command_lines_at_once_leave_stdout_as_it_was():
    before = sys.stdout, sys.stderr
    threads = [threading.Thread(target=ppo.parse_args, args=(["--seed", str(n)],)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (sys.stdout, sys.stderr) == before


VERBS = {
    "run classic --wrkers 2": "did you mean --workers?",
    "run classic --workers x": "--workers takes a whole number, not 'x'.",
    "sweep --trials 3": "--study STR",
    "walk": "Unrecognized options: walk.",
    "": "Expected one of {run, report, evaluate, sweep, speed, check}.",
}


@pytest.mark.parametrize("argv", VERBS)
def test_harness_refuses_flags_in_one_sentence(argv, here, capsys):
    assert harness.main(argv.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and VERBS[argv] in err
    assert not list(here.iterdir())
