"""The files that one use case passes do not become more; tests/trip.py prints them."""

import re
import subprocess
import sys
from pathlib import Path

MAX_FILES = 101


def test_add_domain_enters_few_files():
    script = Path(__file__).parent / "trip.py"

    done = subprocess.run([sys.executable, str(script)], check=False, capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    counts = re.search(r"enters (\d+) functions in (\d+) files", done.stdout)
    assert counts
    assert int(counts[2]) <= MAX_FILES, "where they are: python tests/trip.py --files"
