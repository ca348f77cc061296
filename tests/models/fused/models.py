"""The small models with fused blocks, and how they are run and watched."""

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.supernets import elastic
from tests.tiny_models import CASES, inputs, logits_of

GPT = ("gpt2", "gpt_bigcode-mqa", "gpt_bigcode-mha")
ROTARY = ("llama", "mistral", "qwen2", "qwen3")
WHOLLY = ("bert", "roberta", *GPT, *ROTARY)  # all of a layer but its attention
FUSED = (*WHOLLY, "gpt_neox")


class Calls(TorchDispatchMode):
    """Counts operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def suffix_of(name: str) -> str:
    classes = CASES[name].classes
    return "ForSequenceClassification" if "ForSequenceClassification" in classes else classes[0]


def language_model(name: str, dtype: torch.dtype = torch.float32, of=elastic):
    return of(name, "LMHeadModel" if name == "gpt2" else "ForCausalLM", dtype=dtype)


def run(supernet, subnet, **more) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits, and gradients of the last stage's adapters."""
    supernet.train_stage(2)
    with supernet.activate(subnet):
        logits = logits_of(supernet(**inputs(), **more))
        logits.float().square().sum().backward()
    gradients = {n: p.grad.clone() for n, p in supernet.named_parameters() if p.grad is not None}
    supernet.zero_grad()
    return logits.detach(), gradients


def masked(kind: str) -> dict[str, torch.Tensor]:
    """Inputs with padding on one side, none, or with a gap, which no range of keys has."""
    batch = inputs("left" if kind == "left" else "right")
    if kind == "none":
        del batch["attention_mask"]
    if kind == "gap":
        batch["attention_mask"][0, 3:5] = 0
    return batch
