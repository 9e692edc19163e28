"""Signals that end a run in good order."""

import signal
import sys

STOP = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]


class StopSignals:
    """Within this context a signal of `STOP` only sets `number`, the first one's; None until then. Main thread only."""

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
    """From here on a signal of `STOP` raises SystemExit with status 128 + its number, so that there is a clearing up.

    Libraries have blanket excepts, torch's imports among them: what they catch ends the next `StopSignals` context.
    """

    def leave(number, _):
        StopSignals.swallowed = number
        sys.exit(128 + number)

    for each in STOP:
        signal.signal(each, leave)
