"""Lays out what each size costs and scores, as text."""

from typing import Any


def table(rows: list[dict[str, Any]]) -> str:
    """Aligns rows as a text table, with the keys as the header.

    Counts ("parameters") and "bytes" are shown in millions, "latency" (seconds) in milliseconds, other floats with four
    digits. A key that a row lacks leaves its cell empty.
    """

    def show(key: str, value: Any) -> str:
        if key == "parameters":
            return f"{value / 1e6:.2f} M"
        if key == "bytes":
            return f"{value / 1e6:.1f} MB"
        if key == "latency":
            return f"{value * 1e3:.1f} ms"
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    keys = list(dict.fromkeys(key for row in rows for key in row))
    names = {"bytes": "size on disk"}
    cells = [[names.get(key, key) for key in keys]]
    for row in rows:
        cells.append([show(key, row[key]) if key in row else "" for key in keys])
    widths = [max(len(line[i]) for line in cells) for i in range(len(keys))]
    lines = []
    for line in cells:
        padded = [text.ljust(width) for text, width in zip(line, widths, strict=True)]
        lines.append("  ".join(padded).rstrip())
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    return "\n".join([lines[0], rule, *lines[1:]])


def results_table(rows: list[dict[str, Any]]) -> str:
    """Shows the subnet (hidden/heads/ffn/layers), parameters, size on disk, latency of a batch, and the metrics; and
    under them which layers each depth keeps, and which sizes no configuration can state."""
    left_out = {"sizes", "exportable", "runtime", "samples_per_second", "steps_per_second"}
    first = ["name", "subnet", "parameters", "bytes", "latency"]
    ordered = []
    for row in rows:
        keys = [key for key in first if key in row] + [key for key in row if key not in {*first, *left_out}]
        ordered.append({key: row[key] for key in keys})
    return "\n".join([table(ordered), *_kept_layers(rows), *_not_exportable(rows)])


def _not_exportable(rows: list[dict[str, Any]]) -> list[str]:
    """Says which sizes run in place alone, in a line; none where all can be saved."""
    names = [row["name"] for row in rows if row.get("exportable") is False]
    return [f"in place only, since no configuration states such sizes: {', '.join(names)}"] if names else []


def _kept_layers(rows: list[dict[str, Any]]) -> list[str]:
    """Says which layers each depth below the largest keeps, where the rows tell, a line each."""
    kept = {tuple(row["sizes"]["layers"]) for row in rows if row.get("sizes")}
    depths = sorted(kept, key=len, reverse=True)[1:]
    return [f"{len(layers)} layer{'s' * (len(layers) > 1)}: {', '.join(map(str, layers))}" for layers in depths]


def compared_with_whole(rows: list[dict[str, Any]], metric: str, shares: list[float]) -> str:
    """Says what each smaller size has lost and gained, a line each.

    Args:
        rows: of results, the whole model's first. metric: a share of 1, the more the better.
        shares: for each row, what it keeps of the whole model's layers.
    """
    whole = rows[0]
    lines = [f"against the whole model ({100 * whole[metric]:.1f} %):"]
    for row, share in list(zip(rows, shares, strict=True))[1:]:
        points = 100 * (row[metric] - whole[metric])
        faster = whole["latency"] / row["latency"]
        lines.append(
            f"  {row['name']} keeps {share:.0%} of the layers' weights, is {faster:.1f} times as fast, and scores "
            f"{abs(points):.1f} points {'more' if points > 0 else 'less'}"
        )
    return "\n".join(lines)
