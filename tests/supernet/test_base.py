"""What a base brought with it: weights that loading drew belong to the run, and what else computes is checked."""

import copy
import hashlib
import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf

from mlfs import MLFSError, SuperTransformer
from mlfs.elastic.base import Elastic
from mlfs.supernet import base
from tests.helpers.runs import exportable, load, logits, same_tensors, stored
from tests.supernets import distance, elastic, perturb, space_of, subnets_of
from tests.tiny_models import CASES, VOCABULARY, inputs, logits_of, make

# What a checkpoint was saved from, and what it is loaded as: each lacks weights beside a task's head.
LACKING = [
    ("bert", "ForMaskedLM", "ForSequenceClassification"),  # the pooler
    ("bert", "ForSequenceClassification", "ForMaskedLM"),  # what stands before the vocabulary
    ("roberta", "ForMaskedLM", "ForSequenceClassification"),
    ("distilbert", "ForMaskedLM", "ForSequenceClassification"),
    ("qwen3", "ForSequenceClassification", "ForCausalLM"),
    ("gpt_neox", "ForTokenClassification", "ForSequenceClassification"),
]


def from_folder(name: str, suffix: str, folder: Path) -> tf.PreTrainedModel:
    return getattr(tf, CASES[name].name + suffix).from_pretrained(folder)


@pytest.mark.parametrize(("name", "saved", "loaded"), LACKING)
def test_weights_that_loading_draws_belong_to_the_run(name, saved, loaded, tmp_path):
    make(name, saved).save_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    supernet = perturb(SuperTransformer(from_folder(name, loaded, tmp_path / "base"), space_of(name), rank=4)).eval()
    supernet.order("magnitude")
    supernet.save_pretrained(tmp_path / "run")
    torch.manual_seed(1)
    drawn_anew = from_folder(name, loaded, tmp_path / "base")
    twins = [SuperTransformer.from_pretrained(tmp_path / "run", model=model).eval() for model in (None, drawn_anew)]
    twins.append(SuperTransformer(from_folder(name, loaded, tmp_path / "base"), space_of(name), rank=4).eval())
    twins[-1].restore(tmp_path / "run")
    twins.append(SuperTransformer(from_folder(name, loaded, tmp_path / "base"), space_of(name), rank=4).eval())
    twins[-1].load_state_dict(supernet.state_dict())
    for twin in twins:
        for subnet in list(subnets_of(name).values())[:4]:
            assert torch.equal(logits(twin, subnet), logits(supernet, subnet))
    twins[-1].save_pretrained(tmp_path / "again")
    assert same_tensors(stored(tmp_path / "again"), stored(tmp_path / "run"))
    small = exportable(name)[1]
    twins[0].extract(small).save_pretrained(tmp_path / "small")
    with torch.no_grad():
        found = logits_of(from_folder(name, loaded, tmp_path / "small").eval()(**inputs("left")))
    assert distance(found, logits(supernet, small)) < 1e-5


@pytest.mark.parametrize(("name", "saved", "loaded"), LACKING)
def test_what_is_new_is_what_transformers_reports_as_missing(name, saved, loaded, tmp_path):
    make(name, saved).save_pretrained(tmp_path)
    model_class = getattr(tf, CASES[name].name + loaded)
    model, report = model_class.from_pretrained(tmp_path, output_loading_info=True)
    parameters = {key for key, _ in model.named_parameters()}
    supernet = SuperTransformer(model, space_of(name), rank=4)
    ours = supernet.new_parameters | supernet.head_parameters()
    assert report["missing_keys"] & parameters and report["missing_keys"] & parameters <= ours
    assert supernet.new_parameters <= report["missing_keys"]


def test_a_whole_base_and_one_of_ones_own_have_nothing_new(tmp_path):
    made = make("bert", "ForSequenceClassification")
    made.save_pretrained(tmp_path)
    for model in (from_folder("bert", "ForSequenceClassification", tmp_path), made):
        assert SuperTransformer(model, space_of("bert"), rank=4).new_parameters == set()


# ---- what is no weight, but changes what is computed ------------------------------------------------------------


def set_in_config(**values: Any) -> Callable[[str, str], tf.PreTrainedModel]:
    """A base that is made with another configuration."""

    def make_other(name: str, suffix: str) -> tf.PreTrainedModel:
        plain = make(name, suffix)
        config = type(plain.config).from_dict(plain.config.to_dict() | values)
        other = type(plain)(config)
        other.load_state_dict(plain.state_dict())
        return other.eval()

    return make_other


def changed(change: Callable[[Any], object]) -> Callable[[str, str], tf.PreTrainedModel]:
    """A base in which something is set after it was made."""

    def make_other(name: str, suffix: str) -> tf.PreTrainedModel:
        model = make(name, suffix)
        change(model)
        return model

    return make_other


