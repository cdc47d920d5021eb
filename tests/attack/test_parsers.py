"""Each pure parser of what a guest, a file or a server wrote is fed what nobody would write on purpose."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import fuzz
import soak
from parsers import PARSERS, try_out

FUZZER = Path(__file__).with_name("fuzzer.py")
TESTS = Path(__file__).parents[1]
RUNS = 200_000
DEADLINE_S = 1800.0


@pytest.mark.parametrize("name", PARSERS)
@fuzz.examples(2000)
@given(data=st.data())
def test_a_parser_refuses_or_understands(name, data):
    """B14: it raises nothing but an error of ours, whatever it is given."""
    start = data.draw(st.sampled_from(PARSERS[name][1]) | fuzz.documents())
    try_out(name, start)
    try_out(name, fuzz.mutated(data.draw, start))


@pytest.mark.soak
@pytest.mark.skipif(not importlib.util.find_spec("atheris"), reason="atheris is there for make soak alone")
@pytest.mark.parametrize("name", PARSERS)
def test_a_parser_withstands_what_its_branches_suggest(name, tmp_path):
    """The same, of inputs that atheris makes up to reach each branch."""
    seeds = tmp_path / "seeds"
    seeds.mkdir()
    for number, content in enumerate(PARSERS[name][1]):
        (seeds / str(number)).write_bytes(content)
    runs, environment = soak.times(RUNS), os.environ | {"PYTHONPATH": str(TESTS)}
    words = [sys.executable, str(FUZZER), name, f"-runs={runs}", f"-seed={soak.SEED}", "-rss_limit_mb=2048", str(seeds)]
    done = subprocess.run(
        words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )
    soak.row(f"{runs} inputs to the parser of {name}, by atheris", "no error but ours", f"status {done.returncode}")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
