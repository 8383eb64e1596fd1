from pathlib import Path

import pytest
from forkserver import ForkServer

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def server():
    """One warm process for all crash tests of a session."""
    started = ForkServer(preload=["torch", "checkpoint_jobs"], path=[str(HERE), str(HERE.parent), str(HERE.parents[1])])
    yield started
    started.close()
