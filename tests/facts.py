"""Facts about GoogLeNet that were found independently of this code."""

import json
from pathlib import Path
from typing import Any

FACTS: dict[str, Any] = json.loads(
    (Path(__file__).parent / "data" / "inception_facts.json").read_text()
)
MODULES: dict[str, dict[str, int]] = FACTS["modules"]
