"""Times the scripts against Stable-Baselines3 (sb3-contrib for TRPO) on this machine, each as a process of its own.

The two sides take turns, because a machine's speed drifts. Steps per second leave start-up out on both sides: ours are
in summary.json, theirs are measured from the end of a first learn() of one batch. SAC's steps before its first update
count on neither side. Three rows have no peer: "process" is the time of the README's first command, "environment" the
part of its wall time that reinforce.py spends inside the environments, "workers" a3c.py's speed over a2c.py's.
"""

import contextlib
import csv
import functools
import importlib.metadata
import itertools
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal, NamedTuple
from unittest.mock import patch

import tyro
from gymnasium.vector.utils import batch_space

from benchmarks.jobs import ROOT, UsageError, check_range, cores, make_folder, require


class Row(NamedTuple):
    what: str
    ours: str  # script and arguments
    our_steps: int
    theirs: str  # module, class and arguments
    make: str  # their environment
    their_steps: int
    threads: int = 1
    random: int = 0  # steps before the first update, which count on neither side

    def command(self, device: str) -> list[str]:
        return [*self.ours.split(), "--device", device, "--num-threads", str(threads_of(self))]


def threads_of(row: Row) -> int:
    return row.threads or cores()


CHEETAH = "VecNormalize(make_vec_env('HalfCheetah-v5', 1))"
BREAKOUT = "VecFrameStack(make_atari_env('BreakoutNoFrameskip-v4', {}), 4)"
ALL = 0  # threads: as many as there are cores
# fmt: off
ROWS = {
    "cartpole": Row("PPO, CartPole-v1, 4 envs x 128, 4 minibatches, 4 epochs",
        "ppo.py --env-id CartPole-v1 --num-envs 4 --num-steps 128 --num-minibatches 4 --update-epochs 4 --compile on",
        102_400, "stable_baselines3 PPO n_steps=128, batch_size=128, n_epochs=4",
        "make_vec_env('CartPole-v1', 4)", 25_600),
    "cheetah": Row("PPO, HalfCheetah-v5, 1 x 2048, 32 minibatches, 10 epochs, both with normalisers",
        "ppo.py --env-id HalfCheetah-v5 --num-envs 1 --num-steps 2048 --num-minibatches 32 --log-std-end None"
        " --no-recompute-advantages --compile on",
        40_960, "stable_baselines3 PPO n_steps=2048, batch_size=64, n_epochs=10", CHEETAH, 8_192),
    "cheetah-default": Row("PPO, HalfCheetah-v5, the default of each (ours compiles, as it does for its 1M steps)",
        "ppo.py --env-id HalfCheetah-v5 --compile on", 61_440, "stable_baselines3 PPO",
        "make_vec_env('HalfCheetah-v5', 1)", 8_192),
    "breakout": Row("PPO, BreakoutNoFrameskip-v4, 8 x 128, 4 minibatches, 4 epochs, all cores",
        "ppo.py --env-id BreakoutNoFrameskip-v4 --num-envs 8 --num-steps 128 --num-minibatches 4 --update-epochs 4",
        5_120, "stable_baselines3 PPO n_steps=128, batch_size=256, n_epochs=4, clip_range=0.1, ent_coef=0.01",
        BREAKOUT.format(8), 2_048, ALL),
    "a2c-cartpole": Row("A2C, CartPole-v1, 8 envs x 5, compiled",
        "a2c.py --env-id CartPole-v1 --num-envs 8 --num-steps 5 --gae-lambda 1 --learning-rate 7e-4 --compile on",
        120_000, "stable_baselines3 A2C n_steps=5", "make_vec_env('CartPole-v1', 8)", 40_000),
    "a2c-breakout": Row("A2C, BreakoutNoFrameskip-v4, 16 x 5, all cores",
        "a2c.py --env-id BreakoutNoFrameskip-v4 --num-envs 16 --num-steps 5 --gae-lambda 1 --learning-rate 7e-4"
        " --optimizer rmsprop",
        12_000, "stable_baselines3 A2C n_steps=5, ent_coef=0.01", BREAKOUT.format(16), 4_800, ALL),
    "trpo-cheetah": Row("TRPO, HalfCheetah-v5, 1 x 2048, 15 products, 10 critic epochs, both with normalisers",
        "trpo.py --env-id HalfCheetah-v5 --num-envs 1 --num-steps 2048 --cg-iters 15 --cg-damping 0.1 --max-kl 0.01"
        " --num-minibatches 16 --update-epochs 10 --line-search-steps 10 --compile on",
        40_960, "sb3_contrib TRPO n_steps=2048, batch_size=128, n_critic_updates=10, cg_max_steps=15", CHEETAH, 12_288),
    "sac-cheetah": Row("SAC, HalfCheetah-v5, 1 env, one update of 256 per step, 256-256 networks",
        "sac.py --env-id HalfCheetah-v5 --num-envs 1 --learning-starts 500 --batch-size 256 --buffer-size 1000000"
        " --tau 0.005 --policy-lr 3e-4 --q-lr 3e-4 --updates-per-step 1 --bf16 off --compile on",
        6_000, "stable_baselines3 SAC learning_starts=500, batch_size=256, buffer_size=1_000_000, tau=0.005,"
        " learning_rate=3e-4", "make_vec_env('HalfCheetah-v5', 1)", 2_000, random=500),
}
# fmt: on
ALONE = {  # rows without a peer, each a function below: what it measures, and the unit
    "process": ("whole process, python ppo.py --env-id CartPole-v1", "s"),
    "environment": ("part of reinforce.py's wall time inside the environments, CartPole-v1", ""),
    "workers": ("steps per second of a3c.py over those of A2C, the defaults of each, CartPole-v1", ""),
}
SCRIPTS = ("ppo", "a2c", "trpo", "reinforce", "sac", "a3c")
NEEDED = ("stable_baselines3", "sb3_contrib", "cv2", "matplotlib")
NAMES = ", ".join([*SCRIPTS, *ROWS, *ALONE])
HELP = f"rows, or scripts, which stand for all their rows, of {NAMES} (none: all)"
KINDS = ("ours", "sb3", "environment", "inference", "update", "serial")

