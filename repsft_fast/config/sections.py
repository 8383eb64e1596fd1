"""The typed settings of a run, section by section: names, units, defaults and what each one means.

The model's are in `model_sections`. Every section is frozen and refuses unknown keys. What several sections
must agree on is in `checks`.
"""

from typing import Any, Literal

from pydantic import ByteSize, model_validator

from repsft_fast.config.model_sections import Model, Tokenizer
from repsft_fast.config.section import Section, instead
from repsft_fast.config.task_sections import Tasks
from repsft_fast.config.values import (
    AtLeastTwo,
    Bytes,
    Count,
    Folder,
    Fraction,
    Inside,
    Name,
    NotNegative,
    Part,
    Positive,
    Share,
    SomeBytes,
    Sources,
    Text,
    Whole,
)


class Run(Section):
    """Where the run lives and what makes it repeatable."""

    folder: Folder
    """Output folder: new, or without files that the run would write over; a used one is continued with
    --resume."""
    seed: Whole = 42
    """Seed of data order, subsets, initial weights and dropout."""
    deterministic: bool = False
    """Bit-equal reruns and resumes on the same kind of machine; a GPU has them only so, by some slower
    kernels."""


class Data(Section):
    """What is trained on."""

    train: Sources
    """A file, folder or hub id, a list of them, or a mapping {task: source}."""
    validation: Sources | None = None
    """Held-out rows, the same forms; looked at during the run."""
    test: Sources | None = None
    """Held-out rows that are read once, at the end."""
    validation_fraction: Part = 0.0
    """Share of the training samples carved off by seed for validation."""
    test_fraction: Part = 0.0
    """Share of the training samples carved off by seed for the test."""
    split: Text = "train"
    """Split of a hub dataset that the sources mean."""
    format: Literal[
        "auto", "messages", "prompt", "conversations", "alpaca", "query", "segments", "text", "input_ids"
    ] = "auto"
    """Shape of a row; auto: recognised by its keys."""
    on_bad_row: Literal["raise", "drop"] = "raise"
    """Rows that cannot be trained on: an error that counts them and names the first five, or drop them,
    counted and named."""
    ignore_columns: list[Text] = []  # noqa: RUF012 (pydantic copies it)
    """Columns to leave unused though their names look like instructions; messages[].name means a field of the
    turns."""
    train_on: Literal["all", "last"] = "all"
    """Which assistant turns are trained on."""
    task_column: Text | None = None
    """Column that names a row's task."""
    weight_column: Text | None = None
    """Column with a row's weight in the loss."""
    samples: Count | None = None
    """Train on this many samples; subsets are nested by seed (400 is contained in 800). null: all."""
    overlong: Literal["drop", "truncate", "raise"] = "drop"
    """What happens to samples longer than max_tokens; always counted and said."""
    max_tokens: AtLeastTwo | None = None
    """Longest sample in tokens; null: batch.row_tokens."""
    cache_folder: Folder | None = None
    """Where tokenised data is cached; null: the user's cache folder."""
    device_limit_bytes: Bytes | None = None
    """Tokens lie in device memory up to this size (512MiB, 2GiB …), in pinned host memory past it; null: from
    free memory."""


ROW_TOKENS = 4096


class Batch(Section):
    """Which samples share an update, and the rows they are packed into (packing never changes the
    gradient)."""

    samples: Count | None = 16
    """Samples per update; null when batch.tokens is set."""
    tokens: Count | None = None
    """Tokens per update, instead of a number of samples."""
    row_tokens: Literal["auto"] | AtLeastTwo = ROW_TOKENS
    """Tokens in one packed row = one forward and backward pass; lower it when memory runs out. auto: what the
    GPU has room for, decided when the run begins (4096 on a CPU; data.max_tokens then is 4097 unless set)."""
    pack: bool = True
    """Several samples share a row; false: one sample a row, for architectures that cannot keep them apart
    (docs/models.md)."""
    bucket_tokens: Literal["auto"] | Count = "auto"
    """Rows are padded to a multiple of this, whatever batch.row_lengths would be; auto: the row lengths where
    there are some, else 128 on a GPU or with model.compile, else 1."""
    row_lengths: Literal["auto", "off"] | list[Count] = "auto"
    """Rows are padded to one of these few lengths, ascending; auto: at most 16, from the plan, on a GPU or
    with model.compile, which runs each once before the first update; off: as batch.bucket_tokens says."""

    @model_validator(mode="before")
    @classmethod
    def _tokens_replace_samples(cls, given: Any) -> Any:
        return instead(given, "tokens", "samples")


