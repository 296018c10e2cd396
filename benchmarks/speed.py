"""Times ppo.py against Stable-Baselines3 on this machine: python -m benchmarks.speed [row ...] [--pairs 5]

Each row runs both in turn, ours as the unmodified script, Stable-Baselines3 in a process of its own, and compares them
pair by pair, for a machine's speed drifts. Steps per second leave start-up out on both sides: ours is what summary.json
says, theirs is measured from the end of a first learn() of one batch. Nothing else may run meanwhile.
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

ROOT = Path(__file__).parent.parent
CARTPOLE = "--env-id CartPole-v1 --num-envs 4 --num-steps 128 --num-minibatches 4 --update-epochs 4 --compile on"
CHEETAH = "--env-id HalfCheetah-v5 --num-envs 1 --num-steps 2048 --num-minibatches 32 --update-epochs 10 --compile on"
BREAKOUT = "--env-id BreakoutNoFrameskip-v4 --num-envs 8 --num-steps 128 --num-minibatches 4 --update-epochs 4"

# row: (what it is, our arguments, our steps, their make, their arguments, their steps, threads)
ROWS = {
    "cartpole": (
        "CartPole-v1, 4 envs x 128, 4 minibatches, 4 epochs",
        CARTPOLE,
        102_400,
        "make_vec_env('CartPole-v1', 4)",
        "'MlpPolicy', env, n_steps=128, batch_size=128, n_epochs=4",
        25_600,
        1,
    ),
    "cheetah": (
        "HalfCheetah-v5, 1 x 2048, 32 minibatches, 10 epochs, both with normalisers",
        CHEETAH,
        40_960,
        "VecNormalize(make_vec_env('HalfCheetah-v5', 1))",
        "'MlpPolicy', env, n_steps=2048, batch_size=64, n_epochs=10",
        8_192,
        1,
    ),
    "cheetah-default": (
        "HalfCheetah-v5, the default of each (ours compiles, as it does for its 1M steps)",
        "--env-id HalfCheetah-v5 --compile on",
        61_440,
        "make_vec_env('HalfCheetah-v5', 1)",
        "'MlpPolicy', env",
        8_192,
        1,
    ),
    "breakout": (
        "BreakoutNoFrameskip-v4, 8 x 128, 4 minibatches, 4 epochs, all cores",
        BREAKOUT,
        5_120,
        "VecFrameStack(make_atari_env('BreakoutNoFrameskip-v4', 8), 4)",
        "'CnnPolicy', env, n_steps=128, batch_size=256, n_epochs=4, clip_range=0.1, ent_coef=0.01",
        2_048,
        os.cpu_count(),
    ),
}

THEIRS = """
import json, resource, time, warnings
warnings.filterwarnings("ignore")
import ale_py, gymnasium, torch
gymnasium.register_envs(ale_py)
torch.set_num_threads({threads})
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_atari_env, make_vec_env
from stable_baselines3.common.vec_env import VecFrameStack, VecNormalize
env = {make}
model = PPO({arguments}, device="cpu")
model.learn(1)
begun = time.perf_counter()
model.learn({steps})
sps = model.num_timesteps / (time.perf_counter() - begun)
print(json.dumps([sps, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]))
"""


def run_ours(arguments: str, steps: int, threads: int) -> dict[str, float]:
    """Steps per second, seconds of start-up and MB of memory of one run of ppo.py."""
    with tempfile.TemporaryDirectory() as folder:
        command = f"{sys.executable} {ROOT / 'ppo.py'} {arguments} --total-timesteps {steps} --num-threads {threads}"
        command += f" --runs-dir {folder} --run-name run --checkpoint-interval 1000000"
        subprocess.run(command.split(), check=True, stdout=subprocess.DEVNULL)
        summary = json.loads((Path(folder) / "run" / "summary.json").read_text())
    return {"sps": summary["sps"], "startup": summary["startup_time"], "memory": summary["peak_memory_mb"]}


def run_theirs(make: str, arguments: str, steps: int, threads: int) -> dict[str, float]:
    """Steps per second and MB of memory of Stable-Baselines3 on the same work."""
    code = THEIRS.format(make=make, arguments=arguments, steps=steps, threads=threads)
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    sps, memory = json.loads(done.stdout.splitlines()[-1])
    return {"sps": sps, "memory": memory}


def time_process() -> float:
    """Seconds from start to exit of the README's command, compilation cache empty."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "ppo.py"), "--env-id", "CartPole-v1", "--runs-dir", folder]
        begun = time.perf_counter()
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": folder + "/cache"}
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
        return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="row", help=f"of {', '.join([*ROWS, 'process'])} (default: all)")
    parser.add_argument("--pairs", type=int, default=5)
    asked = parser.parse_args()
    if unknown := set(asked.rows) - {*ROWS, "process"}:
        parser.error(f"there is no row {', '.join(sorted(unknown))}; choose from {', '.join([*ROWS, 'process'])}")
    path = ROOT / "benchmarks" / "results" / "speed.json"
    path.parent.mkdir(exist_ok=True)
    table = json.loads(path.read_text()) if path.exists() else {}
    table["machine"] = {"cpu": cpu_name(), "cores": os.cpu_count(), "python": platform.python_version()}
    for row in asked.rows or [*ROWS, "process"]:
        if row == "process":
            seconds = [time_process() for _ in range(asked.pairs)]
            table[row] = {"what": "whole process, python ppo.py --env-id CartPole-v1", "seconds": seconds}
            path.write_text(json.dumps(table, indent=2) + "\n")
            print(f"{row}: median {statistics.median(seconds):.1f} s of {[round(s, 1) for s in seconds]}", flush=True)
            continue
        what, ours, our_steps, make, theirs, their_steps, threads = ROWS[row]
        pairs = []
        for _ in range(asked.pairs):
            pairs.append((run_ours(ours, our_steps, threads), run_theirs(make, theirs, their_steps, threads)))
            print(f"{row}: {pairs[-1][0]['sps']:,.0f} against {pairs[-1][1]['sps']:,.0f} steps/s", flush=True)
        sides = {"ours": [pair[0] for pair in pairs], "sb3": [pair[1] for pair in pairs]}
        median = {name: {k: statistics.median(run[k] for run in runs) for k in runs[0]} for name, runs in sides.items()}
        ratios = [ours["sps"] / theirs["sps"] for ours, theirs in pairs]
        table[row] = {"what": what, "ratios": ratios, "ratio": statistics.median(ratios), "median": median}
        path.write_text(json.dumps(table, indent=2) + "\n")
    path.write_text(json.dumps(table, indent=2) + "\n")
    print(
        "\n| work | ours, steps/s | SB3, steps/s | ratio | start-up, s | memory, MB (SB3) |\n|---|---|---|---|---|---|"
    )
    for row in ROWS:
        if row in table:
            ours, sb3 = table[row]["median"]["ours"], table[row]["median"]["sb3"]
            numbers = f"{ours['sps']:,.0f} | {sb3['sps']:,.0f} | {table[row]['ratio']:.2f} | {ours['startup']:.1f}"
            print(f"| {table[row]['what']} | {numbers} | {ours['memory']:.0f} ({sb3['memory']:.0f}) |")
    if "process" in table:
        print(f"\n{table['process']['what']}: {statistics.median(table['process']['seconds']):.1f} s")


def cpu_name() -> str:
    import torch

    return torch.cpu.get_capabilities().get("cpu_name") or platform.processor()


if __name__ == "__main__":
    main()