THEIRS = """
import json, resource, time, ale_py, gymnasium, torch
gymnasium.register_envs(ale_py)
torch.set_num_threads({threads})
from {module} import {name}
from stable_baselines3.common.env_util import make_atari_env, make_vec_env
from stable_baselines3.common.vec_env import VecFrameStack, VecNormalize
model = {name}("{policy}", {make}, device="{device}", {arguments})
model.learn({first})
before = model.num_timesteps
wait = torch.cuda.synchronize if "{device}" == "cuda" else lambda: None
begun = wait() or time.perf_counter()
model.learn({steps}, reset_num_timesteps=False)
sps = (model.num_timesteps - before) / (wait() or time.perf_counter() - begun)
print(json.dumps(dict(sps=sps, memory=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)))
"""


def last_line(command: list[str], **environment: str) -> str:
    """What a process prints last; raises CalledProcessError."""
    options = dict(check=True, capture_output=True, cwd=ROOT, env=os.environ | environment)
    options |= dict(encoding="utf-8", errors="replace")
    return subprocess.run(command, **options).stdout.rstrip().rpartition("\n")[2]


def call(function: str, *arguments: str) -> Any:
    """The result of a function of this file, in a process of its own."""
    code = f"import json, sys; from benchmarks import speed; print(json.dumps(speed.{function}(*sys.argv[1:])))"
    return json.loads(last_line([sys.executable, "-c", code, *arguments]))


def run_ours(row: Row, device: str) -> dict[str, float]:
    """Steps per second, seconds of start-up and MB of memory of one run of a script."""
    with tempfile.TemporaryDirectory() as folder:
        script, *flags = row.command(device)
        flags += ["--total-timesteps", str(row.our_steps), "--runs-dir", folder, "--run-name", "run"]
        last_line([sys.executable, str(ROOT / script), *flags, "--checkpoint-interval", "1000000"])
        run = Path(folder) / "run"
        summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
        sps = rate_after_the_first_row(run) if row.random else summary["sps"]
    return {"sps": sps, "startup": summary["startup_time"], "memory": summary["peak_memory_mb"]}


def rate_after_the_first_row(run: Path) -> float:
    """Steps per second from the first row of progress.csv on, in which the random steps are, to the last."""
    with open(run / "progress.csv", newline="", encoding="utf-8") as file:
        rows = [(int(row["global_step"]), float(row["wall_time"])) for row in csv.DictReader(file)]
    (first, begun), (last, ended) = rows[0], rows[-1]
    return (last - first) / (ended - begun)


def run_theirs(row: Row, device: str) -> dict[str, float]:
    """Steps per second and MB of memory of Stable-Baselines3 on the same work."""
    module, name, *arguments = row.theirs.split(maxsplit=2)
    policy, arguments = "CnnPolicy" if "atari" in row.make else "MlpPolicy", "".join(arguments)
    options = dict(module=module, name=name, policy=policy, arguments=arguments, make=row.make, device=device)
    first = row.random + 1  # with a first update, which is slower than the others
    code = THEIRS.format(**options, first=first, steps=row.their_steps, threads=threads_of(row))
    return json.loads(last_line([sys.executable, "-c", code]))


