"""What pyproject.toml promises is what `make test-oldest` runs, and what is carried to a GPU machine is what
is tested here."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def pins(path: str) -> dict[str, str]:
    """name → version of every line of a requirements file, each of which must pin exactly."""
    lines = [
        re.sub(r"\s*#.*", "", line).strip() for line in (ROOT / path).read_text(encoding="utf-8").splitlines()
    ]
    return {
        name.lower().replace("_", "-"): version
        for name, version in (line.split("==") for line in lines if line)
    }


GPU_MACHINE = pins("tests/oldest/gpu_machine.txt")
OLDEST = {**GPU_MACHINE, **pins("tests/oldest/transformers_5_0.txt")}


PROMISED = [
    *PROJECT["dependencies"],
    *PROJECT["optional-dependencies"]["lora"],
    *PROJECT["optional-dependencies"]["optim8"],
]


# needs a GPU of its own
@pytest.mark.parametrize("requirement", [r for r in PROMISED if not r.startswith("bitsandbytes")])
def test_every_oldest_version_promised_is_the_one_tested(requirement):
    name, oldest = re.match(r"([\w.-]+)>=([\d.]+)", requirement).groups()
    assert f"{OLDEST[name]}.".startswith(f"{oldest}."), f"{requirement}, tested is {OLDEST[name]}"


def test_wheels_for_a_gpu_machine_are_the_versions_the_constraints_name():
    tested, carried = pins("constraints.txt"), pins("benchmarks/gpu_wheels.txt")
    assert carried
    assert {name: tested.get(name) for name in carried} == carried
    assert not set(carried) & set(GPU_MACHINE), "it is there already"
