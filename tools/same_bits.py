"""Does training still give the same bits? python tools/same_bits.py OLD_COMMIT [--scripts ppo a2c] [--eager]

Trains short runs with the scripts of another commit and with those of this tree, and compares the weights of the last
checkpoint and episodes.csv (without its clock). Says "same" or "DIFFERENT" for each case, and exits with 1 where one
differs. The runs of a commit are kept in runs/same_bits and used again.
"""

import argparse
import csv
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "runs" / "same_bits"
CASES = {  # what is trained, besides --compile on and off
    "ppo CartPole": "ppo --env-id CartPole-v1 --total-timesteps 20000",
    "ppo Pendulum": "ppo --env-id Pendulum-v1 --total-timesteps 20000 --clip-vloss --target-kl 0.05",
    "ppo HalfCheetah": "ppo --env-id HalfCheetah-v5 --total-timesteps 20480",
    "ppo Breakout": "ppo --env-id BreakoutNoFrameskip-v4 --total-timesteps 3072 --num-steps 64",
    "ppo kl-adaptive": "ppo --env-id Acrobot-v1 --total-timesteps 8192 --objective kl-adaptive",
    "a2c CartPole": "a2c --env-id CartPole-v1 --total-timesteps 20000",
    "a2c Pendulum": "a2c --env-id Pendulum-v1 --total-timesteps 20000",
    "a2c HalfCheetah": "a2c --env-id HalfCheetah-v5 --total-timesteps 20480",
    "a2c Breakout": "a2c --env-id BreakoutNoFrameskip-v4 --total-timesteps 3200",
    "trpo CartPole": "trpo --env-id CartPole-v1 --total-timesteps 20480",
    "trpo Pendulum": "trpo --env-id Pendulum-v1 --total-timesteps 20480 --fisher-fraction 0.5",
    "trpo HalfCheetah": "trpo --env-id HalfCheetah-v5 --total-timesteps 20480",
    "trpo Breakout": "trpo --env-id BreakoutNoFrameskip-v4 --total-timesteps 2048 --num-steps 64",
    "reinforce CartPole": "reinforce --env-id CartPole-v1 --total-timesteps 20000",
    "reinforce Pendulum": "reinforce --env-id Pendulum-v1 --total-timesteps 20000",
    "reinforce HalfCheetah": "reinforce --env-id HalfCheetah-v5 --total-timesteps 20480",
    "reinforce Breakout": "reinforce --env-id BreakoutNoFrameskip-v4 --total-timesteps 2000 --num-steps 100",
    "sac Pendulum": "sac --env-id Pendulum-v1 --total-timesteps 2000 --learning-starts 500 --log-interval 250",
    "sac HalfCheetah": "sac --env-id HalfCheetah-v5 --total-timesteps 1500 --learning-starts 500 --num-envs 2",
    "grpo_toy grpo": "grpo_toy --max-steps 6 --sft-steps 40 --no-cache-warm-start",
    "grpo_toy dapo": "grpo_toy --method dapo --max-steps 4 --sft-steps 40 --no-cache-warm-start",
    "grpo_toy gdpo": "grpo_toy --method gdpo --max-steps 4 --sft-steps 40 --no-cache-warm-start",
    "rlhf_toy model": "rlhf_toy --max-steps 4 --sft-steps 150 --num-prompts 256 --no-cache-warm-start",
    "rlhf_toy verifier": "rlhf_toy --reward verifier --max-steps 4 --sft-steps 150 --no-cache-warm-start",
    "dpo_toy dpo": "dpo_toy --num-prompts 256 --sft-steps 150 --no-cache-warm-start",
}


def train(tree: Path, case: str, compiled: bool, runs: Path) -> Path:
    """The run directory of a case, trained with the scripts of a tree; kept if it is there."""
    script, *flags = CASES[case].split()
    run = runs / f"{case.replace(' ', '-')}-{'compiled' if compiled else 'eager'}"
    if (run / "summary.json").exists():
        return run
    shutil.rmtree(run, ignore_errors=True)
    if not script.endswith("_toy"):
        flags += ["--compile", "on" if compiled else "off"]
    command = [sys.executable, f"{script}.py", *flags, "--num-threads", "1", "--device", "cpu"]
    command += ["--runs-dir", str(runs), "--run-name", run.name]
    done = subprocess.run(command, cwd=tree, capture_output=True, encoding="utf-8", errors="replace")
    if done.returncode:
        sys.exit(f"{case} fails in {tree}: {done.stderr.strip()}")
    return run


def weights(run: Path) -> list[torch.Tensor]:
    """The tensors of the agent or model in the newest checkpoint. They may have got other names and places."""
    state = torch.load(max((run / "checkpoints").glob("step_*.pt")), weights_only=True)
    tensors = state["agent" if "agent" in state else "model"].values()
    return sorted(tensors, key=lambda x: (str(x.dtype), x.shape, x.flatten().tolist()))


def episodes(run: Path) -> list[list[str]]:
    """The rows of episodes.csv, without wall_time."""
    with open(run / "episodes.csv", newline="", encoding="utf-8") as file:
        return [[row[0], *row[2:]] for row in csv.reader(file)]


def difference(old: Path, new: Path) -> str:
    """What differs between two runs, or nothing."""
    found = []
    one, other = weights(old), weights(new)
    if len(one) != len(other) or not all(map(torch.equal, one, other)):
        found.append("weights")
    if episodes(old) != episodes(new):
        found.append("episodes.csv")
    return " and ".join(found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", help="whose training must be equalled")
    parser.add_argument("--scripts", nargs="+", help="only these (default: all)")
    parser.add_argument("--eager", action="store_true", help="leave out the compiled runs")
    asked = parser.parse_args()
    commit = subprocess.check_output(
        ["git", "rev-parse", "--short", asked.commit], cwd=ROOT, encoding="utf-8", errors="replace"
    ).strip()
    cases = [case for case in CASES if not asked.scripts or case.split()[0] in asked.scripts]
    modes = [False] if asked.eager else [False, True]
    cases = [(case, compiled) for case in cases for compiled in (modes if "_toy" not in case else [False])]
    new_runs = RUNS / "new"
    shutil.rmtree(new_runs, ignore_errors=True)
    failed = 0
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        old_tree = Path(folder) / "old"
        subprocess.run(["git", "worktree", "add", "-q", "--detach", old_tree, commit], cwd=ROOT, check=True)
        try:
            old = [pool.submit(train, old_tree, *case, RUNS / commit) for case in cases]
            new = [pool.submit(train, ROOT, *case, new_runs) for case in cases]
            for (case, compiled), one, other in zip(cases, old, new):
                found = difference(one.result(), other.result())
                failed += bool(found)
                name = f"{case}, {'compiled' if compiled else 'eager'}"
                print(f"{name:32} {'DIFFERENT ' + found if found else 'same'}", flush=True)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", old_tree], cwd=ROOT, check=True)
    print(f"{len(cases) - failed} of {len(cases)} cases give the bits of {commit}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
