"""Shows the results of `bench.speed.cpu_step` as text."""

from typing import Any

from mlfs.report.table import table


def show(result: dict[str, Any]) -> str:
    """Lays out every part that was measured, below a line on each machine it was measured on."""
    lines = _machines(result)
    for model in ("encoder", "decoder"):
        if model in result:
            lines += ["", f"Training step, {model}", table(_training(result[model]))]
    if "memory" in result:
        lines += ["", "Peak memory beyond the loaded model (ratio: of whole processes)", table([result["memory"]])]
    if "inference" in result:
        cases = dict(result["inference"])
        switching = cases.pop("switching")
        rows = [
            {
                "size, batch": case,
                "mlfs": _ms(found["mlfs"]),
                "extracted": _ms(found["extracted"]),
                "ratio": _ratio(found["ratio"]),
            }
            | ({"merged ratio": _ratio(found["merged ratio"])} if "merged" in found else {})
            for case, found in cases.items()
        ]
        title = "Inference, stages apart (merged: by supernet.merge_stages), against the extracted model"
        lines += ["", title, table(rows), f"switching sizes: {switching * 1e3:.3f} ms a call"]
    if "decoding" in result:
        rows = [{"size": size, **found, "ratio": _ratio(found["ratio"])} for size, found in result["decoding"].items()]
        lines += ["", "Decoding", table(rows)]
    if "scaling" in result:
        lines += ["", "Scaling", table(result["scaling"])]
    return "\n".join(lines)


def _machines(result: dict[str, Any]) -> list[str]:
    """Describes each environment once, with the parts that it measured."""
    parts: dict[str, list[str]] = {}
    for part, origin in result.get("environments", {}).items():
        text = f"{origin['machine']}, {origin['threads']} threads of {origin['cores']}, torch {origin['torch']}"
        parts.setdefault(f"{text}, extension: {origin['extension']}", []).append(part)
    return [f"{text} ({', '.join(names)})" for text, names in parts.items()]


def _training(found: dict[str, Any]) -> list[dict[str, str]]:
    rows = [{"what": f"PEFT, {size}", "time": _ms(values)} for size, values in found["sizes"].items()]
    floor = f"floor, {found['tokens']} tokens at {found['sgemm GFLOP/s']:.0f} GFLOP/s"
    rows += [
        {"what": "PEFT, sum", "time": _ms(found["PEFT"])},
        {"what": "mlfs, all", "time": _ms(found["mlfs"])},
        {"what": floor, "time": _ms([found["floor"]] * 3)},
        {"what": "mlfs / PEFT", "time": _ratio(found["mlfs / PEFT"])},
        {"what": "mlfs / floor", "time": f"{found['mlfs / floor']:.2f}"},
    ]
    if rate := found["extension GFLOP/s"]:
        what = f"mlfs / floor at the extension's {rate:.0f} GFLOP/s"
        rows += [{"what": what, "time": f"{found['mlfs / own floor']:.2f}"}]
    return rows


def _ms(values: list[float]) -> str:
    return f"{values[0] * 1e3:.1f} ms ({values[1] * 1e3:.1f} to {values[2] * 1e3:.1f})"


def _ratio(values: list[float]) -> str:
    return f"{values[0]:.3f} ({values[1]:.3f} to {values[2]:.3f})"
