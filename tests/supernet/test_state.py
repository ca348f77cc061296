"""A super-transformer carried by its state, or as an object: what trained and the order of the units go with it."""

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing
import transformers as tf
from accelerate import Accelerator
from safetensors.torch import load_model, save_model
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.optim.swa_utils import AveragedModel

from mlfs import ElasticLinear, MLFSError, SuperTransformer
from mlfs.supernet.permutation import difference
from tests.helpers.runs import logits
from tests.supernets import elastic, space_of, subnets_of
from tests.tiny_models import CASES, all_models, inputs, make

every_model = pytest.mark.parametrize(("name", "suffix"), all_models())
every_family = pytest.mark.parametrize(("name", "suffix"), [(name, case.classes[0]) for name, case in CASES.items()])


def trained(name: str, suffix: str) -> SuperTransformer:
    """A small model as training leaves it: three stages with an effect, ordered, norms and head changed."""
    supernet = elastic(name, suffix)
    supernet.order("magnitude")
    supernet.train_stage(2, norms=True)
    with torch.no_grad():
        for parameter in supernet.own_parameters().values():
            parameter += 0.01 * torch.randn_like(parameter)
    return supernet


def fresh(name: str, suffix: str) -> SuperTransformer:
    """The same base, of which nothing has trained and whose units are in their first order."""
    torch.manual_seed(2)
    return SuperTransformer(make(name, suffix), space_of(name, per_layer=True), rank=4, alpha=8.0).eval()


def assert_equal(twin: Any, supernet: SuperTransformer, name: str, folder: Path | None = None) -> None:
    """Compares two super-transformers at every size, and what becomes of the second once it is saved."""
    for subnet in subnets_of(name).values():
        assert torch.equal(logits(twin, subnet), logits(supernet, subnet))
    moves = difference(twin.permutation, supernet.permutation)
    assert all(order == sorted(order) for order in moves.values()) and twin.trained_stages == supernet.trained_stages
    if folder is not None:
        twin.save_pretrained(folder)
        base = make(name, type(supernet.model).__name__.removeprefix(CASES[name].name))
        again = SuperTransformer.from_pretrained(folder, model=base).eval()
        assert torch.equal(logits(again), logits(supernet))


# ---- by its state -----------------------------------------------------------------------------------------------


def _state(source: nn.Module, target: nn.Module, folder: Path) -> None:
    result = target.load_state_dict(source.state_dict())
    assert not result.missing_keys and not result.unexpected_keys


def _assigned(source: nn.Module, target: nn.Module, folder: Path) -> None:
    state = {key: value.clone() for key, value in source.state_dict().items()}
    target.load_state_dict(state, assign=True)


def _torch_save(source: nn.Module, target: nn.Module, folder: Path) -> None:
    torch.save({"state_dict": source.state_dict()}, folder / "model.ckpt")
    target.load_state_dict(torch.load(folder / "model.ckpt", weights_only=True)["state_dict"])


def _safetensors(source: nn.Module, target: nn.Module, folder: Path) -> None:
    save_model(source, str(folder / "model.safetensors"))
    load_model(target, folder / "model.safetensors")


def _inner_model(source: Any, target: Any, folder: Path) -> None:
    target.model.load_state_dict(source.model.state_dict())


def _outer_module(source: nn.Module, target: nn.Module, folder: Path) -> None:
    """As Lightning does: the model is an attribute of a module, whose state has the names of both."""
    outer, other = nn.Module(), nn.Module()
    outer.net, other.net = source, target
    torch.save({"state_dict": outer.state_dict()}, folder / "last.ckpt")
    other.load_state_dict(torch.load(folder / "last.ckpt", weights_only=True)["state_dict"])


def _accelerate(source: nn.Module, target: nn.Module, folder: Path) -> None:
    writes = Accelerator(cpu=True)
    writes.prepare(source)
    writes.save_state(folder / "state")
    reads = Accelerator(cpu=True)
    reads.prepare(target)
    reads.load_state(folder / "state")


def _distributed_checkpoint(source: nn.Module, target: nn.Module, folder: Path) -> None:
    dcp.save({"model": get_model_state_dict(source)}, checkpoint_id=folder / "dcp", no_dist=True)
    state = {"model": get_model_state_dict(target)}
    dcp.load(state, checkpoint_id=folder / "dcp", no_dist=True)
    set_model_state_dict(target, state["model"])


def _in_place(source: nn.Module, target: nn.Module, folder: Path) -> None:
    """Without load_state_dict: what a state dict holds are the model's own tensors."""
    with torch.no_grad():
        own = target.state_dict()
        for key, value in source.state_dict().items():
            own[key].copy_(value)


CARRIERS = {
    function.__name__.strip("_"): function
    for function in (
        _state,
        _assigned,
        _torch_save,
        _safetensors,
        _inner_model,
        _outer_module,
        _accelerate,
        _distributed_checkpoint,
        _in_place,
    )
}