def ceilings(script: str, *flags: str, seconds: float = 2.0) -> dict[str, float]:
    """Steps per second of a script's environments, inference and update alone, and of the three in a row ("serial").

    One iteration of the script's own `train` makes all that is timed: its environments, with random actions; its
    player, in environments that stand still; and `update`, on one batch and from the same weights each time. A player
    plays up to the last action; that of SAC, a step into the buffer. SAC's update draws its batch from a full buffer.
    Give --compile on or off, because one iteration is too short for "auto".
    """
    module = importlib.import_module(Path(script).stem)
    args, replays = module.parse_args([*flags]), hasattr(module, "Replay")
    total = args.learning_starts + args.num_envs if replays else args.num_envs * args.num_steps
    plays = "step" if replays else "play"
    play = getattr(module.Player, plays)
    with (
        tempfile.TemporaryDirectory() as folder,
        patch.object(module.Player, plays, autospec=True, side_effect=play) as played,
        patch.object(module, "update", wraps=module.update) as updated,
        patch.object(module.Environments, "close", lambda envs: None, create=True),  # they are timed below
    ):
        run = module.train(replace(args, total_timesteps=total, runs_dir=folder))
        steps = json.loads((run / "summary.json").read_text(encoding="utf-8"))["global_step"]
    player, agent = played.call_args.args[:2]
    envs = player.envs
    wait = module.torch.cuda.synchronize if agent.device.type == "cuda" else lambda: None

    def per_second(function: Callable, before: Callable = lambda: None) -> float:
        function()
        calls, spent = 0, 0.0
        while spent < seconds:
            before()
            begun = wait() or time.perf_counter()
            function()
            calls, spent = calls + 1, spent + (wait() or time.perf_counter()) - begun
        return calls / spent

    space = batch_space(envs.single_action_space, envs.num_envs)
    actions = itertools.cycle([space.sample() for _ in range(100)])
    obs = envs.reset()
    rates = {"environment": args.num_envs * per_second(lambda: envs.step(next(actions)))}
    zeros, never = module.np.zeros(args.num_envs), module.np.zeros(args.num_envs, dtype=bool)
    still = (obs, zeros, never, never, never, obs)
    envs.reset = lambda: obs
    if replays:
        replay = played.call_args.args[2]
        fill(replay, args.buffer_size)
        envs.step = lambda actions: still
        rates["inference"] = args.num_envs * per_second(lambda: play(player, agent, replay), player.played.clear)
        learner, _, *rest = updated.call_args.args
        steps = 1 / args.updates_per_step

        def update() -> None:
            module.update(learner, replay.sample(args.batch_size, player.rng), *rest)

    else:
        update = functools.partial(module.update, *updated.call_args.args)

        def act() -> None:
            same = itertools.repeat(still, args.num_steps - 1)
            envs.step = lambda actions: next(same)
            with contextlib.suppress(StopIteration):
                play(player, agent)

        rates["inference"] = args.num_envs * args.num_steps * per_second(act)
    weights = {name: tensor.clone() for name, tensor in agent.state_dict().items()}
    rates["update"] = steps * per_second(update, before=lambda: agent.load_state_dict(weights))
    envs.envs.close()
    return rates | {"serial": 1 / sum(1 / rate for rate in rates.values())}


def fill(replay: Any, rows: int) -> None:
    """Fills a replay buffer of SAC to its brim, in memory, with what it has over and over."""
    import numpy as np

    replay.rows = np.resize(replay.rows[: replay.count], (rows, replay.width))
    replay.length = replay.count = rows


def environment() -> float:
    """The part of its wall time that reinforce.py spends inside the environments on CartPole, start-up left out."""
    import reinforce

    spent = []

    def timed(envs: reinforce.SyncEnvs, function: Callable, *arguments: Any, **options: Any) -> Any:
        begun = time.perf_counter()
        result = function(envs, *arguments, **options)
        spent.append(time.perf_counter() - begun)
        return result

    inside = reinforce.SyncEnvs
    inside.step = functools.partialmethod(timed, inside.step)
    inside.reset = functools.partialmethod(timed, inside.reset)
    with tempfile.TemporaryDirectory() as folder:
        run = reinforce.train(reinforce.parse_args(["--env-id", "CartPole-v1", "--runs-dir", folder]))
        return sum(spent) / json.loads((run / "summary.json").read_text(encoding="utf-8"))["wall_time"]


