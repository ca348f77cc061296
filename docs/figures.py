"""Draws the pictures of README.md and docs/: python docs/figures.py (reads bench/results/)."""

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, Rectangle
from matplotlib.path import Path as Line

HERE = Path(__file__).parent
RESULTS = HERE.parent / "bench" / "results" / "palette_quality.json"
TRAINING = RESULTS.with_name("training.json")
COST = RESULTS.with_name("cost.json")
BLUE, ORANGE, GREEN, GREY, LIGHT = "#1f5fa8", "#d9822b", "#3a8f5c", "#5c6670", "#dfe7f0"


def main() -> None:
    how_it_works(HERE / "how_it_works.png")
    kernels(HERE / "kernels.png")
    if RESULTS.exists():
        palette(json.loads(RESULTS.read_text()), HERE / "palette.png")
    if RESULTS.exists() and TRAINING.exists():
        parameters = json.loads(RESULTS.read_text())["parameters"]
        training(json.loads(TRAINING.read_text())["SST-2"], parameters, HERE / "training.png")
    if COST.exists():
        cost(json.loads(COST.read_text()), HERE / "cost.png")


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
    axes.margins(y=0.1)
    axes.legend(frameon=False, loc="upper left")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def training(result: dict[str, Any], parameters: dict[str, int], path: Path) -> None:
    """Accuracy against parameters: palettes and sizes trained alone, means over seeds, on both sets."""
    figure, both = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained", sharey=True)
    series = {
        "one run, adapters and embeddings": ("adapters and embeddings, one stage", "o", BLUE),
        "one run, all weights": ("all weights, one stage", "D", GREEN),
        "one run, adapters": ("adapters, one stage", "^", GREY),
    }
    for axes, measured, title in ((both[0], "dev", "872 dev sentences"), (both[1], "held_back", "3,000 held back")):
        for label, (name, marker, color) in series.items():
            if runs := result["palettes"].get(name):
                points = sorted((parameters[s] / 1e6, 100 * _mean(runs, s, measured)) for s in parameters)
                axes.plot(*zip(*points, strict=True), marker, color=color, markersize=7, alpha=0.85,
                          label=f"{label} ({_seeds(runs)})")  # fmt: skip
        alone: dict[str, float] = {}
        for name, runs in result.get("twins", {}).items():
            score = 100 * sum(run[measured] for run in runs.values()) / len(runs)
            size = name.partition(",")[0]
            alone[size] = max(alone.get(size, 0.0), score)
        points = sorted((parameters[size] / 1e6, score) for size, score in alone.items())
        if points:
            axes.plot(*zip(*points, strict=True), "s", color=ORANGE, markersize=7, label="each size alone, all weights")
        teachers = list(result["teachers"]["base"].values())
        whole = 100 * sum(run[measured] for run in teachers) / len(teachers)
        axes.axhline(whole, color=GREY, linewidth=0.8, linestyle="--", label="the whole model, fine-tuned")
        axes.set(xlabel="parameters (millions)", title=title)
        axes.grid(alpha=0.3)
    both[0].set(ylabel="SST-2 accuracy (%)")
    both[1].legend(frameon=False, loc="lower right", fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def cost(result: dict[str, Any], path: Path) -> None:
    """Time and bytes of a palette, the same for any number of sizes, beside those of sizes trained alone."""
    figure, both = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    sizes, steps = result["sizes"], 500
    counts = range(1, len(sizes) + 1)
    for axes, what, unit, label in (
        (both[0], "milliseconds", 60_000 / steps, "minutes of training (500 steps each)"),
        (both[1], "disk", 1e6, "megabytes on disk"),
    ):
        sums = [sum(result[what][size] for size in sizes[:n]) / unit for n in counts]
        axes.plot(counts, sums, color=ORANGE, label="each size alone, all weights")
        for name, color, style in (
            ("all weights", GREEN, "-."), ("adapters and embeddings", BLUE, "-"), ("adapters", GREY, "--")
        ):  # fmt: skip
            if name in result[what]:
                axes.axhline(result[what][name] / unit, color=color, linestyle=style, label=f"one run, {name}")
        axes.set(xlabel="sizes", ylabel=label, ylim=(0, None))
        axes.grid(alpha=0.3)
    both[0].legend(frameon=False, loc="upper left")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _mean(runs: dict[str, Any], size: str, measured: str) -> float:
    return sum(run[measured][size] for run in runs.values()) / len(runs)


def _seeds(runs: dict[str, Any]) -> str:
    return f"{len(runs)} seed{'s' * (len(runs) > 1)}"


class Drawing:
    """An empty picture, 18 units wide: boxes, words and arrows go on it."""

    def __init__(self, height: float) -> None:
        self.figure, self.axes = plt.subplots(figsize=(9, height / 2), layout="constrained")
        self.axes.set(xlim=(0, 18), ylim=(0, height))
        self.axes.axis("off")

    def box(self, x: float, y: float, w: float, h: float, color: str, **more: Any) -> None:
        style = {"facecolor": color, "edgecolor": GREY, "linewidth": 0.8} | more
        self.axes.add_patch(Rectangle((x, y), w, h, **style))

    def text(self, x: float, y: float, words: str, **more: Any) -> None:
        self.axes.text(x, y, words, **({"ha": "center", "va": "center", "fontsize": 9, "color": "#222222"} | more))

    def arrow(self, points: list[tuple[float, float]], color: str = GREY) -> None:
        self.axes.add_patch(FancyArrowPatch(path=Line(points), arrowstyle="->", mutation_scale=12, color=color))

    def save(self, path: Path) -> None:
        self.figure.savefig(path, dpi=150)
        plt.close(self.figure)


def kernels(path: Path) -> None:
    """[x | h] · [W | B]ᵀ: the adapters are one more step of the product's loop."""
    drawing = Drawing(8.2)
    box, text, arrow = drawing.box, drawing.text, drawing.arrow
    steps, left, low, top = 5, 0.3, 0.9, 7.6
    n, r, t, m = 4.6, 0.55, 2.2, 4.2  # columns of x, ranks, tokens, columns of y
    h_left, y_left, w_low = left + n + 0.12, 7.7, top - 3.7
    b_low = w_low - 0.12 - r
    row, column, tile_t, tile_m = low + 0.75, y_left + 1.4, 0.7, 1.1

    box(left, low, n, t, LIGHT)
    box(h_left, low, r, t, "#fbe9d5")
    box(h_left, w_low, r, top - w_low, "#fbe9d5")
    box(y_left, w_low, m, top - w_low, LIGHT)
    box(y_left, b_low, m, r, "#fbe9d5")
    box(y_left, low, m, t, "white")
    for i in range(steps):
        across, down = n / steps, (top - w_low) / steps
        box(left + i * across, row, across, tile_t, BLUE, alpha=0.55)
        text(left + (i + 0.5) * across, row + tile_t / 2, str(i + 1), color="white")
        box(column, top - (i + 1) * down, tile_m, down, BLUE, alpha=0.55)
        text(column + tile_m / 2, top - (i + 0.5) * down, str(i + 1), color="white")
    box(h_left, row, r, tile_t, ORANGE, alpha=0.85)
    box(column, b_low, tile_m, r, ORANGE, alpha=0.85)
    text(h_left + r / 2, row + tile_t / 2, "6", color="white")
    text(column + tile_m / 2, b_low + r / 2, "6", color="white")
    box(column, row, tile_m, tile_t, GREY)
    text(column + tile_m / 2, row + tile_t / 2, "sum", color="white", fontsize=8)

    for x, y, words in (
        (left + n / 2, low - 0.35, "x  (tokens × n)"),
        (h_left + r / 2, low - 0.35, "h"),
        (h_left + r / 2, top + 0.3, "Aᵀ"),
        (y_left + m / 2, top + 0.3, "Wᵀ  (n × m, frozen)"),
        (y_left + m / 2, low - 0.35, "y  (tokens × m)"),
        (y_left - 0.4, b_low + r / 2, "Bᵀ"),
    ):
        text(x, y, words)

    for y, title, words in (
        (7.3, "First launch", "h = c · x Aᵀ: the rank's 8 numbers\nfor each token"),
        (5.4, "Second launch", "1 to 5: x Wᵀ, a plain product's loop\n6: h Bᵀ, added to the same sum"),
    ):
        text(left, y, title, ha="left", fontweight="bold")
        text(left, y - 0.75, words, ha="left", fontsize=8.5, color=GREY)
    arrow([(h_left + r / 2, w_low - 0.05), (h_left + r / 2, low + t + 0.05)], ORANGE)

    height = 0.62
    text(15.5, 6.5, "Epilogue, in registers", fontweight="bold")
    for i, words in enumerate(("+ bias", "activation", "+ residual", "y is written, once")):
        y = 5.4 - 1.05 * i
        box(13.6, y, 3.8, height, "white" if i < 3 else LIGHT)
        text(15.5, y + height / 2, words)
        if i:
            arrow([(15.5, y + 1.05), (15.5, y + height)])
    middle = row + tile_t / 2
    arrow([(column + tile_m, middle), (12.7, middle), (12.7, 5.4 + height / 2), (13.6, 5.4 + height / 2)])
    drawing.save(path)


def how_it_works(path: Path) -> None:
    """One frozen matrix, three low-rank stages; a subnet reads the leading rows and columns of all of them."""
    drawing = Drawing(7.2)
    box, text = drawing.box, drawing.text
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
    drawing.arrow([(6.1, 0.45), (17.2, 0.45)])
    text(11.6, 0.1, "training: the stage at hand learns, earlier ones are frozen", fontsize=8, color=GREY)
    drawing.save(path)


if __name__ == "__main__":
    main()
