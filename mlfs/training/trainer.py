"""`MLFSTrainer`: the three stages of MLFS (arXiv 2404.01353) as a transformers Trainer.

`train()` is one ordinary Trainer run per stage, each with its own optimizer and schedule, in `output_dir/stage-S`:
checkpoints while the stage trains, the saved super-transformer once it is done. `output_dir` itself holds what the
newest stage that is done has saved.
"""

import contextlib
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging

from mlfs.errors import MLFSError
from mlfs.files import read_json, write_json
from mlfs.space.search_space import SearchSpace
from mlfs.space.subnet import Subnet
from mlfs.supernet.checkpoint import read_state
from mlfs.supernet.depth import LayerMethod, method_of
from mlfs.supernet.folders import locked_folder, make_folder
from mlfs.supernet.loading import restore_order
from mlfs.supernet.model import SuperTransformer
from mlfs.supernet.permutation import LAYERS, permutation_of
from mlfs.supernet.rotation import check_rotatable
from mlfs.training.arguments import BY_SIZE, MLFSArguments, passes_over
from mlfs.training.checks import check_numbers
from mlfs.training.file_list import LIST_NAME, write_list
from mlfs.training.ranking import rank_depths, rank_units
from mlfs.training.rates import give_rate, pretrained_that_train
from mlfs.training.refused import check_arguments, refuse
from mlfs.training.rotating import rotate_units
from mlfs.training.runs import (
    LOGS_NAME,
    ResumePoint,
    copy_state,
    is_saved,
    make_room,
    remove_leftovers,
    resume_point,
    same_state,
    stage_folder,
    stages_done,
    was_stopped,
)
from mlfs.training.saving import SavingTrainer
from mlfs.training.stopping import TrainerControl, catch_signals_again, forget_stop, stop_was_asked, with_stage_flow
from mlfs.training.teacher import FrozenTeacher

logger = logging.get_logger("transformers.mlfs")
_PROJECTIONS = "projections.safetensors"


