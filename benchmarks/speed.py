"""Times the scripts against Stable-Baselines3 on this machine: python -m benchmarks.speed [row ...] [--pairs 5]

Each row runs both in turn, ours as the unmodified script, Stable-Baselines3 (sb3-contrib for TRPO) in a process of its
own, and compares them pair by pair, for a machine's speed drifts. Steps per second leave start-up out on both sides:
ours is what summary.json says, theirs is measured from the end of a first learn() of one batch. Two rows have no peer:
"process" is the seconds of the README's first command, "environment" the part of its wall time that reinforce.py spends
inside the environments. Nothing else may run meanwhile.
The table goes to benchmarks/results/speed.json and, in Markdown, to the terminal.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent


class Row(NamedTuple):
    what: str
    ours: str  # script and arguments
    our_steps: int
    theirs: str  # module, class and arguments
    make: str  # their environment
    their_steps: int
    threads: int = 1


CHEETAH = "VecNormalize(make_vec_env('HalfCheetah-v5', 1))"
BREAKOUT = "VecFrameStack(make_atari_env('BreakoutNoFrameskip-v4', {}), 4)"
ROWS = {
    "cartpole": Row(
        "PPO, CartPole-v1, 4 envs x 128, 4 minibatches, 4 epochs",
        "ppo.py --env-id CartPole-v1 --num-envs 4 --num-steps 128 --num-minibatches 4 --update-epochs 4 --compile on",
        102_400,
        "stable_baselines3 PPO n_steps=128, batch_size=128, n_epochs=4",
        "make_vec_env('CartPole-v1', 4)",
        25_600,
    ),
    "cheetah": Row(
        "PPO, HalfCheetah-v5, 1 x 2048, 32 minibatches, 10 epochs, both with normalisers",
        "ppo.py --env-id HalfCheetah-v5 --num-envs 1 --num-steps 2048 --num-minibatches 32 --compile on",
        40_960,
        "stable_baselines3 PPO n_steps=2048, batch_size=64, n_epochs=10",
        CHEETAH,
        8_192,
    ),
    "cheetah-default": Row(
        "PPO, HalfCheetah-v5, the default of each (ours compiles, as it does for its 1M steps)",
        "ppo.py --env-id HalfCheetah-v5 --compile on",
        61_440,
        "stable_baselines3 PPO",
        "make_vec_env('HalfCheetah-v5', 1)",
        8_192,
    ),
    "breakout": Row(
        "PPO, BreakoutNoFrameskip-v4, 8 x 128, 4 minibatches, 4 epochs, all cores",
        "ppo.py --env-id BreakoutNoFrameskip-v4 --num-envs 8 --num-steps 128 --num-minibatches 4 --update-epochs 4",
        5_120,
        "stable_baselines3 PPO n_steps=128, batch_size=256, n_epochs=4, clip_range=0.1, ent_coef=0.01",
        BREAKOUT.format(8),
        2_048,
        os.cpu_count() or 1,
    ),
    "a2c-cartpole": Row(
        "A2C, CartPole-v1, 8 envs x 5, compiled",
        "a2c.py --env-id CartPole-v1 --num-envs 8 --num-steps 5 --gae-lambda 1 --learning-rate 7e-4 --compile on",
        120_000,
        "stable_baselines3 A2C n_steps=5",
        "make_vec_env('CartPole-v1', 8)",
        40_000,
    ),
    "a2c-breakout": Row(
        "A2C, BreakoutNoFrameskip-v4, 16 x 5, all cores",
        "a2c.py --env-id BreakoutNoFrameskip-v4 --num-envs 16 --num-steps 5 --gae-lambda 1 --learning-rate 7e-4"
        " --optimizer rmsprop",
        12_000,
        "stable_baselines3 A2C n_steps=5, ent_coef=0.01",
        BREAKOUT.format(16),
        4_800,
        os.cpu_count() or 1,
    ),
    "trpo-cheetah": Row(
        "TRPO, HalfCheetah-v5, 1 x 2048, 15 products, 10 critic epochs, both with normalisers",
        "trpo.py --env-id HalfCheetah-v5 --num-envs 1 --num-steps 2048 --cg-iters 15 --cg-damping 0.1 --max-kl 0.01"
        " --num-minibatches 16 --update-epochs 10 --line-search-steps 10 --compile on",
        40_960,
        "sb3_contrib TRPO n_steps=2048, batch_size=128, n_critic_updates=10, cg_max_steps=15",
        CHEETAH,
        12_288,
    ),
}

THEIRS = """
import json, resource, time, warnings
warnings.filterwarnings("ignore")
import ale_py, gymnasium, torch
gymnasium.register_envs(ale_py)
torch.set_num_threads({threads})
from {module} import {name}
from stable_baselines3.common.env_util import make_atari_env, make_vec_env
from stable_baselines3.common.vec_env import VecFrameStack, VecNormalize
env = {make}
model = {name}("{policy}", env, device="cpu", {arguments})
model.learn(1)
begun = time.perf_counter()
model.learn({steps})
sps = model.num_timesteps / (time.perf_counter() - begun)
print(json.dumps([sps, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]))
"""

INSIDE = """
import json, sys, time
sys.path.insert(0, {root!r})
import gymnasium, reinforce
inside, step, reset = 0.0, gymnasium.vector.SyncVectorEnv.step, gymnasium.vector.SyncVectorEnv.reset
def timed(function):
    def call(*args, **options):
        global inside
        begun = time.perf_counter()
        result = function(*args, **options)
        inside += time.perf_counter() - begun
        return result
    return call
