"""One tree's side of a comparison: reads the name of a case per line, runs it once, answers its
milliseconds."""

import json
import sys
import time

from benchmarks.harness import cases
from benchmarks.harness.timing import COLD_BYTES_CPU


def main() -> None:
    import torch

    torch.set_num_threads(1)
    cold = torch.empty(COLD_BYTES_CPU, dtype=torch.uint8)
    calls = {}
    for line in sys.stdin:
        name = json.loads(line)
        try:
            if name not in calls:
                calls[name] = cases.CASES[name].build()
                for _ in range(3):
                    calls[name]()
            cold.fill_(1)
            begin = time.perf_counter_ns()
            calls[name]()
            answer = {"ms": (time.perf_counter_ns() - begin) / 1e6}
        except Exception as error:  # told to the other side, which names it
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