@every_model
def test_a_state_carries_what_trained_and_the_order(name, suffix, tmp_path):
    supernet, twin = trained(name, suffix), fresh(name, suffix)
    twin.merge_stages(1)  # the copy is of what was there before
    assert not torch.equal(logits(twin), logits(supernet))
    _state(supernet, twin, tmp_path)
    assert_equal(twin, supernet, name, tmp_path / "run")


@pytest.mark.parametrize("carry", CARRIERS.values(), ids=CARRIERS.keys())
@pytest.mark.parametrize(("name", "suffix"), [("bert", "ForSequenceClassification"), ("llama-tied", "ForCausalLM")])
def test_whoever_carries_the_state_carries_all_of_it(name, suffix, carry, tmp_path):
    supernet, twin = trained(name, suffix), fresh(name, suffix)
    carry(supernet, twin, tmp_path)
    assert_equal(twin, supernet, name, tmp_path / "run")


def test_a_model_without_memory_takes_a_state():
    """Made on the meta device, as large models are, and given its tensors by the state."""
    supernet = trained("llama-tied", "ForCausalLM")
    with torch.device("meta"):
        plain = tf.LlamaForCausalLM(CASES["llama-tied"].config())
        twin = SuperTransformer(plain, space_of("llama-tied", per_layer=True), rank=4, alpha=8.0).eval()
    twin.load_state_dict({key: value.clone() for key, value in supernet.state_dict().items()}, assign=True)
    twin.model.model.rotary_emb = supernet.model.model.rotary_emb  # whose buffer is in no state
    assert_equal(twin, supernet, "llama-tied")


def _give_effect(supernet: SuperTransformer, stage: int, seed: int) -> None:
    """Lets a stage train, and gives it the effect of some steps."""
    supernet.train_stage(stage)
    generator = torch.Generator().manual_seed(seed)
    for module in supernet.elastic():
        if isinstance(module, ElasticLinear) and module.stages:
            b = module.lora_B[stage]
            b.data.copy_(torch.randn(b.shape, generator=generator) * 0.05)


def _averaged_by_hand(first: SuperTransformer, second: SuperTransformer) -> SuperTransformer:
    """The second model with the mean of both models' weights."""
    mean = copy.deepcopy(second)
    with torch.no_grad():
        for parameter, one, other in zip(mean.parameters(), first.parameters(), second.parameters(), strict=True):
            parameter.copy_(0.5 * one + 0.5 * other)
    return mean


@pytest.mark.parametrize("integers", ["averaged too", "copied"])
def test_an_average_of_states_is_the_average_of_the_models(integers):
    """An exponential moving average, kept as a dict: half of a model before stage 1, half of it after."""
    supernet = fresh("bert", "ForSequenceClassification")
    supernet.order("magnitude")
    _give_effect(supernet, 0, 1)
    before = copy.deepcopy(supernet)
    average = {key: value.clone() for key, value in supernet.state_dict().items()}
    _give_effect(supernet, 1, 2)
    for key, value in supernet.state_dict().items():
        if integers == "averaged too" or value.is_floating_point():
            average[key] = 0.5 * average[key] + 0.5 * value
        else:
            average[key] = value.clone()
    twin = fresh("bert", "ForSequenceClassification")
    twin.load_state_dict(average)
    assert_equal(twin, _averaged_by_hand(before, supernet), "bert")


def test_an_averaged_model_follows_the_stages():
    """It copies the model once, averages parameters and copies buffers: without load_state_dict."""
    supernet = fresh("bert", "ForSequenceClassification")
    _give_effect(supernet, 0, 1)
    before, averaged = copy.deepcopy(supernet), AveragedModel(supernet)
    averaged.update_parameters(supernet)
    _give_effect(supernet, 1, 2)
    averaged.update_parameters(supernet)
    assert_equal(averaged.module, _averaged_by_hand(before, supernet), "bert")


@pytest.mark.parametrize("integers", ["averaged too", "copied"])
def test_an_average_over_different_orders_is_refused(integers):
    supernet = fresh("bert", "ForSequenceClassification")
    average = {key: value.clone() for key, value in supernet.state_dict().items()}
    supernet.order("magnitude")
    for key, value in supernet.state_dict().items():
        if integers == "averaged too" or value.is_floating_point():
            average[key] = 0.9 * average[key] + 0.1 * value
        else:
            average[key] = value.clone()
    with pytest.raises(MLFSError, match="average only states that were ordered alike"):
        fresh("bert", "ForSequenceClassification").load_state_dict(average)


