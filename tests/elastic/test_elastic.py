"""The elastic layers on their own, in models and loops that know nothing of transformers."""

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

from mlfs import ElasticEmbedding, ElasticLayerNorm, ElasticLinear, ElasticRMSNorm, MLFSError, train_stage

WIDTHS = (64, 32, 16)


class Net(nn.Module):
    """A plain PyTorch network: the label of four tokens is what the first and the last of them say."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 32)
        self.up = nn.Linear(128, 64)
        self.norm = nn.LayerNorm(64)
        self.middle = nn.Linear(64, 64)
        self.scale = nn.RMSNorm(64, eps=1e-6)
        self.down = nn.Linear(64, 4)

    def forward(self, ids: Tensor, width: int | None = None) -> Tensor:
        size = {} if width is None else {"out_features": width}
        x = self.norm(self.up(self.embed(ids).flatten(1), **size).relu())
        return self.down(self.scale(self.middle(x, **size).relu()))


def elastic_net(rank: int, train_base: bool) -> Net:
    net = Net()
    net.embed = ElasticEmbedding.from_embedding(net.embed, train_base=train_base)
    net.up = ElasticLinear.from_linear(net.up, rank=rank, train_base=train_base)
    net.norm = ElasticLayerNorm.from_layer_norm(net.norm, train_base=train_base)
    net.middle = ElasticLinear.from_linear(net.middle, rank=rank, train_base=train_base)
    net.scale = ElasticRMSNorm.from_rms_norm(net.scale, train_base=train_base)
    net.down = ElasticLinear.from_linear(net.down, rank=min(rank, 4), train_base=train_base)
    return net


def batch(seed: int) -> tuple[Tensor, Tensor]:
    ids = torch.randint(12, (64, 4), generator=torch.Generator().manual_seed(seed))
    return ids, (ids[:, 0] + ids[:, 3]) % 4


def losses(net: Net) -> dict[int, float]:
    ids, labels = batch(10_000)
    with torch.no_grad():
        return {width: nn.functional.cross_entropy(net(ids, width), labels).item() for width in WIDTHS}


def randomized(linear: nn.Module, rank: int = 4, stages: int = 3, seed: int = 0, **options) -> ElasticLinear:
    """An elastic layer all of whose stages have an effect."""
    torch.manual_seed(seed)
    layer = ElasticLinear.from_linear(linear, rank=rank, stages=stages, **options)
    for stage in range(layer.stages):
        layer.train_stage(stage)
        nn.init.normal_(layer.lora_B[stage], std=0.1)
    return layer


def conv(rows: int, columns: int) -> Conv1D:
    module = Conv1D(rows, columns)
    nn.init.normal_(module.weight), nn.init.normal_(module.bias)
    return module


MAKERS: dict[str, Callable[[], nn.Module]] = {
    "Linear": lambda: nn.Linear(24, 40),
    "Linear without bias": lambda: nn.Linear(24, 40, bias=False),
    "Conv1D": lambda: conv(40, 24),
}
every_linear = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())


@pytest.mark.parametrize(("rank", "train_base"), [(0, True), (4, True), (4, False)])
def test_a_plain_network_trains_at_three_widths_at_once(rank, train_base):
    torch.manual_seed(0)
    net = elastic_net(rank, train_base)
    base = {name: p.clone() for name, p in net.named_parameters() if "lora" not in name}
    before = losses(net)
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=3e-3 if train_base else 2e-2)
    for step in range(300):
        ids, labels = batch(step)
        optimizer.zero_grad()
        for width in WIDTHS:
            nn.functional.cross_entropy(net(ids, width), labels).backward()
        optimizer.step()
    after = losses(net)
    assert all(after[width] < 0.3 * before[width] for width in WIDTHS), (before, after)
    unchanged = all(torch.equal(p, base[name]) for name, p in net.named_parameters() if name in base)
    assert unchanged is not train_base


def test_stages_train_one_after_another_in_a_plain_loop():
    torch.manual_seed(0)
    net = elastic_net(4, train_base=False)
    for stage in range(3):
        train_stage(net, stage)
        before = {name: p.clone() for name, p in net.named_parameters()}
        optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=2e-2)
        loss_before = sum(losses(net).values())
        for step in range(40):
            ids, labels = batch(step)
            optimizer.zero_grad()
            for width in WIDTHS:
                nn.functional.cross_entropy(net(ids, width), labels).backward()
            optimizer.step()
        assert sum(losses(net).values()) < loss_before
        changed = {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}
        stages = {f"{name}.lora_{kind}.{stage}" for name in ("up", "middle", "down") for kind in "AB"}
        assert changed == stages
        assert {name for name, p in net.named_parameters() if p.grad is not None} >= stages
    train_stage(net, None)
    assert not any(p.requires_grad for p in net.parameters())


@pytest.mark.usefixtures("reference")
def test_fresh_layers_are_drop_in_bit_for_bit():
    torch.manual_seed(0)
    plain = Net()
    net = copy.deepcopy(plain)
    net.embed, net.norm = ElasticEmbedding.from_embedding(net.embed), ElasticLayerNorm.from_layer_norm(net.norm)
    for name in ("up", "middle", "down"):
        setattr(net, name, ElasticLinear.from_linear(getattr(net, name), rank=4))
    ids, _ = batch(0)
    assert torch.equal(net(ids), plain(ids))
    net.scale = ElasticRMSNorm.from_rms_norm(net.scale)  # torch's own is fused and rounds otherwise
    torch.testing.assert_close(net(ids), plain(ids), rtol=1e-6, atol=1e-6)


def test_layers_share_the_storage_of_the_ones_they_replace():
    linear, embedding, norm, rms = nn.Linear(8, 12), nn.Embedding(5, 8), nn.LayerNorm(8), nn.RMSNorm(8)
    pairs = [
        (ElasticLinear.from_linear(linear, rank=2), linear),
        (ElasticEmbedding.from_embedding(embedding), embedding),
        (ElasticLayerNorm.from_layer_norm(norm), norm),
        (ElasticRMSNorm.from_rms_norm(rms), rms),
        (ElasticLinear.from_linear(module := conv(12, 8), rank=2), module),
    ]
    for layer, original in pairs:
        for name, parameter in original.named_parameters():
            assert layer.get_parameter(name) is parameter
    with torch.no_grad():
        linear.weight.zero_(), linear.bias.fill_(3)
    assert torch.equal(pairs[0][0](torch.randn(2, 8)), torch.full((2, 12), 3.0))


@every_linear
@pytest.mark.parametrize("n", [24, 10])
@pytest.mark.parametrize("m", [40, 13, None])
def test_linear_reads_the_leading_slice_of_the_merged_matrix(make, n, m):
    layer = randomized(make().double())
    x = torch.randn(3, 2, n, dtype=torch.float64)
    matrix = layer.own_weight.T if layer.transposed else layer.own_weight
    for a, b in zip(layer.lora_A, layer.lora_B, strict=True):
        matrix = matrix + 4.0 * b @ a  # alpha 16 over rank 4
    expected = x @ matrix[:m, :n].T
    expected = expected if layer.bias is None else expected + layer.bias[:m]
    torch.testing.assert_close(layer(x, m), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("reference")
@every_linear
def test_fresh_linear_has_the_effect_of_the_base_alone(make):
    plain = make()
    x = torch.randn(3, 2, 24)
    assert torch.equal(ElasticLinear.from_linear(plain, rank=4)(x), plain(x))


@pytest.mark.usefixtures("reference")
def test_embedding_and_norms_read_leading_columns():
    torch.manual_seed(0)
    table, norm, rms = nn.Embedding(9, 8, padding_idx=2), nn.LayerNorm(8), nn.RMSNorm(8, eps=1e-6)
    for p in (norm.weight, norm.bias, rms.weight):
        nn.init.normal_(p)
    ids, x = torch.tensor([[0, 2], [8, 3]]), torch.randn(3, 5)
    layer = ElasticEmbedding.from_embedding(table)
    assert torch.equal(layer(ids), table(ids))
    assert torch.equal(layer(ids, features=5), table(ids)[..., :5])
    expected = nn.functional.layer_norm(x, (5,), norm.weight[:5], norm.bias[:5], norm.eps)
    assert torch.equal(ElasticLayerNorm.from_layer_norm(norm)(x), expected)
    expected = nn.functional.rms_norm(x, (5,), rms.weight[:5], rms.eps)
    torch.testing.assert_close(ElasticRMSNorm.from_rms_norm(rms)(x), expected)


def test_embedding_trains_only_the_columns_it_read_and_never_the_padding():
    layer = ElasticEmbedding.from_embedding(nn.Embedding(9, 8, padding_idx=2), train_base=True)
    layer(torch.tensor([1, 2, 4]), features=5).sum().backward()
    touched = torch.zeros(9, 8)
    touched[[1, 4], :5] = 1
    assert torch.equal(layer.own_weight.grad, touched)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.usefixtures("reference")
def test_rms_norm_of_transformers_is_drop_in_bit_for_bit(kind):
    plain = LlamaRMSNorm(8, eps=1e-3).to(kind)
    nn.init.normal_(plain.weight)
    x = torch.randn(4, 8).to(kind)
    expected = plain(x)
    assert torch.equal(ElasticRMSNorm.from_rms_norm(plain)(x), expected)


def test_rms_norm_without_eps_takes_the_types_own_as_torch_does():
    x = torch.randn(4, 8) * 1e-4
    plain = nn.RMSNorm(8)
    torch.testing.assert_close(ElasticRMSNorm.from_rms_norm(plain)(x), plain(x))


@every_linear
@pytest.mark.parametrize("stages", [1, 2, 3])
def test_folded_stages_compute_the_same_to_rounding(make, stages):
    layer = randomized(make())
    x = torch.randn(3, 2, 10)
    before = layer(x, 13)
    base = layer.own_weight.clone()
    layer.merge_stages(stages)
    torch.testing.assert_close(layer(x, 13), before, rtol=1e-5, atol=1e-5)
    assert torch.equal(layer.own_weight, base)
    assert not any("merged" in key for key in layer.state_dict())
    layer.merge_stages(0)
    assert torch.equal(layer(x, 13), before)


def test_the_stage_that_trains_over_folded_ones_gets_the_same_gradients():
    layer = randomized(nn.Linear(24, 40).double())
    layer.train_stage(2)
    x, dy = torch.randn(5, 10, dtype=torch.float64), torch.randn(5, 13, dtype=torch.float64)
    layer(x, 13).backward(dy)
    expected = [p.grad.clone() for p in (layer.lora_A[2], layer.lora_B[2])]
    layer.zero_grad()
    layer.merge_stages(2)
    layer(x, 13).backward(dy)
    for p, e in zip((layer.lora_A[2], layer.lora_B[2]), expected, strict=True):
        torch.testing.assert_close(p.grad, e, rtol=1e-10, atol=1e-12)
    assert all(p.grad is None for s in (0, 1) for p in (layer.lora_A[s], layer.lora_B[s]))


def test_all_stages_folded_still_pass_gradients_on():
    layer = randomized(nn.Linear(24, 40))
    layer.merge_stages(3)
    layer.train_stage(None)
    x = torch.randn(5, 24, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.merged_weight().sum(0).expand(5, 24).to(x.dtype), rtol=1e-4, atol=1e-4)


def test_folding_over_a_half_precision_base_keeps_fp32_updates():
    """Merged into the base's own type, updates below its resolution would be lost."""
    layer = randomized(nn.Linear(24, 40).bfloat16())
    for b in layer.lora_B:
        nn.init.normal_(b, std=1e-4)
    assert all(p.dtype == torch.float32 for p in (*layer.lora_A, *layer.lora_B))
    x = torch.randn(7, 24)
    before = layer(x)
    layer.merge_stages(3)
    torch.testing.assert_close(layer(x), before, rtol=1e-5, atol=1e-6)
    assert not torch.equal(layer.merged_weight(), layer.own_weight.float())


