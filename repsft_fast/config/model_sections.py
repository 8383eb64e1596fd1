"""The settings of the model: what is loaded, how it is held and computed, its adapters and its tokenizer."""

from typing import Any, Literal

from pydantic import Field, create_model

from repsft_fast.config.section import Section
from repsft_fast.config.values import Count, Folder, FolderOrHubId, Free, Part, Positive, Template, Text

# `from` is a word of Python's own, so this one setting cannot be written in a class's body.
_FROM: Any = (
    Folder | None,
    Field(None, description="Folder of adapters to go on from; model.path is their base model."),
)
_LoraFrom: type[Section] = create_model("_LoraFrom", __base__=Section, **{"from": _FROM})


class Lora(_LoraFrom):  # type: ignore[valid-type,misc]  # made while running
    """Low-rank adapters (peft) in place of full fine-tuning."""

    rank: Count = 16
    """Rank of the adapters."""
    alpha: Positive = 32.0
    """Scale: the adapter's output is multiplied by alpha / rank."""
    dropout: Part = 0.0
    """Dropout before the adapter."""
    target_modules: Text | list[Text] = "all-linear"
    """Ends of names of the layers that get adapters, or all-linear: those of the backbone without routers.
    Experts kept in one parameter get them where they are named, such as [all-linear, experts.down_proj]."""
    merge: bool = False
    """Merge the adapters into the weights of the saved model; they are saved first, in the folder adapter."""


class Model(Section):
    """The model and how it is held and computed."""

    path: FolderOrHubId | None = None
    """Folder or hub id of the model."""
    gguf_file: Folder | None = None
    """GGUF file inside the folder, de-quantised when loaded."""
    config: Free | None = None
    """Architecture (with its model_type) for a model with random weights, instead of path."""
    init: Literal["auto", "pretrained", "random"] = "auto"
    """Weights to start from; auto: pretrained with a path, random with a config."""
    param_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """How the weights are kept; auto: float32. Plain bfloat16 stalls after many epochs."""
    compute_dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """How they are computed with; auto: bfloat16 on a GPU, float32 on a CPU."""
    save_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """How they are saved; auto: in the types they were loaded in, random ones as they are kept. Adapters stay
    float32."""
    resize_vocabulary: bool = False
    """Give the model rows for tokens that only its tokenizer has; each begins as the mean of the others."""
    attention: Literal[
        "auto", "varlen", "flash2", "flash3", "flash4", "sdpa",
        "auto:varlen", "auto:flash2", "auto:flash3", "auto:flash4",
    ] = "auto"  # fmt: skip
    """Attention over packed rows; auto: the fastest that can be imported and is seen to work, decided when
    the run begins. auto:NAME: NAME, and another in layers it does not serve, where NAME alone refuses."""
    layer_kernels: Literal["auto", "liger", "none"] = "auto"
    """Fused norms, rotary embeddings and MLPs; auto: liger on CUDA when installed, unless the layers are
    compiled, which is the default there."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """Recompute activations in the backward pass to save memory."""
    compile: Literal["auto"] | bool = "auto"
    """Compile the backbone's layers with torch.compile; auto: on CUDA, unless liger is asked for. Where it
    fails, the layers stay plain, which the run says and its resumptions keep."""
    cuda_graphs: Literal["off", "auto"] = "off"
    """Capture the passes of a row once and replay them, for small models on one GPU; auto: where a trial
    finds the same bits and less time. Unmeasured."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model or is named in mixture.extractor. Off unless asked for."""
    lora: Lora | None = None
    """Low-rank adapters; null: full fine-tuning."""


class Tokenizer(Section):
    """Text to token ids."""

    path: FolderOrHubId | None = None
    """Folder or hub id; null: the model's own."""
    chat_template: Template | None = None
    """Jinja chat template, or the path of a file with one; null: the tokenizer's own."""
    template_kwargs: Free = {}  # noqa: RUF012 (pydantic copies it)
    """Variables for the chat template, such as {enable_thinking: false}; a row's chat_template_kwargs go over
    them."""
    special_tokens: Literal["text", "parse"] = "text"
    """Special-token strings in the data, as in rendered chats: text keeps them text, parse makes them the
    tokens."""
