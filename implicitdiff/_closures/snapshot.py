"""The variables of a function as they are now, and the function run with them later.

Python looks a variable up when the function runs. A condition runs again when the derivative is taken, often after the
loop that defined it has gone on to the next task. A snapshot notes the places where Python looks values up (`walk`
finds them), with the values: cells of closures, global variables, defaults, attributes, items of lists and
dictionaries, the parameters, buffers and flags of modules. Later the function itself runs. For that time, the values
are put back into the places that hold other values by then. Nothing is copied, so identities, registries and relative
imports are those of the user's own function.

A snapshot cannot know every place. The operations of a function are compared as well, see `program`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from implicitdiff._closures.variables import Place
from implicitdiff._closures.walk import Walk

# Putting back writes to variables that other threads may read.
_LOCK = threading.RLock()


class Snapshot:
    """The places where a function looks values up, with these values.

    Attributes:
        places: these places.
    """

    def __init__(self, fn: Any, args: Sequence[Any] = ()) -> None:
        """Note the places of a function and of its arguments that are no tensors."""
        self.places: list[Place] = Walk(fn, args).places

    def replaced(self) -> list[torch.Tensor]:
        """The tensors that other values have taken the places of."""
        return [v for place in self.places if not place.holds() for v in place.lost() if isinstance(v, torch.Tensor)]

    def keep_used(self, is_used: Callable[[torch.Tensor], bool]) -> None:
        """After one evaluation, forget the places that it has written itself (counters, caches, logs), and tensors that
        it has not used: in a script, one may hold the graph of the call before, which holds that of the call before."""
        self.places = [
            place for place in self.places if (place.holds() or place.keep_unwritten()) and place.keep_used(is_used)
        ]

    @contextmanager
    def put_back(self) -> Iterator[None]:
        """Run the body with every place as it was. Places that are as they were are not written to."""
        if all([place.holds() for place in self.places]):
            yield
            return
        with _LOCK:
            changed = [(place, place.now()) for place in self.places if not place.holds()]
            try:
                for place, _ in changed:
                    place.restore()
                yield
            finally:
                for place, now in reversed(changed):
                    place.put(now)