def test_layers_move_copy_and_pickle_like_any_module():
    torch.manual_seed(0)
    net = elastic_net(4, train_base=False)
    ids, _ = batch(0)
    expected = net(ids, 32)
    twin = copy.deepcopy(net)
    assert torch.equal(twin(ids, 32), expected)
    assert not {p.data_ptr() for p in net.parameters()} & {p.data_ptr() for p in twin.parameters()}
    buffer = io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(ids, 32), expected)
    other = elastic_net(4, train_base=False)
    assert not torch.equal(other(ids, 32), expected)
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(ids, 32), expected)
    torch.testing.assert_close(net.double()(ids, 32).float(), expected, rtol=1e-4, atol=1e-5)


def test_train_stage_leaves_other_modules_alone():
    net = nn.Sequential(ElasticLinear.from_linear(nn.Linear(8, 8), rank=2), nn.Linear(8, 8))
    train_stage(net, 1)
    trains = {name for name, p in net.named_parameters() if p.requires_grad}
    assert trains == {"0.lora_A.1", "0.lora_B.1", "1.weight", "1.bias"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: ElasticLinear.from_linear(nn.Linear(8, 12), rank=9),
            "rank=9, .* 12 x 8 layer: expected 0 <= rank <= 8",
        ),
        (lambda: ElasticLinear.from_linear(nn.Linear(12, 8), rank=9), "rank=9, .* 8 x 12 layer: .*choose a lower rank"),
        (lambda: ElasticLinear.from_linear(nn.Linear(8, 12), rank=-1), "rank=-1"),
        (lambda: ElasticLinear.from_linear(nn.Linear(8, 12), rank=2, stages=-1), "stages=-1"),
        (lambda: ElasticLinear.from_linear(nn.Conv2d(8, 12, 3)), "Conv2d.*expected an nn.Linear or a Conv1D"),
        (lambda: ElasticLinear.from_linear(nn.Embedding(8, 12)), "Embedding.*expected an nn.Linear or a Conv1D"),
        (lambda: ElasticEmbedding.from_embedding(nn.Embedding(8, 4, max_norm=1.0)), "max_norm, sparse or scale_grad"),
        (lambda: ElasticEmbedding.from_embedding(nn.Embedding(8, 4, sparse=True)), "max_norm, sparse or scale_grad"),
        (lambda: ElasticLayerNorm.from_layer_norm(nn.LayerNorm((3, 4))), r"normalized_shape=\(3, 4\): only the last"),
        (lambda: ElasticRMSNorm.from_rms_norm(nn.RMSNorm((3, 4))), "an RMSNorm needs a weight over the last axis"),
        (
            lambda: ElasticRMSNorm.from_rms_norm(nn.RMSNorm(4, elementwise_affine=False)),
            "an RMSNorm needs a weight over the last axis",
        ),
    ],
)
def test_layer_that_cannot_be_made_elastic_is_refused(make, message):
    with pytest.raises(MLFSError, match=message):
        make()


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda layer: layer(torch.ones(2, 9)), "input of width 9, expected at most in_features=8"),
        (lambda layer: layer(torch.ones(2, 8), out_features=13), "out_features=13: expected 1 to 12"),
        (lambda layer: layer(torch.ones(2, 8), out_features=0), "out_features=0: expected 1 to 12"),
        (lambda layer: layer.train_stage(3), "stage=3: this layer has stages 0 to"),
        (lambda layer: layer.train_stage(-1), "stage=-1: this layer has stages 0 to"),
        (lambda layer: layer.merge_stages(4), "cannot merge 4 of"),
        (lambda layer: layer.merge_stages(-1), "cannot merge -1 of"),
    ],
)
def test_bad_use_of_a_linear_is_refused(use, message, rank):
    with pytest.raises(MLFSError, match=message):
        use(ElasticLinear.from_linear(nn.Linear(8, 12), rank=rank))


