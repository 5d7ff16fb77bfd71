"""The README's claims about the repository."""
import re
import shlex
from pathlib import Path

import pytest

import config

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_file_table_names_every_module_and_no_other():
    table = README.split("## Files")[1].split("##")[0]
    assert set(re.findall(r"^\| `(\w+\.py)`", table, re.M)) == {path.name for path in ROOT.glob("*.py")}


def test_ci_runs_the_readmes_test_command():
    command = re.search(r"&& (\.venv/bin/python -m pytest.*)", README).group(1).strip()
    assert command in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("flags", re.findall(r"`(--[^`]+)`", README.split("| question | flag |")[1].split("\n## ")[0]))
def test_flags_that_the_readme_names_change_something(flags):
    assert config.parse(shlex.split(flags)) != config.parse([])


def test_functions_that_the_readme_names_exist():
    named = re.findall(r"`(\w+)\.(\w+)`", README.split("## The method")[1].split("## Results")[0])
    assert len(named) > 10
    for owner, name in named:  # a module or a class
        places = [path.read_text() for path in ROOT.glob("*.py") if path.stem == owner or f"class {owner}" in path.read_text()]
        assert any(f"def {name}(" in text for text in places), (owner, name)


def test_pictures_that_the_readme_shows_are_in_the_repository():
    for path in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (ROOT / path).is_file(), path


def test_no_file_is_longer_than_an_evening_allows():
    for path in ROOT.glob("*.py"):
        assert len(path.read_text().splitlines()) <= 420, path.name
        assert max(map(len, path.read_text().splitlines())) <= 125, path.name
