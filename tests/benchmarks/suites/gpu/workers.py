"""Workers of parts C and D without their processes, which spend most of a rehearsal importing."""

from benchmarks.suites.gpu import processes, training


class Here:
    """Measures in this process."""

    def measure(self, session, wanted, limit_s):
        training.measure(session, wanted)
        return True

    def close(self):
        pass


def without_processes(monkeypatch, make):
    """`processes.workers` gives what `make()` makes, one for every point."""

    class Managed:
        def __init__(self, session, kinds):
            self.made = [make() for _ in kinds]

        def __enter__(self):
            return self.made

        def __exit__(self, *_):
            return None

    monkeypatch.setattr(processes, "workers", Managed)
