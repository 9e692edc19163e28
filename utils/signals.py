"""Signals that stop a run after a save."""

import signal
import sys

STOP = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]


class StopSignals:
    """In this context a signal of `STOP` only sets `number`, None before. The first one counts. Main thread only."""

    swallowed = None  # a signal whose SystemExit somebody has caught

    def __enter__(self):
        self.number = StopSignals.swallowed
        self._before = {each: signal.signal(each, self._note) for each in STOP}
        return self

    def __exit__(self, *_):
        for each, handler in self._before.items():
            signal.signal(each, handler)

    def _note(self, number, _):
        self.number = self.number or number


def leave_on_signals():
    """From now on a signal of `STOP` raises SystemExit(128 + its number), so that `finally` clauses run. A library may
    catch that, as torch does while it is imported: then the signal counts in the next `StopSignals`."""

    def leave(number, _):
        StopSignals.swallowed = number
        sys.exit(128 + number)

    for each in STOP:
        signal.signal(each, leave)
