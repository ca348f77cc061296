"""A bound subnet is one size of the model, in any thread and whatever is active around it."""

import copy
import pickle
import random
from concurrent.futures import ThreadPoolExecutor
from threading import Thread
from typing import Any

import pytest
import torch
import transformers as tf

from mlfs import MLFSError, Subnet
from tests.helpers.runs import exportable, logits
from tests.supernets import distance, elastic, subnets_of
from tests.tiny_models import CASES, inputs, logits_of

every_family = pytest.mark.parametrize(("name", "suffix"), [(name, case.classes[0]) for name, case in CASES.items()])


@every_family
def test_a_pool_of_threads_runs_several_sizes_at_once_each_as_if_alone(name, suffix):
    """Threads of a pool that was started while another subnet was active, which they do not see."""
    supernet = elastic(name, suffix)
    expected = {subnet: logits(supernet, subnet) for subnet in subnets_of(name).values()}
    bound = {subnet: supernet.bound(subnet) for subnet in expected}
    jobs = list(expected) * 6
    random.Random(0).shuffle(jobs)

    def work(subnet: Subnet) -> torch.Tensor:
        with torch.no_grad():
            return logits_of(bound[subnet](**inputs("left")))

    with supernet.activate(supernet.space.min), ThreadPoolExecutor(6) as pool:
        for subnet, found in zip(jobs, pool.map(work, jobs), strict=True):
            assert torch.equal(found, expected[subnet])
        assert supernet.active == supernet.space.min


@pytest.mark.parametrize(("name", "suffix"), [(n, case.classes[0]) for n, case in CASES.items() if case.is_decoder])
def test_every_thread_generates_at_its_size(name, suffix):
    supernet = elastic(name, suffix)
    chosen = [*exportable(name)[:2], subnets_of(name)["per layer, random"]]
    prompt = inputs("left")
    expected = [supernet.extract(subnet).generate(**prompt, max_new_tokens=5, do_sample=False) for subnet in chosen]
    with ThreadPoolExecutor(3) as pool:
        work = [pool.submit(supernet.bound(s).generate, **prompt, max_new_tokens=5, do_sample=False) for s in chosen]
        for found, right in zip(work, expected, strict=True):
            assert torch.equal(found.result(), right)


def test_it_runs_its_size_inside_of_every_other_activation():
    supernet = elastic("llama", "ForCausalLM")
    small, other = subnets_of("llama")["uniform"], subnets_of("llama")["per layer, random"]
    bound = supernet.bound(small)
    expected = logits(supernet, small)
    with torch.no_grad():
        for around in (supernet.activate(other), supernet.activate_rows([other, small, other])):
            with around:
                assert torch.equal(bound(**inputs("left")).logits, expected)
        with supernet.activate(other):
            assert torch.equal(bound(**inputs("left")).logits, expected)
            assert supernet.active == other


