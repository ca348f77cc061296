"""What a subnet's pass moves and multiplies at least, in two senses.

`LowerBound`: a launch for each group of products, attention and norm.

A tensor that passes between these is written once, and read once by each that needs it. Products of one input (query,
key and value; gate and up) read it together. What is a function of single numbers is applied as they are read or before
they are written (activations, residual sums, rotary embeddings): of a feed-forward block only the numbers before the
activation pass, to the backward pass too. Low-rank products are made again where that needs no further tensor. Each
weight and each adapter is read once by each pass. No program moves less that keeps these tensors in memory.

`LowerBoundOfScheme`: where the loop of every product is that of a plain one, over operands that are in memory as they
go into it: [x | h] · [W | B]ᵀ, with h = x · Aᵀ made before it. So x is read for h, too; dy for dB and g = dy · B; x for
dA; and the output of an activation is written for the product that reads it. Attention is PyTorch's, as
`bench.static.traffic` counts it, and rotary embeddings are a pass before and after it. All else is as above.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from bench.static.traffic import Launch, flash_attention, flash_attention_backward
from mlfs import Subnet, SuperTransformer
from mlfs.elastic.linear import ElasticLinear
from mlfs.models.configuration import has_final_norm
from mlfs.models.families.spec import Embedding, LayerNorm, Linear, RotaryAttention

BF16, FP32 = 2, 4
Tensor = tuple[str, int]  # name, and numbers that each token has


@dataclass(frozen=True)
class Products:
    """Linear layers that read one input: (n, m) of each, how many numbers their biases have, the adapters' rank."""

    shapes: tuple[tuple[int, int], ...]
    biases: int
    rank: int

    @property
    def a(self) -> int:
        """Bytes of all A, of their gradients too."""
        return self.rank * sum(n for n, _ in self.shapes) * FP32

    @property
    def b(self) -> int:
        """Bytes of all B."""
        return self.rank * sum(m for _, m in self.shapes) * FP32

    @property
    def weights(self) -> int:
        """Bytes."""
        return (sum(n * m for n, m in self.shapes) + self.biases) * BF16

    @property
    def writes(self) -> int:
        return sum(m for _, m in self.shapes)

    def forward_flops(self, tokens: int) -> int:
        return 2 * tokens * sum(n * m + self.rank * (n + m) for n, m in self.shapes)

    def backward_flops(self, tokens: int, needs_dx: bool) -> int:
        """g = dy · B, dB and dA; if dx is needed, dy · W and g · A."""
        low = sum(self.rank * (2 * m + (2 if needs_dx else 1) * n) for n, m in self.shapes)
        return 2 * tokens * (low + (sum(n * m for n, m in self.shapes) if needs_dx else 0))


