"""The README's Python block runs as it stands, and its commands name things that exist."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_python_block_runs(tmp_path):
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(block.splitlines()) <= 14
    done = subprocess.run(
        [sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "n_id" in done.stdout or "Data(" in done.stdout
    assert (tmp_path / "runs" / "notebook" / "result.json").exists()


def test_files_and_links_exist():
    named = re.findall(r"\]\(([^)#]+)\)", README) + re.findall(r"\b((?:launch|benchmarks)/\w+\.(?:py|sh))", README)
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing


def test_every_script_of_launch_is_mentioned():
    scripts = {path.name for path in (ROOT / "launch").glob("*.py")} - {"quickstart.py", "demo.py", "baselines.py"}
    assert not [name for name in scripts if name not in README]
