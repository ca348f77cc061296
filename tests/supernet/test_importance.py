"""Scores of importance are what their formulas say, and scoring leaves no trace."""

import pytest
import torch
from torch import Tensor

from mlfs import ElasticLayerNorm, ElasticLinear, ElasticRMSNorm, MLFSError, SuperTransformer
from mlfs.supernet.permutation import permutation_of
from tests.helpers.calibration import METHODS, batches
from tests.supernets import elastic, space_of
from tests.tiny_models import CASES, inputs, make

every_method = pytest.mark.parametrize("method", METHODS)
FIRST = [(name, case.classes[0]) for name, case in CASES.items()]


every_family = pytest.mark.parametrize(("name", "suffix"), FIRST)


def amplify(supernet: SuperTransformer, axis: str, layer: int | None, unit: int, factor: float) -> None:
    """Makes one unit matter: enlarges what reads it (and, along hidden, what every norm lets through of it)."""
    dims = supernet.dimensions
    for module in supernet.elastic():
        if isinstance(module, ElasticLinear) and (size := module.axes().input):
            if (size.axis, size.layer) == (axis, layer):
                width = size.unit * (dims.group if axis == "heads" else 1)
                matrix = module.own_weight.T if module.transposed else module.own_weight
                matrix.data[:, unit * width : (unit + 1) * width] *= factor
        elif axis == "hidden" and isinstance(module, (ElasticLayerNorm, ElasticRMSNorm)):
            module.own_weight.data[unit] *= factor


@every_method
@every_family
def test_a_unit_made_important_moves_to_the_front(name, suffix, method):
    for key in (("ffn", 2), ("heads", 1), ("hidden", None)):
        supernet = elastic(name, suffix)
        ranked = permutation_of(supernet.importance(method, batches(suffix)))[key]
        # A norm after the layer undoes a change that is too large, and with it the gradient.
        unit, factor = (ranked[1], 12.0) if method == "gradient" else (ranked[-1], 100.0)
        amplify(supernet, *key, unit, factor)
        assert permutation_of(supernet.importance(method, batches(suffix)))[key][0] == unit, key
        supernet.order(method, batches(suffix))
        assert supernet.permutation[key][0] == unit


def test_importance_of_the_first_units_is_the_highest_after_order():
    supernet = elastic("llama", "ForCausalLM")
    supernet.order("magnitude")
    for key, scores in supernet.importance("magnitude").items():
        assert (scores[:-1] >= scores[1:] - 1e-9).all(), key


@every_family
def test_magnitude_is_the_sum_of_squares_of_what_reads_or_writes_a_unit(name, suffix):
    supernet = elastic(name, suffix, torch.float64)
    scores = supernet.importance("magnitude")
    dims = supernet.dimensions
    expected = dict.fromkeys(scores, 0.0)
    assert set(scores) == {("hidden", None), *((axis, i) for axis in ("heads", "ffn") for i in range(4))}
    unit = {key: min(3, len(scores[key]) - 1) for key in scores}
    for key in scores:
        width = dims.head_dim * dims.group if key[0] == "heads" else 1
        for module in supernet.elastic():
            if not isinstance(module, ElasticLinear):
                continue
            matrix = module.merged_weight()
            axes = module.axes()
            if axes.input and (axes.input.axis, axes.input.layer) == key:
                expected[key] += matrix[:, unit[key] * width : (unit[key] + 1) * width].square().sum().item()
            for size, start, stop in axes.outputs:
                axis = "heads" if size.axis == "kv_heads" else size.axis
                shared = size.axis == "kv_heads" and dims.kv_heads == 1
                if (axis, size.layer) == key and not shared:
                    count = (stop - start) // len(scores[key])
                    rows = slice(start + unit[key] * count, start + (unit[key] + 1) * count)
                    expected[key] += matrix[rows].square().sum().item()
        assert scores[key][unit[key]].item() == pytest.approx(expected[key], rel=1e-9)


@pytest.mark.parametrize(
    ("name", "suffix"), [("bert", "ForSequenceClassification"), ("llama", "ForSequenceClassification")]
)
def test_gradient_score_is_the_effect_of_removing_a_unit_to_first_order(name, suffix):
    """For one batch of one sequence: |Σ x ∂L/∂x| is |dL/dg| of a gate g on the unit's output."""
    supernet = elastic(name, suffix, torch.float64)
    batch = {key: value[:1] for key, value in batches(suffix)[0].items()}
    scores = supernet.importance("gradient", [batch])
    for axis, layer, unit in (("ffn", 2, 5), ("heads", 1, 1)):
        gate = torch.ones((), dtype=torch.float64, requires_grad=True)
        width = supernet.dimensions.head_dim * supernet.dimensions.group if axis == "heads" else 1
        (reader,) = (
            m for m in supernet.elastic()
            if isinstance(m, ElasticLinear) and (size := m.axes().input) and (size.axis, size.layer) == (axis, layer)
        )  # fmt: skip

        def scale(_: object, args: tuple, unit: int = unit, width: int = width, gate: Tensor = gate) -> Tensor:
            mask = torch.zeros(args[0].shape[-1], dtype=torch.float64)
            mask[unit * width : (unit + 1) * width] = 1
            return args[0] * (1 - mask) + args[0] * mask * gate

        handle = reader.register_forward_pre_hook(scale)
        loss = supernet(**batch).loss
        handle.remove()
        (derivative,) = torch.autograd.grad(loss, gate)
        assert scores[axis, layer][unit].item() == pytest.approx(abs(derivative.item()), rel=1e-9)


