"""What `torch.compile` does while something runs: how often it compiles, and how long that takes."""

import time
from dataclasses import dataclass


@dataclass
class Compilations:
    """Counts compilations, and the seconds they take, from `listen` on.

    Attributes:
        count: How many there were.
        seconds: How long they took, all together.
    """

    count: int = 0
    seconds: float = 0.0
    _began: float = 0.0
    _listening: bool = False

    def listen(self) -> None:
        """Begin to listen; once is enough. It imports the compiler, which takes a second."""
        if self._listening:
            return
        from torch._dynamo.callback import on_compile_end, on_compile_start

        on_compile_start(self._start)
        on_compile_end(self._end)
        self._listening = True

    def since(self, earlier: tuple[int, float]) -> tuple[int, float]:
        """Return count and seconds since an earlier `now`."""
        return self.count - earlier[0], self.seconds - earlier[1]

    def now(self) -> tuple[int, float]:
        """Return count and seconds so far."""
        return self.count, self.seconds

    def _start(self, about: object) -> None:
        self._began = time.perf_counter()

    def _end(self, about: object) -> None:
        self.count += 1
        self.seconds += time.perf_counter() - self._began


COMPILATIONS = Compilations()
"""Of this process: the compiler tells everybody."""
