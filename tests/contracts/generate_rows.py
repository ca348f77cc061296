"""Rows of the contract with transformers' generate; tests/contracts/test_generate.py holds them."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache, set_seed

from tests.contracts import page
from tests.models.fused.models import masked
from tests.tiny_models import inputs

SAME, PLAIN, REFUSED = "as the extracted model", "as transformers: an error", "refused"
Run = Callable[[PreTrainedModel, PreTrainedModel], Tensor]  # of the model, and a small one that may assist


@dataclasses.dataclass(frozen=True)
class Row:
    """What is asked of `generate`, what a super-transformer does, and why; with a call that asks for it."""

    asked: str
    does: str
    run: Run
    why: str = ""


GREEDY: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
SAMPLED: dict[str, Any] = {"max_new_tokens": 6, "do_sample": True}


def ids() -> Tensor:
    return masked("none")["input_ids"]


def call(left: bool = False, seed: int | None = None, one: bool = False, **options: Any) -> Run:
    """A call of `generate` on one text or three, which may be padded on the left."""

    def run(model: PreTrainedModel, assistant: PreTrainedModel) -> Tensor:
        if options.get("assistant_model") == "small":
            given = options | {"assistant_model": assistant}
        else:
            given = options
        if seed is not None:
            set_seed(seed)
        batch = inputs("left") if left else {"input_ids": ids()[:1] if one else ids()}
        return model.generate(**batch, **(GREEDY if seed is None else SAMPLED), **given)

    return run


def going_on(make: Callable[[Any], Any]) -> Run:
    """A call of `generate` that goes on from a cache in which the first six tokens are."""

    def run(model: PreTrainedModel, assistant: PreTrainedModel) -> Tensor:
        cache, x = make(model.config), ids()
        model(x[:, :6], attention_mask=torch.ones(3, 6, dtype=torch.long), past_key_values=cache)
        return model.generate(x, past_key_values=cache, **GREEDY)

    return run


def from_embeddings(model: PreTrainedModel, assistant: PreTrainedModel) -> Tensor:
    return model.generate(inputs_embeds=model.get_input_embeddings()(ids()), **GREEDY)


NEEDS_CODE = "transformers loads code from the Hub for it, and asks for trust_remote_code."
ROWS = [
    Row("a cache that grows (`dynamic`, the default)", SAME, call()),
    Row("use_cache=False", SAME, call(use_cache=False)),
    Row("left padding", SAME, call(left=True)),
    Row("cache_implementation=static", SAME, call(left=True, cache_implementation="static"),
        "Keys beyond those that are written are not read."),
    Row("cache_implementation=sliding_window", SAME, call(left=True, cache_implementation="sliding_window")),
    Row("cache_implementation=hybrid", SAME, call(left=True, cache_implementation="hybrid")),
    Row("cache_implementation=offloaded", PLAIN, call(cache_implementation="offloaded"),
        "Where there is no GPU; not run on one."),
    Row("cache_implementation=offloaded_static", PLAIN, call(cache_implementation="offloaded_static"), "The same."),
    Row("cache_implementation=quantized", PLAIN, call(cache_implementation="quantized"),
        "Without optimum-quanto or hqq, or for models with a window; not run with them."),
    Row("prefill_chunk_size", SAME, call(prefill_chunk_size=4)),
    Row("prefill_chunk_size, left padding", SAME, call(left=True, prefill_chunk_size=4)),
    Row("prefill_chunk_size, static", SAME, call(prefill_chunk_size=4, cache_implementation="static"),
        "The cache, which transformers allocates for the full model, is allocated anew for the size."),
    Row("num_beams", SAME, call(left=True, num_beams=3, num_return_sequences=2)),
    Row("num_beams, static", SAME, call(num_beams=3, cache_implementation="static")),
    Row("sampling with a seed", SAME, call(left=True, seed=3, top_k=9, top_p=0.9, temperature=0.7)),
    Row("beams that sample, with a seed", SAME, call(seed=3, num_beams=2)),
    Row("processors of logits", SAME, call(repetition_penalty=1.3, no_repeat_ngram_size=2)),
    Row("guidance_scale", SAME, call(guidance_scale=1.5)),
    Row("prompt_lookup_num_tokens", SAME, call(one=True, prompt_lookup_num_tokens=3)),
    Row("assistant_model", SAME, call(one=True, assistant_model="small"), "A smaller size that was extracted, say."),
    Row("assistant_model, sampling with a seed", SAME, call(one=True, seed=3, assistant_model="small")),
    Row("a cache that is gone on with", SAME, going_on(lambda config: DynamicCache(config=config)),
        "At the size that wrote it; see below."),
    Row("a static cache that is gone on with", SAME,
        going_on(lambda config: StaticCache(config=config, max_cache_len=30)), "The same."),
    Row("inputs_embeds", SAME, from_embeddings, "Made by the model's embeddings at that size."),
    Row("penalty_alpha", PLAIN, call(penalty_alpha=0.6, top_k=4), NEEDS_CODE),
    Row("num_beam_groups", PLAIN, call(num_beams=4, num_beam_groups=2, diversity_penalty=0.5), NEEDS_CODE),
]  # fmt: skip
CHANGED = Row(
    "a cache of another size is gone on with", REFUSED, call(),
    "Where its heads or layers differ: the size that wrote it has to go on, or a new cache be taken.",
)  # fmt: skip


def text() -> str:
    """The page, written from the rows."""
    heads = ("asked", "a super-transformer does", "notes")
    cells = [(row.asked, row.does, row.why) for row in (*ROWS, CHANGED)]
    return page.page(
        f"""
# The contract with generate
Every decoder of the table of families (docs/models.md) makes, under `supernet.activate(subnet)`, the tokens that the
model makes that `supernet.extract(subnet)` returns. Tested for three sizes of each: the full one, one that a
checkpoint can state, and one whose layers differ and that leaves layer 0 out. "{PLAIN}" is the error that the extracted
model raises, too.
""",
        [("What is asked", heads, cells)],
        "tests.contracts.generate_rows",
    )


if __name__ == "__main__":
    page.write("generate", text())