def test_activation_score_is_the_norm_of_what_enters_times_the_norm_of_its_column():
    supernet = elastic("bert", "ForSequenceClassification", torch.float64)
    seen: list[Tensor] = []
    place = supernet.get_submodule("model.bert.encoder.layer.2.output.dense")
    handle = place.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().flatten(0, 1)))
    scores = supernet.importance("activation", batches("ForSequenceClassification", 2))
    handle.remove()
    expected = sum(x.norm(dim=0) * place.merged_weight().norm(dim=0) for x in seen)
    torch.testing.assert_close(scores["ffn", 2], expected.detach())


def test_scores_add_up_over_batches():
    supernet = elastic("gpt2", "LMHeadModel", torch.float64)
    one, two = batches("LMHeadModel")
    for method in ("activation", "gradient"):
        both = supernet.importance(method, [one, two])
        single = [supernet.importance(method, [batch]) for batch in (one, two)]
        for key, scores in both.items():
            torch.testing.assert_close(scores, single[0][key] + single[1][key])


@every_method
def test_scoring_leaves_no_trace(method):
    supernet = elastic("llama", "ForSequenceClassification").train()
    supernet.train_stage(1)
    flags = {key: p.requires_grad for key, p in supernet.named_parameters()}
    before = {key: value.clone() for key, value in supernet.state_dict().items()}
    some = next(p for p in supernet.parameters() if p.requires_grad)
    some.grad = torch.full_like(some, 3.0)
    supernet.importance(method, batches("ForSequenceClassification"))
    assert supernet.model.training
    assert {key: p.requires_grad for key, p in supernet.named_parameters()} == flags
    assert [p.grad is not None for p in supernet.parameters()].count(True) == 1
    assert torch.equal(some.grad, torch.full_like(some, 3.0))
    assert all(torch.equal(before[key], value) for key, value in supernet.state_dict().items())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in supernet.modules())


def test_scoring_keeps_the_hooks_of_reentrant_gradient_checkpointing():
    supernet = elastic("llama", "ForSequenceClassification")
    supernet.model.enable_input_require_grads()
    supernet.importance("gradient", batches("ForSequenceClassification"))
    assert supernet.get_input_embeddings()(torch.tensor([1])).requires_grad


def test_order_is_of_the_active_stages_too():
    """What training has learned counts: a large update of one unit moves it up."""
    supernet = elastic("bert", "ForSequenceClassification")
    module = supernet.get_submodule("model.bert.encoder.layer.0.intermediate.dense")
    assert permutation_of(supernet.importance("magnitude"))["ffn", 0][0] != 9
    module.lora_B[2].data[9] = 5.0
    assert permutation_of(supernet.importance("magnitude"))["ffn", 0][0] == 9


def test_bad_method_and_missing_data_are_refused():
    supernet = SuperTransformer(make("bert", "ForSequenceClassification"), space_of("bert"), rank=2)
    with pytest.raises(MLFSError, match="method='size': expected 'magnitude', 'activation' or 'gradient'"):
        supernet.order("size")
    for method in ("activation", "gradient"):
        with pytest.raises(MLFSError, match=f"method='{method}' needs batches to score on"):
            supernet.order(method)
        with pytest.raises(MLFSError, match="no batch to score importance on: the calibration data is empty"):
            supernet.order(method, [])
    with pytest.raises(MLFSError, match="layers='size': expected one of 'auto', 'loss', 'influence', 'even'"):
        supernet.order("activation", [inputs()], layers="size")
    assert supernet.permutation == {}


def test_activation_needs_no_labels():
    supernet, batch = elastic("bert", "ForSequenceClassification"), batches("ForSequenceClassification")[0]
    with_labels = supernet.importance("activation", [batch])
    without = supernet.importance("activation", [{key: batch[key] for key in ("input_ids", "attention_mask")}])
    assert all(torch.equal(with_labels[key], without[key]) for key in with_labels)


def test_scores_are_the_whole_models_whatever_is_active():
    supernet = elastic("llama", "ForCausalLM")
    for method in METHODS:
        expected = supernet.importance(method, batches("ForCausalLM"))
        with supernet.activate(supernet.space.min):
            scores = supernet.importance(method, batches("ForCausalLM"))
        assert all(torch.equal(scores[key], expected[key]) for key in expected)
