"""What the clip of PPO does: python -m benchmarks.clip_figure [--out benchmarks/results/clip]

The surrogate of one action against its probability ratio, and the gradient in the ratio, both from
`ppo.surrogate_objective`: clipped (eq. 7) and not (eq. 6), for a positive and a negative advantage. The upper row is
figure 1 of the PPO paper (arXiv 1707.06347); the grey region is where the gradient is zero. Writes OUT.png.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import ppo
from benchmarks.figures import PALETTE, new_figure, save_figure

RATIOS = np.linspace(0, 2, 402)  # an even number: none is 1 - eps, 1 or 1 + eps


def surrogate(ratios: np.ndarray, advantage: float, args: ppo.Args) -> tuple[np.ndarray, np.ndarray]:
    """The surrogate of a batch of one action at each of the ratios, and its gradient in the ratio."""
    points = []
    for number in ratios.tolist():
        ratio = torch.tensor([number], dtype=torch.float64, requires_grad=True)
        advantages, kl = torch.full_like(ratio, advantage), torch.zeros_like(ratio)
        value = ppo.surrogate_objective(ratio, advantages, kl, 0.0, args)
        points.append((value.item(), torch.autograd.grad(value, ratio)[0].item()))
    return tuple(np.array(points).T)


def draw(args: ppo.Args, path: Path) -> None:
    eps = args.clip_coef
    figure, axes = new_figure(2, 2, 4.2, 2.2)
    for column, advantage, sign in zip(axes.T, (1.0, -1.0), ("> 0", "< 0")):
        clipped, plain = (surrogate(RATIOS, advantage, replace(args, objective=name)) for name in ("clip", "none"))
        flat = RATIOS[clipped[1] == 0]
        for axis, ours, theirs in zip(column, clipped, plain):
            if len(flat):
                axis.axvspan(flat[0], flat[-1], color="#E6E6E6", linewidth=0, label="clipped: gradient is zero")
            for place in (1 - eps, 1, 1 + eps):
                axis.axvline(place, color="#888888", linewidth=0.8, linestyle=":")
            axis.axhline(0, color="#888888", linewidth=0.8)
            axis.plot(RATIOS, ours, color=PALETTE[0], linewidth=3, label="clipped (objective clip)")
            axis.plot(
                RATIOS, theirs, color=PALETTE[1], linewidth=1.5, linestyle="--", label="not clipped (objective none)"
            )
            axis.plot(1, advantage, "o", color="#000000", markersize=5, label="old policy")
            axis.set_xticks([0, 1 - eps, 1, 1 + eps, 2], labels=["0", "1 − ε", "1", "1 + ε", "2"])
            axis.set_yticks([0, advantage, 2 * advantage], labels=["0", "A", "2 A"])
            axis.set_xlim(0, 2)
        column[0].set_title(f"A {sign}", fontsize=11)
        column[1].set_ylim(*sorted((-0.25 * advantage, 1.35 * advantage)))
        column[1].set_xlabel(r"ratio  $r = \pi(a|s)\, /\, \pi_{\mathrm{old}}(a|s)$")
    axes[0, 0].set_ylabel("surrogate")
    axes[1, 0].set_ylabel("gradient in r")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(handles), frameon=False)
    save_figure(figure, path)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    results = Path(__file__).parent / "results"
    parser.add_argument("--out", type=Path, default=results / "clip", help="figure without its ending")
    asked = parser.parse_args(argv)
    torch.set_num_threads(1)
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    draw(ppo.Args(), asked.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