class Loss(Section):
    """What is minimised."""

    average: Literal["sample", "token"] = "sample"
    """sample: every sample weighs the same whatever its length; token: every trained token does."""
    skip_below: Part = 0.0
    """Drop tokens whose 1 - p(target) is below this from the gradient; 0: exact."""
    chunk_bytes: SomeBytes | None = None
    """Memory for one chunk of logits (256MiB …); null: from the shapes and, on a GPU, what is free when the
    run begins."""


class Optim(Section):
    """The optimizer, its learning rate and the warm-up."""

    name: Literal["adamw", "adamw8bit", "bnb_adamw8bit", "torchao_adamw8bit", "sgd"] = "adamw"
    """adamw is torch's fused one, on a GPU ours in its place; adamw8bit is ours, the prefixed ones those of
    bitsandbytes and torchao."""
    lr: Positive = 2e-5
    """Peak learning rate."""
    betas: tuple[Part, Part] = (0.9, 0.999)
    """Decay of Adam's two moments; the first is the momentum of sgd."""
    eps: Positive = 1e-8
    """Adam's epsilon."""
    weight_decay: NotNegative = 0.0
    """Decoupled weight decay."""
    max_norm: Positive | None = 1.0
    """Clip the gradient's norm to this; null: no clipping."""
    warmup_fraction: Part | None = 0.03
    """Linear warm-up as a share of the budget; null when warmup_updates is set."""
    warmup_updates: Whole | None = None
    """Linear warm-up in updates, instead of a fraction."""

    @model_validator(mode="before")
    @classmethod
    def _updates_replace_fraction(cls, given: Any) -> Any:
        return instead(given, "warmup_updates", "warmup_fraction")


class Schedule(Section):
    """The learning rate after the warm-up."""

    name: Literal["wsd", "cosine", "constant", "linear"] = "wsd"
    """wsd: stable, then a decay that saturation or the budget's end starts; cosine and linear fall to 0 over
    the budget."""
    decay_fraction: Fraction = 0.1
    """Length of wsd's decay as a share of the updates done when it starts."""


class Budget(Section):
    """How long the run may last; the first limit reached ends it. At least one is needed."""

    updates: Count | None = None
    """Optimizer steps."""
    epochs: Positive | None = None
    """Passes over the active training data."""
    tokens: Count | None = None
    """Real (unpadded) tokens passed through the model."""


class Stop(Section):
    """Rules that end a run before its budget. Ending by rule is success."""

    token_accuracy: Share | None = 0.97
    """Stop when token accuracy on the training data reaches this; null: never."""
    decay_token_accuracy: Literal["auto"] | Share = "auto"
    """Under wsd, where the decay begins that ends the run. auto: where the finished model is predicted at
    token_accuracy, from looks at the model itself at epochs' ends; a number: at this one, without looks."""
    probe_samples: Count | None = None
    """Measure it on this many fixed training samples, at every epoch's end and once at the run's, with a rule
    or without; null: over the last whole epoch's training pass, for free."""
    plateau_epochs: Count | None = None
    """Stop when token accuracy has not risen for this many epochs; null: never."""
    plateau_min_delta: NotNegative = 0.001
    """A smaller rise than this does not count."""


