"""The values of a function's variables at the call, and later evaluations with these values.

Python looks a variable up when the function runs. A condition runs again when the derivative is taken, often after the
loop that defined the condition has gone on to the next task. A snapshot records the locations where Python looks values
up (see `walk`), and the values: cells of closures, global variables, defaults, attributes, items of lists and
dictionaries, the parameters, buffers and flags of modules. For a later run of the function, the snapshot writes the
recorded values back into the locations that have changed. Nothing is copied, so identities, registries and relative
imports are those of the user's own function.

A snapshot cannot find every location, for example those in compiled code. So `program` also compares the operations.
"""

from __future__ import annotations

import threading
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from itertools import filterfalse
from operator import methodcaller

from implicitdiff._closures.variables import Location
from implicitdiff._closures.walk import Walk

# Restoring writes to variables that other threads may read.
_LOCK = threading.RLock()


class Snapshot:
    """The locations where a function looks values up, with the values at the call.

    Attributes:
        locations: the locations, each with its value.
    """

    def __init__(self, fn: object, args: Sequence[object] = ()) -> None:
        """Record the locations that a function, and its arguments other than tensors, lead to."""
        self.locations: list[Location] = Walk(fn, args).locations

    def changed(self) -> list[Location]:
        """Return the locations that do not hold the recorded values."""
        return [*filterfalse(methodcaller("is_unchanged"), self.locations)]

    def keep_used(self, changed: Sequence[Location], used: Container[int]) -> None:
        """Forget locations that an evaluation wrote (counters, caches, logs), and tensors that are not `used`, by id.

        An unused variable of a script, such as the last loss, may hold the graph of the previous call, which would hold
        the graph of the call before, and so on.
        """
        self.locations = [
            location
            for location in self.locations
            # Of a location that has changed in part, the unchanged names stay.
            if (location not in changed or location.keep_unwritten()) and location.keep_used(used)
        ]

    @contextmanager
    def put_back(self) -> Iterator[None]:
        """Run the body with the recorded values in all locations. Unchanged locations are not written to."""
        # Without the lock, since most derivatives find every location unchanged.
        if all(map(methodcaller("is_unchanged"), self.locations)):
            yield
            return
        with _LOCK:
            # All current values are read before the first write: two locations may share an object.
            changed = [(location, location.read()) for location in self.changed()]
            try:
                for location, _ in changed:
                    location.restore()
                yield
            finally:
                for location, now in reversed(changed):
                    location.write(now)
