"""RESULTS.md says what the raw episodes beside it say."""
import json
import re
from pathlib import Path

import pytest

from intervals import over_seeds, summarize
from reflector import StopRule
from report import results_table

ROOT = Path(__file__).parent.parent


def read(folder):
    """{policy: lines}; a variant of a seed (`..._seed1_rival`) is compared with that seed's cloned policy."""
    cloned = folder.with_name(re.match(r".*_seed\d", folder.name)[0]) / "cloned.jsonl"
    paths = sorted({cloned, *folder.glob("*.jsonl")}, key=lambda path: path.stem)
    return {path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in paths}


def tables(lines, **more):
    text = results_table({"task": "", "preset": "", "seed": 0} | summarize(lines, StopRule(confirm=2)) | more)
    return [row for row in text.splitlines() if row.startswith("|")]


@pytest.mark.parametrize("run", sorted((ROOT / "results").glob("**/*_seed*")), ids=lambda run: run.name)
def test_every_table_follows_from_the_raw_episodes(run):
    lines = read(run)
    assert len({tuple((line["task_id"], line["seed"]) for line in rows) for rows in lines.values()}) == 1, "not paired"
    first = {name: [line for line in rows if line["seed"] < 5] for name, rows in lines.items()}  # those of the run itself
    whole = tables(lines)
    assert len(whole) > 27
    if run.parent.name != "results" or not run.name[-1].isdigit():
        whole = whole[2:5]  # of variants and earlier versions RESULTS.md keeps the rates alone
    rows = [row.removesuffix(" – |") for row in whole + tables(first)[2:5]]  # what is imagined has no raw episodes
    assert not [row for row in rows if row not in (ROOT / "RESULTS.md").read_text()]


@pytest.mark.parametrize("runs", ["libero_object_seed?", "first/*_seed?", "first/*_seed?_own"])
def test_the_tables_over_seeds_follow_too(runs):
    runs = sorted((ROOT / "results").glob(runs))
    rows = tables({}, over_seeds=over_seeds({run.name: read(run) for run in runs}))
    assert len(rows) > 4 and not [row for row in rows if row not in (ROOT / "RESULTS.md").read_text()]


def test_rl_and_filtered_cloning_are_compared_on_the_same_episodes():
    pooled = {}
    for variant in ("", "_filtered", "_filtered_rl"):
        for run in sorted((ROOT / "results").glob(f"libero_object_seed[012]{variant}")):
            for name in {path.stem for path in run.glob("*.jsonl")}:
                pooled.setdefault(name, []).extend(read(run)[name])
    assert len({len(lines) for lines in pooled.values()}) == 1 and len(pooled) == 4
    rows = [row for row in tables(pooled) if row.count("|") == 5 and row.endswith((" – |", "|  |"))]
    assert len(rows) > 9 and not [row for row in rows if row.removesuffix(" – |") not in (ROOT / "RESULTS.md").read_text()]
