"""`repsft train` and `repsft msft`: a run, or with --dry-run what it would do."""

from repsft_fast.config import Config
from repsft_fast.errors import ConfigError, describe
from repsft_fast.report.result import RunResult


def train(config: Config, *, dry_run: bool, resume: bool, world: int | None) -> RunResult | None:
    """The run's result; None after a dry run, which rehearses on `world` GPUs where that is given."""
    if dry_run:
        from repsft_fast.sizing import dry_run as planned

        planned.dry_run(config, ranks=world)
        return None
    if world is not None:
        todo = "add --dry-run; the launcher says how many GPUs train"
        raise ConfigError(describe("--world", "trains nothing", todo=todo))

    from repsft_fast.training import trainer

    return trainer.train(config, resume=resume)
