"""What a run leaves on disk: restored exactly, refused when it is not whole, and never half-written."""

import errno
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from mlfs import MLFSError, SearchSpace, SuperTransformer
from tests.helpers.runs import load, logits, tensors_file
from tests.supernets import distance, elastic, perturb, space_of, subnets_of
from tests.tiny_models import CASES, all_models, make

every_model = pytest.mark.parametrize(("name", "suffix"), all_models())
every_family = pytest.mark.parametrize(("name", "suffix"), [(name, case.classes[0]) for name, case in CASES.items()])


@every_model
def test_saved_and_loaded_it_gives_the_same_logits_bit_for_bit(name, suffix, tmp_path):
    supernet = elastic(name, suffix)
    supernet.order("magnitude")
    supernet.train_stage(2, norms=name != "bert")
    with torch.no_grad():
        for parameter in supernet.own_parameters().values():
            parameter += 0.01 * torch.randn_like(parameter)
    supernet.save_pretrained(tmp_path)
    twin = SuperTransformer.from_pretrained(tmp_path, model=make(name, suffix)).eval()
    assert twin.space == supernet.space and twin.permutation == supernet.permutation
    assert (twin.rank, twin.stages, twin.alpha) == (4, 3, 8.0)
    ours, theirs = supernet.state_dict(), twin.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    for subnet in subnets_of(name).values():
        assert torch.equal(logits(twin, subnet), logits(supernet, subnet))
    twin.save_pretrained(tmp_path / "again")
    assert tensors_file(tmp_path / "again").read_bytes() == tensors_file(tmp_path).read_bytes()
    assert (tmp_path / "again" / "mlfs.json").read_bytes() == (tmp_path / "mlfs.json").read_bytes()


@every_family
def test_restored_in_place_whatever_it_was_before(name, suffix, tmp_path):
    supernet = elastic(name, suffix)
    supernet.order("magnitude")
    supernet.save_pretrained(tmp_path)
    expected = {subnet: logits(supernet, subnet) for subnet in subnets_of(name).values()}
    other = SuperTransformer(make(name, suffix), space_of(name, per_layer=True), rank=4, alpha=8.0).eval()
    other.apply_permutation({("hidden", None): list(range(48))[::-1], ("ffn", 1): list(range(40))[::-1]})
    other.merge_stages(1)
    other.restore(tmp_path)
    assert other.permutation == supernet.permutation
    for subnet, right in expected.items():
        assert distance(logits(other, subnet), right) < 1e-5
    other.merge_stages(0)
    for subnet, right in expected.items():
        assert torch.equal(logits(other, subnet), right)


def test_what_is_saved_is_the_stages_alone(saved):
    supernet, folder = saved
    stored = load_file(tensors_file(folder))
    orders = {key: stored.pop(key) for key in list(stored) if key.startswith("permutation.")}
    assert stored.keys() == supernet.own_parameters().keys()
    assert {key for key in stored if "lora" not in key} == {"classifier.weight", "classifier.bias"}
    state = json.loads((folder / "mlfs.json").read_text())
    assert SearchSpace.from_dict(state["space"]) == supernet.space
    assert (state["rank"], state["stages"], state["alpha"]) == (4, 3, 8.0)
    assert orders["permutation.hidden"].tolist() == supernet.permutation["hidden", None]
    assert orders["permutation.ffn.1"].tolist() == supernet.permutation["ffn", 1]
    assert len(orders) == len(supernet.permutation) and {order.dtype for order in orders.values()} == {torch.int32}
    assert state["base"]["name"] == supernet.base_name
    assert {path.name for path in folder.iterdir()} == {"mlfs.json", state["tensors"]["file"]}


def test_every_file_of_a_run_has_the_permissions_of_an_ordinary_one(saved):
    _, folder = saved
    (folder / "ordinary").touch()
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1


def test_a_run_of_format_1_loads_as_it_was(saved):
    """It had the permutation in the JSON, under "live_stages" how many stages had trained, and no other difference."""
    supernet, folder = saved
    path, state = tensors_file(folder), json.loads((folder / "mlfs.json").read_text())
    stored = load_file(path)
    permutation: dict = {}
    for (axis, layer), order in supernet.permutation.items():
        if layer is None:
            permutation[axis] = order
        else:
            permutation.setdefault(axis, {})[str(layer)] = order
    save_file({key: value for key, value in stored.items() if not key.startswith("permutation.")}, path)
    state["tensors"]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    state |= {"format": 1, "permutation": permutation, "live_stages": state.pop("trained_stages")}
    del state["checksum"]
    state["checksum"] = hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
    (folder / "mlfs.json").write_text(json.dumps(state))
    twin = load(folder)
    assert twin.permutation == supernet.permutation and torch.equal(logits(twin), logits(supernet))
    twin.save_pretrained(folder)
    assert json.loads((folder / "mlfs.json").read_text())["format"] == 4
    assert load(folder).permutation == supernet.permutation


