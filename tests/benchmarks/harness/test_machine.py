"""What this machine reaches."""

import torch

from benchmarks.harness import machine


def test_ceilings_are_rates_a_machine_can_have():
    rates = machine.ceilings("cpu", torch.float32, small=True)
    assert 1e7 < rates["bytes_per_s"] < 1e13
    assert 1e7 < rates["flops_per_s"] < 1e16
