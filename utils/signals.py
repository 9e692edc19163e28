"""Signals that end a run in good order."""

import signal

STOP = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]


class StopSignals:
    """Within this context a signal of `STOP` only sets `number`, the first one's; None until then. Main thread only."""

    def __enter__(self):
        self.number = None
        self._before = {each: signal.signal(each, self._note) for each in STOP}
        return self

    def __exit__(self, *_):
        for each, handler in self._before.items():
            signal.signal(each, handler)

    def _note(self, number, _):
        self.number = self.number or number
