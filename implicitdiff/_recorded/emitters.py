"""The emitters of all operations that have instructions."""

import implicitdiff._recorded.linear_algebra as _linear_algebra
import implicitdiff._recorded.movement as _movement
import implicitdiff._recorded.operations as _operations
from implicitdiff._recorded.registry import Emitters

EMITTERS: Emitters = _operations.ARITHMETIC | _linear_algebra.LINEAR_ALGEBRA | _movement.MOVEMENT
