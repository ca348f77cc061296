"""Inference parts of `bench.speed.cpu_step`: latency of each size, the price of switching, and decoding."""

import copy
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bench.speed.cpu_models import (
    DECODER_SUBNETS,
    ENCODER_SUBNETS,
    encoder_batch,
    one_sentence,
    supernet_of,
    with_stages,
)
from bench.speed.cpu_timing import alternate, ratios, spread
from mlfs import Subnet, SuperTransformer, without_padding


def inference(repeats: int) -> dict[str, Any]:
    """Times each size, stages apart and merged, against the extracted plain model; and switching between calls."""
    found: dict[str, Any] = {}
    supernet = with_stages(supernet_of("encoder")).eval()
    merged = copy.deepcopy(supernet)
    merged.merge_stages(merged.trained_stages)
    padded = {name: value for name, value in encoder_batch().items() if name != "labels"}
    batches = {"1": one_sentence(), "32": padded, "32, without padding": padded}
    for subnet in ENCODER_SUBNETS:
        small = supernet.extract(subnet).eval()
        for rows, batch in batches.items():
            packs = "without" in rows
            variants = {
                "mlfs": _active_call(supernet, subnet, batch, packs),
                "merged": _active_call(merged, subnet, batch, packs),
                "extracted": _plain_call(small, batch),
            }
            case = f"{subnet}, batch {rows}"
            times = alternate(variants, 3 * repeats, case)
            found[case] = {name: spread(values) for name, values in times.items()}
            found[case]["ratio"] = spread(ratios(times["mlfs"], times["extracted"]))
            found[case]["merged ratio"] = spread(ratios(times["merged"], times["extracted"]))
    found["switching"] = _switching(supernet, batches["1"], repeats)
    return found


def decoding(repeats: int) -> dict[str, Any]:
    """Measures tokens a second of the decoder at batch 1, and the share of the memory's bandwidth that they take.

    The bandwidth is that of a copy of 256 MB, measured in the same turns; every weight counts as read once a token.
    """
    found: dict[str, Any] = {}
    supernet = with_stages(supernet_of("decoder")).eval()
    prompt, tokens = torch.randint(1000, 40000, (1, 16)), 24
    source = torch.randn(64 << 20)
    target = torch.empty_like(source)
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    for subnet in DECODER_SUBNETS:
        small = supernet.extract(subnet).eval()

        def active(subnet: Subnet = subnet) -> None:
            with torch.inference_mode(), supernet.activate(subnet):
                supernet.generate(prompt, **options)

        def plain(small: PreTrainedModel = small) -> None:
            with torch.inference_mode():
                small.generate(prompt, **options)

        variants = {"mlfs": active, "extracted": plain, "copy": lambda: target.copy_(source)}
        times = alternate(variants, max(repeats // 2, 3), f"decoding {subnet}")
        bandwidth = 2 * source.nbytes / median(times["copy"])
        read = 4 * supernet.count_parameters(subnet) * tokens  # bytes of fp32
        found[str(subnet)] = {
            "mlfs tokens/s": tokens / median(times["mlfs"]),
            "extracted tokens/s": tokens / median(times["extracted"]),
            "ratio": spread(ratios(times["extracted"], times["mlfs"])),
            "share of bandwidth": read / median(times["mlfs"]) / bandwidth,
        }
    return found


def _active_call(
    supernet: SuperTransformer, subnet: Subnet, batch: dict[str, Tensor], packs: bool
) -> Callable[[], None]:
    def call() -> None:
        with torch.inference_mode(), supernet.activate(subnet), without_padding(packs):
            supernet(**batch)

    return call


def _plain_call(model: PreTrainedModel, batch: dict[str, Tensor]) -> Callable[[], None]:
    def call() -> None:
        with torch.inference_mode():
            model(**batch)

    return call


def _switching(supernet: SuperTransformer, batch: dict[str, Tensor], repeats: int) -> float:
    """Returns the seconds that a call takes longer because the one before ran another size."""
    a, b = ENCODER_SUBNETS[1:3]

    def calls(order: tuple[Subnet, ...]) -> Callable[[], None]:
        def run() -> None:
            for subnet in order:
                with torch.inference_mode(), supernet.activate(subnet):
                    supernet(**batch)

        return run

    variants = {"mixed": calls((a, b) * 4), "same": calls((a,) * 4 + (b,) * 4)}
    times = alternate(variants, 4 * repeats, "switching")
    # within a run the mixed order switches 7 times, the other once
    return (median(times["mixed"]) - median(times["same"])) / 6