class LowerBound:
    """The launches of a pass of `subnet`.

    Args:
        batch, length: of the tokens that run. past: how many are in the key-value cache before them.
        rank: of a linear layer's adapters, all that are read together.
    """

    def __init__(
        self, supernet: SuperTransformer, subnet: Subnet, batch: int, length: int, rank: int, past: int = 0
    ) -> None:
        self.supernet, self.sizes, self.rank = supernet, supernet.layer_sizes(subnet), rank
        self.tokens, self.length, self.past = batch * length, length, past
        self.hidden = subnet.hidden
        self.pre_norm = has_final_norm(supernet.family)  # else norms follow the sums, as in BERT
        self.heads = [self.sizes.of_layer["heads"][i] for i in subnet.layers]
        self.layers = [self._products(i) for i in subnet.layers]
        norms = supernet.family.layer.values()
        self.norm_weight = self.hidden * BF16 * (2 if any(isinstance(spec, LayerNorm) for spec in norms) else 1)

    def forward(self) -> Iterator[Launch]:
        """From the tokens to the last hidden state, which the head reads."""
        tables = sum(isinstance(spec, Embedding) for spec in self.supernet.family.outer.values())
        rows = {"tokens": self.tokens} | ({"positions": self.length} if tables > 1 else {})
        first, last = ("s0", self.hidden), (f"s{len(self.layers)}", self.hidden)
        summed = first if self.pre_norm else ("n", self.hidden)
        yield Launch(
            "embedding", {name: count * self.hidden * BF16 for name, count in rows.items()}, self._bytes([summed])
        )
        if not self.pre_norm:
            yield self._norm([summed], first)
        for j in range(len(self.layers)):
            t = self._tensors(j)
            if self.pre_norm:
                yield self._norm([t["s"]], t["a"])
            yield from self._product("qkv", j, t["a"], [], self._made_by_qkv(t))
            yield from self._attention(j, t)
            yield from self._product("out", j, t["o"], [t["s"]], [t["m"]])
            yield self._norm([t["m"]], t["c"])
            yield from self._product("up", j, t["c"], [], self._made_by_up(t))
            yield from self._product("down", j, self._made_by_up(t)[-1], [t["m" if self.pre_norm else "c"]], [t["n"]])
            if not self.pre_norm:
                yield self._norm([t["n"]], t["next"])
        if self.pre_norm:
            yield self._norm([last], ("y", self.hidden))

    def head(self) -> Launch:
        """Logits of one token."""
        words = self.supernet.model.get_output_embeddings().weight.shape[0]
        reads = self._bytes([("y", self.hidden)]) | {"head": words * self.hidden * BF16}
        return Launch("head", reads, {"logits": words * BF16}, 2 * words * self.hidden)

    def backward(self) -> Iterator[Launch]:
        """From the last hidden state's gradient to those of all adapters; embeddings and norms are frozen."""
        if self.pre_norm:
            last = f"s{len(self.layers)}"
            yield self._norm([("dy", self.hidden), (last, self.hidden)], (f"d{last}", self.hidden))
        for j in reversed(range(len(self.layers))):
            t = self._tensors(j)
            if not self.pre_norm:
                yield self._norm([t["dnext"], t["n"]], t["dn"])
            after = [t["dn"]]  # of the sum that the layer ends with: goes on through `down` and around it
            around_norm, around_block = (after, []) if self.pre_norm else ([], after)
            yield from self._product_backward("down", j, after, t["z"], [], t["dz"])
            yield from self._product_backward("up", j, [t["dz"]], t["c"], around_block, t["dc"])
            yield self._norm([t["dc"], t["m"], *around_norm], t["dm"])
            yield from self._product_backward("out", j, [t["dm"]], t["o"], [], t["do"])
            yield from self._attention_backward(j, t)
            dqkv = self._made_by_attention_backward(t)
            if j == 0:  # nothing before it trains
                yield from self._product_backward("qkv", j, dqkv, t["a"], [], None)
            elif self.pre_norm:
                yield from self._product_backward("qkv", j, dqkv, t["a"], [], t["da"])
                yield self._norm([t["da"], t["s"], t["dm"]], t["ds"])
            else:
                yield from self._product_backward("qkv", j, dqkv, t["a"], [t["dm"]], t["ds"])

    # ---- parts -------------------------------------------------------------------------------------------------------

    def _products(self, i: int) -> dict[str, Products]:
        """The linear layers of layer i, by what they read and write."""
        groups: dict[str, list[ElasticLinear]] = {"qkv": [], "out": [], "up": [], "down": []}
        for name, spec in self.supernet.family.layer.items():
            module = self.supernet.layers[i].get_submodule(name)
            if isinstance(spec, Linear) and isinstance(module, ElasticLinear):
                inner = {"heads": "out", "ffn": "down"}
                groups[inner.get(str(spec.reads), "up" if spec.writes == "ffn" else "qkv")].append(module)
        return {
            role: Products(
                tuple(module.read_sizes(self.sizes) for module in group),
                sum(module.read_sizes(self.sizes)[1] for module in group if module.bias is not None),
                self.rank,
            )
            for role, group in groups.items()
        }

    def _tensors(self, j: int) -> dict[str, Tensor]:
        """Those of the j-th layer: s goes in; a is what query, key and value read (s, or its norm); m is s + attention,
        c its norm, z the feed-forward block before its activation; n is the sum it ends with; next goes into the next
        layer. Gradients have a d before the name."""
        layer, hidden = self.layers[j], self.hidden
        widths = {"s": hidden, "qkv": layer["qkv"].writes, "o": layer["out"].shapes[0][0], "m": hidden, "c": hidden}
        widths |= {"z": layer["up"].writes}
        own = {name: (f"{name}{j}", width) for name, width in widths.items()}
        own["next"] = (f"s{j + 1}", hidden)
        own["a"] = (f"a{j}", hidden) if self.pre_norm else own["s"]
        own["n"] = own["next"] if self.pre_norm else (f"n{j}", hidden)
        return own | {f"d{key}": (f"d{name}", width) for key, (name, width) in own.items()}

    def _bytes(self, tensors: Iterable[Tensor]) -> dict[str, int]:
        return {name: self.tokens * width * BF16 for name, width in tensors}

    def _norm(self, reads: list[Tensor], writes: Tensor) -> Launch:
        return Launch("norm", self._bytes(reads) | {f"norm {writes[0]}": self.norm_weight}, self._bytes([writes]))

    def _product(self, role: str, j: int, x: Tensor, added: list[Tensor], writes: list[Tensor]) -> Iterator[Launch]:
        """`added` are read, too: they are added to what is written."""
        group, name = self.layers[j][role], f"{role}{j}"
        reads = self._bytes([x, *added]) | {f"W {name}": group.weights, f"A {name}": group.a, f"B {name}": group.b}
        yield Launch(role, reads, self._bytes(writes), group.forward_flops(self.tokens))

    def _product_backward(
        self, role: str, j: int, dy: list[Tensor], x: Tensor, added: list[Tensor], dx: Tensor | None
    ) -> Iterator[Launch]:
        """dx, dA and dB; without dx W is not read. Of `down` x is what went into the activation, dx its gradient."""
        group, name = self.layers[j][role], f"{role}{j}"
        reads = self._bytes([*dy, x, *added]) | {f"A {name}": group.a, f"B {name}": group.b}
        reads |= {f"W {name}": group.weights} if dx else {}
        writes = self._bytes([dx] if dx else []) | {f"dA {name}": group.a, f"dB {name}": group.b}
        yield Launch(f"{role} backward", reads, writes, group.backward_flops(self.tokens, dx is not None))

    def _made_by_qkv(self, t: dict[str, Tensor]) -> list[Tensor]:
        return [t["qkv"]]

    def _made_by_up(self, t: dict[str, Tensor]) -> list[Tensor]:
        """What `down` reads is last."""
        return [t["z"]]

    def _made_by_attention_backward(self, t: dict[str, Tensor]) -> list[Tensor]:
        return [t["dqkv"]]

    def _attention(self, j: int, t: dict[str, Tensor]) -> Iterator[Launch]:
        reads, writes = self._bytes([t["qkv"]]), self._bytes([t["o"]])
        row = (t["qkv"][1] - t["o"][1]) * BF16  # a token's keys and values
        if self.past:
            reads, writes = reads | {f"cache{j}": self.past * row}, writes | {f"cache{j}": self.tokens * row}
        else:
            writes |= self._logsumexp(j)
        yield Launch("attention", reads, writes, self._attention_flops(t))

    def _attention_backward(self, j: int, t: dict[str, Tensor]) -> Iterator[Launch]:
        """Five products where the forward pass has two: its scores are made again."""
        reads = self._bytes([t["qkv"], t["o"], t["do"]]) | self._logsumexp(j)
        yield Launch("attention backward", reads, self._bytes([t["dqkv"]]), self._attention_flops(t) * 5 // 2)

    def _attention_flops(self, t: dict[str, Tensor]) -> int:
        causal = self.pre_norm and not self.past
        return 4 * self.tokens * (self.past + self.length) * t["o"][1] // (2 if causal else 1)

    def _logsumexp(self, j: int) -> dict[str, int]:
        return {f"logsumexp{j}": self.tokens * self.heads[j] * FP32}


class LowerBoundOfScheme(LowerBound):
    """The launches of a training pass in which the loops of products are plain."""

    def _product(self, role: str, j: int, x: Tensor, added: list[Tensor], writes: list[Tensor]) -> Iterator[Launch]:
        group, name, h = self.layers[j][role], f"{role}{j}", self._ranks("h", role, j)
        thin = 2 * self.tokens * self.rank * sum(n for n, _ in group.shapes)
        yield Launch(f"thin {role}", self._bytes([x]) | {f"A {name}": group.a}, h, thin)
        reads = self._bytes([x, *added]) | {f"W {name}": group.weights, f"B {name}": group.b} | h
        yield Launch(role, reads, self._bytes(writes), group.forward_flops(self.tokens) - thin)

    def _product_backward(
        self, role: str, j: int, dy: list[Tensor], x: Tensor, added: list[Tensor], dx: Tensor | None
    ) -> Iterator[Launch]:
        """x of `down` is made again, from what went into the activation, beside dx; that of others is read for dA."""
        group, name, g = self.layers[j][role], f"{role}{j}", self._ranks("g", role, j)
        (n, m), flops = (sum(sizes) for sizes in zip(*group.shapes, strict=True)), 2 * self.tokens * self.rank
        reads = self._bytes(dy) | self._ranks("h", role, j) | {f"B {name}": group.b}
        yield Launch(f"thin {role} backward", reads, g | {f"dB {name}": group.b}, 2 * flops * m)
        of_a = {f"dA {name}": group.a}
        if role != "down":
            yield Launch(f"{role} dA", self._bytes([x]) | g, of_a, flops * n)
        if dx:
            reads = self._bytes([*dy, *added]) | {f"W {name}": group.weights, f"A {name}": group.a} | g
            reads, of_a = (reads | self._bytes([x]), of_a) if role == "down" else (reads, {})
            spent = 2 * flops * m + (flops * n if role != "down" else 0)
            products = group.backward_flops(self.tokens, True) - spent
            yield Launch(f"{role} backward", reads, self._bytes([dx]) | of_a, products)

    def _made_by_qkv(self, t: dict[str, Tensor]) -> list[Tensor]:
        return self._unturned(self._parts(t["qkv"], t))

    def _made_by_up(self, t: dict[str, Tensor]) -> list[Tensor]:
        name, width = t["z"]
        j = int(name[1:])
        return [(name, width), (f"act{j}", self.layers[j]["down"].shapes[0][0])]

    def _made_by_attention_backward(self, t: dict[str, Tensor]) -> list[Tensor]:
        return self._parts(t["dqkv"], t)

    def _attention(self, j: int, t: dict[str, Tensor]) -> Iterator[Launch]:
        qkv = self._parts(t["qkv"], t)
        if self._turns:
            yield Launch("rotary", self._bytes(self._unturned(qkv)[:2]), self._bytes(qkv[:2]))
        yield flash_attention(self._of_attention(j, t), self._attention_flops(t))

    def _attention_backward(self, j: int, t: dict[str, Tensor]) -> Iterator[Launch]:
        yield from flash_attention_backward(self._of_attention(j, t), self._attention_flops(t))
        dqkv = self._parts(t["dqkv"], t)
        if self._turns:
            yield Launch("rotary", self._bytes(self._unturned(dqkv)[:2]), self._bytes(dqkv[:2]))

    def _of_attention(self, j: int, t: dict[str, Tensor]) -> dict[str, tuple[str, int]]:
        """Tensors as PyTorch's attention names them, and their bytes."""
        q, heads = t["o"][1], self.tokens * self.heads[j] * FP32
        of = dict(zip("qkv", self._parts(t["qkv"], t), strict=True)) | {"o": t["o"], "do": t["do"]}
        of |= dict(zip(("dq", "dk", "dv"), self._unturned(self._parts(t["dqkv"], t)), strict=True))
        of |= {name: (f"{name}{j}", q) for name in ("wide_k", "wide_v") if of["k"][1] < q}
        found = {name: (key, self.tokens * width * BF16) for name, (key, width) in of.items()}
        found["sums"] = (f"sums{j}", self.tokens * q * FP32)
        return found | {name: (f"{name}{j}", heads) for name in ("lse", "delta")}

    def _parts(self, qkv: Tensor, t: dict[str, Tensor]) -> list[Tensor]:
        (name, width), q = qkv, t["o"][1]
        return [(f"{name} {part}", size) for part, size in zip("qkv", (q, *[(width - q) // 2] * 2), strict=True)]

    def _unturned(self, qkv: list[Tensor]) -> list[Tensor]:
        """Query and key without rotary embeddings, where the model has them, and value."""
        return [(f"{name} unturned", width) for name, width in qkv[:2]] + qkv[2:] if self._turns else qkv

    @property
    def _turns(self) -> bool:
        return any(isinstance(block, RotaryAttention) for block in self.supernet.family.fused.values())

    def _ranks(self, name: str, role: str, j: int) -> dict[str, int]:
        """h or g: `rank` numbers a token for each layer of the group."""
        return {f"{name} {role}{j}": self.tokens * self.rank * len(self.layers[j][role].shapes) * BF16}
