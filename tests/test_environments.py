"""Environments as users bring them: what is opened is closed, what they return is checked, spaces are kept to."""

import importlib
import importlib.util
import json
import os
import random
import re
import signal
import sys
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces

import ppo

SMALL = ["--num-envs", "2", "--num-steps", "32", "--total-timesteps", "128", "--device", "cpu"]
MINIBATCHES = ["--num-minibatches", "2", "--compile", "off"]


class Odd(gym.Env):
    """Episodes of `length` steps that each pay 1. Instances are numbered; reply changes what number 1 says."""

    made: list["Odd"] = []

    def __init__(self, reply=None, length=5, observations=None, actions=None, bad_close=None, broken=None, **options):
        self.observation_space = observations or spaces.Box(-1, 1, (3,), np.float32)
        self.action_space = actions or spaces.Discrete(2)
        self.number, self.life, self.taken, self.closed, self.t = len(Odd.made), 0, [], 0, 0
        self.reply, self.length, self.bad_close, self.broken = reply or {}, length, bad_close, broken
        if self.broken == ("made", self.number):
            raise KeyError("level")
        Odd.made.append(self)
        if self.broken == ("space", self.number):
            self.action_space = spaces.Discrete(3)

    def observation(self):
        first = getattr(self.observation_space, "start", 0)
        return np.full(self.observation_space.shape, first + self.t / 100, self.observation_space.dtype)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        if self.broken == ("reset", self.number):
            raise ValueError("no more games")
        return self.say("reset", (self.observation(), {}))

    def ends(self):
        return self.t == self.length

    def step(self, action):
        self.t, self.life = self.t + 1, self.life + 1
        self.taken.append(action)
        if self.broken == ("step", self.number) and self.life == 40:
            raise ValueError("the gripper broke")
        return self.say("end" if self.ends() else "step", (self.observation(), 1.0, self.ends(), False, {}))

    def say(self, moment, result):
        """The result with what reply has for the moment: a whole answer, or a change to one of its parts."""
        if self.number == 1 and moment in self.reply:
            change = self.reply[moment]
            return change(*result) if callable(change) else change
        return result

    def close(self):
        self.closed += 1
        if self.bad_close:
            raise self.bad_close


