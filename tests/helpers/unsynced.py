"""Files of tests are not waited for until they are on the disk.

A run of a second syncs 50 to 100 files and folders, milliseconds each in which nothing is computed. A power cut
is nothing that a test can make: what a killed process wrote is there for the next one, synced or not. What a
sync refuses is still refused, and a test that looks when something is synced looks at `os.fsync` as before.
"""

import os
import stat

_REAL = os.fsync


def fsync(fd: int) -> None:
    """As `os.fsync`; of a file or a folder only whether it is open."""
    mode = os.fstat(fd).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        _REAL(fd)


def install(real: bool = False) -> None:
    """For this process and what it forks. real: files are waited for again."""
    os.fsync = _REAL if real else fsync
