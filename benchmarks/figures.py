"""The figures of reports: learning curves, aggregates with intervals, performance profiles."""

import warnings
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, LogLocator

from benchmarks import stats
from benchmarks.jobs import PEERS
from benchmarks.records import ORDER, STORED, Run, rank

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
# Safe for colour blindness (Okabe and Ito); an algorithm has the same colour in every figure.
COLORS = dict(
    zip(ORDER, (*PALETTE[:3], "#999933", PALETTE[3], "#882255", *PALETTE[4:6], "#94C973", "#B98A8A", "#888888"))
)
OTHERS = ("#000000", "#7A5195", "#8C564B", "#17BECF", "#B22222", "#6B8E23", "#FF7F7F", "#4B4BC3")


def style_of(algo: str, algos: list[str]) -> dict[str, str]:
    """Colour and line style of an algorithm in a report on algos.

    Lines are dashed for peers, for stored results beside newer runs, and for unknown algorithms after the first eight.
    """
    if algo in COLORS:
        return {"color": COLORS[algo], "linestyle": "--" if algo in PEERS else "-"}
    if algo.endswith(STORED):
        style = style_of(algo.removesuffix(STORED), [*algos, algo.removesuffix(STORED)])
        return style | {"linestyle": "--" if style["linestyle"] == "-" else ":"}
    place = sorted({name for name in algos if name not in COLORS and not name.endswith(STORED)}).index(algo)
    return {"color": OTHERS[place % len(OTHERS)], "linestyle": ("-", "--", ":")[place // len(OTHERS) % 3]}


def plain(name: str) -> str:
    """A name as matplotlib takes it: a dollar sign begins no formula. One without end would leave no room."""
    return (name if len(name) <= 100 else f"{name[:97]}...").replace("$", r"\$")


def new_figure(rows: int, columns: int, width: float, height: float) -> tuple[Any, np.ndarray]:
    return plt.subplots(rows, columns, figsize=(width * columns, height * rows), squeeze=False, layout="constrained")


def save_figure(figure: Any, path: Path) -> None:
    with warnings.catch_warnings():  # about letters that the font does not have
        warnings.simplefilter("ignore")
        figure.savefig(path, dpi=160)
    plt.close(figure)


def draw_curves(cells: dict, path: Path, against: str, statistic: str, rng: np.random.Generator) -> None:
    """A panel per environment: the running mean return of 100 episodes against "steps" or wall-clock "time".

    Thin lines are seeds. The thick one is the mean (or iqm) of the completed seeds at equal steps, with its 95% band,
    as far as all of them reach. Against time it is drawn where the median of them had got to those steps, on a
    logarithmic axis where algorithms differ much. A cross ends a run that did not complete.
    """
    envs = list(dict.fromkeys(env_id for env_id, _ in cells))
    algos = sorted({algo for _, algo in cells}, key=rank)
    unit, seconds = unit_of_time(cells) if against == "time" else ("environment steps", 0)
    columns = min(len(envs), 3 if len(envs) != 4 else 2)
    figure, axes = new_figure(-(-len(envs) // columns), columns, 4.0, 2.9)
    ends, crosses = [[] for _ in envs], [[] for _ in envs]  # places on the axis, per panel
    for panel, (axis, env_id) in enumerate(zip(axes.flat, envs)):
        for algo in algos:
            style = style_of(algo, algos)
            runs = [run for run in cells.get((env_id, algo), []) if len(run.returns)]
            crosses[panel] += draw_seeds(axis, runs, style["color"], seconds)
            if done := [run for run in runs if run.done]:
                ends[panel].append(draw_centre(axis, done, style, seconds, statistic, rng))
        axis.set_title(plain(env_id), fontsize=10)
        axis.grid(alpha=0.25)
        axis.margins(x=0.01)
        axis.set_xlabel(unit)
        if against == "steps":
            axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.locator_params(axis="x", nbins=6)
    if against == "time":
        spread_out(axes, ends, crosses)
    for axis in axes.flat[len(envs) :]:
        axis.axis("off")
    for row in axes:
        row[0].set_ylabel("return, last 100 episodes")
    add_legend(figure, cells, algos)
    save_figure(figure, path)


def unit_of_time(cells: dict) -> tuple[str, int]:
    """The unit of a time axis that holds the longest run, and its seconds."""
    longest = max((run.seconds[-1] for runs in cells.values() for run in runs if len(run.seconds)), default=0.0)
    if longest > 7200:
        return "hours", 3600
    return ("minutes", 60) if longest > 120 else ("seconds", 1)


def places(run: Run, grid: np.ndarray, seconds: int) -> np.ndarray:
    """Where the steps of the grid stand on the axis: as they are, or as time in a unit of so many seconds."""
    return np.interp(grid, run.steps, run.seconds) / seconds if seconds else grid


def draw_seeds(axis: Any, runs: list[Run], color: str, seconds: int) -> list[float]:
    """A thin line for each run, and a cross at the end of those that did not complete; the places of the crosses."""
    crosses = []
    for run in runs:
        grid = np.linspace(run.steps[0], run.steps[-1], 300)
        x, curve = places(run, grid, seconds), run.curve(grid)
        axis.plot(x, curve, color=color, alpha=0.25, linewidth=0.6)
        if not run.done:
            axis.plot(x[-1], curve[-1], "x", color=color, markersize=6)
            crosses.append(x[-1])
    return crosses


def draw_centre(
    axis: Any, done: list[Run], style: dict[str, str], seconds: int, statistic: str, rng: np.random.Generator
) -> float:
    """The thick line of completed runs and its band; the place where the line ends."""
    grid = np.linspace(max(run.steps[0] for run in done), min(run.steps[-1] for run in done), 300)
    curves = np.array([run.curve(grid) for run in done])
    x = np.median([places(run, grid, seconds) for run in done], axis=0)
    centre = curves.mean(0) if statistic == "mean" else stats.iqm(curves, axis=0)
    axis.plot(x, centre, **style, linewidth=1.8, zorder=3)
    if len(done) > 1:
        low, high = stats.bootstrap_curves(curves, rng, statistic, repetitions=1000)
        axis.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)
    return x[-1]


def spread_out(axes: np.ndarray, ends: list[list[float]], crosses: list[list[float]]) -> None:
    """Makes all time axes logarithmic if, in one panel, an algorithm ends four times as late as another.

    On a linear axis the other one's curve would be a vertical line. The axes begin at a tenth of the earliest end, and
    before every cross.
    """
    if not any(max(panel) > 4 * min(panel) > 0 for panel in ends if panel):
        return
    for axis, panel, stopped in zip(axes.flat, ends, crosses):
        axis.set_xscale("log")
        axis.set_xlim(min([*(0.1 * end for end in panel), *(0.9 * cross for cross in stopped)], default=0) or None)
        axis.minorticks_off()
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter("{x:g}")


def add_legend(figure: Any, cells: dict, algos: list[str]) -> None:
    """One legend below all panels, with the numbers of completed seeds."""
    handles = []
    for algo in algos:
        counts = sorted({sum(run.done for run in runs) for (_, name), runs in cells.items() if name == algo})
        seeds = "-".join(map(str, dict.fromkeys([counts[0], counts[-1]])))
        label = f"{plain(algo)} ({seeds} {'seed' if seeds == '1' else 'seeds'})"
        handles.append(Line2D([], [], **style_of(algo, algos), linewidth=2, label=label))
    inches = 0.55 + 0.075 * max(len(handle.get_label()) for handle in handles)  # of an entry
    figure.set_figwidth(max(figure.get_figwidth(), inches))
    columns = min(len(handles), int(figure.get_figwidth() / inches))
    figure.set_figheight(figure.get_figheight() + 0.18 * (-(-len(handles) // columns) - 1))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)


def draw_aggregates(
    by_algo: dict[str, list[np.ndarray]], aggregates: dict, intervals: dict, everyone: list[str], path: Path
) -> None:
    """Point and 95% interval of each aggregate for each algorithm; everyone is all algorithms of the report."""
    algos = sorted(by_algo, key=rank, reverse=True)
    figure, axes = new_figure(1, len(aggregates), 2.4, 0.9 + 0.28 * len(algos))
    for axis, (name, aggregate) in zip(axes[0], aggregates.items()):
        for place, algo in enumerate(algos):
            value, color = aggregate(by_algo[algo]), style_of(algo, everyone)["color"]
            low, high = intervals[algo, name]
            if np.isfinite(low):
                axis.barh(place, high - low, left=low, height=0.6, color=color, alpha=0.35)
            axis.plot([value, value], [place - 0.3, place + 0.3], color=color, linewidth=2.5)
        axis.set_title(name + (" (less is better)" if name == "optimality gap" else ""), fontsize=9)
        axis.set_yticks(range(len(algos)), map(plain, algos) if axis is axes[0][0] else [""] * len(algos))
        axis.grid(alpha=0.25, axis="x")
        axis.locator_params(axis="x", nbins=4)
        axis.use_sticky_edges = False
        axis.margins(x=0.06)
    figure.supxlabel("normalised score", fontsize=9)
    save_figure(figure, path)


def draw_profiles(
    by_algo: dict[str, list[np.ndarray]], everyone: list[str], path: Path, rng: np.random.Generator
) -> None:
    """Performance profiles: the share of runs above each normalised score, with 95% bands."""
    algos = sorted(by_algo, key=rank)
    highest = max(values.max() for runs in by_algo.values() for values in runs)
    taus = np.linspace(min(0.0, *(values.min() for runs in by_algo.values() for values in runs)), highest, 200)
    figure, axes = new_figure(1, 1, 5.0, 3.2)
    for algo in algos:
        style = style_of(algo, everyone)
        axes[0, 0].plot(taus, stats.performance_profile(by_algo[algo], taus), **style, linewidth=1.8, label=plain(algo))
        low, high = stats.profile_band(by_algo[algo], taus, rng)
        axes[0, 0].fill_between(taus, low, high, color=style["color"], alpha=0.2, linewidth=0)
    axes[0, 0].set_xlabel("normalised score")
    axes[0, 0].set_ylabel("share of runs above")
    axes[0, 0].grid(alpha=0.25)
    axes[0, 0].margins(x=0.01)
    figure.legend(loc="outside right center", frameon=False)
    save_figure(figure, path)
