"""Two processes, started as `torchrun` and `accelerate launch` do, train what one process with the whole batch does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
_SCRIPT = """
import sys
from pathlib import Path
from safetensors.torch import save_file
from tests.trainers import own, trainer
folder, size = Path(sys.argv[1]), int(sys.argv[2])
t = trainer(folder, dropout_stages=[], per_device_train_batch_size=size, stage_steps=[3], save_strategy="no",
            train_sampling_strategy="sequential", order=sys.argv[3], distill_beta=[0.0], optim="sgd", max_grad_norm=0.0)
t.train()
save_file(own(t.supernet), folder / f"rank-{t.args.process_index}.safetensors")
"""


def run(folder: Path, processes: int, size: int, order: str) -> None:
    folder.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"] if processes > 1 else []
    script = folder / "script.py"
    script.write_text(_SCRIPT)
    command = [sys.executable, *launcher, str(script), str(folder), str(size), order]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("order", ["magnitude", "gradient"])
def test_two_processes_train_what_one_does(order: str, tmp_path: Path) -> None:
    run(tmp_path / "two", 2, 4, order)
    first, second = (load_file(tmp_path / "two" / f"rank-{rank}.safetensors") for rank in (0, 1))
    for name in first:
        assert torch.equal(first[name], second[name]), name
    if order == "magnitude":  # ranking by gradients sees other batches: two of four sequences are not one of eight
        run(tmp_path / "one", 1, 8, order)
        alone = load_file(tmp_path / "one" / "rank-0.safetensors")
        for name in first:
            assert torch.allclose(first[name], alone[name], rtol=1e-4, atol=1e-6), name
        assert any("lora_B.2" in name and value.abs().max() > 0 for name, value in first.items())