@pytest.fixture
def odd(tmp_path, monkeypatch):
    """odd(**options) registers an Odd of its own and returns its id; the current folder is an empty one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Odd, "made", [])
    ids = []

    def register(cls=Odd, **options):
        ids.append(f"Strange{len(ids)}-v0")
        gym.register(ids[-1], cls, kwargs=options)
        return ids[-1]

    yield register
    for name in ids:
        del gym.registry[name]


def start(env_id, *flags, script=ppo):
    minibatches = MINIBATCHES if script is ppo else []
    return script.main([*SMALL, *minibatches, "--env-id", env_id, "--run-name", "run", *flags])


def all_closed(count):
    assert [env.closed for env in Odd.made] == [1] * count


def one_sentence(capsys):
    out, err = capsys.readouterr()
    assert re.fullmatch(r"[^\n]+\n", err), err
    return err


# ------------------------------------------------------------------------------------- what is opened is closed
@pytest.mark.parametrize("name", ["ppo", "a2c", "trpo", "reinforce"])
def test_environments_are_closed_after_training_and_after_evaluation(name, odd):
    script, env_id = importlib.import_module(name), odd()
    assert start(env_id, script=script) == 0
    all_closed(2)
    assert script.main(["--evaluate", "runs/run", "--eval-episodes", "3"]) == 0
    all_closed(5)


WAYS_OUT = {  # options, flags, exit status, environments that were made
    "a step raises": (dict(broken=("step", 1)), [], 1, 2),
    "the first reset raises": (dict(broken=("reset", 1)), [], 1, 2),
    "a promise is broken": (dict(reply={"step": None}), [], 1, 2),
    "a constructor raises": (dict(broken=("made", 1)), [], 2, 1),
    "other spaces": (dict(broken=("space", 1)), [], 2, 2),
    "a space that is not supported": (dict(actions=spaces.MultiBinary(3)), [], 2, 2),
    "a space that is empty": (dict(observations=spaces.Box(0, 1, (0,))), [], 2, 2),
    "flags that cannot be": ({}, ["--scale-actions", "on"], 2, 2),
    "a folder that exists": ({}, ["--run-name", "other"], 2, 2),
    "a loss that is not finite": ({}, ["--learning-rate", "1e30"], 1, 2),
}


@pytest.mark.parametrize("way", WAYS_OUT)
def test_environments_are_closed_on_every_way_out(way, odd, capsys):
    options, flags, status, made = WAYS_OUT[way]
    Path("runs/other").mkdir(parents=True)
    assert start(odd(**options), *flags) == status
    all_closed(made)
    assert one_sentence(capsys).startswith("error: ")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_environments_are_closed_after_a_signal(signum, odd, monkeypatch):
    monkeypatch.setattr(ppo, "update", lambda *args, update=ppo.update: os.kill(os.getpid(), signum) or update(*args))
    assert start(odd()) == 128 + signum
    all_closed(2)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_environments_are_closed_after_a_signal_to_an_evaluation(signum, odd, monkeypatch):
    assert start(odd()) == 0
    monkeypatch.setattr(Odd, "ends", lambda env: os.kill(os.getpid(), signum))
    assert ppo.main(["--evaluate", "runs/run"]) == 128 + signum
    all_closed(10)
    assert sum(len(env.taken) for env in Odd.made[2:]) == 1


def test_environments_are_closed_after_ctrl_c_in_a_constructor(odd):
    class Slow(Odd):
        def __init__(self, **options):
            if len(Odd.made) == 2:
                raise KeyboardInterrupt
            super().__init__(**options)

    with pytest.raises(KeyboardInterrupt):
        ppo.make_envs(ppo.parse_args(["--env-id", odd(Slow)]), 3, 1)
    all_closed(2)


@pytest.mark.parametrize("error", [RuntimeError("the server is gone"), SystemExit(3)], ids=["error", "exit"])
@pytest.mark.parametrize("broken, status", [(None, 0), (("step", 0), 1)])
def test_an_error_while_closing_hides_nothing_and_keeps_no_other_open(error, broken, status, odd, capsys):
    assert start(odd(bad_close=error, broken=broken)) == status
    all_closed(2)
    err = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"An environment of Strange0-v0 could not be closed; it raised .+\(.+py:\d+\)\.", err[0])
    assert len(err) == 1 + status and all("the gripper broke" in line for line in err[1:])
    assert json.loads(Path("runs/run/summary.json").read_text())["status"] == ("failed" if status else "completed")


def test_a_signal_while_closing_keeps_no_environment_open(odd):
    with pytest.raises(KeyboardInterrupt), ppo.make_envs(ppo.parse_args(["--env-id", odd()]), 3, 1):
        Odd.made[2].bad_close = Odd.made[1].bad_close = KeyboardInterrupt()
    all_closed(3)


def test_closing_twice_is_closing_once(odd):
    envs = ppo.make_envs(ppo.parse_args(["--env-id", odd()]), 2, 1)
    with envs:
        envs.close()
    envs.close()
    all_closed(2)


def test_twins_of_a_film_are_closed(odd):
    args = ppo.parse_args(["--env-id", "ALE/Pong-v5", "--eval-episodes", "1", "--num-threads", "1"])
    with ppo.make_envs(args, 1, 1) as envs, ppo.Camera(envs, args, "film", 1) as camera:
        assert not camera.twins.envs.closed and not envs.envs.closed
    assert camera.twins.envs.closed and envs.envs.closed


# ------------------------------------------------------------------------------------------------------- endless
class Endless(Odd):
    """Environments whose number in an evaluation is in `never` have no end after their first `good` episodes."""

    never, good, counted = (), 0, 0

    def reset(self, **options):
        self.counted += 1
        return super().reset(**options)

    def ends(self):
        endless = self.number - 2 in self.never and self.counted > self.good
        return self.t == self.length and not endless


def evaluation(odd, monkeypatch, *flags, script=ppo, never=(), good=0, length=5):
    env_id = odd(Endless, length=length)
    assert start(env_id, script=script) == 0
    monkeypatch.setattr(Endless, "never", never)
    monkeypatch.setattr(Endless, "good", good)
    return script.main(["--evaluate", "runs/run", *flags])


@pytest.mark.parametrize("name", ["ppo", "reinforce"])
def test_an_evaluation_that_does_not_end_is_ended_and_tells_what_it_knows(name, odd, monkeypatch, capsys):
    script, before = importlib.import_module(name), "runs/run/summary.json"
    flags = ["--eval-episodes", "4", "--eval-max-steps", "300"]
    assert evaluation(odd, monkeypatch, *flags, script=script, never=(1, 3)) == 1
    out, err = capsys.readouterr()
    assert out.splitlines()[-1] == "2 deterministic episodes: mean 5.00, std 0.00, min 5.00, max 5.00"
    assert err == (
        "error: an episode of environment 1 of Strange0-v0 did not end within 300 steps (--eval-max-steps); "
        "2 of 4 episodes ended, and nothing is recorded.\n"
    )
    told = json.loads(Path(before).read_text())
    assert told["status"] == "completed" and "eval" not in told
    assert {len(env.taken) for env in Odd.made[2:]} == {300}
    assert [env.closed for env in Odd.made] == [1] * 6


def test_an_evaluation_of_which_no_episode_ends_says_so(odd, monkeypatch, capsys):
    assert evaluation(odd, monkeypatch, "--eval-episodes", "1", "--eval-max-steps", "9", never=(0,)) == 1
    out, err = capsys.readouterr()
    assert "episodes:" not in out and "within 9 steps (--eval-max-steps); 0 of 1 episodes ended" in err


def test_an_episode_may_take_all_of_the_steps(odd, monkeypatch, capsys):
    assert evaluation(odd, monkeypatch, "--eval-episodes", "3", "--eval-max-steps", "5") == 0
    assert ppo.main(["--evaluate", "runs/run", "--eval-max-steps", "4"]) == 1


def test_an_environment_that_has_played_its_share_may_go_on_for_ever(odd, monkeypatch, capsys):
    """Environment 0 plays two episodes of 200 steps, the second one of the others is not wanted."""
    flags = ["--eval-episodes", "9", "--eval-max-steps", "200"]
    assert evaluation(odd, monkeypatch, *flags, never=range(1, 8), good=1, length=200) == 0
    assert len(Odd.made[3].taken) >= 400 and "9 deterministic episodes: mean 200.00" in capsys.readouterr().out


def test_a_long_evaluation_shows_how_far_it_is(odd, monkeypatch, capsys):
    env_id, clock = odd(), time.perf_counter
    assert start(env_id) == 0
    capsys.readouterr()
    seconds = iter(range(10_000))
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + 2 * next(seconds))
    assert ppo.main(["--evaluate", "runs/run", "--eval-episodes", "9"]) == 0
    *progress, last = capsys.readouterr().out.splitlines()
    assert progress and all(re.fullmatch(r" +\d of 9 episodes, \d+ steps", line) for line in progress)
    assert last.startswith("9 deterministic episodes")


# ------------------------------------------------------------------------------------------ actions in their space
ACTIONS = {
    "float32": spaces.Box(-1, 1, (3,), np.float32),
    "float64 that float32 cannot say": spaces.Box(-0.1, 0.1, (2,), np.float64),
    "float16": spaces.Box(-0.1, 70.0, (2,), np.float16),
    "a number": spaces.Box(-2, 2, (), np.float32),
    "half open": spaces.Box(0, np.inf, (2,), np.float32),
    "half open below": spaces.Box(-np.inf, np.float64([1, 2]), (2,), np.float64),
    "unbounded": spaces.Box(-np.inf, np.inf, (2,), np.float64),
    "int32": spaces.Box(0, 4, (1,), np.int32),
    "int8 matrix": spaces.Box(-3, 2, (2, 2), np.int8),
    "uint8": spaces.Box(0, 255, (2,), np.uint8),
    "all of int64": spaces.Box(-(2**63), 2**63 - 1, (2,), np.int64),
    "all of uint64": spaces.Box(0, 2**64 - 1, (2,), np.uint64),
    "unbounded integers": spaces.Box(-np.inf, np.inf, (2,), np.int32),
    "one point": spaces.Box(3, 3, (1,), np.float32),
    "wide": spaces.Box(np.float32([0, -1]), np.float32([1000, 1]), (2,), np.float32),
    "wide float16": spaces.Box(-6e4, 6e4, (1,), np.float16),
    "discrete": spaces.Discrete(3),
    "discrete from -2": spaces.Discrete(3, start=-2),
    "discrete int8 from 120": spaces.Discrete(3, start=120, dtype=np.int8),
    "discrete uint64": spaces.Discrete(3, dtype=np.uint64),
    "multidiscrete": spaces.MultiDiscrete([2, 5]),
    "multidiscrete int16": spaces.MultiDiscrete([2, 5], dtype=np.int16),
    "multidiscrete uint16": spaces.MultiDiscrete([2, 5], dtype=np.uint16),
    "multidiscrete matrix": spaces.MultiDiscrete([[2, 3], [4, 1]], start=[[0, -1], [7, 3]]),
    "multidiscrete int8": spaces.MultiDiscrete([2, 3], start=[-128, 125], dtype=np.int8),
}
every_space = pytest.mark.parametrize("space", ACTIONS.values(), ids=ACTIONS)


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("scaled", [False, True])
@every_space
def test_every_action_is_in_its_space_and_of_its_dtype(space, scaled):
    if isinstance(space, spaces.Box):
        dims = int(np.prod(space.shape))
        far = np.float32([-np.inf, -3e38, -1e19, -300, -1, -0.6, -0.5, 0, 0.5, 0.6, 1, 2.5, 300, 1e19, 3e38, np.inf])
        far = far[1:-1] if scaled else far  # an infinite action, times nothing, is none
        actions = np.stack([np.roll(far, i) for i in range(dims)], axis=1)
        scale = ppo.middle_and_half(space) if scaled else None
    else:
        choices, _ = ppo.choices_of(space)
        nvec = np.atleast_1d(getattr(space, "nvec", getattr(space, "n", None))).flatten()
        actions, scale = np.stack([np.arange(20) % n for n in nvec.astype(int)], axis=1), None
        assert actions.shape[1] == choices[0]
    taken = ppo.to_env(space, actions, scale)
    assert taken.dtype == space.dtype and taken.shape == (len(actions), *space.shape)
    for action in taken:
        assert np.asarray(action) in space, action


def test_integers_are_rounded_and_clipped_and_nothing_else_is_changed():
    whole = ppo.to_env(ACTIONS["int32"], np.float32([[-2.0], [0.4], [0.6], [2.7], [9.0]]))
    assert whole.flatten().tolist() == [0, 0, 1, 3, 4]
    box = np.float32([[-2.0, 0.25, 0.1], [0.3, 1.0, 7.0]])
    assert np.array_equal(ppo.to_env(ACTIONS["float32"], box), box.clip(-1, 1))
    assert ppo.to_env(ACTIONS["all of int64"], np.float32([[1e30, -1e30]])).tolist() == [[2**63 - 1, -(2**63)]]


@every_space
def test_environments_get_such_actions_from_a_rollout(space, odd, capsys):
    assert start(odd(actions=space), "--no-norm-obs", "--log-std-init", "2") == 0
    for env in Odd.made:
        assert len(env.taken) == 64
        for action in env.taken:
            assert action.dtype == space.dtype and np.asarray(action) in space, action
    assert capsys.readouterr().err == ""


# --------------------------------------------------------------------------------------------------- scaled actions
NOT_FAR = ["Pendulum-v1", "MountainCarContinuous-v0", "HalfCheetah-v4", "HalfCheetah-v5", "Humanoid-v5", "Pusher-v5"]
NOT_FAR += ["InvertedPendulum-v5", "Reacher-v5", "Swimmer-v5"]
FAR = {
    "wide": spaces.Box(0, 1000, (1,)),
    "wide in one of two": spaces.Box(np.float32([-1, -1]), np.float32([1, 30])),
    "wide in one of two, the other unbounded": spaces.Box(np.float32([-np.inf, 0]), np.float32([np.inf, 30])),
    "narrow": spaces.Box(-0.01, 0.01, (2,)),
    "elsewhere": spaces.Box(2.0, 2.5, (2,)),
    "bytes": spaces.Box(0, 255, (2,), np.uint8),
}
NEITHER = {
    "steering and gas": spaces.Box(np.float32([-1, 0, 0]), np.float32([1, 1, 1])),  # Box2D's CarRacing
    "half open": spaces.Box(0, np.inf, (2,)),
    "largest numbers": spaces.Box(-np.finfo(np.float32).max, np.finfo(np.float32).max, (2,)),
    "largest integers": spaces.Box(-(2**31), 2**31 - 1, (2,), np.int32),
    "one point": spaces.Box(0, 0, (2,)),
    "discrete": spaces.Discrete(2000),
}


def test_only_boxes_far_from_minus_1_to_1_are_scaled():
    assert all(ppo.is_far(space) for space in FAR.values())
    assert not any(ppo.is_far(space) for space in NEITHER.values())
    for env_id in NOT_FAR:
        assert not ppo.is_far(gym.make(env_id).action_space), env_id


def test_a_wide_box_is_played_scaled_and_evaluated_and_resumed_the_same(odd, capsys):
    class Near700(Odd):
        def step(self, action):
            obs, _, *flags = super().step(action)
            return obs, -abs(float(action[0]) - 700), *flags

    env_id = odd(Near700, actions=spaces.Box(0, 1000, (1,)))
    assert start(env_id) == 0
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert second == "observes Box(3,) as 3 numbers through an MLP, acts in Box(1,), scaled to it"
    assert json.loads(Path("runs/run/config.json").read_text())["args"]["scale_actions"] == "on"
    taken = np.array([action[0] for env in Odd.made for action in env.taken])
    assert 200 < taken.std() < 500 and 350 < taken.mean() < 650  # a normal deviate, times 500 and clipped
    assert 0.2 < np.isin(taken, [0, 1000]).mean() < 0.45

    args = ppo.parse_args(["--evaluate", "runs/run", "--eval-episodes", "1"])
    returns = ppo.evaluate(args)
    weights = ppo.load_checkpoint(Path("runs/run"))["agent"]
    with torch.no_grad():
        expected = []
        for t in range(5):
            x = torch.full((3,), t / 100)
            for layer in ("first", "second"):
                x = torch.tanh(weights[f"actor.{layer}.weight"] @ x + weights[f"actor.{layer}.bias"])
            expected.append(500 + 500 * (weights["actor.last.weight"] @ x + weights["actor.last.bias"]).item())
    assert np.concatenate(Odd.made[2].taken[:5]) == pytest.approx(expected, abs=1e-2)
    assert returns == [pytest.approx(sum(-abs(x - 700) for x in expected), abs=0.1)]

    Path("runs/run/checkpoints/step_000000000128.pt").unlink()
    Path("runs/run/summary.json").unlink()
    capsys.readouterr()
    assert ppo.main(["--resume", "runs/run"]) == 0
    assert ", exactly as if it had never stopped" in capsys.readouterr().out


def test_a_wide_box_that_is_not_scaled_is_warned_of(odd, capsys):
    assert start(odd(actions=spaces.Box(0, 1000, (1,))), "--scale-actions", "off") == 0
    out = capsys.readouterr().out
    assert "acts in Box(1,)\nwarning: actions from 0 to 1000 are not known to learn unscaled; use --scale-" in out
    assert max(action[0] for env in Odd.made for action in env.taken) < 10


# ---------------------------------------------------------------------------------------- what environments return
def changed(position, value):
    """A reply with another value at a position."""
    return lambda *result: (*result[:position], value, *result[position + 1 :])


DISCRETE = dict(observations=spaces.Discrete(4, start=2))
BYTES = dict(observations=spaces.Box(0, 255, (3,), np.uint8))
BROKEN = {  # moment, reply, options, what is said
    "reset without info": (
        "reset",
        np.zeros(3),
        {},
        "an array (3,) of float64 from 0.0 to 0.0, not (observation, info)",
    ),
    "old reset of two": ("reset", np.zeros(2), {}, "an array (2,) of float64 from 0.0 to 0.0, not (observation, info)"),
    "reset of nothing": ("reset", None, {}, "None, not (observation, info)"),
    "info is no dict": ("reset", changed(1, 0.5), {}, "0.5 as info, not a dict"),
    "no observation": ("reset", changed(0, None), {}, "None as observation, not Box(3,) of float32"),
    "a dict": ("reset", changed(0, {"x": 1}), {}, "a dict of 1 as observation, not Box(3,) of float32"),
    "a text": ("reset", changed(0, "left"), {}, "'left' as observation, not Box(3,) of float32"),
    "a number": ("reset", changed(0, 0.5), {}, "0.5 as observation, not Box(3,) of float32"),
    "wrong shape": (
        "reset",
        changed(0, np.float32([1, 2, 3, 4])),
        {},
        "an array (4,) of float32 from 1.0 to 4.0 as obs",
    ),
    "one more axis": ("reset", changed(0, np.zeros((1, 3))), {}, "an array (1, 3) of float64 from 0.0 to 0.0 as obs"),
    "ragged": ("reset", changed(0, [[1], [2, 3], 4]), {}, "a list of 3 as observation, not Box(3,) of float32"),
    "complex": ("reset", changed(0, np.zeros(3, complex)), {}, "an array (3,) of complex128 as observation"),
    "float for bytes": (
        "reset",
        changed(0, np.float32([0, 0.5, 1])),
        BYTES,
        "float32 from 0.0 to 1.0 as observation, not",
    ),
    "too much for bytes": (
        "step",
        changed(0, np.array([0, 1, 256])),
        BYTES,
        "of int64 from 0 to 256 as observation, not",
    ),
    "negative for bytes": ("step", changed(0, [0, -1, 2]), BYTES, "a list of 3 as observation, not Box(3,) of uint8"),
    "outside of discrete": ("step", changed(0, 6), DISCRETE, "6 as observation, not Discrete(4, start=2) of int64"),
    "below discrete": (
        "reset",
        changed(0, np.int64(1)),
        DISCRETE,
        "np.int64(1) as observation, not Discrete(4, start=2)",
    ),
    "float for discrete": ("reset", changed(0, 3.0), DISCRETE, "3.0 as observation, not Discrete(4, start=2)"),
    "one-hot for discrete": ("reset", changed(0, np.array([1, 0, 0])), DISCRETE, "an array (3,) of int64 from 0 to 1"),
    "old step": (
        "step",
        (np.zeros(3), 1.0, False, {}),
        {},
        "a tuple of 4, not (observation, reward, terminated, truncated",
    ),
    "step of nothing": ("step", None, {}, "None, not (observation, reward"),
    "two rewards": (
        "step",
        changed(1, np.zeros(2)),
        {},
        "an array (2,) of float64 from 0.0 to 0.0 as reward, not a number",
    ),
    "reward in an array": (
        "step",
        changed(1, np.ones(1)),
        {},
        "an array (1,) of float64 from 1.0 to 1.0 as reward, not a",
    ),
    "reward in a list": ("step", changed(1, [1.0]), {}, "a list of 1 as reward, not a number"),
    "no reward": ("step", changed(1, None), {}, "None as reward, not a number"),
    "reward is a text": ("step", changed(1, "1.0"), {}, "'1.0' as reward, not a number"),
    "no terminated": ("step", changed(2, None), {}, "None as terminated, not True or False"),
    "terminated is a text": ("step", changed(2, "no"), {}, "'no' as terminated, not True or False"),
    "terminated in part": ("step", changed(2, 0.5), {}, "0.5 as terminated, not True or False"),
    "truncated is info": ("step", changed(3, {}), {}, "a dict of 0 as truncated, not True or False"),
    "no reward at the end": ("end", changed(1, None), {}, "None as reward, not a number"),
    "no observation at the end": ("end", changed(0, None), {}, "None as observation, not Box(3,) of float32"),
    "old step at the end": ("end", (np.zeros(3), 1.0, True, {}), {}, "a tuple of 4, not (observation, reward"),
}
MOMENT = {"reset": "first reset", "step": "first step", "end": "first end of an episode"}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_an_environment_returns_is_checked_where_it_enters(kind, odd, capsys):
    moment, reply, options, said = BROKEN[kind]
    assert start(odd(reply={moment: reply}, **options)) == 1
    err = one_sentence(capsys)
    assert f"environment 1 of Strange0-v0 returned at its {MOMENT[moment]} " in err and said in err, err
    if moment == "reset":
        assert not Path("runs").exists()
    else:
        step = {"step": 0, "end": 4}[moment]
        assert err.startswith(
            f"error: iteration 1: in step {step} of the rollout environment 1 of Strange0-v0 returned"
        )
        assert json.loads(Path("runs/run/summary.json").read_text())["status"] == "failed"


def test_a_second_reset_is_checked_too_and_then_nothing_any_more(odd, monkeypatch):
    looked, promise = [], ppo.broken_promise
    monkeypatch.setattr(ppo, "broken_promise", lambda *given: looked.append(len(given[2])) or promise(*given))
    with ppo.make_envs(ppo.parse_args(["--env-id", odd(length=3)]), 2, 1) as envs:
        envs.reset()
        for _ in range(10):
            assert bool(envs.envs.unchecked) == (len(looked) < 8)
            envs.step(np.zeros(2, dtype=np.int64))
    assert looked == [2, 2, 5, 5, 5, 5, 2, 2] and not envs.envs.unchecked
    Odd.made[1].reply = {"reset": None}
    with pytest.raises(ppo.Failed, match=r"environment 1 of Strange0-v0 raised TypeError: .*NoneType"):
        envs.reset()


KEPT = {
    "float64 for float32": ("step", changed(0, np.zeros(3)), {}),
    "a list": ("step", changed(0, [0, 0.5, 1]), {}),
    "integers for float32": ("reset", changed(0, np.arange(3)), {}),
    "beyond the bounds": ("reset", changed(0, np.float32([9, 9, 9])), {}),
    "integers for bytes": ("step", changed(0, [0, 1, 255]), BYTES),
    "a number of Python's for discrete": ("step", changed(0, 5), DISCRETE),
    "a small integer for discrete": ("step", changed(0, np.int8(2)), DISCRETE),
    "a reward of numpy's": ("step", changed(1, np.float32(1)), {}),
    "a reward in an array without axes": ("step", changed(1, np.array(1)), {}),
    "a reward of torch's": ("step", changed(1, torch.tensor(1.0)), {}),
    "a reward that is true": ("step", changed(1, True), {}),
    "a list instead of a tuple": ("step", lambda *result: [*result], {}),
    "flags of numpy's": ("step", changed(2, np.bool_(False)), {}),
    "flags that are numbers": ("end", changed(2, 1), {}),
}


@pytest.mark.parametrize("kind", KEPT)
def test_what_works_is_not_refused(kind, odd, capsys):
    moment, reply, options = KEPT[kind]
    assert start(odd(reply={moment: reply}, **options)) == 0
    assert capsys.readouterr().err == ""


def test_an_environment_that_raises_is_named_with_type_text_and_place(odd, capsys):
    assert start(odd(broken=("step", 1))) == 1
    said = "in step 7 of the rollout environment 1 of Strange0-v0 raised ValueError: the gripper broke ("
    assert f"error: iteration 2: {said}{__file__}:" in one_sentence(capsys)


@pytest.mark.parametrize(
    "frame, said", [(None, "None"), (np.zeros((4, 4), np.uint8), "an array (4, 4) of uint8 from 0 to 0")]
)
def test_a_picture_that_is_none_is_named(frame, said, odd, monkeypatch, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "moviepy" or found(name))
    monkeypatch.setattr(Odd, "render", lambda env: frame, raising=False)
    assert start(odd(), "--capture-video") == 1
    assert f"environment 0 of Strange0-v0 rendered {said}, not an array (height, width, 3)" in one_sentence(capsys)
    assert json.loads(Path("runs/run/summary.json").read_text())["status"] == "completed"
    assert [env.closed for env in Odd.made] == [1] * 10


def test_an_observation_that_is_none_ends_an_evaluation(odd, monkeypatch, capsys):
    assert start(odd()) == 0
    observation = Odd.observation
    monkeypatch.setattr(Odd, "observation", lambda env: observation(env) * (np.nan if env.number == 3 else 1))
    assert ppo.main(["--evaluate", "runs/run", "--eval-episodes", "2"]) == 1
    assert one_sentence(capsys) == "error: the observation of environment 1 of Strange0-v0 is NaN or infinite\n"
    all_closed(4)


class Silent(Exception):
    def __str__(self):
        raise ValueError("no text")


@pytest.mark.parametrize(
    "error, said", [(SystemExit(0), "SystemExit: 0"), (Silent(), "Silent"), (GeneratorExit(), "G")]
)
def test_whatever_an_environment_raises_is_a_failure(error, said, odd, capsys):
    def fail(*result):
        raise error

    assert start(odd(reply={"step": fail})) == 1
    assert f"in step 0 of the rollout environment 1 of Strange0-v0 raised {said}" in one_sentence(capsys)


def test_the_old_api_under_a_wrapper_of_gymnasium_is_told_what_must_be_returned(odd, capsys):
    env_id = odd(reply={"step": (np.zeros(3), 1.0, False, {})})
    gym.registry[env_id].max_episode_steps = 50
    assert start(env_id) == 1
    err = one_sentence(capsys)
    assert "environment 1 of Strange0-v0 raised ValueError: not enough values to unpack (expected 5, got 4) (" in err
    assert "; what must be returned is (observation, reward, terminated, truncated, info); the last good" in err


def test_a_constructor_that_raises_is_named_with_type_text_and_place(odd, capsys):
    assert start(odd(broken=("made", 1))) == 2
    err = one_sentence(capsys)
    assert err.startswith(f"error: --env-id Strange0-v0 cannot be made, it raised KeyError: 'level' ({__file__}:")
    assert not Path("runs").exists()


def test_environments_with_different_spaces_are_refused(odd, capsys):
    assert start(odd(broken=("space", 1))) == 2
    assert one_sentence(capsys) == "error: environment 1 of --env-id Strange0-v0 has other spaces than environment 0.\n"


# ------------------------------------------------------------------------------------------------------- --env-id
MODULES = {
    "exits": "import sys\nsys.exit(0)\n",
    "divides": "x = 1 / 0\n",
    "needs": "import no_such_library\n",
    "torn": "def f(:\n",
    "panics": "class Panic(BaseException): pass\nraise Panic('at the\\ndisco')\n",
}
REFUSED = {
    "..:X": "begins with a relative name; name a module from the top, as in package:Env-v0.",
    ".x:X-v0": "begins with a relative name",
    "nowhere_at_all:X-v0": "No module named 'nowhere_at_all'. Python looked in ",
    "os.nowhere:X-v0": "put its folder on PYTHONPATH.",
    "a b:X-v0": "put its folder on PYTHONPATH.",
    "exits:X-v0": "exits cannot be imported, it raised SystemExit: 0 (",
    "divides:X-v0": "divides cannot be imported, it raised ZeroDivisionError: division by zero (",
    "needs:X-v0": "needs cannot be imported, it raised ModuleNotFoundError: No module named 'no_such_library' (",
    "torn:X-v0": "torn cannot be imported, it raised SyntaxError: ",
    "panics:X-v0": "panics cannot be imported, it raised Panic: at the disco (",
    "": "error: --env-id '' is not registered in gymnasium",
    ":": "is not registered in gymnasium",
    "CartPole-v1\n": r"error: --env-id 'CartPole-v1\n' is not registered in gymnasium; did you mean CartPole-v1?",
    "\udcff\x1b": r"error: --env-id '\udcff\x1b' is not registered in gymnasium",
    "x" * 5000: "is not registered in gymnasium",
}


@pytest.mark.parametrize("env_id", REFUSED, ids=[ascii(env_id)[:20] for env_id in REFUSED])
def test_an_env_id_that_cannot_be_is_one_sentence_and_leaves_nothing(env_id, odd, tmp_path, monkeypatch, capsys):
    (tmp_path / "modules").mkdir()
    for name, text in MODULES.items():
        (tmp_path / "modules" / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path / "modules")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    before = sorted(tmp_path.rglob("*"))
    assert ppo.main(["--env-id", env_id]) == 2
    assert REFUSED[env_id] in one_sentence(capsys)
    assert sorted(tmp_path.rglob("*")) == before


# ------------------------------------------------------------------------------------------ what was understood
def first_lines(capsys):
    return capsys.readouterr().out.splitlines()[1:3]


UNDERSTOOD = {
    "CartPole-v1": "observes Box(4,) as 4 numbers through an MLP, acts in Discrete(2)",
    "Pendulum-v1": "observes Box(3,) as 3 normalised numbers through an MLP, acts in Box(1,)",
    "HalfCheetah-v5": "observes Box(17,) as 17 normalised numbers through an MLP, acts in Box(6,)",
    "FrozenLake-v1": "observes Discrete(16) as 16 numbers through an MLP, acts in Discrete(4)",
}


@pytest.mark.parametrize("env_id", UNDERSTOOD)
def test_the_start_says_how_observations_are_read_and_actions_are_made(env_id, odd, capsys):
    assert start(env_id) == 0
    told, then = first_lines(capsys)
    assert told == UNDERSTOOD[env_id] and len(told) < 80 and "left" in then


PIXELS = {
    "grey": spaces.Box(0, 255, (84, 84), np.uint8),
    "floats": spaces.Box(0, 1, (3, 64, 64), np.float32),
    "small": spaces.Box(0, 255, (32, 32, 3), np.uint8),
    "a stack in colour": spaces.Box(0, 255, (2, 36, 36, 3), np.uint8),
}


@pytest.mark.parametrize("kind", PIXELS)
def test_pixels_that_the_cnn_does_not_take_are_warned_of(kind, odd, capsys):
    space = PIXELS[kind]
    assert start(odd(observations=space), "--update-epochs", "1") == 0
    told, warning = first_lines(capsys)
    assert told.startswith(f"observes Box{space.shape} as {np.prod(space.shape):,} numbers through an MLP, acts in")
    assert warning.startswith("warning: an MLP is not known to learn from pixels; the CNN takes uint8 in three dim")


@pytest.mark.parametrize("space", [spaces.Box(0, 10, (7, 7, 3), np.uint8), spaces.Box(-1, 1, (4, 64))])
def test_tables_of_numbers_are_not_taken_for_pixels(space, odd, capsys):
    assert start(odd(observations=space)) == 0
    assert "warning" not in capsys.readouterr().out


# ------------------------------------------------------------------------------- what float32 cannot tell apart
class Stamped(Odd):
    """Shows seconds since 1970, in which float32 counts by 128, and a small number."""

    def observation(self):
        return np.array([1.7e9 + self.t, self.t / 3])


TIME = spaces.Box(-np.inf, np.inf, (2,), np.float64)


@pytest.mark.parametrize("name", ["ppo", "reinforce"])
def test_float64_is_normalised_before_it_is_cast(name, odd, capsys):
    script = importlib.import_module(name)
    minibatches = MINIBATCHES if script is ppo else []
    env_id = odd(Stamped, observations=TIME)
    args = script.parse_args([*SMALL, *minibatches, "--env-id", env_id, "--norm-obs", "--num-steps", "30"])
    with script.make_envs(args, 2, 1) as envs:
        agent = script.make_agent(envs, args)
        player = script.Player(envs, args, script.Rng(1, "cpu"))
        times = np.tile(1.7e9 + np.arange(5.0), 6)
        for _ in range(2):  # with the untrained normaliser, and with the trained one
            steps = player.play(agent)
            observations = steps.observations[:30, 0]
            assert observations.dtype == torch.float64 and observations[:, 0].tolist() == times.tolist()
            features = agent.features(observations)
            assert features.dtype == torch.float32
            agent.obs_norm.update(steps.observations[:30].flatten(0, 1))
        expected = ((times - times.mean()) / times.std()).clip(-10, 10)
        assert features[:, 0].numpy() == pytest.approx(expected, abs=1e-5)
        with torch.no_grad():
            torch_says = script.act(agent, agent.features(observations), torch.zeros(2)).numpy()
            noise = np.zeros((30, 1, 2), np.float32)
            assert np.array_equal(script.numpy_actor(agent)(observations.numpy(), noise), torch_says)
    assert "warning" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["ppo", "reinforce"])
@pytest.mark.parametrize("dtype", [np.float64, np.int64])
def test_what_float32_cannot_tell_apart_is_said_once_in_the_first_rollout(name, dtype, odd, capsys):
    space = spaces.Box(-(2**40), 2**40, (2,), dtype)
    assert (
        start(
            odd(Stamped if dtype is np.float64 else Counted, observations=space), script=importlib.import_module(name)
        )
        == 0
    )
    out = capsys.readouterr().out
    assert out.count("warning") == 1
    assert "makes equal most values of 1 of 2 components of the observations; use --norm-obs, which" in out


class Counted(Odd):
    def observation(self):
        return np.array([2**33 + self.t, self.t])


def test_ordinary_float64_is_not_warned_of(odd, capsys):
    assert start("HalfCheetah-v5", "--no-norm-obs") == 0
    assert "warning" not in capsys.readouterr().out


def test_float32_observations_are_normalised_as_ever():
    norm, x = ppo.RunningNorm((3,)), torch.randn(50, 3) * 5 + 2
    norm.update(x)
    shift, scale = norm.mean.float(), (norm.var + 1e-8).rsqrt().float()
    assert torch.equal(norm(x), ((x - shift) * scale).clamp(-10, 10)) and norm(x).dtype == torch.float32


class Drawn(Odd):
    """Has a map that its constructor draws from the random numbers of the process."""

    def __init__(self, **options):
        super().__init__(**options)
        self.drawn = np.random.rand(), random.random(), torch.rand(()).item()


def test_what_constructors_draw_depends_on_the_seed_alone():
    gym.register("Drawn-v0", Drawn)
    args = ppo.parse_args(["--env-id", "Drawn-v0"])

    def maps(seed):
        with ppo.make_envs(args, 2, seed) as envs:
            return [env.unwrapped.drawn for env in envs.envs.envs]

    try:
        first = maps(1)
        assert first == maps(1) and first[0] != first[1] and first != maps(2)
    finally:
        del gym.registry["Drawn-v0"]
