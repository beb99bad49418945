"""Pages whose examples need the compiled modules are left out where these were not built."""

from __future__ import annotations

from implicitdiff import _C

collect_ignore = [] if _C.cpu else ["compiled.md"]
