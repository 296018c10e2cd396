"""Environments for the workers of a3c.py, which are processes of their own and import this module."""

import multiprocessing
import os
import sys
import time

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces

WORKER = multiprocessing.current_process().name  # "worker 1"


class Bad(gym.Env):
    """Episodes of 50 steps that each pay 1. In worker 1 it does after `after` steps what `how` says."""

    observation_space = spaces.Box(-1, 1, (2,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, how="", after=30):
        self.how = how if WORKER == "worker 1" else ""
        self.after, self.life = after, 0
        if self.how == "cannot be made":
            raise ValueError("the gripper is gone")

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.t, self.life = self.t + 1, self.life + 1
        how = self.how if self.life > self.after else ""
        if how == "raises":
            raise ValueError("the gripper broke")
        if how == "exits":
            os._exit(3)
        if how == "sleeps":
            time.sleep(600)
        reward = np.nan if how == "pays nan" else 1.0
        return np.full(2, self.t / 50, np.float32), reward, self.t == 50, False, {}


class Choice(gym.Env):
    """An episode is one step: what is seen times the action, -1 or 1, is paid."""

    observation_space = spaces.Box(-1, 1, (1,), np.float32)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.seen = float(self.np_random.choice([-1, 1]))
        return np.array([self.seen], np.float32), {}

    def step(self, action):
        return np.array([self.seen], np.float32), self.seen * (2 * action - 1), True, False, {}


class Endless(gym.Env):
    """One episode that never ends and tells the worker: it pays 1 in worker 0, 2 in worker 1, and so on."""

    observation_space = spaces.Box(-1, 1, (2,), np.float32)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(2, np.float32), {}

    def step(self, action):
        return self.np_random.random(2, np.float32), 1.0 + int(WORKER[-1]), False, False, {}


class Spy(Endless):
    """Makes an update of a worker slow, and of two halves: v[worker] += 1, and later parameters[worker] += 1."""

    def __init__(self):
        def step(optimizer, grad, learning_rate):
            worker = int(WORKER[-1])
            optimizer.v[worker] += 1
            time.sleep(0.01)
            optimizer.parameters[worker] += 1

        if WORKER.startswith("worker"):
            sys.modules["a3c"].RMSprop.step = step


def take_all(shared, batch, pipe, parent):
    """What a worker does that only takes: how many rollouts it got goes into the pipe."""
    line = sys.modules["a3c"].Line(0, shared, batch, 0, pipe, parent)
    pipe.send("ready")
    pipe.recv()
    taken = 0
    while line.take():
        taken += 1
        with shared.lock:
            shared.return_norm.update(torch.ones(1))
    pipe.send(taken)


for name in ("raises", "exits", "sleeps", "pays nan", "cannot be made"):
    gym.register(f"Bad/{name.replace(' ', '-')}-v0", Bad, kwargs={"how": name})
for environment in (Bad, Choice, Endless, Spy):
    gym.register(f"Workers/{environment.__name__}-v0", environment)
