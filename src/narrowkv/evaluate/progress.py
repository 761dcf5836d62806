"""Progress of work that has several parts, counted as one."""

from collections.abc import Callable

OnStep = Callable[[int, int], None]  # called with (steps done, steps in all)


class Progress:
    """Passes on how far all parts have come together. total: steps in all."""

    def __init__(self, total: int, on_step: OnStep | None = None):
        self.total = total
        self.done = 0
        self._on_step = on_step

    def part(self) -> OnStep:
        """What a part that begins now is to call with (its steps done, its steps in all)."""
        before = self.done

        def step(done: int, total: int) -> None:
            self.done = before + done
            if self._on_step:
                self._on_step(self.done, self.total)

        return step