def test_bert_base_at_rank_eight_takes_sixteen_megabytes(tmp_path):
    model = tf.BertForSequenceClassification(tf.BertConfig())  # whose defaults are bert-base's
    assert 109e6 < sum(p.numel() for p in model.parameters()) < 110e6
    SuperTransformer(model, rank=8, stages=3).save_pretrained(tmp_path)
    assert 15e6 < sum(path.stat().st_size for path in tmp_path.iterdir()) < 18e6
    assert (tmp_path / "mlfs.json").stat().st_size < 200e3


def test_the_base_is_found_by_its_name(tmp_path):
    model = make("llama", "ForSequenceClassification")
    model.save_pretrained(tmp_path / "base")
    base = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    supernet = perturb(SuperTransformer(base, space_of("llama"), rank=4)).eval()
    supernet.save_pretrained(tmp_path / "run")
    twin = SuperTransformer.from_pretrained(tmp_path / "run")
    assert not twin.training
    assert torch.equal(logits(twin), logits(supernet))
    half = SuperTransformer.from_pretrained(tmp_path / "run", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert (logits(half).float() - logits(supernet)).norm() < 0.04 * logits(supernet).norm()


def test_a_headless_base_gets_the_runs_head(tmp_path):
    """As with bert-base-uncased, whose classifier is new: the run brings it."""
    tf.BertModel(CASES["bert"].config()).save_pretrained(tmp_path / "base")
    model = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=5)
    supernet = perturb(SuperTransformer(model, space_of("bert"), rank=4)).eval()
    torch.manual_seed(5)
    supernet.save_pretrained(tmp_path / "run")
    twin = SuperTransformer.from_pretrained(tmp_path / "run")
    assert twin.config.num_labels == 5
    assert torch.equal(logits(twin), logits(supernet))


def test_tied_weights_stay_tied(tmp_path):
    supernet = elastic("llama-tied", "ForCausalLM")
    supernet.order("magnitude")
    supernet.save_pretrained(tmp_path)
    twin = SuperTransformer.from_pretrained(tmp_path, model=make("llama-tied", "ForCausalLM"))
    assert twin.get_output_embeddings().weight is twin.get_input_embeddings().weight
    assert not any("embed" in key or "lm_head" in key for key in load_file(tensors_file(tmp_path)))


def test_saving_while_stages_are_merged_saves_the_stages_and_no_merged_weight(saved, tmp_path):
    supernet, folder = saved
    supernet.merge_stages(2)
    supernet.save_pretrained(tmp_path / "merged")
    assert tensors_file(tmp_path / "merged").read_bytes() == tensors_file(folder).read_bytes()
    assert (tmp_path / "merged" / "mlfs.json").read_bytes() == (folder / "mlfs.json").read_bytes()


def edit(folder: Path, change: Callable[[dict], object]) -> None:
    path = folder / "mlfs.json"
    state = json.loads(path.read_text())
    change(state)
    path.write_text(json.dumps(state))


def flip_a_bit(folder: Path) -> None:
    path = tensors_file(folder)
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def other_tensors(folder: Path) -> None:
    path = tensors_file(folder)
    save_file({key: value + 1 for key, value in load_file(path).items()}, path)


def other_order(folder: Path) -> None:
    path = tensors_file(folder)
    save_file(load_file(path) | {"permutation.hidden": load_file(path)["permutation.hidden"].flip(0)}, path)