def workers() -> float:
    """Steps per second of a3c.py, with a worker on each core, over those of a2c.py."""
    rows = [Row("", f"{name}.py --env-id CartPole-v1", 200_000, "", "", 0) for name in ("a3c", "a2c")]
    a3c, a2c = (run_ours(row, "cpu")["sps"] for row in rows)
    return a3c / a2c


def process() -> float:
    """Seconds from start to exit of the README's first command, compilation cache empty."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "ppo.py"), "--env-id", "CartPole-v1", "--runs-dir", folder]
        begun = time.perf_counter()
        last_line(command, TORCHINDUCTOR_CACHE_DIR=f"{folder}/cache")
        return time.perf_counter() - begun


def measure(name: str, device: str, options: "Speed") -> dict[str, Any]:
    """A row of the table; raises CalledProcessError."""
    if name in ALONE:
        measured = [call(name) for _ in range(options.pairs)]
        return {"what": ALONE[name][0], "unit": ALONE[name][1], "measured": measured}
    row, sides, pairs, ratios = ROWS[name], {"ours": run_ours, "sb3": run_theirs}, [], []
    for number in range(options.pairs):
        pair = {side: sides[side](row, device) for side in [*sides][:: (-1) ** number]}
        ours, sb3 = pair["ours"]["sps"], pair["sb3"]["sps"]
        print(f"{name} on {device}: {ours:,.0f} against {sb3:,.0f} steps/s, {ours / sb3:.2f}", flush=True)
        if options.ceilings:
            pair["ceilings"] = call("ceilings", *row.command(device))
            pair["ceilings"]["reached"] = ours / pair["ceilings"]["serial"]
        pairs.append(pair)
        ratios.append(ours / sb3)
    middle = {side: {key: median(pair[side][key] for pair in pairs) for key in pair[side]} for side in pair}
    return {"what": row.what, "ratios": ratios, "ratio": median(ratios), "median": middle, "pairs": pairs}


def provenance(device: str, load: float) -> dict[str, Any]:
    """Where, when and with what; partly from the config.json of a run."""
    import ppo

    with tempfile.TemporaryDirectory() as folder:
        run = ppo.create_run_dir(ppo.RunArgs(runs_dir=folder, device=device))
        config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    peers = {d.name: d.version for d in importlib.metadata.distributions() if d.name.startswith(("stable", "sb3"))}
    date, command = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()), ["python", "-m", "benchmarks", *sys.argv[1:]]
    return {
        "date": date,
        "command": shlex.join(command),
        "load": round(load, 2),
        "cores": cores(),
        "git_commit": str(config["git_commit"]),
        "git_dirty": config["git_dirty"],
        "hardware": config["hardware"],
        "versions": config["versions"] | peers,
    }


def markdown(table: dict[str, Any]) -> str:
    """The rows with a peer as a table, the others as lines below it."""
    columns = "row | work | ours, steps/s | SB3, steps/s | ratio (range) | start-up, s | memory, MB (SB3)"
    columns += " | environment | inference | update | serial ceiling | ours of it | measured"
    lines, alone = [f"| {columns} |", "|---" * 13 + "|"], []
    for name, row in table.items():
        here = row["machine"]
        when = (
            f"{here['date']}, {here['hardware']}, {here['cores']} cores, load {here['load']}, {here['git_commit']:.7}"
        )
        if "measured" in row:
            middle, low, high = (f"{f(row['measured']):.3g} {row['unit']}".rstrip() for f in (median, min, max))
            alone.append(f"\n{name}: {row['what']}: {middle} ({low} to {high}); {when}")
            continue
        ours, sb3, best = row["median"]["ours"], row["median"]["sb3"], row["median"].get("ceilings")
        cells = [name, row["what"], f"{ours['sps']:,.0f}", f"{sb3['sps']:,.0f}"]
        cells += [f"**{row['ratio']:.2f}** ({min(row['ratios']):.2f} to {max(row['ratios']):.2f})"]
        cells += [f"{ours['startup']:.1f}", f"{ours['memory']:.0f} ({sb3['memory']:.0f})"]
        if best:
            cells += [*[f"{rate:,.0f}" for rate in [*best.values()][:4]], f"{best['reached']:.0%}"]
        else:
            cells += ["-"] * 5
        lines.append(f"| {' | '.join([*cells, when])} |")
    return "\n".join([*lines, *alone]) + "\n"


def draw(rows: dict[str, Any], path: Path) -> None:
    """Left the ratios with their range, right the steps per second of both sides and of the ceilings."""
    from benchmarks.figures import PALETTE, plt, save_figure

    size = (11, 1.4 + 0.62 * len(rows))
    figure, (left, right) = plt.subplots(1, 2, sharey=True, width_ratios=(2, 3), figsize=size, layout="constrained")
    names = [f"{name}\n{', '.join(row['what'].split(', ')[:2])}" for name, row in rows.items()]
    spread = [(row["ratio"] - min(row["ratios"]), max(row["ratios"]) - row["ratio"]) for row in rows.values()]
    bars = left.barh(names, [row["ratio"] for row in rows.values()], xerr=[*zip(*spread)], color=PALETTE[0], capsize=3)
    left.bar_label(bars, fmt="%.1f", label_type="center", color="white", fontweight="bold")
    left.invert_yaxis()
    left.set_xlabel("ours over Stable-Baselines3 (sb3), median and range")
    medians = [row["median"] for row in rows.values()]
    rates = [{"ours": m["ours"]["sps"], "sb3": m["sb3"]["sps"]} | m.get("ceilings", {}) for m in medians]
    for kind, color, marker, size in zip(KINDS, PALETTE, "oo>sD|", (8, 8, 8, 8, 8, 16)):
        if points := [(rate[kind], y) for y, rate in enumerate(rates) if kind in rate]:
            options = dict(color=color, markersize=size, markeredgewidth=2, label=kind)
            right.plot(*zip(*points), marker, fillstyle="full" if marker == "o" else "none", **options)
    right.set(xscale="log", xlabel="steps per second (serial: environment, inference and update in a row)")
    right.grid(alpha=0.25)
    figure.legend(loc="outside lower center", ncols=6)
    save_figure(figure, path)


@dataclass
class Speed:
    rows: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[ROW ...]", help=HELP)] = ()
    pairs: int = 5
    """runs of each side; a row without a peer is measured as often"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where both sides run (auto: on the CPU and, in rows of their own, on the GPU where torch sees one)"""
    ceilings: bool = True
    """after each pair, time environments, inference and update alone"""
    out: Path = Path("runs/speed")
    """table and figure without their endings; rows measured at other times stay in them"""