ROPE = {"rope_theta": 500.0, "rope_type": "default"}
OTHERS: dict[str, tuple[str, str, Callable[[str, str], tf.PreTrainedModel], str]] = {
    "epsilon": ("bert", "ForSequenceClassification", set_in_config(layer_norm_eps=0.1), "layer_norm_eps=0.1, there"),
    "activation": ("bert", "ForMaskedLM", set_in_config(hidden_act="relu"), "hidden_act='relu', there it was 'gelu'"),
    "RMS epsilon": ("llama", "ForCausalLM", set_in_config(rms_norm_eps=0.1), "rms_norm_eps=0.1, there it was 1e-06"),
    "theta": ("llama", "ForCausalLM", set_in_config(rope_parameters=ROPE), "rope_parameters.rope_theta=500.0, there"),
    "window": ("mistral", "ForCausalLM", set_in_config(sliding_window=3), "sliding_window=3, there it was 5"),
    "scaling": ("gpt2", "LMHeadModel", set_in_config(scale_attn_weights=False), "scale_attn_weights=False, there"),
    "a norm's epsilon": (
        "bert",
        "ForSequenceClassification",
        changed(lambda m: setattr(m.bert.encoder.layer[2].output.LayerNorm, "eps", 0.1)),
        r"its bert\.encoder\.layer\.2\.output\.LayerNorm\.eps is 0\.1, there it was 1e-12",
    ),
    "an attention's scale": (
        "llama",
        "ForCausalLM",
        changed(lambda m: setattr(m.model.layers[1].self_attn, "scaling", 0.5)),
        r"its model\.layers\.1\.self_attn\.scaling is 0\.5, there",
    ),
    "frequencies": (
        "llama",
        "ForCausalLM",
        changed(lambda m: m.model.rotary_emb.inv_freq.mul_(0.9)),
        r"its buffer model\.rotary_emb\.inv_freq has other numbers",
    ),
    "positions": (
        "bert",
        "ForMaskedLM",
        changed(lambda m: m.bert.embeddings.position_ids.add_(1)),
        r"its buffer bert\.embeddings\.position_ids has other numbers",
    ),
}


@pytest.mark.parametrize(("name", "suffix", "make_other", "message"), OTHERS.values(), ids=OTHERS.keys())
def test_a_base_that_computes_otherwise_with_the_same_weights_is_refused(name, suffix, make_other, message, tmp_path):
    elastic(name, suffix).save_pretrained(tmp_path)
    other = make_other(name, suffix)
    with torch.no_grad():
        assert not torch.equal(logits_of(other(**inputs())), logits_of(make(name, suffix)(**inputs())))
    with pytest.raises(MLFSError, match=f"the base is not the one .* was trained on: .*{message}") as raised:
        SuperTransformer.from_pretrained(tmp_path, model=other)
    assert "\n" not in str(raised.value)
    assert not any(isinstance(module, Elastic) for module in other.modules()), "a refused base is left as it was"
    resumed = SuperTransformer(other, space_of(name, per_layer=True), rank=4, alpha=8.0)
    with pytest.raises(MLFSError, match=message):
        resumed.restore(tmp_path)


INNOCENT = dict(
    attention_probs_dropout_prob=0.3, hidden_dropout_prob=0.2, classifier_dropout=0.1, id2label={0: "no", 1: "yes"},
    label2id={"no": 0, "yes": 1}, problem_type="single_label_classification", use_cache=False, initializer_range=0.1,
    output_hidden_states=True, _attn_implementation="eager",
)  # fmt: skip


def test_a_base_that_differs_in_nothing_that_computes_is_taken(saved):
    supernet, folder = saved
    other = set_in_config(**INNOCENT)("bert", "ForSequenceClassification")
    assert distance(logits(SuperTransformer.from_pretrained(folder, model=other).eval()), logits(supernet)) < 1e-5


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "gpt_neox"])
def test_a_base_in_half_precision_is_still_the_base(name, tmp_path):
    suffix = CASES[name].classes[0]
    elastic(name, suffix).save_pretrained(tmp_path)
    for dtype in (torch.bfloat16, torch.float16):
        SuperTransformer.from_pretrained(tmp_path, model=make(name, suffix).to(dtype))


def test_a_run_of_format_3_loads_as_it_was(saved):
    """It had no rotation, and no other difference."""
    supernet, folder = saved
    path = folder / "mlfs.json"
    state = json.loads(path.read_text())
    del state["checksum"]
    state["format"] = 3
    state["checksum"] = hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(state))
    twin = load(folder)
    assert twin.rotation is None and torch.equal(logits(twin), logits(supernet))


def test_a_run_of_format_2_loads_as_it_was(saved):
    """It said nothing of what the base computes with beside its weights."""
    supernet, folder = saved
    path = folder / "mlfs.json"
    state = json.loads(path.read_text())
    del state["base"]["constants"], state["base"]["vocabulary"], state["checksum"]
    state["format"] = 2
    state["checksum"] = hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(state))
    twin = load(folder)
    assert torch.equal(logits(twin), logits(supernet))
    twin.save_pretrained(folder)
    assert json.loads(path.read_text())["format"] == 4 and json.loads(path.read_text())["base"]["constants"]


