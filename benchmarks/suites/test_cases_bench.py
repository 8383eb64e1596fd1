"""Every gated case, and its yardsticks, timed by pytest-benchmark."""

import pytest

from benchmarks.harness import cases

TIMED = {name: case.build for name, case in cases.CASES.items()}
TIMED |= {"full logits": cases.RATIOS["head / full logits"][0], "packing": cases.packing, "plan": cases.plan}


@pytest.mark.parametrize("name", list(TIMED))
def test_case(benchmark, name):
    benchmark.pedantic(TIMED[name](), rounds=20, iterations=1, warmup_rounds=3)
