"""`llmtune runs`: list them, or two side by side."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from llmtune.errors import UserError


def runs(arguments: argparse.Namespace) -> int:
    from llmtune import runs as finder

    words = arguments.folders or ["runs"]
    if words[0] == "diff":
        if len(words) != 3:
            raise UserError("runs diff: takes two runs, as in 'llmtune runs diff runs/first runs/second'")
        first, second = map(Path, words[1:])
        sections = finder.diff(first, second)
        sys.stdout.write(_json(sections) if arguments.json else finder.render_diff(first, second, sections))
        return 0
    if len(words) > 1:
        raise UserError(f"runs: lists one folder, and {len(words)} were named; 'llmtune runs diff A B' compares two")
    found = finder.find(Path(words[0]))
    sys.stdout.write(_json([run.model_dump() for run in found]) if arguments.json else finder.render_list(found))
    return 0


def _json(found: object) -> str:
    return json.dumps(found, indent=1) + "\n"
