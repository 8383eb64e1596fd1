"""One process of `judging.Judge`: reads pairs of expressions, a JSON line each, and answers a word a line.

Run as a file, by its path: it needs math-verify and nothing of ours.
"""

import json
import logging
import math
import resource
import sys
import time


def main() -> None:
    """argv: seconds for a pair, bytes of address space. Ends with its input, or with a pair's time."""
    seconds, memory = float(sys.argv[1]), int(sys.argv[2])
    try:
        from math_verify import LatexExtractionConfig, parse, verify
    except Exception as error:
        print(f"math-verify cannot be imported ({type(error).__name__}: {error})", flush=True)
        return
    logging.disable()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    print("ready", flush=True)
    for line in sys.stdin:
        # Who gave the pair may be gone before its time is over, and an operation on large numbers hears of
        # nothing but the kernel.
        spent = math.ceil(time.process_time() + seconds) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (spent, resource.RLIM_INFINITY))
        try:
            found, right = (
                parse(f"${text}$", [LatexExtractionConfig()], parsing_timeout=None)
                for text in json.loads(line)
            )
            word = "right" if verify(right, found, timeout_seconds=None) else "wrong"
        except MemoryError:
            word = "memory"
        except Exception:  # whatever a parser of mathematics raises: they are not the same
            word = "wrong"
        # math-verify goes on after a MemoryError, to another verdict.
        if word == "wrong" and _peak_bytes() > 0.8 * memory:
            word = "memory"
        print(word, flush=True)
        if word == "memory":
            return


def _peak_bytes() -> int:
    """The largest address space so far; 0 where the system does not say."""
    try:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmPeak"))
    except (OSError, StopIteration):
        return 0


if __name__ == "__main__":
    main()
