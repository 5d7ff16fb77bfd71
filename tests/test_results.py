"""RESULTS.md says what the raw episodes beside it say."""
import json
from pathlib import Path

import pytest

from intervals import summarize
from reflector import StopRule
from report import results_table

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("folder", sorted((ROOT / "results").iterdir()), ids=lambda folder: folder.name)
def test_every_table_follows_from_the_raw_episodes(folder):
    lines = {path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in sorted(folder.glob("*.jsonl"))}
    assert len({tuple((line["task_id"], line["seed"]) for line in rows) for rows in lines.values()}) == 1, "not paired"
    text = results_table({"task": "", "preset": "", "seed": 0} | summarize(lines, StopRule(confirm=2)))
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) > 10 and not [row for row in rows if row not in (ROOT / "RESULTS.md").read_text()]