gymnasium.vector.SyncVectorEnv.step, gymnasium.vector.SyncVectorEnv.reset = timed(step), timed(reset)
args = reinforce.parse_args(["--env-id", "CartPole-v1", "--runs-dir", {folder!r}])
path = reinforce.train(args)
print(json.dumps(inside / json.loads((path / "summary.json").read_text())["wall_time"]))
"""


def run_ours(row: Row) -> dict[str, float]:
    """Steps per second, seconds of start-up and MB of memory of one run of a script."""
    with tempfile.TemporaryDirectory() as folder:
        script, *arguments = row.ours.split()
        command = [sys.executable, str(ROOT / script), *arguments, "--total-timesteps", str(row.our_steps)]
        command += ["--num-threads", str(row.threads), "--runs-dir", folder, "--run-name", "run"]
        subprocess.run([*command, "--checkpoint-interval", "1000000"], check=True, stdout=subprocess.DEVNULL)
        summary = json.loads((Path(folder) / "run" / "summary.json").read_text())
    return {"sps": summary["sps"], "startup": summary["startup_time"], "memory": summary["peak_memory_mb"]}


def run_python(code: str) -> list | float:
    """What the code prints, as JSON, in its last line."""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def run_theirs(row: Row) -> dict[str, float]:
    """Steps per second and MB of memory of Stable-Baselines3 on the same work."""
    module, name, *arguments = row.theirs.split(maxsplit=2)
    policy, arguments = "CnnPolicy" if "atari" in row.make else "MlpPolicy", "".join(arguments)
    options = dict(module=module, name=name, policy=policy, arguments=arguments, make=row.make)
    sps, memory = run_python(THEIRS.format(**options, steps=row.their_steps, threads=row.threads))
    return {"sps": sps, "memory": memory}


def time_inside() -> float:
    """The part of its wall time that reinforce.py spends inside the environments on CartPole, start-up left out."""
    with tempfile.TemporaryDirectory() as folder:
        return run_python(INSIDE.format(root=str(ROOT), folder=folder))


def time_process() -> float:
    """Seconds from start to exit of the README's command, compilation cache empty."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "ppo.py"), "--env-id", "CartPole-v1", "--runs-dir", folder]
        begun = time.perf_counter()
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": folder + "/cache"}
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
        return time.perf_counter() - begun


# rows without a peer: what they measure, unit, function
ALONE = {
    "process": ("whole process, python ppo.py --env-id CartPole-v1", "s", time_process),
    "environment": ("part of reinforce.py's wall time inside the environments, CartPole-v1", "", time_inside),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ", ".join([*ROWS, *ALONE])
    parser.add_argument("rows", nargs="*", metavar="row", help=f"of {names} (default: all)")
    parser.add_argument("--pairs", type=int, default=5)
    asked = parser.parse_args()
    if unknown := set(asked.rows) - {*ROWS, *ALONE}:
        parser.error(f"there is no row {', '.join(sorted(unknown))}; choose from {names}")
    path = ROOT / "benchmarks" / "results" / "speed.json"
    path.parent.mkdir(exist_ok=True)
    table = json.loads(path.read_text()) if path.exists() else {}
    table["machine"] = {"cpu": cpu_name(), "cores": os.cpu_count(), "python": platform.python_version()}
    for name in asked.rows or [*ROWS, *ALONE]:
        if name in ALONE:
            what, unit, measure = ALONE[name]
            table[name] = {"what": what, "unit": unit, "measured": [measure() for _ in range(asked.pairs)]}
        else:
            row, pairs = ROWS[name], []
            for _ in range(asked.pairs):
                pairs.append((run_ours(row), run_theirs(row)))
                print(f"{name}: {pairs[-1][0]['sps']:,.0f} against {pairs[-1][1]['sps']:,.0f} steps/s", flush=True)
            median = {}
            for side, runs in zip(("ours", "sb3"), zip(*pairs)):
                median[side] = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
            ratios = [ours["sps"] / theirs["sps"] for ours, theirs in pairs]
            table[name] = {"what": row.what, "ratios": ratios, "ratio": statistics.median(ratios), "median": median}
        path.write_text(json.dumps(table, indent=2) + "\n")
    print(
        "\n| work | ours, steps/s | SB3, steps/s | ratio | start-up, s | memory, MB (SB3) |\n|---|---|---|---|---|---|"
    )
    for name in (name for name in ROWS if name in table):
        ours, sb3 = table[name]["median"]["ours"], table[name]["median"]["sb3"]
        numbers = f"{ours['sps']:,.0f} | {sb3['sps']:,.0f} | {table[name]['ratio']:.2f} | {ours['startup']:.1f}"
        print(f"| {table[name]['what']} | {numbers} | {ours['memory']:.0f} ({sb3['memory']:.0f}) |")
    for row in (table[name] for name in ALONE if name in table):
        print(f"\n{row['what']}: {statistics.median(row['measured']):.3g} {row['unit']}".rstrip())


def cpu_name() -> str:
    import torch

    return torch.cpu.get_capabilities().get("cpu_name") or platform.processor()


if __name__ == "__main__":
    main()