def cut(path: Path, share: float = 0.5) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "folder missing": (shutil.rmtree, "run folder .* does not exist: give the folder"),
    "json missing": (lambda f: (f / "mlfs.json").unlink(), r"has no mlfs\.json: it is no run folder, or"),
    "json empty": (lambda f: (f / "mlfs.json").write_text(""), r"mlfs\.json cannot be read .*it is damaged"),
    "json cut": (lambda f: cut(f / "mlfs.json"), r"mlfs\.json cannot be read .*it is damaged"),
    "json no text": (
        lambda f: (f / "mlfs.json").write_bytes(b"\xff\xfe"),
        r"mlfs\.json cannot be read .*it is damaged",
    ),
    "json no object": (lambda f: (f / "mlfs.json").write_text("[1]"), "holds no JSON object: it is damaged"),
    "json lacks the space": (lambda f: edit(f, lambda s: s.pop("space")), r"lacks \['space'\]: it is damaged"),
    "json lacks its checksum": (lambda f: edit(f, lambda s: s.pop("checksum")), r"lacks \['checksum'\]"),
    "newer format": (
        lambda f: edit(f, lambda s: (s.pop("space"), s.update(format=99))),
        "has format 99, this version reads 1 to 4",
    ),
    "other alpha": (lambda f: edit(f, lambda s: s.update(alpha=99.0)), r"mlfs\.json is not what was saved"),
    "other rank": (lambda f: edit(f, lambda s: s.update(rank=2)), r"mlfs\.json is not what was saved"),
    "other space": (lambda f: edit(f, lambda s: s["space"].update(ffn=[40])), r"mlfs\.json is not what was saved"),
    "fewer trained stages": (
        lambda f: edit(f, lambda s: s.update(trained_stages=1)),
        r"mlfs\.json is not what was saved",
    ),
    "other file name": (
        lambda f: edit(f, lambda s: s["tensors"].update(file="../x")),
        r"mlfs\.json is not what was saved",
    ),
    "tensors missing": (lambda f: tensors_file(f).unlink(), "lacks its tensors 'stages-.*half-copied"),
    "tensors cut": (lambda f: cut(tensors_file(f)), r"is not what was saved \(its SHA-256 differs\)"),
    "tensors empty": (lambda f: tensors_file(f).write_bytes(b""), r"is not what was saved \(its SHA-256 differs\)"),
    "a bit flipped": (flip_a_bit, r"is not what was saved \(its SHA-256 differs\)"),
    "other order": (other_order, r"is not what was saved \(its SHA-256 differs\)"),
    "other tensors": (other_tensors, r"is not what was saved \(its SHA-256 differs\)"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE.keys())
def test_damaged_run_is_refused_in_one_line(saved, damage, message):
    supernet, folder = saved
    damage(folder)
    for attempt in (lambda: load(folder), lambda: supernet.restore(folder)):
        before = logits(supernet)
        with pytest.raises(MLFSError, match=message) as raised:
            attempt()
        assert "\n" not in str(raised.value) and str(folder) in str(raised.value)
        assert torch.equal(logits(supernet), before)


def test_a_file_is_no_run_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MLFSError, match="does not exist"):
        load(tmp_path / "file")
    with pytest.raises(MLFSError, match="is a file: give a folder to save to"):
        elastic("bert", "ForSequenceClassification").save_pretrained(tmp_path / "file")


def test_json_laid_out_otherwise_is_the_same_run(saved):
    supernet, folder = saved
    edit(folder, lambda state: None)
    assert torch.equal(logits(load(folder)), logits(supernet))


