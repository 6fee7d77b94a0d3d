"""Turns and ratios of what is timed."""

from __future__ import annotations

import torch

from hf_adanorm.bench.timing import summarize, take_turns


def test_turns_alternate_and_the_warm_up_is_not_counted():
    calls = []
    functions = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    times = take_turns(functions, torch.device("cpu"), rounds=3)
    assert {name: len(values) for name, values in times.items()} == dict.fromkeys("abc", 3)
    assert calls[-9:] == list("abcbcacab")


def test_ratios_are_taken_within_a_round():
    # The machine gets ten times slower in the second round: the ratio does not see it.
    times = {"layernorm": [1.0, 10.0, 1.0], "adanorm": [2.0, 20.0, 3.0]}
    stats = summarize(times)
    assert stats["layernorm"]["ratio"] == 1.0
    assert stats["adanorm"]["ratio"] == 2.0
    assert stats["adanorm"]["seconds"] == 3.0
    assert stats["adanorm"]["ratio_high"] == 3.0
    assert stats["adanorm"]["rounds"] == 3