class MLFSTrainer(SavingTrainer):
    """Trains a super-transformer; takes and does everything that a `transformers.Trainer` does.

    Args:
        model: a `SuperTransformer`, or a transformers model to make one of (with `space` and the rank of `args`).
        args: the options.
        space: the sizes on offer, if `model` is not a SuperTransformer yet.
        **kwargs: of `transformers.Trainer`, save `optimizers` and `model_init`: each stage makes its own.

    Raises:
        MLFSError: options that do not fit together or the model; an output_dir that cannot be written.
    """

    args: MLFSArguments

    def __init__(
        self,
        model: SuperTransformer | PreTrainedModel,
        args: MLFSArguments | None = None,
        space: SearchSpace | None = None,
        **kwargs: Any,
    ) -> None:
        args = MLFSArguments() if args is None else args
        check_arguments(kwargs)
        check_numbers(args)
        if args.should_save:
            make_folder(Path(args.output_dir or "."))
        if args.n_gpu > 1:
            raise MLFSError(f"{args.n_gpu} GPUs in one process: start with `accelerate launch` or `torchrun` instead")
        if not isinstance(model, SuperTransformer):
            model = SuperTransformer(model, space, rank=args.rank, alpha=args.lora_alpha)
        if max(args.stages_to_train) >= model.stages:
            raise MLFSError(
                f"stages_to_train={args.stages_to_train}, but the super-transformer has {model.stages} stages"
            )
        if args.order == "rotation" and model.rotation is None:
            check_rotatable(model)
        with _some_length(args):
            super().__init__(model, args, **kwargs)
        self.control = TrainerControl(**self.control.state()["args"])
        with_stage_flow(self.callback_handler)
        self._step_offset = 0  # optimizer steps of the stages before
        self._teacher_run: Path | None = None  # whose the frozen teacher is
        self._stage_is_over = False  # whether a callback ended the stage before it was cut off

    # ---- the stages ---------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:  # type: ignore[override]
        """Runs the stages of `args.stages_to_train`.

        A callback that sets `should_training_stop` ends the run: the stage that it stops is saved, and counts as done.
        With `stop_ends="stage"` the next stage begins.

        Args:
            resume_from_checkpoint: True goes on in `output_dir` from the last whole checkpoint, or from the start if
                there is none; a path names the run folder, or one checkpoint in it.

        Returns:
            Steps of all stages, the training loss of the last one, and metrics by names `stage_S_METRIC`.

        Raises:
            MLFSError: another run in `output_dir`; nothing whole to resume from; a loss that is not finite.
        """
        with self._alone():
            return self._train_stages(resume_from_checkpoint, **kwargs)

    def _alone(self) -> contextlib.AbstractContextManager[None]:
        """Keeps other runs out of the run folder; of several processes of one run the one that saves does."""
        return locked_folder(self.run_folder) if self.args.should_save else contextlib.nullcontext()

    def _train_stages(self, resume_from_checkpoint: str | bool | None, **kwargs: Any) -> TrainOutput:
        args = self.args
        if args.should_save:
            remove_leftovers(self.run_folder)
        point = resume_point(self.run_folder, args.stages_to_train, resume_from_checkpoint)
        done = stages_done(point, args.stages_to_train) if resume_from_checkpoint else []
        left = [stage for stage in args.stages_to_train if stage not in done]
        self._make_room(left, point, resumes=bool(resume_from_checkpoint))
        settings = {name: getattr(args, name) for name in ("learning_rate", "num_train_epochs", "max_steps")}
        self._restore_teacher(point, done, left)
        history: list[dict[str, Any]] = []
        metrics: dict[str, float] = {}
        output, self._step_offset, self._was_stopped = TrainOutput(0, 0.0, {}), 0, False
        try:
            for self.stage in args.stages_to_train:
                if self.stage in done:
                    # what one stage has, later ones have too: the last alone is loaded
                    newer = [s for s in done if s > self.stage and is_saved(stage_folder(point.run, s))]
                    loads = not newer and point.checkpoint is None
                    logs, steps = self._restore_stage(stage_folder(point.run, self.stage), loads)
                else:
                    output = self._train_stage(settings, point.checkpoint if self.stage == left[0] else None, **kwargs)
                    logs, steps = self.state.log_history, self.state.global_step
                    metrics |= {f"stage_{self.stage}_{name}": value for name, value in output.metrics.items()}
                history += logs
                self._step_offset += steps
                if self._was_stopped:
                    break
            self.teach_with(None)  # unless it was cut off, and goes on in this process
        finally:
            for name, value in settings.items():
                setattr(args, name, value)
            self.supernet.merge_stages(0)
        self.state.log_history = history
        if args.should_save:
            if not left and not same_state(last := stage_folder(point.run, self.stage), self.run_folder):
                copy_state(last, self.run_folder)  # the run was cut off before it did, or began elsewhere
            write_json(self.run_folder / LOGS_NAME, history)
        return TrainOutput(self._step_offset, output.training_loss, metrics)

    def _restore_stage(self, folder: Path, loads: bool) -> tuple[list[dict[str, Any]], int]:
        """Reads a stage that is done, if it is there; returns its logs and its number of steps.

        Args:
            loads: whether its weights are loaded too.
        """
        if not is_saved(folder):
            logger.warning(f"{folder} is gone: later stages hold what it learned; its logs and steps do not count.")
            return [], 0
        if loads:
            self.supernet.restore(folder)
            self._load_projections(folder)
        if self.args.should_save and folder.parent == self.run_folder and not (folder / LIST_NAME).exists():
            write_list(folder)  # the run was cut off before it did
        state = read_json(folder / TRAINER_STATE_NAME)
        return state["log_history"], state["global_step"]

    def _train_stage(self, settings: Mapping[str, Any], begun: Path | None, **kwargs: Any) -> TrainOutput:
        """Trains and saves one stage, from the checkpoint `begun` on if there is one."""
        self._enter_stage(settings, fresh=begun is None)
        catch_signals_again(self.callback_handler)
        self._stage_is_over = begun is not None and was_stopped(begun)
        forget_stop(self.control)
        output = super().train(resume_from_checkpoint=None if begun is None else str(begun), **kwargs)
        self._was_stopped = stop_was_asked(self.control) and self.args.stop_ends == "run"
        self._leave_stage()
        return output

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # transformers takes a step before it asks whether that was the last one: a run that was cut off after the last
        # checkpoint of a stage would take one too many
        if self._stage_is_over or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            forget_stop(self.control, asked=self._stage_is_over)
            return
        super()._run_epoch(*args, **kwargs)

    def _enter_stage(self, settings: Mapping[str, Any], fresh: bool) -> None:
        """Readies arguments, weights and random numbers for the stage.

        Args:
            settings: what the arguments say for all stages.
            fresh: whether the stage starts at its beginning, not from a checkpoint.
        """
        args, stage = self.args, self.stage
        self._set_length_and_rate(settings)
        # Seeded per stage, a stage runs the same whether the one before ran in this process or in an earlier one.
        set_seed(args.seed + stage)
        self.supernet.merge_stages(0)
        self.supernet.train_stage(None)
        orders = args.order != "none" or self._ranks_layers()
        is_ordered = self.supernet.permutation or self.supernet.rotation is not None
        if fresh and stage > 0 and orders and not is_ordered:
            self._order()
        if stage > 0 and args.teacher == "frozen" and self.teacher is None:
            self._keep_teacher()
        self._let_train()
        self.optimizer = self.lr_scheduler = None
        self.model_wrapped = self.supernet.model
        set_seed(args.seed + stage)

    def _set_length_and_rate(self, settings: Mapping[str, Any]) -> None:
        """Has the arguments say how long the stage is, and its learning rate."""
        args, stage = self.args, self.stage
        rate = args.base_learning_rate if stage in args.train_base else settings["learning_rate"]
        rate *= self._rate_factor()
        args.learning_rate = args.of_stage("stage_learning_rates", stage, rate)
        args.num_train_epochs = args.of_stage("stage_epochs", stage, settings["num_train_epochs"])
        if args.num_train_epochs == BY_SIZE:
            args.num_train_epochs = passes_over(_length_of(self.train_dataset))
        steps = args.of_stage("stage_steps", stage, None)
        if steps:
            args.max_steps = int(steps)
        elif args.stage_epochs:
            args.max_steps = -1  # epochs count
        else:
            args.max_steps = settings["max_steps"]

    def _rate_factor(self) -> float:
        return self.args.subnet_rate_factor if self.stage > 0 else 1.0

    def _let_train(self) -> None:
        """Lets the adapters of the stage (head, ...) train, and merges the stages before; or lets all weights train."""
        args, base = self.args, self.stage in self.args.train_base
        self.supernet.train_stage(self.stage, args.train_head, args.train_norms, base, self._trains_embeddings())
        self.supernet.merge_stages(self.stage if args.merge_stages and not base else 0)
        self.teach_with(self.teacher)

    def _trains_embeddings(self) -> bool:
        """Whether embeddings train: unless the arguments say, those of encoders, whose small sizes gain most by it."""
        if self.args.train_embeddings is not None:
            return self.args.train_embeddings
        is_rotated = self.args.order == "rotation" or self.supernet.rotation is not None
        return not is_rotated and self.supernet.model.get_output_embeddings() is None

    def _restore_teacher(self, point: ResumePoint, done: list[int], left: list[int]) -> None:
        """Makes the frozen teacher again, where a run goes on that has begun to learn from one.

        Its weights are in the folder of the first stage that it teaches; where they are not there, or damaged, they are
        those of stage 0, in the order that the run has come to.

        Raises:
            MLFSError: neither is there.
        """
        began = any(stage > 0 for stage in done) or (point.checkpoint is not None and left[0] > 0)
        if self.teacher is not None and began and self._teacher_run == point.run.resolve():
            return  # it went on in this process
        self.teacher = None
        if self.args.teacher != "frozen" or not began or not left:
            return
        folder, first = self._teacher_folder(point.run), stage_folder(point.run, 0)
        try:
            self.supernet.restore(folder)
        except MLFSError as error:
            if 0 not in self.args.stages_to_train or not is_saved(first):
                raise MLFSError(
                    f"the run goes on with the teacher that it began with, which cannot be read ({error}): resume with "
                    "teacher='maxnet' if the run had that, or begin anew from stage 0"
                ) from None
            newest = point.checkpoint or stage_folder(point.run, done[-1])
            self.supernet.restore(first)
            restore_order(self.supernet, read_state(newest), newest)
        self._keep_teacher(saves=point.run.resolve() != self.run_folder.resolve())

    def _keep_teacher(self, saves: bool = True) -> None:
        """Makes the frozen teacher of maxnet as it is now, and saves its weights for a run that goes on later."""
        if saves and self.args.should_save:
            self.supernet.save_pretrained(self._teacher_folder(self.run_folder))
        self.accelerator.wait_for_everyone()
        self.teacher, self._teacher_run = FrozenTeacher(self.supernet), self.run_folder.resolve()

    def _teacher_folder(self, run: Path) -> Path:
        """Returns where a run keeps its teacher's weights: hidden, in the folder of the first stage that it teaches."""
        return stage_folder(run, min(stage for stage in self.args.stages_to_train if stage > 0)) / ".teacher"

    def _leave_stage(self) -> None:
        """Saves the stage, and leaves the model as it was before it was prepared."""
        # accelerate puts autocast and the like on the model's `forward`, and would not do it again for the next stage,
        # whose model it takes for prepared; what it leaves there is taken off, as no public function of it does.
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        for name in ("forward", "_is_accelerate_prepared"):
            self.model.__dict__.pop(name, None)
        self.supernet.merge_stages(0)
        self._check_weights()
        folder = stage_folder(self.run_folder, self.stage)
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            self.state.save_to_json(str(folder / TRAINER_STATE_NAME))
        # the stage counts as done from here on: mlfs.json is written last, but for the list of the files
        self.save_model(str(folder), _internal_call=True)
        if self.args.should_save:
            write_list(folder)
            copy_state(folder, self.run_folder)  # file by file under other names, so that it is whole all along
        self.accelerator.wait_for_everyone()

    def _order(self) -> None:
        """Ranks units and layers by the first training batches, and orders them so."""
        args, permutation = self.args, {}
        batches = itertools.islice(iter(self.get_train_dataloader()), args.order_batches)
        prepared = [self._prepare_inputs(dict(batch)) for batch in batches]
        if args.order == "rotation":
            permutation = rotate_units(self, prepared)
        elif args.order != "none":
            permutation = permutation_of(rank_units(self, args.order, prepared))  # type: ignore[arg-type]
        if self._ranks_layers():
            permutation[LAYERS] = rank_depths(self, self._layer_method(), prepared)
        self.supernet.apply_permutation(permutation)  # once: it copies every weight

    def _ranks_layers(self) -> bool:
        """Whether which layers each depth keeps is found by measurement."""
        space = self.supernet.space
        return space.counts_layers and len(space.layers) > 1 and self._layer_method() != "even"

    def _layer_method(self) -> LayerMethod:
        return method_of(self.supernet.model, self.args.order_layers)  # type: ignore[arg-type]

    # ---- optimizer and logs ---------------------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Makes the Trainer's optimizer over what trains in this stage, learned projections included."""
        optimizer = super().create_optimizer(model)
        if self.stage not in self.args.train_base:
            rate = self.args.base_learning_rate * self._rate_factor()
            give_rate(optimizer, pretrained_that_train(self.supernet), min(rate, self.args.learning_rate))
        projections = [parameter for parameter in self.distance.parameters() if parameter.requires_grad]
        if projections and self.stage > 0:
            optimizer.add_param_group({"params": projections, "weight_decay": 0.0})
        return optimizer

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the stage and the mean losses of maxnet, minnet and the rest; steps count on through the stages."""
        if "loss" in logs:
            logs |= self.means.take(self.accelerator.num_processes)
        if self.is_in_train:
            logs["stage"] = self.stage
        self.state.global_step += self._step_offset
        try:
            super().log(logs, start_time)
        finally:
            self.state.global_step -= self._step_offset

    def subnets_to_evaluate(self) -> dict[str, Subnet]:
        """Returns the palette; while stage 0 trains, the full model."""
        if self.is_in_train and self.stage == 0:
            return {"max": self.supernet.space.max}
        return self.palette

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> Any:
        """Raises MLFSError: it is not supported."""
        raise refuse("hyperparameter_search")

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Raises MLFSError: it is not supported."""
        raise refuse("push_to_hub")

    # ---- the run folder -------------------------------------------------------------------------------------------

    def _get_output_dir(self, trial: Any) -> str:
        if trial is not None:
            raise refuse("hyperparameter_search")
        return str(stage_folder(self.run_folder, self.stage))

    def _make_room(self, stages: list[int], point: ResumePoint, resumes: bool) -> None:
        """Refuses, or with `overwrite_run` removes, what `stages` would replace."""
        options = {"resumes": resumes, "overwrite": self.args.overwrite_run}
        make_room(self.run_folder, stages, point, **options, delete=False)
        self.accelerator.wait_for_everyone()  # all have looked before one deletes
        if self.args.should_save:
            make_room(self.run_folder, stages, point, **options, delete=True)
        self.accelerator.wait_for_everyone()


def _length_of(dataset: Any) -> int | None:
    """Counts the examples of a data set; None where it has no length."""
    try:
        return len(dataset)
    except (TypeError, NotImplementedError):
        return None


@contextlib.contextmanager
def _some_length(args: MLFSArguments) -> Iterator[None]:
    """Has the arguments name a number of steps where `stage_steps` does: a Trainer of a stream asks for one at once."""
    steps = args.max_steps
    if args.stage_steps and steps <= 0:
        args.max_steps = int(args.stage_steps[0])
    try:
        yield
    finally:
        args.max_steps = steps
