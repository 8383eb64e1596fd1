"""What stands where a model, its weights or one of its files should be: named as what it is, with the way
out.

Each of these is common: folders cloned without Git LFS, pages that a proxy sent in place of a file, weights
under other names.
"""

from __future__ import annotations

import os
from pathlib import Path

from repsft_fast.errors import ModelError, describe, open_plain

CONFIG, INDEX, WEIGHTS = "config.json", "model.safetensors.index.json", "model.safetensors"
ADAPTERS = "adapter_config.json"
AGAIN = "fetch it again: it is damaged or cut short"
# (First bytes, what begins so, what to do).
_FILES = (
    (
        b"version https://git-lfs",
        "is a pointer of Git LFS, not the file itself",
        "run git lfs pull in its folder",
    ),
    (b"/annex/objects/", "is a pointer of git-annex, not the file itself", "run git annex get in its folder"),
    (b"\xef\xbb\xbf", "begins with a byte-order mark", "save it in UTF-8 without one"),
    (b"\xff\xfe", "is in UTF-16", "save it in UTF-8"),
    (b"\xfe\xff", "is in UTF-16", "save it in UTF-8"),
    (b"\x1f\x8b", "is packed by gzip", "unpack it"),
    (b"GGUF", "is a GGUF file", "let its name end in .gguf, and set model.path to it"),
    (
        b"PK\x03\x04",
        "is a zip archive, as torch.save writes it: a pickle, which is not read",
        "save it as safetensors",
    ),
    (b"\x80", "is a pickle, which is not read", "save it as safetensors"),
)
_PAGES = (b"<!doctype", b"<html", b"<?xml")
# Files and folders of weights that others write: (the end of the name, whose).
_FOREIGN = (
    (".onnx", "ONNX"), ("onnx", "ONNX"), (".h5", "Keras or TensorFlow"), (".keras", "Keras"),
    ("saved_model.pb", "TensorFlow"), (".msgpack", "Flax"), (".npz", "MLX or NumPy"),
    (".tflite", "TensorFlow Lite"), (".mlpackage", "Core ML"), ("zero_to_fp32.py", "DeepSpeed"),
    ("latest_checkpointed_iteration.txt", "Megatron"), (".nemo", "NeMo"), (".pte", "ExecuTorch"),
    (".engine", "TensorRT"), (".plan", "TensorRT"),
)  # fmt: skip
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_OF_A_TRAINER = (
    "training_args.bin",
    "optimizer.pt",
    "optimizer.bin",
    "scheduler.pt",
    "scaler.pt",
    "rng_state.pth",
)


def other_file(file: Path) -> tuple[str, str] | None:
    """(What a file that cannot be read as what it should be is instead, what to do), where its first bytes
    show it."""
    try:
        with open_plain(file) as opened:
            head = opened.read(512)
    except OSError:
        return None
    if not head:
        return "is empty", AGAIN
    if head.lstrip().lower().startswith(_PAGES):
        return (
            "is a web page, not the file itself",
            "fetch it again: perhaps an error came, or a request to log in",
        )
    return next(((what, todo) for first, what, todo in _FILES if head.startswith(first)), None)


def instead_of_a_model(folder: Path) -> tuple[str, str] | None:
    """(What a folder without config.json and tokenizer holds, what to do); None where nothing is known of
    it."""
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return None
    # The surest sign first: a folder may hold several of these.
    if ADAPTERS in names:
        return "holds adapters, no model", "set model.path to their base and model.lora.from to this folder"
    if gguf := [name for name in names if name.lower().endswith(".gguf")]:
        return f"holds GGUF files ({some(gguf)})", f"set model.path to one of them: {folder / gguf[0]}"
    if inside := [name for name in names if os.path.isfile(folder / name / CONFIG)]:
        return (
            f"holds folders with models ({some(inside)}), and none itself",
            f"give one of them: {folder / inside[0]}",
        )
    if "model_index.json" in names:
        return "holds a pipeline of diffusers", "give the folder of a causal language model"
    if weights := [name for name in names if name.endswith((".safetensors", *_PICKLES))]:
        return (
            f"holds weights ({some(weights)}), and no {CONFIG} that says of which model",
            f"put its {CONFIG} beside them",
        )
    return None


def no_weights(folder: Path, where: str) -> ModelError:
    """For a model's folder without safetensors: what it holds in their place."""
    # A trainer's own pickles lie beside the weights of any model and say nothing of them.
    names = sorted(set(os.listdir(folder)) - set(_OF_A_TRAINER))
    safe = [name for name in names if name.endswith(".safetensors")]
    if any(name.startswith("adapter_model.") for name in names):
        wrong = f"holds adapters without their {ADAPTERS}, and no model"
        todo = f"put {ADAPTERS} beside them, and set model.lora.from to this folder"
    elif safe and all(name.startswith("consolidated") for name in safe):
        wrong = f"its weights ({some(safe)}) are in the form of Mistral's own code"
        todo = f"fetch those in the form of transformers: {WEIGHTS}, or its parts and {INDEX}"
    elif len(safe) == 1:
        wrong = f"holds weights that are not called {WEIGHTS} ({safe[0]})"
        todo = f"rename {safe[0]} to {WEIGHTS}"
    elif safe:
        wrong = f"holds weights in {len(safe)} files ({some(safe)}) without {INDEX}"
        todo = f"fetch {INDEX} too"
    elif gguf := [name for name in names if name.lower().endswith(".gguf")]:
        wrong = f"its weights are GGUF files ({some(gguf)})"
        todo = f"set model.gguf_file to one of them: {gguf[0]}"
    elif pickles := [name for name in names if name.endswith(_PICKLES)]:
        wrong = f"its weights are pickles ({some(pickles)}), which may run code and are not read"
        todo = f"fetch {WEIGHTS}, or make it where you trust them (save_pretrained of transformers)"
    elif foreign := [(name, whose) for name in names for end, whose in _FOREIGN if name.endswith(end)]:
        wrong = f"its weights are those of {foreign[0][1]} ({foreign[0][0]})"
        todo = f"fetch or make {WEIGHTS}"
    else:
        wrong = f"holds no weights ({WEIGHTS}, or its parts with {INDEX})"
        todo = "fetch them; model.init: random trains the architecture from nothing"
    return ModelError(describe(where, wrong, got=str(folder), todo=todo))


def some(names: list[str]) -> str:
    """
    >>> some(["a", "b", "c", "d"])
    'a, b, c, …'
    """
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
