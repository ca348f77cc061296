"""What a slice has kept before any training: rules for layers, and orders of the units along each axis.

    python -m bench.quality.slices                    SmolLM2 on Python source, nats per token
    python -m bench.quality.slices --model minilm     MiniLM fine-tuned on SST-2 (16,000 sentences, one pass), accuracy
    python -m bench.quality.slices --only layers      one part: layers, hidden, heads, ffn, or mixed
    python -m bench.quality.slices --table            prints the recorded results

Rules for layers: evenly spaced; by influence (1 - cos of a layer's input and output, measured once, as in ShortGPT, or
anew after each layer is out); by loss (`mlfs.supernet.depth`); by loss with every layer tried; and by the dynamic
programme of AmoebaLLM (of the first n layers the best m to leave out, by the loss of the whole model without them),
whose depths need not lie within one another. All are measured on calibration batches, and compared on others. "mixed"
compares sizes of about two thirds of SmolLM2, layers by loss.
"""

import argparse
import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, DataCollatorWithPadding, default_data_collator, set_seed

from bench.environment import environment
from mlfs import MLFSArguments, MLFSTrainer, SearchSpace, Subnet, SuperTransformer
from mlfs.commands.bases import load_model, load_tokenizer
from mlfs.data.arguments import DataArguments
from mlfs.data.builtin import stdlib_source
from mlfs.data.raw import load_raw, prepare
from mlfs.data.tokens import tokenize
from mlfs.files import write_json
from mlfs.models.pretrained import MINILM, SMOLLM2, find_model
from mlfs.models.residual import why_not_rotatable
from mlfs.report.table import table
from mlfs.supernet.depth import depth_search

