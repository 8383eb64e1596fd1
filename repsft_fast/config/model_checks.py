"""What the model's settings must agree on."""

from collections.abc import Iterator

from repsft_fast.config.sections import Settings
from repsft_fast.errors import describe

Finding = tuple[tuple[str, ...], str]  # the settings read, and what is wrong with them together


def of_the_model(config: Settings) -> Iterator[Finding]:
    """Combinations of the model's own settings that cannot be used."""
    yield from _origin(config)
    yield from _adapters(config)
    yield from _computed(config)


def _origin(config: Settings) -> Iterator[Finding]:
    """Where architecture and weights come from: one place, which has them."""
    model = config.model
    if model.path is None and model.config is None:
        yield (
            ("model.path", "model.config"),
            describe("model", "has neither path nor config", todo="set model.path to a folder or hub id"),
        )
    if model.path is not None and model.config is not None:
        yield (
            ("model.path", "model.config"),
            describe(
                "model",
                "has both path and config",
                todo="drop one; model.init: random takes a path's architecture without its weights",
            ),
        )
    if model.init == "pretrained" and model.config is not None:
        yield (
            ("model.init", "model.config"),
            describe(
                "model.init",
                "a config has no pretrained weights",
                expected="random",
                got=model.init,
                todo="set model.path instead",
            ),
        )
    if model.gguf_file is not None and model.path is None:
        yield (
            ("model.gguf_file", "model.path"),
            describe("model.gguf_file", "needs the folder it lies in", todo="set model.path"),
        )


def _adapters(config: Settings) -> Iterator[Finding]:
    """What adapters cannot do: they train nothing of what lies beside them."""
    model = config.model
    if model.resize_vocabulary and model.lora is not None:
        yield (
            ("model.resize_vocabulary", "model.lora"),
            describe(
                "model.resize_vocabulary",
                "adapters leave the embedding frozen, so new tokens would never be learned",
                got="true with model.lora",
                todo=(
                    "drop model.lora, or first save a model with the new rows by a run without adapters, and"
                    " adapt that one"
                ),
            ),
        )
    source = getattr(model.lora, "from", None)
    if source is not None and (model.path is None or model.init == "random"):
        yield (
            ("model.lora.from", "model.path", "model.config", "model.init"),
            describe(
                "model.lora.from",
                "adapters mean nothing beside random weights",
                got=source,
                todo=(
                    "set model.path to the model they were trained beside, and no model.config or model.init:"
                    " random"
                ),
            ),
        )


def _computed(config: Settings) -> Iterator[Finding]:
    """What would compute something else, or with nothing to read the data by."""
    model = config.model
    if model.layer_kernels == "liger" and model.compile is True:
        yield (
            ("model.layer_kernels", "model.compile"),
            describe(
                "model.layer_kernels",
                "liger's kernels inside compiled layers have given wrong numbers without a word",
                got="liger with model.compile: true",
                todo=(
                    "set model.layer_kernels to auto or none to compile, or model.compile to false for liger"
                ),
            ),
        )
    reads_text = config.data.format not in ("auto", "input_ids")
    if model.path is None and model.config is not None and config.tokenizer.path is None and reads_text:
        yield (
            ("tokenizer.path", "model.config", "data.format"),
            describe(
                "tokenizer.path", "a model made from a config brings no tokenizer", todo="set tokenizer.path"
            ),
        )