@pytest.fixture
def process_group(tmp_path):
    """A group of this process alone."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore")  # the older one names a newer way to save
@pytest.mark.parametrize("version", [1, 2])
def test_a_sharded_model_runs_and_gives_and_takes_a_whole_state(process_group, version):
    supernet = trained("bert", "ForSequenceClassification")
    right = {subnet: logits(supernet, subnet) for subnet in subnets_of("bert").values()}
    plain, twin = fresh("bert", "ForSequenceClassification"), fresh("bert", "ForSequenceClassification")

    def shard(model: SuperTransformer) -> nn.Module:
        if version == 1:
            return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
        mesh = init_device_mesh("cpu", (1,))
        for layer in model.layers:
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    sharded, sharded_twin = shard(supernet), shard(twin)
    options = StateDictOptions(full_state_dict=True)
    state = get_model_state_dict(sharded, options=options)
    plain.load_state_dict(state)
    set_model_state_dict(sharded_twin, state, options=options)
    for subnet, expected in right.items():
        assert torch.equal(logits(plain, subnet), expected)
        for model, inner in ((sharded, supernet), (sharded_twin, twin)):
            with torch.no_grad(), inner.activate(subnet):
                assert torch.equal(model(**inputs("left")).logits, expected)


def test_a_state_of_other_options_or_of_a_plain_model_is_refused_before_anything_is_loaded():
    supernet = trained("bert", "ForSequenceClassification")
    before = logits(supernet)
    base = make("bert", "ForSequenceClassification")
    space = space_of("bert", per_layer=True)
    others: dict[str, tuple[dict, bool]] = {
        "another rank": (SuperTransformer(base, space, rank=2, alpha=8.0).state_dict(), False),
        "another alpha": (SuperTransformer(remake(), space, rank=4, alpha=4.0).state_dict(), True),
        "another space": (SuperTransformer(remake(), space_of("bert"), rank=4, alpha=8.0).state_dict(), True),
        "it is of a plain model": ({f"model.{k}": v for k, v in remake().state_dict().items()}, False),
        "or a part": ({k: v for k, v in supernet.state_dict().items() if "lora" in k}, False),
    }
    for message, (state, strict) in others.items():
        with pytest.raises(MLFSError, match=message) as raised:
            supernet.load_state_dict(state, strict=strict)
        assert "\n" not in str(raised.value)
        assert torch.equal(logits(supernet), before)


def remake() -> tf.PreTrainedModel:
    return make("bert", "ForSequenceClassification")


def test_layers_of_ones_own_network_carry_what_trained():
    def network() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(*(ElasticLinear.from_linear(nn.Linear(8, 8), rank=2) for _ in range(2)))

    one, other, x = network(), network(), torch.randn(3, 8)
    for layer in one:
        for stage in range(3):
            layer.train_stage(stage)
            nn.init.normal_(layer.lora_B[stage])
    other[0].merge_stages(1)
    other.load_state_dict(one.state_dict())
    assert torch.equal(other(x), one(x))


# ---- as an object -----------------------------------------------------------------------------------------------


def _pickle(supernet: Any) -> Any:
    return pickle.loads(pickle.dumps(supernet))


def _saved_whole(supernet: Any) -> Any:
    file = io.BytesIO()
    torch.save(supernet, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@every_family
@pytest.mark.parametrize("carry", [_pickle, copy.deepcopy])
def test_copies_compute_the_same_and_stand_alone(name, suffix, carry):
    supernet = trained(name, suffix)
    with supernet.activate(supernet.space.min):  # what is active is not carried
        twin = carry(supernet)
        assert twin.active == supernet.space.max
    assert type(twin) is type(supernet) and isinstance(twin, SuperTransformer)
    assert type(twin.layers[0]) is type(supernet.layers[0])
    assert_equal(twin, supernet, name)
    before = logits(supernet)
    twin.apply_permutation({("hidden", None): list(range(48))[::-1]})
    _give_effect(twin, 0, 3)
    assert torch.equal(logits(supernet), before)
    twin.load_state_dict(supernet.state_dict())
    assert_equal(twin, supernet, name)


@pytest.mark.parametrize("carry", [_saved_whole, copy.copy, _pickle])
def test_copies_are_saved_as_runs(carry, tmp_path):
    supernet = trained("llama-tied", "ForCausalLM")
    assert_equal(carry(supernet), supernet, "llama-tied", tmp_path)


def test_a_copy_of_the_model_inside_is_a_copy_of_all():
    supernet = trained("llama", "ForCausalLM")
    model = copy.deepcopy(supernet.model)
    with torch.no_grad():
        assert torch.equal(model(**inputs()).logits, supernet(**inputs()).logits)
    assert type(model) is type(supernet.model) and isinstance(model, tf.LlamaForCausalLM)


def _logits_of_smallest(supernet: SuperTransformer, results: Any) -> None:
    torch.set_num_threads(1)  # as here: with more, sums are rounded in another order
    results.put(logits(supernet, supernet.space.min).numpy())


def test_a_spawned_process_takes_a_super_transformer():
    supernet = trained("llama", "ForCausalLM")
    context = torch.multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=_logits_of_smallest, args=(supernet, results))
    process.start()
    found = results.get(timeout=120)
    process.join()
    assert torch.equal(torch.from_numpy(found), logits(supernet, supernet.space.min))
