"""Draws the README's pictures: python docs/figures.py (reads bench/results/palette_quality.json)."""

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, Rectangle

HERE = Path(__file__).parent
RESULTS = HERE.parent / "bench" / "results" / "palette_quality.json"
BLUE, ORANGE, GREY, LIGHT = "#1f5fa8", "#d9822b", "#5c6670", "#dfe7f0"


def main() -> None:
    how_it_works(HERE / "how_it_works.png")
    if RESULTS.exists():
        palette(json.loads(RESULTS.read_text()), HERE / "palette.png")


def palette(result: dict[str, Any], path: Path) -> None:
    """Accuracy against parameters: one training run's sizes, and each size trained alone."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    ours, twins = result.get("mlfs"), result.get("peft", {})
    millions = {size: count / 1e6 for size, count in result["parameters"].items()}
    if twins:
        label = f"each size trained alone with PEFT ({sum(t['seconds'] for t in twins.values()) / 60:.0f} min)"
        xs, ys = zip(*sorted((millions[s], 100 * t["accuracy"]) for s, t in twins.items()), strict=True)
        axes.plot(xs, ys, "s", color=ORANGE, label=label, markersize=7)
    if ours:
        points = sorted((millions[s], 100 * a, s) for s, a in ours["accuracy"].items())
        axes.plot([p[0] for p in points], [p[1] for p in points], "o", color=BLUE, markersize=8,
                  label=f"all sizes from one mlfs run ({ours['seconds'] / 60:.0f} min)")  # fmt: skip
        for x, y, size in points:
            place = {"xytext": (-7, 3), "ha": "right"} if x == points[-1][0] else {"xytext": (5, -11)}
            axes.annotate(size, (x, y), textcoords="offset points", fontsize=7, color=GREY, **place)
    axes.set(
        xlabel="parameters (millions; 11.9 of them word embeddings at full width)", ylabel="SST-2 dev accuracy (%)"
    )
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="upper left")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def how_it_works(path: Path) -> None:
    """One frozen matrix, three low-rank stages; a subnet reads the leading rows and columns of all of them."""
    figure, axes = plt.subplots(figsize=(9, 3.6), layout="constrained")
    axes.set(xlim=(0, 18), ylim=(0, 7.2))
    axes.axis("off")

    def box(x: float, y: float, w: float, h: float, color: str, **more: Any) -> None:
        axes.add_patch(Rectangle((x, y), w, h, facecolor=color, edgecolor=GREY, linewidth=0.8, **more))

    def text(x: float, y: float, words: str, **more: Any) -> None:
        axes.text(x, y, words, **({"ha": "center", "va": "center", "fontsize": 9, "color": "#222222"} | more))

    box(0.4, 1.4, 4.2, 4.2, LIGHT)
    box(0.4, 2.8, 2.8, 2.8, BLUE, alpha=0.55)
    text(1.8, 4.2, "W[:m, :n]", color="white", fontsize=10)
    text(3.9, 1.9, "W", fontsize=11, color=GREY)
    text(2.5, 6.1, "pretrained, frozen, never copied")
    text(2.5, 0.9, "n columns follow the input,\nm rows follow the subnet", fontsize=8, color=GREY)
    for stage, (x, what) in enumerate(
        ((6.1, "fine-tunes the\nfull model"), (10.1, "adds widths"), (14.1, "adds depths"))
    ):
        text(x - 0.75, 3.5, "+", fontsize=14)
        box(x, 1.4, 0.5, 4.2, "#fbe9d5")
        box(x, 2.8, 0.5, 2.8, ORANGE, alpha=0.85)
        box(x + 0.7, 5.1, 2.3, 0.5, "#fbe9d5")
        box(x + 0.7, 5.1, 1.55, 0.5, ORANGE, alpha=0.85)
        text(x + 0.25, 1.1, f"B{stage}[:m]", fontsize=8)
        text(x + 1.85, 4.8, f"A{stage}[:, :n]", fontsize=8)
        text(x + 1.5, 6.1, f"stage {stage}")
        text(x + 1.9, 3.4, what, fontsize=8, color=GREY)
    axes.add_patch(FancyArrowPatch((6.1, 0.45), (17.2, 0.45), arrowstyle="->", mutation_scale=12, color=GREY))
    text(11.6, 0.1, "training: the stage at hand learns, earlier ones are frozen", fontsize=8, color=GREY)
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main()
