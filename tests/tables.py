"""Launch tables for tests."""

import json
from pathlib import Path
from typing import Any

from fused_inception.tuning import table
from fused_inception.tuning.targets import TARGETS

SM_90 = TARGETS["sm_90"]
KEY = (1, 2)


def contents(rows: list[Any]) -> dict[str, Any]:
    """A table for sm_90."""
    run = {"gpu": "none: written by a test"}
    return {"format": table.FORMAT, "target": "sm_90", "runs": [run], "entries": rows}


def put(what: Any, path: Path | None = None) -> Path:
    """Write `what`, text or to be encoded, as the user's table or to `path`."""
    path = path or table.user_path("sm_90")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(what if isinstance(what, str) else json.dumps(what))
    return path
