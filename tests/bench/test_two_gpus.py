"""What the run on two GPUs makes of its phases' figures. The phases themselves need two devices."""

from __future__ import annotations

from typing import Any

from bench.two_gpus import beside_one, compare


def prompt(tokens: list[int], gaps: list[float], logprobs: list[float]) -> dict[str, list[Any]]:
    return {"tokens": tokens, "gaps": gaps, "logprobs": logprobs}


def test_only_the_first_difference_of_a_prompt_counts() -> None:
    reference = [
        prompt([5, 6, 7], [1.0, 0.02, 3.0], [-1.0, -2.0, -3.0]),
        prompt([5, 6, 7], [1.0, 0.5, 3.0], [-1.0, -2.0, -3.0]),
        prompt([5, 6, 7], [1.0, 0.5, 3.0], [-1.0, -2.0, -3.0]),
    ]
    others = [
        prompt([5, 9, 8], [], [-1.125, -9.0, -9.0]),
        prompt([5, 9, 7], [], [-1.0, -9.0, -3.0]),
        prompt([5, 6, 7], [], [-1.0, -2.25, -3.0]),
    ]
    want = {"prompts": 3, "differ": 2, "largest_gap": 0.5, "no_near_ties": 1, "logprobs_apart": 0.25}
    assert compare(reference, others) == want


def test_figures_stand_beside_those_of_one_gpu() -> None:
    one = {"cases": {"decode_b1": {"decode_tok_s": 100.0}, "mixed_1000": {"req_s": 40.0, "out_tok_s": 8000.0}}}
    dp2 = {"cases": {"decode_b1": {"decode_tok_s": 190.0}}}
    assert beside_one({"one": one, "dp2": dp2, "soak": {"ended": "killed after 100 s"}}) == {
        "dp2": {"decode_b1 decode_tok_s": 1.9}
    }
    assert beside_one({"one": {"ended": "with exit code 1"}, "dp2": dp2}) == {}