# ---- a base that was changed in memory --------------------------------------------------------------------------


def _merged(model: tf.PreTrainedModel) -> tf.PreTrainedModel:
    """What PEFT trained, merged into the query and value projections."""
    options = {"task_type": "SEQ_CLS", "r": 2, "target_modules": ["query", "value"]}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**options))
    for module in wrapped.modules():
        if isinstance(module, peft.tuners.lora.Linear):
            torch.nn.init.normal_(module.lora_B["default"].weight, std=0.1)
    return wrapped.merge_and_unload()


def _one_step(model: tf.PreTrainedModel) -> tf.PreTrainedModel:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(**inputs(), labels=torch.tensor([0, 1, 0])).loss.backward()
    optimizer.step()
    return model


def _one_tensor(model: tf.PreTrainedModel) -> tf.PreTrainedModel:
    model.bert.pooler.dense.weight.data.mul_(2)
    return model


CHANGES = {"merged adapters": (_merged, "8"), "one step": (_one_step, r"6\d|7\d"), "one tensor": (_one_tensor, "1")}


@pytest.fixture
def said(monkeypatch) -> list[str]:
    """What is said in warnings."""
    lines: list[str] = []
    monkeypatch.setattr(base.logger, "warning", lines.append)
    return lines


@pytest.mark.parametrize("orders", [True, False])
@pytest.mark.parametrize("change", CHANGES)
def test_what_was_changed_in_memory_before_the_conversion_is_saved_with_the_run(change, orders, said, tmp_path):
    make("bert", "ForSequenceClassification").save_pretrained(tmp_path / "base")
    act, count = CHANGES[change]
    changed = act(from_folder("bert", "ForSequenceClassification", tmp_path / "base"))
    supernet = perturb(SuperTransformer(copy.deepcopy(changed), space_of("bert"), rank=4)).eval()
    state = torch.get_rng_state()
    if orders:
        supernet.order("magnitude")
    supernet.save_pretrained(tmp_path / "run")
    assert torch.equal(torch.get_rng_state(), state), "comparing draws nothing"
    supernet.save_pretrained(tmp_path / "run")
    (line,) = said
    assert "MB" in line and "save the changed model to a folder" in line and "\n" not in line
    assert re.match(rf"({count}) of 71 tensors of the base ", line)
    twins = [SuperTransformer.from_pretrained(tmp_path / "run", model=m).eval() for m in (None, copy.deepcopy(changed))]
    for model in (changed, from_folder("bert", "ForSequenceClassification", tmp_path / "base")):
        twins.append(SuperTransformer(copy.deepcopy(model), space_of("bert"), rank=4).eval())
        twins[-1].restore(tmp_path / "run")
        twins.append(SuperTransformer(copy.deepcopy(model), space_of("bert"), rank=4).eval())
        twins[-1].load_state_dict(supernet.state_dict())
    for i, twin in enumerate(twins):
        for subnet in list(subnets_of("bert").values())[:4]:
            assert torch.equal(logits(twin, subnet), logits(supernet, subnet))
        twin.save_pretrained(tmp_path / f"again{i}")
        again = SuperTransformer.from_pretrained(tmp_path / f"again{i}").eval()
        assert torch.equal(logits(again), logits(supernet))


def test_drawn_weights_that_lost_their_mark_in_a_copy_belong_to_the_run(said, tmp_path):
    make("bert", "ForMaskedLM").save_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    model = from_folder("bert", "ForSequenceClassification", tmp_path / "base")
    for carried in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        supernet = perturb(SuperTransformer(carried, space_of("bert"), rank=4)).eval()
        torch.manual_seed(0)  # as when the base was loaded: what is drawn is the same once more
        supernet.save_pretrained(tmp_path / "run")
        assert supernet.new_parameters == {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}
        twin = SuperTransformer.from_pretrained(tmp_path / "run").eval()
        assert torch.equal(logits(twin), logits(supernet))


@pytest.mark.parametrize("name", ["", "an/unknown-name", "/no/such/folder"])
def test_a_base_that_is_nowhere_to_be_found_counts_as_it_is(name, said, tmp_path):
    supernet = SuperTransformer(make("bert", "ForSequenceClassification"), space_of("bert"), rank=4, base_name=name)
    supernet.save_pretrained(tmp_path)
    assert supernet.new_parameters == set() and said == []
    assert torch.equal(logits(load(tmp_path)), logits(supernet.eval()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("extra", [0, 3])
def test_a_base_as_it_was_loaded_brings_nothing_more_into_the_run(dtype, extra, said, tmp_path):
    make("llama-tied", "ForCausalLM").save_pretrained(tmp_path / "base")
    model = tf.LlamaForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype)
    if extra:
        model.resize_token_embeddings(VOCABULARY + extra)
    supernet = SuperTransformer(model, space_of("llama-tied"), rank=4)
    supernet.save_pretrained(tmp_path / "run")
    assert supernet.new_parameters == set() and said == []
