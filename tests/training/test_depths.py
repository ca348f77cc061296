"""Depths by number in a training run: their layers are ranked after stage 0, by the loss of training, and stay."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mlfs import MLFSError, SearchSpace, Subnet, SuperTransformer
from mlfs.training.ranking import rank_depths
from tests.tiny_models import make
from tests.trainers import assert_same, own, rows, trainer

SPACE = SearchSpace((48, 32, 24), (6, 4, 2), (40, 20), (4, 2, 1))
LAYERS = ("layers", None)


def counted(name: str = "bert", suffix: str = "ForSequenceClassification") -> SuperTransformer:
    torch.manual_seed(0)
    return SuperTransformer(make(name, suffix), SPACE, rank=2)


@pytest.mark.parametrize(("name", "suffix"), [("bert", "ForSequenceClassification"), ("llama", "ForCausalLM")])
def test_layers_are_ranked_when_widths_begin_and_stay_so(name: str, suffix: str, tmp_path: Path) -> None:
    method = "auto" if name == "llama" else "loss"
    t = trainer(tmp_path / "run", name, suffix, supernet=counted(name, suffix), order_layers=method)
    t.train()
    ranking = t.supernet.permutation[LAYERS]
    assert sorted(ranking) == [0, 1, 2, 3]
    loaded = SuperTransformer.from_pretrained(tmp_path / "run", model=make(name, suffix))
    for supernet in (t.supernet, loaded):
        assert supernet.permutation[LAYERS] == ranking
        assert supernet.kept_layers(SPACE.min) == tuple(sorted(ranking[:1]))
    first = SuperTransformer.from_pretrained(tmp_path / "run" / "stage-0", model=make(name, suffix))
    assert LAYERS not in first.permutation
    rows_of_table = t.results(t.evaluate())
    assert [row["sizes"]["layers"] for row in rows_of_table][-1] == sorted(ranking[:1])
    json.dumps(rows_of_table)


def test_the_ranking_is_that_of_the_fine_tuned_model(tmp_path: Path) -> None:
    data = rows(4)  # one batch: the order that they come in makes no difference
    t = trainer(tmp_path, supernet=counted(), stages_to_train=[0, 1], train_dataset=data, order_layers="loss")
    t.train()
    twin = trainer(tmp_path / "twin", supernet=counted(), stages_to_train=[0], train_dataset=data)
    twin.train()
    batches = [twin._prepare_inputs(dict(batch)) for batch in twin.get_train_dataloader()]
    assert t.supernet.permutation[LAYERS] == twin.supernet.rank_layers("loss", batches)


def test_a_resumed_run_keeps_the_ranking(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole", supernet=counted(), order_layers="influence")
    whole.train()
    part = trainer(tmp_path / "part", supernet=counted(), stages_to_train=[0, 1], order_layers="influence")
    part.train()
    again = trainer(tmp_path / "part", supernet=counted(), order_layers="influence")
    again.train(resume_from_checkpoint=True)
    assert again.supernet.permutation == whole.supernet.permutation and LAYERS in whole.supernet.permutation
    assert_same(own(again.supernet), own(whole.supernet))


@pytest.mark.parametrize("options", [{}, {"order_layers": "even"}, {"order": "none"}])
def test_even_layers_are_not_ranked(options: dict[str, Any], tmp_path: Path) -> None:
    t = trainer(tmp_path, supernet=counted(), stage_steps=[1], **options)
    t.train()
    assert LAYERS not in t.supernet.permutation and t.supernet.kept_layers(SPACE.min) == (0,)


def test_layers_are_ranked_without_an_order_of_units_too(tmp_path: Path) -> None:
    t = trainer(tmp_path, supernet=counted(), stage_steps=[1], order="none", order_layers="influence")
    t.train()
    assert t.supernet.permutation.keys() == {LAYERS}


def test_a_loss_of_ones_own_ranks_the_layers(tmp_path: Path) -> None:
    def loss_of(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        return nn.functional.cross_entropy(-outputs["logits"], labels)  # of the opposite class

    data, found = rows(4), []
    for compute_loss_func in (None, loss_of):
        t = trainer(
            tmp_path / str(len(found)), supernet=counted(), stages_to_train=[1], stage_steps=[1], train_dataset=data
        )
        t.compute_loss_func = compute_loss_func
        batches = [t._prepare_inputs(dict(batch)) for batch in t.get_train_dataloader()]
        found.append(rank_depths(t, "loss", batches))
    assert found[0] == counted().rank_layers("loss", batches)
    assert found[1] != found[0]


def test_a_palette_by_number_and_options_that_are_none(tmp_path: Path) -> None:
    small = {"hidden": 24, "heads": 2, "ffn": 20, "layers": 2}
    t = trainer(tmp_path, supernet=counted(), stage_steps=[1], palette=json.dumps({"small": small}))
    assert t.palette == {"small": Subnet(24, 2, 20, 2)}
    with pytest.raises(MLFSError, match="layers=3 is not one of"):
        trainer(tmp_path, supernet=counted(), palette=json.dumps({"small": small | {"layers": 3}}))
    with pytest.raises(MLFSError, match="order_layers='best': expected one of auto, loss, influence, even"):
        trainer(tmp_path, supernet=counted(), order_layers="best")
