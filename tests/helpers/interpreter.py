"""Triton's CPU interpreter for chosen modules, inside one process and for one test."""

import importlib

import triton

# Triton imports it at the first launch, and it insists on the compiled functions
import triton.experimental.gluon.nvidia
from triton.runtime.interpreter import InterpretedFunction


def interpret(monkeypatch, *names: str) -> None:
    """What TRITON_INTERPRET=1 does at import: every jitted function of the named modules and of the language
    is replaced."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for module in (*map(importlib.import_module, names), triton.language, triton.language.standard):
        for name, value in list(vars(module).items()):
            if isinstance(value, triton.runtime.JITFunction):
                monkeypatch.setattr(module, name, InterpretedFunction(value.fn))