class Evaluate(Section):
    """Validation and tasks, during the run."""

    every_epochs: Positive = 1.0
    """Epochs between validations, when there is validation data; the end of a run is always one."""
    generate_samples: Whole = 2
    """Held-out prompts answered beside the figures; 0: none."""
    generate_tokens: Count = 64
    """Longest answer in tokens."""
    keep: Literal["last", "best"] = "last"
    """Which weights are saved at the end: the last, or those with the lowest validation loss."""
    tasks: Tasks | None = None
    """Tasks that the model answers in its own words: {name: source}, or {name: {source: …, n: 4, …}}
    (docs/evaluation.md)."""
    tasks_every_epochs: Positive | None = None
    """Epochs between evaluations by tasks; null: once, of the result, at the end."""
    engine: Literal["auto", "loop", "batching", "vllm"] = "auto"
    """What generates: our own loop, transformers' continuous batching, or vLLM (repsft eval alone); auto: the
    loop on a CPU and on several ranks, batching on a GPU where it serves the model."""
    batch_replies: Count = 32
    """Replies that the loop generates at once."""


class Numbers(Section):
    """What to do when numbers go wrong."""

    on_nonfinite: Literal["stop", "skip", "revert"] = "stop"
    """NaN or Inf in the loss or a gradient: no update is applied. stop the run; skip that update and count
    it; or revert to the newest state in memory that was read and finite, and pass the update over."""
    on_spike: Literal["log", "skip", "revert"] = "log"
    """An update whose loss or gradient norm (before clipping; both as logarithms) lies more than 6 standard
    deviations above the last 128 updates': log it and apply it; skip it and count it; or revert as above.
    Judged once 64 are known."""
    on_out_of_memory: Literal["stop", "retry"] = "stop"
    """Out of memory in an update changes nothing: stop and say what to lower, or retry it in rows half as
    long (one rank)."""


class Log(Section):
    """What is written while it runs; metrics.jsonl always is."""

    every_updates: Count = 10
    """Updates between two readings of the device's counters."""
    trackers: list[Literal["wandb", "trackio", "tensorboard"]] = []  # noqa: RUF012 (pydantic copies it)
    """Experiment trackers, by name."""
    peak_flops: Positive | None = None
    """The device's peak in FLOP/s for MFU; null: known for common GPUs, otherwise no MFU."""


class Checkpoint(Section):
    """State on disk, to resume from."""

    every_updates: Count | None = None
    """Updates between checkpoints, instead of minutes. One at the end of a run, before its model is saved,
    there always is."""
    every_minutes: Positive | None = 10.0
    """Minutes between checkpoints; null: none on the way, unless every_updates is set."""
    keep_last: Count = 2
    """Whole checkpoints kept."""
    keep_extendable: bool = True
    """Save and keep the last one from before wsd's decay: --resume with a larger budget goes on from
    there."""
    keep_best: bool = False
    """Keep the one with the lowest validation loss too."""

    @model_validator(mode="before")
    @classmethod
    def _updates_replace_minutes(cls, given: Any) -> Any:
        return instead(given, "every_updates", "every_minutes")


class Distributed(Section):
    """Many GPUs. How many there are says the launcher (torchrun, srun)."""

    shard_ranks: Count | None = None
    """GPUs that share a copy of the weights (HSDP), say those of a node; only gradients travel between
    copies. null: all."""
    keep_gathered: Literal["auto"] | bool = "auto"
    """Weights that were gathered for a row stay for the next rows of its update; auto: where a GPU's memory
    holds them, decided at every start."""