RESULTS = Path(__file__).parents[1] / "results" / "slices.json"
DATA = Path(__file__).parents[3] / "shared" / "data" / "glue" / "SST-2"
PARTS = ("layers", "hidden", "heads", "ffn", "mixed")
ORDERS = ("none", "magnitude", "activation", "gradient", "rotation")
# (heads, ffn, layers) that leave about two thirds of SmolLM2
TWO_THIRDS = (
    (9, 1536, 18), (9, 1408, 20), (9, 1152, 22), (9, 1024, 24), (9, 896, 26), (9, 768, 28),
    (6, 1408, 22), (6, 1280, 24), (6, 1024, 26),
)  # fmt: skip
Batch = Mapping[str, Tensor]
Kept = tuple[int, ...]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["smollm2", "minilm"], default="smollm2")
    parser.add_argument("--only", choices=PARTS, help="run one part")
    parser.add_argument("--rows", nargs="+", choices=[*RULES, *ORDERS], help="run these rules or orders alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, default=DATA, help="the folder of SST-2, for minilm")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="print the recorded results and stop")
    given = parser.parse_args(arguments)
    recorded = json.loads(given.output.read_text()) if given.output.exists() else {}
    if not given.table:
        origin = environment(given.seed)
        subject = decoder(given.seed) if given.model == "smollm2" else encoder(given.seed, given.data)
        for part in [given.only] if given.only else PARTS:
            rows = recorded.setdefault(given.model, {}).setdefault(part, {})
            measured = {"layers": layers, "mixed": mixed}.get(part) or functools.partial(orders, axis=part)
            for name, row in measured(subject, given.rows):
                rows[name] = {"row": row, "environment": origin}
                write_json(given.output, recorded)
                print(name, row, flush=True)
    for model, parts in recorded.items():
        for part, rows in parts.items():
            print(f"\n{model}, {part}\n{table([{part: name, **kept['row']} for name, kept in rows.items()])}")


class Subject:
    """A model to slice, and what its slices are measured by.

    Args:
        make: makes the super-transformer, whole and unordered.
        calibration: batches that rules and orders are measured on.
        score: computes what is reported of the size that is active.
        unit: what that is.
        sizes: sizes to slice each axis to, and numbers of layers. mixed: sizes that are sliced along several axes.
    """

    def __init__(
        self,
        make: Callable[[], SuperTransformer],
        calibration: list[Batch],
        score: Callable[[SuperTransformer], float],
        unit: str,
        sizes: Mapping[str, Sequence[int]],
        mixed: Sequence[Subnet] = (),
    ) -> None:
        self.make, self.calibration, self.score = make, calibration, score
        self.unit, self.sizes, self.mixed = unit, sizes, mixed


def decoder(seed: int) -> Subject:
    """SmolLM2-135M on source of the standard library: 24 blocks of 256 tokens for calibration, 32 for the loss."""
    train, validation = stdlib_source(seed)
    tokenizer = load_tokenizer(SMOLLM2)
    data = DataArguments(block_size=256, max_train_samples=24, max_eval_samples=32)
    sets = tokenize(prepare(train.select_columns(["text"]), validation.select_columns(["text"]), data), tokenizer, data)
    blocks = {name: list(DataLoader(rows, 4, collate_fn=default_data_collator)) for name, rows in sets.items()}

    def make() -> SuperTransformer:
        model = AutoModelForCausalLM.from_pretrained(find_model(SMOLLM2), dtype=torch.float32).eval()
        space = SearchSpace((576, 480, 384), (9, 6), (1536, *range(1408, 767, -128)), tuple(range(30, 14, -1)))
        return SuperTransformer(model, space, rank=0, base_name=SMOLLM2)

    def score(supernet: SuperTransformer) -> float:
        losses = [supernet(**batch, use_cache=False).loss.item() for batch in blocks["validation"]]
        return sum(losses) / len(losses)

    sizes = {"layers": (26, 24, 22, 20, 18, 15), "hidden": (480, 384), "heads": (6,), "ffn": (1152,)}
    mixed = [Subnet(576, *size) for size in TWO_THIRDS]
    return Subject(make, blocks["train"], score, "nats per token", sizes, mixed)


def encoder(seed: int, folder: Path) -> Subject:
    """MiniLM after stage 0 on 16,000 sentences of SST-2: 30 batches of 32 for calibration, accuracy on the dev set."""
    files = {name: str(folder / f"{file}.tsv") for name, file in (("train_file", "train"), ("validation_file", "dev"))}
    data = DataArguments(**files, max_train_samples=16_000)
    raw, tokenizer = load_raw(data), load_tokenizer(MINILM)
    sets, collator = tokenize(raw, tokenizer, data), DataCollatorWithPadding(tokenizer)
    run = Path("runs", f"slices-{seed}")
    space = SearchSpace((384, 288, 192), (12, 9, 6), (1536, 1152, 768), (6, 5, 4, 3, 2))

    def make() -> SuperTransformer:
        set_seed(seed)
        supernet = SuperTransformer(load_model(MINILM, raw, tokenizer), space)
        if (run / "stage-0" / "mlfs.json").exists():
            supernet.restore(run / "stage-0")
        else:
            args = MLFSArguments(
                output_dir=str(run),
                seed=seed,
                stages_to_train=[0],
                num_train_epochs=1,
                per_device_train_batch_size=32,
                save_strategy="no",
                report_to=[],
                overwrite_run=True,
            )
            MLFSTrainer(supernet, args, train_dataset=sets["train"], data_collator=collator).train()
        return supernet.eval()

    def score(supernet: SuperTransformer) -> float:
        hits = [supernet(**batch).logits.argmax(-1).eq(batch["labels"]) for batch in loaders["validation"]]
        return 100 * torch.cat(hits).float().mean().item()

    train = sets["train"].shuffle(seed=seed).select(range(960))
    loaders = {
        name: list(DataLoader(rows, 32, collate_fn=collator))  # type: ignore[arg-type]
        for name, rows in (("train", train), ("validation", sets["validation"]))
    }
    sizes = {"layers": (5, 4, 3, 2), "hidden": (288, 192), "heads": (9, 6), "ffn": (1152, 768)}
    return Subject(make, [dict(batch) for batch in loaders["train"]], score, "% right", sizes)


# ---- layers -------------------------------------------------------------------------------------------------------


def layers(subject: Subject, names: Sequence[str] | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Measures what each rule keeps: the score of every depth, and how many batches the choice ran."""
    supernet, counts = subject.make(), subject.sizes["layers"]
    yield "whole model", {subject.unit: _scored(subject, supernet, tuple(range(supernet.space.max.depth)))}
    for name in names or RULES:
        runs: list[None] = []
        handle = supernet.model.register_forward_pre_hook(lambda *_, runs=runs: runs.append(None))
        chosen = RULES[name](supernet, subject.calibration, counts)
        handle.remove()
        row: dict[str, Any] = {f"{count} layers": _scored(subject, supernet, chosen[count]) for count in counts}
        yield name, row | {"batches": len(runs)}


def _even(supernet: SuperTransformer, _: list[Batch], counts: Sequence[int]) -> dict[int, Kept]:
    return {count: supernet.kept_layers(_depth(supernet, count)) for count in counts}


def _influence_once(supernet: SuperTransformer, batches: list[Batch], counts: Sequence[int]) -> dict[int, Kept]:
    every = list(range(supernet.space.max.depth))
    with depth_search(supernet, batches) as search:
        influence = search.measure(every).influence
    return _first(sorted(every, key=influence.__getitem__, reverse=True), counts)


def _influence(supernet: SuperTransformer, batches: list[Batch], counts: Sequence[int]) -> dict[int, Kept]:
    return _first(supernet.rank_layers("influence", batches), counts)


def _loss(supernet: SuperTransformer, batches: list[Batch], counts: Sequence[int]) -> dict[int, Kept]:
    return _first(supernet.rank_layers("loss", batches), counts)


def _loss_of_all(supernet: SuperTransformer, batches: list[Batch], counts: Sequence[int]) -> dict[int, Kept]:
    with depth_search(supernet, batches) as search:
        return _first(search.ranking("loss", min(counts), candidates=supernet.space.max.depth), counts)


def _programme(supernet: SuperTransformer, batches: list[Batch], counts: Sequence[int]) -> dict[int, Kept]:
    """Of the first n layers finds the best m to leave out, for all n and m: keeping layer n, or leaving it out."""
    every = range(supernet.space.max.depth)
    most = len(every) - min(counts)
    best: dict[int, Kept] = {0: ()}
    with depth_search(supernet, batches) as search:

        @functools.cache
        def loss(out: Kept) -> float:
            return search.measure([layer for layer in every if layer not in out]).loss

        for layer in every:
            found = dict(best)
            for count, out in best.items():
                longer = (*out, layer)
                if count < most and (count + 1 not in best or loss(longer) < loss(best[count + 1])):
                    found[count + 1] = longer
            best = found
    return {count: tuple(layer for layer in every if layer not in best[len(every) - count]) for count in counts}


RULES: dict[str, Callable[[SuperTransformer, list[Batch], Sequence[int]], dict[int, Kept]]] = {
    "evenly spaced": _even,
    "influence, measured once": _influence_once,
    "influence": _influence,
    "loss": _loss,
    "loss, every layer tried": _loss_of_all,
    "dynamic programme": _programme,
}


def _first(ranking: Sequence[int], counts: Sequence[int]) -> dict[int, Kept]:
    return {count: tuple(sorted(ranking[:count])) for count in counts}


def _depth(supernet: SuperTransformer, count: int) -> Subnet:
    full = supernet.space.max
    return Subnet(full.hidden, full.heads, full.ffn, count)


def _scored(subject: Subject, supernet: SuperTransformer, kept: Kept) -> float:
    full = supernet.space.max
    sizes = supernet.dimensions.layer_sizes(Subnet(full.hidden, full.heads, full.ffn, kept))
    with torch.no_grad(), supernet.activate_sizes(sizes):
        return subject.score(supernet)


# ---- several axes -----------------------------------------------------------------------------------------------


def mixed(subject: Subject, names: Sequence[str] | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Measures sizes that are sliced along several axes, with the layers of each depth by loss."""
    scores: dict[str, dict[str, Any]] = {str(subnet): {} for subnet in subject.mixed}
    for order in names or ("activation", "gradient"):
        supernet = subject.make()
        supernet.order(order, subject.calibration)  # type: ignore[arg-type]
        for subnet in subject.mixed:
            row = scores[str(subnet)]
            row["parameters"] = supernet.count_parameters(subnet)
            with torch.no_grad(), supernet.activate(subnet):
                row[order] = subject.score(supernet)
            yield str(subnet), row


# ---- units --------------------------------------------------------------------------------------------------------


def orders(subject: Subject, names: Sequence[str] | None, axis: str = "hidden") -> Iterator[tuple[str, dict[str, Any]]]:
    """Measures what each order of the units keeps along one axis, all others whole."""
    for order in names or ORDERS:
        supernet = subject.make()
        if order == "rotation" and (axis != "hidden" or why_not_rotatable(supernet.model, supernet.family)):
            continue
        if order != "none":
            supernet.order(order, subject.calibration, layers="even")  # type: ignore[arg-type]
        row: dict[str, Any] = {}
        for subnet in _sliced(supernet, axis, subject.sizes[axis]):
            with torch.no_grad(), supernet.activate(subnet):
                row[f"{axis} {getattr(subnet, axis)}"] = subject.score(supernet)
            row[f"parameters of {getattr(subnet, axis)}"] = supernet.count_parameters(subnet)
        yield order, row


def _sliced(supernet: SuperTransformer, axis: str, sizes: Sequence[int]) -> Iterator[Subnet]:
    full = supernet.space.max
    for size in (getattr(full, axis), *sizes):
        yield Subnet(**{**full.to_dict(), axis: size})


if __name__ == "__main__":
    main()