@pytest.mark.parametrize("features", [0, 9])
def test_embedding_refuses_widths_it_does_not_have(features):
    with pytest.raises(MLFSError, match=f"features={features}: expected 1 to 8"):
        ElasticEmbedding.from_embedding(nn.Embedding(5, 8))(torch.tensor([1]), features=features)


@pytest.mark.parametrize(
    "layer",
    [ElasticLayerNorm.from_layer_norm(nn.LayerNorm(8)), ElasticRMSNorm.from_rms_norm(nn.RMSNorm(8))],
    ids=["LayerNorm", "RMSNorm"],
)
def test_norms_refuse_inputs_wider_than_they_are(layer):
    with pytest.raises(MLFSError, match="input of width 9, expected at most 8"):
        layer(torch.ones(2, 9))


def test_a_folded_stage_does_not_train():
    layer = randomized(nn.Linear(8, 12), rank=2)
    layer.merge_stages(2)
    with pytest.raises(MLFSError, match="stage 1 is merged: merge at most 1 stages to train it"):
        layer.train_stage(1)
    layer.train_stage(2)


def test_a_base_that_trains_is_not_folded():
    layer = randomized(nn.Linear(8, 12), rank=2, train_base=True)
    with pytest.raises(MLFSError, match="the base trains: it cannot be read from a merged copy"):
        layer.merge_stages(1)