@pytest.mark.parametrize("key", ["rank", "alpha", "space", "stages"])
def test_run_of_another_shape_is_not_restored_into_this_one(saved, key):
    _, folder = saved
    options = {"rank": 4, "alpha": 8.0, "stages": 3} | {"rank": {"rank": 2}, "alpha": {"alpha": 4.0}}.get(key, {})
    options |= {"stages": 2} if key == "stages" else {}
    space = space_of("bert", per_layer=key != "space")
    supernet = SuperTransformer(make("bert", "ForSequenceClassification"), space, **options)
    with pytest.raises(MLFSError, match=f"was saved with another {key}: resume with the options of that run"):
        supernet.restore(folder)


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def die(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def second_call(action: Callable) -> Callable:
    """`os.replace` that works once and then does `action`: the tensors are renamed, the JSON is not."""
    calls: list[int] = []
    replace = os.replace

    def run(*args: object) -> None:
        calls.append(1)
        return replace(*args) if len(calls) < 2 else action()

    return run


INTERRUPTIONS = {
    "writing the tensors": lambda action: ("supernet.checkpoint.save_file", action),
    "renaming the tensors": lambda action: ("files.os.replace", action),
    "renaming the json": lambda action: ("files.os.replace", second_call(action)),
    "writing the json": lambda action: ("files.json.dumps", action),
}


@pytest.mark.parametrize("action", [full, die], ids=["disk full", "interrupted"])
@pytest.mark.parametrize("where", INTERRUPTIONS)
def test_a_save_that_dies_leaves_the_earlier_one_whole(saved, monkeypatch, where, action):
    supernet, folder = saved
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    expected = logits(supernet)
    with torch.no_grad():
        for parameter in supernet.own_parameters().values():
            parameter += 0.1
    place, replacement = INTERRUPTIONS[where](action)
    with monkeypatch.context() as patch:
        patch.setattr(f"mlfs.{place}", replacement)
        if action is die:
            with pytest.raises(KeyboardInterrupt):
                supernet.save_pretrained(folder)
        else:
            with pytest.raises(
                MLFSError, match=r"could not save to .*No space left .*what was saved there before is whole"
            ):
                supernet.save_pretrained(folder)
    assert torch.equal(logits(load(folder)), expected)
    assert all((folder / name).read_bytes() == data for name, data in before.items())
    supernet.save_pretrained(folder)
    assert torch.equal(logits(load(folder)), logits(supernet)) and not torch.equal(logits(supernet), expected)
    assert len(list(folder.iterdir())) == 2, "the save that died, or the one before, left something"


def test_a_process_killed_at_any_moment_of_saving_leaves_a_run_that_loads(saved):
    """Every file operation of the save in turn is the last one that happens."""
    supernet, folder = saved
    expected = {True: logits(supernet)}
    with torch.no_grad():
        for parameter in supernet.own_parameters().values():
            parameter += 0.1
    expected[False] = logits(supernet)
    outcomes = []
    for count in range(1, 40):
        copy = folder.with_name(f"copy-{count}")
        shutil.copytree(folder, copy)
        pid = os.fork()
        if pid == 0:
            left = [count]

            def audit(event: str, _: tuple, left: list[int] = left) -> None:
                if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.chmod", "tempfile.mkstemp"):
                    left[0] -= 1
                    if left[0] == 0:
                        os._exit(1)

            sys.addaudithook(audit)
            supernet.save_pretrained(copy)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        (old,) = [value for value in (True, False) if torch.equal(logits(load(copy)), expected[value])]
        outcomes.append(old)
        if os.waitstatus_to_exitcode(status) == 0:
            break
    assert outcomes == sorted(outcomes, reverse=True)  # the old run, and from some moment on the new one
    assert outcomes[0] is True and outcomes[-1] is False and len(outcomes) > 5


def test_saving_twice_leaves_one_set_of_tensors(saved):
    supernet, folder = saved
    supernet.save_pretrained(folder)
    assert len(list(folder.iterdir())) == 2
    supernet.own_parameters()["classifier.bias"].data += 1
    supernet.save_pretrained(folder)
    assert len(list(folder.iterdir())) == 2
    assert torch.equal(logits(load(folder)), logits(supernet))


def test_other_files_in_the_folder_are_left_alone(saved):
    supernet, folder = saved
    (folder / "tokenizer.json").write_text("{}")
    (folder / "distiller.safetensors").write_bytes(b"x")
    supernet.own_parameters()["classifier.bias"].data += 1
    supernet.save_pretrained(folder)
    assert (folder / "tokenizer.json").read_text() == "{}" and (folder / "distiller.safetensors").read_bytes() == b"x"


def test_missing_base_says_what_to_do(tmp_path):
    supernet = SuperTransformer(make("bert", "ForSequenceClassification"), space_of("bert"), rank=4)
    supernet.save_pretrained(tmp_path / "unnamed")
    with pytest.raises(MLFSError, match="does not say where its base came from: pass it"):
        SuperTransformer.from_pretrained(tmp_path / "unnamed")
    supernet.base_name = str(tmp_path / "gone")
    supernet.save_pretrained(tmp_path / "run")
    with pytest.raises(MLFSError, match=r"the base .*gone' cannot be loaded .*: pass it") as raised:
        SuperTransformer.from_pretrained(tmp_path / "run")
    assert "\n" not in str(raised.value)


def test_a_base_may_be_given_as_a_path_and_one_of_other_sizes_is_refused_in_one_line(tmp_path):
    base, narrower = tmp_path / "base", tmp_path / "narrower"
    model = make("bert", "ForSequenceClassification")
    model.save_pretrained(base)
    supernet = elastic("bert", "ForSequenceClassification")
    supernet.extract(supernet.space.min).save_pretrained(narrower)
    loaded = SuperTransformer(type(model).from_pretrained(base), rank=2)
    loaded.save_pretrained(tmp_path / "run")
    SuperTransformer.from_pretrained(tmp_path / "run", model=base)
    with pytest.raises(MLFSError, match=r"the base .* cannot be loaded") as raised:
        SuperTransformer.from_pretrained(tmp_path / "run", model=narrower)
    assert "\n" not in str(raised.value)