def plan(options: Speed) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """The table so far, and the rows and devices to measure; raises UsageError."""
    import torch

    rows, path, cuda = ROWS | ALONE, Path(f"{options.out}.json"), torch.cuda.is_available()
    words = options.rows or tuple(rows)
    if unknown := [word for word in words if word not in (*SCRIPTS, *rows)]:
        raise UsageError(f"there is no row {', '.join(unknown)}; choose from {NAMES}.")
    check_range(options, 1, "pairs")
    if options.out.name in ("", ".."):
        raise UsageError(f"--out is {str(options.out)!r}, but must be a path of files, without their endings.")
    asked = [name for name in rows if any(word == name or f"{word}.py" in str(rows[name]) for word in words)]
    peers = [name for name in asked if name in ROWS]
    if options.device == "cuda" and not (cuda and peers):
        raise UsageError("--device cuda: torch sees no CUDA device here, or these rows run on the CPU only.")
    require("speed", "bench,peers", *NEEDED)
    try:
        table = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        markdown(table)
        make_folder(path.parent)
        path.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError):
        raise UsageError(f"{path} is no table of this command, or cannot be written; choose another --out.") from None
    both = [(name, "cpu") for name in asked] + [(name, "cuda") for name in peers if cuda]
    return table, [(name, device) for name, device in both if options.device in (device, "auto")]


def main(options: Annotated[Speed, tyro.conf.arg(name="")]) -> int:
    """Times the scripts against Stable-Baselines3 in pairs, and against the ceilings of this machine.

    Nothing else may run meanwhile. Prints a table and writes OUT.md, OUT.json and OUT.png.
    """
    (table, planned), load, status = plan(options), os.getloadavg()[0], 0
    if load > 0.5 * cores():
        print(f"warning: the load is {load:.1f} on {cores()} cores; timings mean nothing while others compute.")
    for name, device in planned:
        key = f"{name}-cuda" if device == "cuda" else name
        try:
            table[key] = measure(name, device, options) | {"machine": provenance(device, load)}
        except subprocess.CalledProcessError as error:
            print(f"error: {key}: exit status {error.returncode} of {shlex.join(error.cmd)}", file=sys.stderr)
            print(*(error.stdout + error.stderr).splitlines()[-15:], sep="\n", file=sys.stderr)
            status = 1
            continue
        Path(f"{options.out}.json").write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
        Path(f"{options.out}.md").write_text(markdown(table), encoding="utf-8")
        if timed := {key: row for key, row in table.items() if "ratios" in row}:
            draw(timed, Path(f"{options.out}.png"))
    print(f"\n{markdown(table)}")
    return status
