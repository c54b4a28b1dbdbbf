"""The training loop of jaxserve/examples: on-policy to rounding, without a copy of the weights, and it learns."""

from __future__ import annotations

from pathlib import Path

import pytest

from jaxserve.examples import reinforce


@pytest.mark.slow
@pytest.mark.usefixtures("quickest_compiles")
def test_it_learns_on_its_own_tokens(tmp_path: Path) -> None:
    llm, core = reinforce.make_model(tmp_path)
    with llm:
        reports = list(reinforce.train(llm, core, 15))
    assert [report.weight_version for report in reports] == list(range(15))
    assert max(report.gap for report in reports) < 1e-4
    assert sum(r.reward for r in reports[:3]) / 3 < 0.65
    assert sum(r.reward for r in reports[-3:]) / 3 > 0.85
