"""Subnets and search spaces for property tests: hypothesis strategies, and one small space."""

from hypothesis import strategies as st

from mlfs import SearchSpace, Subnet

SPACE = SearchSpace((48, 32, 16), (6, 4, 2), (40, 24, 16), ((0, 1, 2, 3), (0, 2, 3), (1, 3)))
indices = st.sets(st.integers(0, 60), min_size=1, max_size=8).map(lambda s: tuple(sorted(s)))


positive = st.integers(1, 5000)
descending = st.sets(positive, min_size=1, max_size=5).map(lambda s: tuple(sorted(s, reverse=True)))


@st.composite
def subnets(draw) -> Subnet:
    layers = draw(indices)
    each = st.one_of(positive, st.tuples(*[positive] * len(layers)))
    return Subnet(draw(positive), draw(each), draw(each), layers)


@st.composite
def spaces(draw) -> SearchSpace:
    full = draw(indices)
    shallower = draw(st.sets(st.sets(st.sampled_from(full), min_size=1).map(lambda s: tuple(sorted(s))), max_size=3))
    layers = (full, *sorted(shallower - {full}, key=len, reverse=True))
    return SearchSpace(draw(descending), draw(descending), draw(descending), layers, draw(st.booleans()))
