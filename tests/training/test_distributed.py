"""Two processes, started as `torchrun` and `accelerate launch` do, train what one process with the whole batch does."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mlfs import SearchSpace, SuperTransformer
from tests.tiny_models import make
from tests.trainers import own, rows, trainer
from tests.training.test_accumulation import of_items, ragged

ROOT = Path(__file__).parents[2]
STEPS: dict[str, Any] = {
    "dropout_stages": [], "stage_steps": [2], "save_strategy": "no", "train_sampling_strategy": "sequential",
    "optim": "sgd", "max_grad_norm": 0.0, "logging_steps": 1,
}  # fmt: skip
DEPTHS = SearchSpace((48, 32, 24), (6, 4, 2), (40, 20), (4, 2))  # which layers two are is measured
CLASSIFIER, TEXT = ("bert", "ForSequenceClassification"), ("llama", "ForCausalLM")
# Each trains alone and on two processes: (model, options). Texts have another number of labels and tokens in each row.
QUICK: dict[str, tuple[tuple[str, str], dict[str, Any]]] = {
    "classifier": (CLASSIFIER, {"train_embeddings": None}),  # they train
    "text": (TEXT, {}),
    "text, rotated": (TEXT, {"order": "rotation"}),
    "text by activation, in lockstep, a loss of one's own, accumulated": (
        TEXT,
        {
            "compute_loss_func": of_items, "order": "activation", "subnet_execution": "lockstep",
            "gradient_accumulation_steps": 2,
        },
    ),
}  # fmt: skip
LONGER: dict[str, tuple[tuple[str, str], dict[str, Any]]] = {
    "classifier by magnitude": (CLASSIFIER, {"order": "magnitude", "distill_beta": [0.0]}),
    "classifier by activation": (CLASSIFIER, {"order": "activation"}),
    "text by activation": (TEXT, {"order": "activation"}),
    "text from logits": (TEXT, {"fused_head_loss": False}),
    "text, smoothed": (TEXT, {"label_smoothing_factor": 0.1}),
    "text, smoothed, from logits": (TEXT, {"label_smoothing_factor": 0.1, "fused_head_loss": False}),
    "text in lockstep": (TEXT, {"subnet_execution": "lockstep"}),
    "text, a loss of one's own": (TEXT, {"compute_loss_func": of_items}),
    "text, learned projections": (TEXT, {"projection": "learned"}),
    "text, accumulated": (TEXT, {"gradient_accumulation_steps": 2}),
    "text in long runs": (TEXT, {"stage_steps": [12], "num_train_epochs": 3.0}),
}
RUNS = {**QUICK, **LONGER}


def with_padding(example: dict[str, Any], i: int) -> dict[str, Any]:
    """Has up to three tokens at the end be padding, which has no labels."""
    count = i * 3 % 4
    return {
        "attention_mask": [1] * (9 - count) + [0] * count, "labels": example["labels"][: 9 - count] + [-100] * count,
    }  # fmt: skip


def train(folder: Path, name: str, rows_per_process: int) -> None:
    """Trains one of `RUNS`, and saves the weights of each process."""
    (model, suffix), options = RUNS[name][0], dict(RUNS[name][1])
    func = options.pop("compute_loss_func", None)
    data = rows(96 if "accumulated" in name else 32, causal=suffix == "ForCausalLM")
    if suffix == "ForCausalLM":
        data = data.map(ragged, with_indices=True).map(with_padding, with_indices=True)
    supernet = SuperTransformer(make(model, suffix), DEPTHS, rank=2)
    settings = {**STEPS, "order_layers": "loss", "distill_beta": [0.3], "learning_rate": 0.1, **options}
    t = trainer(
        folder / name, model, suffix, supernet=supernet, train_dataset=data,
        per_device_train_batch_size=rows_per_process, **settings,
    )  # fmt: skip
    t.compute_loss_func = func
    t.train()
    found = {**own(t.supernet), **{f"projections.{n}": p.detach() for n, p in t.distance.named_parameters()}}
    losses = [entry["loss"] for entry in t.state.log_history if "loss" in entry]
    save_file({**found, "losses": torch.tensor(losses)}, folder / f"{name}-{t.args.process_index}.safetensors")


def on_two_processes(folder: Path, names: list[str]) -> None:
    """Trains runs one after the other on two processes, with half of the rows each."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    script = folder / "script.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\nfrom tests.training.test_distributed import train\n"
        "for name in sys.argv[2:]:\n    train(Path(sys.argv[1]), name, 4)\n"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", str(script)]
    done = subprocess.run(
        [*launch, str(folder), *names], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr[-3000:]


def compare(two: Path, one: Path, name: str) -> None:
    first, second = (load_file(two / f"{name}-{rank}.safetensors") for rank in (0, 1))
    alone = load_file(one / f"{name}-0.safetensors")
    assert first.keys() == second.keys() == alone.keys()
    for key, value in first.items():
        assert torch.equal(value, second[key]), key
        torch.testing.assert_close(value, alone[key], rtol=1e-4, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")
    assert any("lora_B.2" in key and value.abs().max() > 0 for key, value in first.items())


@pytest.fixture(scope="module")
def two(tmp_path_factory: Any) -> Path:
    """What two processes have trained, in one start of them."""
    folder: Path = tmp_path_factory.mktemp("two")
    on_two_processes(folder, list(QUICK))
    return folder


@pytest.mark.parametrize("name", QUICK)
def test_two_processes_train_what_one_does(name: str, two: Path, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    train(tmp_path, name, 8)
    compare(two, tmp_path, name)


@pytest.mark.soak
@pytest.mark.parametrize("name", LONGER)
def test_two_processes_train_what_one_does_in_every_way(name: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    on_two_processes(tmp_path, [name])
    (tmp_path / "one").mkdir()
    train(tmp_path / "one", name, 8)
    compare(tmp_path, tmp_path / "one", name)
