"""Environments that do what those of users have been seen to do: --env-id odd_envs:Odd/Coin-v0, and so on."""

import gymnasium as gym
import numpy as np
from gymnasium import spaces


class Long(gym.Env):
    """Episodes of 2,000 steps that each pay 1."""

    length = 2000
    observation_space = spaces.Box(-1, 1, (3,), np.float32)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.zeros(3, np.float32), {}

    def step(self, action):
        self.t += 1
        return np.full(3, self.t / self.length, np.float32), 1.0, False, self.t == self.length, {}


class Tally(Long):
    """Carries something over from episode to episode, a curriculum; observations do not show it."""

    length = 20
    level = 0

    def reset(self, **options):
        self.level += 1
        return super().reset(**options)

    def step(self, action):
        obs, _, *flags = super().step(action)
        return obs, float(self.level), *flags


class Coin(gym.Env):
    """Episodes of 200 or 1,200 steps, by a coin; every step pays 1: the mean return is 700, whatever the agent does."""

    observation_space = spaces.Box(-1, 1, (1,), np.float32)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.length = 0, 1200 if self.np_random.random() < 0.5 else 200
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.t += 1
        return np.zeros(1, np.float32), 1.0, self.t == self.length, False, {}


class Slide(gym.Env):
    """A point that is pushed, paid for being near 1. Episodes end where it slides too far, or after 25 steps."""

    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = spaces.Box(-3, 7, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.state = 0, self.np_random.normal(size=2)
        return self.state.copy(), {}

    def step(self, action):
        x, speed = self.state
        self.state = np.array([x + 0.3 * speed, 0.9 * speed + 0.3 * (float(action[0]) - 2)])
        self.t += 1
        return self.state.copy(), -abs(x - 1), abs(self.state[0]) > 3, self.t == 25, {}


for environment in (Long, Tally, Coin, Slide):
    gym.register(f"Odd/{environment.__name__}-v0", environment)
