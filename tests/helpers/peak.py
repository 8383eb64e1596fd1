"""Peak bytes a call holds on the CPU above what was there before it, from the profiler's allocation
events."""

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile


def peak_bytes(call: Callable[[], object]) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    events = sorted(
        (event.start_ns(), event.nbytes())
        for event in profiler.profiler.kineto_results.events()
        if event.name() == "[memory]"
    )
    del result
    held = peak = 0
    for _, change in events:
        held = max(0, held + change)  # what was held before may be freed: that is no room gained
        peak = max(peak, held)
    return peak
