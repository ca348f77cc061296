"""What a run saves and loads again: checkpoints, stages that are done, and the optimizer; never by pickle."""

import contextlib
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from transformers.utils import logging

from mlfs.errors import MLFSError
from mlfs.training.checks import not_finite
from mlfs.training.file_list import what_is_wrong, write_list
from mlfs.training.runs import last_checkpoint
from mlfs.training.step import SubnetTrainer

logger = logging.get_logger("transformers.mlfs")
_PROJECTIONS = "projections.safetensors"


class SavingTrainer(SubnetTrainer):
    """Saves a super-transformer where a Trainer saves a model, whole or not at all."""

    @property
    def run_folder(self) -> Path:
        """Where the run is written."""
        return Path(self.args.output_dir or ".")

    def _let_train(self) -> None:
        """Lets what the stage trains train."""
        raise NotImplementedError

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        self._check_weights()
        if self.args.should_save:
            shutil.rmtree(folder, ignore_errors=True)  # of an earlier process, and not whole, or it would be read
        self.accelerator.wait_for_everyone()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
            self._list_files(folder)
        except (OSError, RuntimeError, MLFSError) as error:
            shutil.rmtree(folder, ignore_errors=True)
            last = last_checkpoint(folder.parent)
            kept = f"the last whole checkpoint is {last}" if last else "no earlier checkpoint of this stage exists"
            raise MLFSError(f"could not save {folder}: {error}; {kept}. Free some disk space, then resume") from error
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save:  # older ones go once this one is whole
            rotate_checkpoints(str(folder.parent), limit, self.state.best_model_checkpoint, use_mtime=True)

    def _check_weights(self) -> None:
        """Stops the run before weights are saved that are NaN or infinite: what is saved, a run can go on from."""
        if faulty := not_finite(self.supernet.own_parameters().items()):
            raise self._not_finite(f"the weight {faulty}", self.state.global_step, "and is not saved")

    def _list_files(self, checkpoint: Path) -> None:
        """Writes the list of a checkpoint's files, once every process has written its own."""
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            write_list(checkpoint)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save:
            return
        path = Path(output_dir or self.run_folder)
        path.mkdir(parents=True, exist_ok=True)
        if any(parameter.requires_grad for parameter in self.distance.parameters()):
            projections = {
                name: parameter.detach().cpu().contiguous() for name, parameter in self.distance.named_parameters()
            }
            save_file(projections, path / _PROJECTIONS)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(path)
        (path / "training_args.json").write_text(self.args.to_json_string() + "\n", encoding="utf-8")
        self.supernet.save_pretrained(path)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        path = Path(resume_from_checkpoint)
        if (wrong := what_is_wrong(path)) is not None:
            raise MLFSError(f"checkpoint {path} is half-written or damaged: {wrong}; resume from the run folder")
        self.supernet.restore(path)
        self._load_projections(path)
        self._let_train()

    def _load_projections(self, path: Path) -> None:
        """Loads the projections that a checkpoint, or a stage that is done, has learned.

        Raises:
            MLFSError: they are not there, though a stage that learns them has trained.
        """
        if (path / _PROJECTIONS).exists():
            self.distance.load_state_dict(load_file(path / _PROJECTIONS))
        elif self.args.projection == "learned" and self.stage > 0:
            raise MLFSError(
                f"{path / _PROJECTIONS} is missing: projection='learned' goes on from what the stage has learned; "
                "resume from an earlier checkpoint, or with the projection of that run"
            )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        try:
            with _no_pickle(checkpoint):
                super()._load_optimizer_and_scheduler(checkpoint)
        except ValueError as error:  # PyTorch's, where other parameters train now
            raise MLFSError(
                f"the optimizer of {checkpoint} does not fit ({error}): resume with the options of that run "
                f"(train_head, train_norms, rank, ...), which are in {checkpoint}/training_args.json"
            ) from error

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _no_pickle(checkpoint):
            super()._load_rng_state(checkpoint)

    def _load_scaler(self, checkpoint: str | None) -> None:
        with _no_pickle(checkpoint):
            super()._load_scaler(checkpoint)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        logger.info(f"Loading the best checkpoint of stage {self.stage}, {best} (score: {self.state.best_metric}).")
        self._load_from_checkpoint(str(best))


@contextlib.contextmanager
def _no_pickle(checkpoint: str | None) -> Iterator[None]:
    """Says in one line what transformers does not load: anything but tensors and plain values (weights_only)."""
    try:
        yield
    except pickle.UnpicklingError as error:
        first = str(error).strip().partition("\n")[0]
        raise MLFSError(f"{checkpoint} holds more than tensors, which is not loaded: {first}") from None