def test_a_stream_of_text_runs_in_a_thread_of_its_own():
    """As transformers shows it: generate in a thread, the text read in this one."""
    supernet = elastic("llama", "ForCausalLM")
    small = subnets_of("llama")["uniform"]

    class Streamer:
        def __init__(self) -> None:
            self.tokens: list[int] = []

        def put(self, value: torch.Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            pass

    prompt, streamer = torch.tensor([[2, 5, 7]]), Streamer()
    right = supernet.extract(small).generate(prompt, max_new_tokens=6, do_sample=False)
    bound = supernet.bound(small)
    thread = Thread(
        target=bound.generate, args=(prompt,), kwargs=dict(max_new_tokens=6, do_sample=False, streamer=streamer)
    )
    thread.start()
    thread.join()
    assert streamer.tokens == right[0].tolist()


def test_it_stands_for_the_model(tmp_path):
    supernet = elastic("bert", "ForSequenceClassification")
    small = exportable("bert")[1]
    bound = supernet.bound(small)
    assert bound.config is supernet.config and bound.device == supernet.device
    assert bound.eval() is bound and bound.train() is bound and supernet.model.training
    bound.eval()
    bound.save_pretrained(tmp_path)
    plain = tf.BertForSequenceClassification.from_pretrained(tmp_path)
    assert plain.config.hidden_size == small.hidden
    with torch.no_grad():
        assert distance(bound.forward(**inputs()).logits, plain(**inputs()).logits) < 1e-5
        assert distance(bound.extract()(**inputs()).logits, plain(**inputs()).logits) < 1e-5
    with pytest.raises(AttributeError, match="nonsense"):
        _ = bound.nonsense
    assert str(small) in repr(bound)


def test_it_trains_what_its_size_uses():
    supernet = elastic("bert", "ForSequenceClassification")
    small = subnets_of("bert")["uniform"]
    labels = torch.tensor([0, 1, 0])
    supernet.bound(small)(**inputs(), labels=labels).loss.backward()
    found = {key: p.grad.clone() for key, p in supernet.named_parameters() if p.grad is not None}
    supernet.zero_grad()
    with supernet.activate(small):
        supernet(**inputs(), labels=labels).loss.backward()
    right = {key: p.grad for key, p in supernet.named_parameters() if p.grad is not None}
    assert found.keys() == right.keys() and all(torch.equal(found[key], right[key]) for key in right)


@pytest.mark.parametrize("carry", [copy.deepcopy, lambda bound: pickle.loads(pickle.dumps(bound))])
def test_copies_run_the_same_size(carry):
    supernet = elastic("llama", "ForCausalLM")
    small = subnets_of("llama")["uniform"]
    twin: Any = carry(supernet.bound(small))
    assert twin.subnet == small and twin.supernet is not supernet
    with torch.no_grad():
        assert torch.equal(twin(**inputs("left")).logits, logits(supernet, small))


def test_what_cannot_be_bound_or_set_is_refused():
    supernet = elastic("bert", "ForSequenceClassification")
    with pytest.raises(MLFSError, match="hidden=47 is not one of"):
        supernet.bound(Subnet(47, 6, 40, (0, 1, 2, 3)))
    with pytest.raises(MLFSError, match="expected a Subnet, got str"):
        supernet.bound("min")
    with pytest.raises(MLFSError, match=r"set mode on supernet\.model, for all sizes"):
        supernet.bound(supernet.space.min).mode = 1


@every_family
def test_its_modules_run_its_size_too(name, suffix):
    supernet = elastic(name, suffix)
    subnet = subnets_of(name)["uniform"]
    bound, small = supernet.bound(subnet), supernet.extract(subnet).eval()
    ids = inputs("left")["input_ids"]
    assert distance(bound.base_model(ids).last_hidden_state, small.base_model(ids).last_hidden_state) < 1e-5
    embedded = bound.get_input_embeddings()(ids)
    assert torch.equal(embedded, small.get_input_embeddings()(ids))
    own, plain = bound.get_submodule(supernet.layers_name), bound.base_model
    assert len(list(own)) == len(own) == len(supernet.layers) and plain
    linear = next(path for path, m in supernet.layers[0].named_modules() if type(m).__name__ == "ElasticLinear")
    in_small = small.get_submodule(supernet.layers_name)[0].get_submodule(linear)
    x = torch.randn(2, getattr(in_small, "in_features", getattr(in_small, "nx", None)))
    assert distance(own[0].get_submodule(linear)(x), in_small(x)) < 1e-5
    with pytest.raises(MLFSError, match="holds nothing of its own"):
        bound.base_model.training = True


def test_blocks_that_end_in_another_order_are_refused_and_leave_nothing_active():
    supernet = elastic("bert", "ForSequenceClassification")
    full = logits(supernet, supernet.space.max)

    def by_turns(subnet: Subnet) -> Any:
        for _ in range(2):
            with supernet.activate(subnet):
                yield logits_of(supernet(**inputs("left")))

    with pytest.raises(MLFSError, match="ended in another order than they began"), torch.no_grad():
        list(zip(by_turns(supernet.space.min), by_turns(supernet.space.max), strict=True))
    assert supernet.active == supernet.space.max
    with torch.no_grad():
        assert torch.equal(logits_of(supernet(**inputs("left"))), full)

    outer, inner = supernet.activate(supernet.space.min), supernet.activate(subnets_of("bert")["uniform"])
    outer.__enter__(), inner.__enter__()
    with pytest.raises(MLFSError, match="another order"):
        outer.__exit__(None, None, None)
    with pytest.raises(MLFSError, match="another order"):
        inner.__exit__(None, None, None)
    assert supernet.active == supernet.space.max
    with pytest.raises(KeyError), supernet.activate(supernet.space.min):
        raise KeyError
    assert supernet.active == supernet.space.max
