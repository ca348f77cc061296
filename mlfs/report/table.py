"""What each size of a palette costs and scores, as text."""

from typing import Any


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as an aligned text table; floats short, bytes and counts in millions."""

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
    cells = [[names.get(k, k) for k in keys]] + [[show(k, row[k]) if k in row else "" for k in keys] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(keys))]
    lines = ["  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    return "\n".join([lines[0], "-" * (sum(widths) + 2 * (len(widths) - 1)), *lines[1:]])


def results_table(rows: list[dict[str, Any]], task: str) -> str:
    """Subnet (hidden/heads/ffn/layers), parameters, size on disk, latency of a batch, and the task's metrics."""
    hidden = {"sizes", "runtime", "samples_per_second", "steps_per_second"}
    order = ["name", "subnet", "parameters", "bytes", "latency"]
    return table(
        [
            {k: row[k] for k in order if k in row} | {k: v for k, v in row.items() if k not in {*order, *hidden}}
            for row in rows
        ]
    )
