"""Models whose residual stream can be rotated, and rotations for them."""

from collections.abc import Sequence

import torch
import transformers as tf
from torch import nn

from mlfs import SearchSpace, SuperTransformer
from mlfs.supernet.permutation import Permutation
from tests.helpers.calibration import active
from tests.supernets import elastic, perturb, subnets_of
from tests.tiny_models import CASES, PAD, VOCABULARY, all_models

ROTATABLE = [(name, suffix) for name, suffix in all_models() if name.startswith(("llama", "mistral", "qwen"))]
OTHERS = [(name, suffix) for name, suffix in all_models() if (name, suffix) not in ROTATABLE]
FIRST = [(name, case.classes[0]) for name, case in CASES.items() if (name, case.classes[0]) in ROTATABLE]

_ODD = {
    "vocab_size": VOCABULARY, "hidden_size": 45, "intermediate_size": 37, "num_hidden_layers": 3,
    "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 40, "pad_token_id": PAD,
}  # fmt: skip
ODD = {
    "llama with biases": lambda tied: tf.LlamaConfig(
        **_ODD, head_dim=6, attention_bias=True, mlp_bias=True, tie_word_embeddings=tied
    ),
    "mistral": lambda tied: tf.MistralConfig(**_ODD, head_dim=6, sliding_window=5, tie_word_embeddings=tied),
    "qwen2 with biases": lambda tied: tf.Qwen2Config(**_ODD, head_dim=6, tie_word_embeddings=tied),
    "qwen3 with norms": lambda tied: tf.Qwen3Config(**_ODD, head_dim=6, tie_word_embeddings=tied),
}
ODD_SPACE = SearchSpace((45, 31, 17), (9, 6, 3), (37, 19), ((0, 1, 2), (0, 2)))


def odd_model(name: str, tied: bool) -> tf.PreTrainedModel:
    """Makes a float64 causal LM of odd sizes, all of whose norms take their statistics in float64 too."""
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(ODD[name](tied)).double().eval()
    for path, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            parent, _, child = path.rpartition(".")
            norm = nn.RMSNorm(len(module.weight), eps=1e-6, dtype=torch.float64)
            setattr(model.get_submodule(parent), child, norm)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += torch.randn_like(parameter) * 0.3
    return model


def odd_supernet(name: str, tied: bool) -> SuperTransformer:
    """Makes it elastic: three stages of rank 3, each with an effect."""
    return perturb(SuperTransformer(odd_model(name, tied), ODD_SPACE, rank=3, alpha=6.0)).eval()


def orthogonal(size: int = 48, seed: int = 0) -> torch.Tensor:
    """Draws an orthogonal matrix, float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]


TIED = ("llama-tied", "ForCausalLM")


def rotated(name: str, suffix: str, seed: int = 0) -> SuperTransformer:
    """Makes a small model with trained stages that was rotated, and then ordered."""
    supernet = elastic(name, suffix)
    supernet.apply_rotation(orthogonal(seed=seed))
    supernet.apply_permutation(order_of(name))
    return supernet


def order_of(name: str, units: Sequence[int] = range(39, -1, -1)) -> Permutation:
    """Gives heads and feed-forward units of two layers another order."""
    groups = 6 if name == "llama-mqa" else 3
    return {("heads", 1): [*range(1, groups), 0], ("ffn", 2): list(units)}


def assert_rotated_alike(twin: SuperTransformer, supernet: SuperTransformer, name: str) -> None:
    """Compares what was done to two super-transformers, and every size, bit for bit."""
    assert twin.rotation is not None and torch.equal(twin.rotation, supernet.rotation)
    assert ("hidden", None) not in twin.permutation
    for subnet in subnets_of(name).values():
        assert torch.equal(active(twin, subnet), active(supernet, subnet))
