"""How layers make up groups, and what a table's reach lets go."""

from __future__ import annotations

import pytest

from jaxserve.models.cache_layout import CacheLayout, CachePlace, Reach, group_layers, one_table
from jaxserve.models.cache_spec import CacheSpec, StateSpec

FULL, NEAR, FAR = CacheSpec("full", 2, 8), CacheSpec("sliding", 2, 8, 24), CacheSpec("sliding", 2, 8, 64)
CHUNKED, LATENT, STATE = CacheSpec("chunked", 2, 8, 24), CacheSpec("latent", 1, 32), StateSpec((4,), (None,))
SHAPES = {  # kinds of layers -> layers of a group, its tables
    "gemma3_27b": (([NEAR] * 5 + [FULL]) * 10 + [NEAR] * 2, 11, 6),
    "gemma3_4b": (([NEAR] * 5 + [FULL]) * 5 + [NEAR] * 4, 5, 7),
    "gpt_oss": ([NEAR, FULL] * 12, 12, 2),
    "llama4": (([CHUNKED] * 3 + [FULL]) * 12, 12, 4),
    "three_kinds": ([NEAR, FAR, FULL] * 2, 2, 3),
    "one_of_many": ([NEAR] * 29 + [FULL], 5, 7),
}


@pytest.mark.parametrize("name", SHAPES)
def test_groups_are_of_one_size_and_kind(name: str) -> None:
    specs, size, tables = SHAPES[name]
    layout = group_layers(specs, 1000)
    assert (len(layout.arrays), layout.num_tables) == (size, tables)
    assert len({(p.table, p.array) for p in layout.places}) == len(specs), "two layers in one place"
    assert {p.array for p in layout.places} == set(range(size))
    for spec, place in zip(specs, layout.places, strict=True):
        assert place.table is not None
        assert layout.reaches[place.table] == Reach(spec.window, spec.kind == "chunked")


def test_one_table_where_groups_save_nothing_or_cannot_be() -> None:
    for specs in (
        [FULL] * 3,
        [NEAR] * 3,
        [NEAR, FULL, CacheSpec("full", 4, 8)],
        [NEAR, LATENT],
        [CacheSpec("sliding", 2, 8, n) for n in range(1, 12)],
    ):
        layout = group_layers(specs, 1000)
        assert layout == one_table(specs) and layout.arrays == tuple(specs)
        assert layout.places == tuple(CachePlace(i, 0) for i in range(len(specs)))
    assert group_layers([NEAR, FULL, FAR], 24) == one_table([NEAR, FULL, FAR]), "no text is longer than the windows"
    assert group_layers([NEAR, FULL, FAR], 64).reaches == (Reach(24), Reach(), Reach())


def test_the_one_table_reaches_as_far_as_any_layer() -> None:
    def reach(*specs: CacheSpec | StateSpec) -> Reach:
        return one_table(specs).reaches[0]

    assert reach(NEAR, FAR, STATE) == Reach(64)
    assert reach(CHUNKED, CHUNKED) == Reach(24, is_chunked=True)
    assert reach(CHUNKED, FAR) == Reach(64)
    assert reach(NEAR, FULL) == reach(STATE) == Reach()


def test_states_have_arrays_of_their_own() -> None:
    other = StateSpec((5,), (None,))
    layout = group_layers([STATE, NEAR, FULL, NEAR, other, FULL], 1000)
    places = [CachePlace(2, None), CachePlace(0, 0), CachePlace(0, 1), CachePlace(1, 0), CachePlace(3, None), CachePlace(1, 1)]
    assert layout == CacheLayout(tuple(places), (NEAR, NEAR, STATE, other), (Reach(24), Reach()))


@pytest.mark.parametrize("reach", [Reach(), Reach(1), Reach(24), Reach(24, is_chunked=True), Reach(32, is_chunked=True)], ids=str)
def test_what_a_request_holds_at_most(reach: Reach) -> None:
    """Whichever chunks it is computed in, before a step what no token reads is given back, and pages for the step are taken."""
    page, max_chunk = 16, 40
    for total in (1, 15, 16, 17, 100, 250):
        for chunk in (1, 7, 16, 40):
            for start in range(0, total, chunk):
                stop = min(start + chunk, total)
                held = -(-stop // page) - reach.first_read(start) // page
                assert 1 <= held <= reach.max_pages(total, page, max_chunk)
                for position in range(start, stop):
                    sees = position + 1 if reach.window is None else reach.window
                    if reach.is_chunked and reach.window is not None:
                        sees = position % reach.window + 1
                    assert reach.first_read(start) <= max(position + 1 - sees, 0)
