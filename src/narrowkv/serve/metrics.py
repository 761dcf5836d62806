"""What the server has done, counted, and shown as Prometheus text."""

import threading
import time
from collections import deque

HELP = {
    "requests": "Requests that were taken.",
    "rejected": "Requests that were refused.",
    "cancelled": "Requests whose client left.",
    "failed": "Requests that ended in an error of the server.",
    "prompt_tokens": "Tokens of prompts.",
    "reused_tokens": "Tokens of prompts that were taken from stored prefixes.",
    "generated_tokens": "Tokens that were generated.",
    "steps": "Forward passes that decode.",
    "chunks": "Forward passes that read a part of a prompt.",
    "running": "Sequences that are being decoded.",
    "reading": "Sequences whose prompt is being read.",
    "waiting": "Sequences that wait for a row.",
    "running_bytes": "Bytes of the caches of sequences under way.",
    "prefixes": "Stored prefixes.",
    "prefix_bytes": "Bytes of stored prefixes.",
    "bits_per_element": "Bits of a stored element, everything counted, of the longest sequence under way.",
    "tokens_per_second": "Tokens generated in each of the last ten seconds, on average.",
}
GAUGES = (
    "running",
    "reading",
    "waiting",
    "running_bytes",
    "prefixes",
    "prefix_bytes",
    "bits_per_element",
    "tokens_per_second",
)
SPAN = 10.0  # seconds over which tokens per second are averaged


class Metrics:
    """Counters and gauges by name; safe between threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: dict[str, float] = dict.fromkeys(HELP, 0)
        self._recent: deque[float] = deque()  # when tokens were generated

    def add(self, name: str, amount: float = 1) -> None:
        """Count."""
        with self._lock:
            self._values[name] += amount
            if name == "generated_tokens":
                self._recent.extend([time.monotonic()] * int(amount))
                self._drop_old()

    def set(self, **values: float) -> None:
        """Set gauges."""
        with self._lock:
            self._values.update(values)

    def read(self) -> dict[str, float]:
        """All values."""
        with self._lock:
            self._drop_old()
            return {**self._values, "tokens_per_second": len(self._recent) / SPAN}

    def _drop_old(self) -> None:
        while self._recent and self._recent[0] < time.monotonic() - SPAN:
            self._recent.popleft()

    def text(self) -> str:
        """In the text form of Prometheus."""
        lines = []
        for name, value in self.read().items():
            gauge = name in GAUGES
            full = f"narrowkv_{name}" if gauge else f"narrowkv_{name}_total"
            lines += [f"# HELP {full} {HELP[name]}", f"# TYPE {full} {'gauge' if gauge else 'counter'}", f"{full} {value:g}"]
        return "\n".join(lines) + "\n"
