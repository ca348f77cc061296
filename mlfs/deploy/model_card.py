"""Writes the README.md of an exported checkpoint."""

from pathlib import Path

from transformers import PreTrainedModel

from mlfs.models.pretrained import is_path
from mlfs.space.subnet import Subnet
from mlfs.supernet.model import SuperTransformer


def model_card(supernet: SuperTransformer, subnet: Subnet, small: PreTrainedModel, finished: bool = False) -> str:
    """Writes the model card of `small`, the extracted `subnet`: front matter for the Hub, sizes, and how to load it.

    Args:
        finished: whether it has trained on alone since it was extracted.
    """
    count = sum(p.numel() for p in small.parameters())
    full = supernet.count_parameters(supernet.space.max)
    auto = "AutoModelForCausalLM" if small.can_generate() else "AutoModelForSequenceClassification"
    # a folder is the reader's business only by its name
    base = supernet.hub_name or supernet.base_name or "an unnamed model"
    base = Path(base).name if is_path(base) else base
    alone = "Then all of its weights were trained on alone. " if finished else ""
    untied = _of_untied_heads(supernet, small)
    return f"""---
library_name: transformers
base_model: {base}
tags: [mlfs]
---

# {base}, {subnet}

A sub-network of {base}: {subnet.depth} of {supernet.dimensions.layers} layers, hidden size {subnet.hidden},
{subnet.heads} heads, feed-forward size {subnet.ffn}; {count / 1e6:.1f} million of {full / 1e6:.1f} million parameters.
It was trained with mlfs (Multistage Low-rank Fine-tuning of Super-transformers, arXiv 2404.01353) and has its low-rank
updates merged. {alone}{untied}It is an ordinary transformers checkpoint:

```python
from transformers import {auto}, AutoTokenizer

model = {auto}.from_pretrained(".")
tokenizer = AutoTokenizer.from_pretrained(".")
```

Subnet: `{subnet.to_json()}`; layers of {base}: {", ".join(map(str, supernet.kept_layers(subnet)))}.
"""


def _of_untied_heads(supernet: SuperTransformer, small: PreTrainedModel) -> str:
    """Says which heads were tied to the embeddings in the base and are not in `small`, and what that adds."""
    said = ""
    for name in supernet.record.untied:
        size = small.get_parameter(name).nbytes
        said += f"Its residual stream was rotated, so {name} is not tied to the embeddings: {size:,} bytes more. "
    return said