class Mixture(Section):
    """Training on several tasks at once."""

    policy: Literal["sft", "sft_resets", "msft", "continual", "sro", "soft_sro", "ies", "dynamix"] | None = (
        None
    )
    """Who decides which tasks are trained when; null: one plain run over everything."""
    rule: Literal["paper", "tested"] = "tested"
    """msft's rule: ours, which excludes for a fall that is no noise, or the paper's literal one."""
    compute_budget: Positive = 1.0
    """C: epochs of the active mixture per stage."""
    evaluations_per_epoch: Count = 4
    """Evaluations of every task per epoch."""
    max_stages: Count = 10
    """Stages at most."""
    optimizer: Literal["reset", "restore"] = "reset"
    """Moments after a roll-back: new, or those of the moment gone back to."""
    schedule: Literal["continue", "rewind"] = "continue"
    """The learning rate's clock after a roll-back."""
    data: Literal["continue", "rewind"] = "continue"
    """The data order after a roll-back: a fresh one, or the old stage's again."""
    exclude_on: Literal["overfit", "saturation"] = "overfit"
    """A task leaves when its validation score falls, or when its training data is memorised
    (stop.token_accuracy)."""
    rehearsal: Part | None = None
    """Part of their samples that excluded tasks keep; 0: none; null: 0.05 under rule tested with exclude_on
    overfit, else none."""
    metric: Literal["exact_match", "nll", "token_accuracy", "answer"] = "exact_match"
    """What decides, on the validation rows; answer generates the reply and compares its final answer (for
    rationales)."""
    extractor: Text = "final"
    """metric answer: final, boxed, hashes, last_number, number, choice, whole, or, with
    model.trust_remote_code, an own function as package.module:function (text → answer or None)."""
    answer_tokens: Count = 512
    """metric answer: longest generated reply in tokens."""
    pool: Literal["items", "tasks"] = "items"
    """The mean of the tasks' scores that names the result: over all validation rows, or over tasks."""
    keep: Literal["last", "best"] | None = None
    """Which weights are the result: the last, or the best moment's; null: the best, and the last where
    exclude_on is saturation."""
    alpha: Inside = 0.1
    """rule tested: share of whole runs in which noise alone may exclude a task."""
    z: NotNegative | None = None
    """rule tested: standard errors that a fall must exceed; null: what alpha makes of the run's tasks and
    looks."""
    min_looks: Whole = 8
    """rule tested: nobody leaves before so many evaluations of a task, earlier stages' counted."""
    min_delta: NotNegative = 0.0
    """rule tested: smallest fall that counts as overfitting, in units of the metric."""
    patience: Count = 2
    """rule tested: evaluations in a row below the peak before a task counts as overfit."""
    weights: dict[Name, NotNegative] | None = None
    """Sampling weight of each task; null: by size."""
    temperature: Positive | None = None
    """Sampling weights proportional to size ** (1 / temperature); null: by size."""


class Snapshot(Section):
    """State in memory, to go back to within a run."""

    device_bytes: Bytes | None = None
    """Device memory for snapshots (8GiB …); null: what the run leaves free."""
    pinned_bytes: Bytes | None = None
    """Pinned host memory for them; null: half of what is free."""
    disk_bytes: Bytes = ByteSize(0)
    """Disk for them, when memory is not enough."""


class Settings(Section):
    """All sections. `loading.Config` adds how they are read and written."""

    run: Run
    model: Model = Model()
    tokenizer: Tokenizer = Tokenizer()
    data: Data
    batch: Batch = Batch()
    loss: Loss = Loss()
    optim: Optim = Optim()
    schedule: Schedule = Schedule()
    budget: Budget = Budget()
    stop: Stop = Stop()
    evaluate: Evaluate = Evaluate()
    numbers: Numbers = Numbers()
    log: Log = Log()
    checkpoint: Checkpoint = Checkpoint()
    distributed: Distributed = Distributed()
    mixture: Mixture = Mixture()
    snapshot: Snapshot = Snapshot()

    @model_validator(mode="before")
    @classmethod
    def _samples_do_not_follow_the_memory(cls, given: Any) -> Any:
        """Which samples are too long must not depend on what a machine has room for."""
        batch, data = (given.get(name) if isinstance(given, dict) else None for name in ("batch", "data"))
        if not isinstance(batch, dict) or batch.get("row_tokens") != "auto" or not isinstance(data, dict):
            return given
        longest = ROW_TOKENS + 1 if data.get("max_tokens") is None else data["max_tokens"]
        return {**given, "data": {**data, "max_tokens": longest}}
