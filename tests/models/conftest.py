"""A saved tiny Llama, and a copy of it that a test may spoil."""

import shutil

import pytest
from transformers import AutoModelForCausalLM

from tests.helpers import tiny


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    AutoModelForCausalLM.from_config(tiny.config("llama")).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(source, tmp_path):
    return shutil.copytree(source, tmp_path / "m")
