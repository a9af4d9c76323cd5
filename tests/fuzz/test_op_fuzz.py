"""The fuzzer of the ops: what it found, a few cases of each op, and that it sees what is wrong."""

import random

import op_fuzz
import pytest
import torch
from op_fuzz import check

from moekv.ops import reference

pytestmark = pytest.mark.usefixtures("one_thread")


def draw(op: str, seed: int, backend: str) -> op_fuzz.Fields:
    return {**op_fuzz.draw(op, random.Random(seed)), "backend": backend}


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("op", op_fuzz.BUILD)
@torch.no_grad()
def test_a_few_cases(op, backend):
    for seed in range(12):
        check(op, **draw(op, seed, backend))


@torch.no_grad()
def test_a_row_that_is_its_own_sample_counts_each_key_once():
    """Products of a key as a sample and as a neighbour, rounded apart at 1e6: no share of 1."""
    check(
        *("expected_attention",),
        **{"seed": 895933780, "backend": "torch", "dtype": "float32", "values": "normal"},
        **{"size": 1000.0, "layout": "dense", "batch": 1, "heads": 1, "group": 2, "dim": 2},
        **{"keys": 2, "scaling": 1.0, "softcap": 0.0, "padding": "none", "hidden": "value"},
        **{"poison": "none", "turned": 0, "own_turns": False},
    )


@torch.no_grad()
def test_padding_of_a_row_that_is_not_finite_stands_out_by_0():
    check(
        *("project_tokens",),
        **{"seed": 1824757714, "backend": "torch", "dtype": "float32", "values": "normal"},
        **{"size": 1.0, "layout": "dense", "batch": 1, "tokens": 2, "channels": 1},
        **{"projections": 1, "mask": True, "hidden": "value", "poison": "nan"},
    )


@torch.no_grad()
def test_equal_addends_whose_roundings_do_not_cancel():
    check(
        "project_tokens",
        **{"seed": 833070852, "backend": "torch", "dtype": "float16", "values": "equal"},
        **{"size": 0.01, "layout": "dense", "batch": 1, "tokens": 95, "channels": 288},
        **{"projections": 2, "mask": False, "hidden": "value", "poison": "none"},
    )


@torch.no_grad()
def test_equal_logits_beside_which_rounding_is_large():
    """Shares of a half, of whose bounds one is a number that the other swallows."""
    check(
        *("expected_attention",),
        **{"seed": 1161913526, "backend": "cpu", "dtype": "float32", "values": "ties"},
        **{"size": 1e4, "layout": "dense", "batch": 1, "heads": 1, "group": 1, "dim": 17},
        **{"keys": 6, "scaling": 0.125, "softcap": 0.0, "padding": "none", "hidden": "value"},
        **{"poison": "none", "turned": 0, "own_turns": False},
    )
    check(
        *("expert_scores",),
        **{"seed": 1012919060, "backend": "cpu", "dtype": "float32", "values": "ties"},
        **{"size": 1e4, "layout": "dense", "batch": 2, "heads": 2, "group": 1, "dim": 16},
        **{"keys": 3, "window": 3, "value_dim": 2, "kinds": [0], "scaling": 0.125},
        **{"softcap": 0.0, "pool": 1, "lag": 1, "padding": "none", "hidden": "value"},
        poison="none",
    )


@torch.no_grad()
def test_channels_whose_first_is_far_out():
    """A spread is summed up from the first channel on: how far it is out is lost in precision."""
    check(
        *("expert_scores",),
        **{"seed": 1061405020, "backend": "cpu", "dtype": "float32", "values": "spread"},
        **{"size": 1.0, "layout": "dense", "batch": 1, "heads": 3, "group": 0, "dim": 32},
        **{"keys": 12, "window": 0, "value_dim": 64, "kinds": [3], "scaling": 1.0},
        **{"softcap": 1.0, "pool": 1, "lag": 2, "padding": "none", "hidden": "value"},
        poison="none",
    )


def first_failure(op: str, cases: int = 200) -> int:
    for seed in range(cases):
        fields = draw(op, seed, "torch")
        if fields.get("wrong") is None and op_fuzz.failure(op, fields) is not None:
            return seed
    raise AssertionError(f"{cases} cases of {op} show nothing")


@torch.no_grad()
def test_seeded_bugs_are_found_and_made_small(monkeypatch):
    right = reference.mix_scores

    def without_offset(scores, weights, experts, gain=None, offset=None):
        return right(scores, weights, experts, gain)

    monkeypatch.setattr(reference, "mix_scores", without_offset)
    fields = draw("mix_scores", first_failure("mix_scores"), "torch")
    small = op_fuzz.smallest("mix_scores", fields)
    assert small["offset"] and small["batch"] == small["heads"] == small["keys"] == 1
    assert op_fuzz.line("mix_scores", small).startswith("check('mix_scores', seed=")

    from_below = reference.select_kept

    def ties_to_the_higher(scores, start=None, **options):
        return from_below(scores + torch.arange(scores.shape[-1]) * 1e-6, start, **options)

    monkeypatch.setattr(reference, "select_kept", ties_to_the_higher)
    first_failure("select_kept")
