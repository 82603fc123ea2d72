"""The check of commit messages passes good ones and says what is wrong with others; the hooks are those of lint."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "tools" / "commit_message.py"
LONG = "adaln: " + "x" * 65  # 72 characters


def check(tmp_path: Path, message: str) -> tuple[int, str]:
    file = tmp_path / "message"
    file.write_text(message)
    done = subprocess.run([sys.executable, str(SCRIPT), str(file)], capture_output=True, text=True)
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    "message",
    [
        "adaln: read the gate once\n",
        "tests, bench: move the shapes beside the benches\n\nThe reason.\n",
        "csrc/cpu: format with clang-format\n# a comment that git leaves out\n# another: One.\n",
        "# git's comments may come first\nsetup: build with ninja\n",
        LONG,
        "Merge branch 'main' into a-name-that-makes-the-subject-longer-than-seventy-two-characters\n",
        'Revert "adaln: read the gate once"\n\nThis reverts commit 0123.\n',
        "fixup! adaln: read the gate once\n",
        "adaln: read once\n# ------------------------ >8 ------------------------\nA diff: below.\nand more\n",
    ],
)
def test_a_good_message_passes(tmp_path, message):
    assert check(tmp_path, message) == (0, "")


@pytest.mark.parametrize(
    ("message", "fault"),
    [
        (LONG + "x", "the subject has 73 characters; it may have 72"),
        ("Read the gate once", "must be `area: verb ...`"),
        ("adaln:read the gate once", "must be `area: verb ...`"),
        ("Adaln: read the gate once", "must be `area: verb ...`"),
        ("adaln: Read the gate once", "must be `area: verb ...`"),
        ("the gate of adaln: read it once", "must be `area: verb ...`"),
        ("adaln: read the gate once.", "ends with a full stop"),
        ("adaln: read the gate once\nThe reason.", "the line after the subject must be empty"),
        ("", "the message is empty"),
        ("# only a comment\n\n", "the message is empty"),
    ],
)
def test_a_bad_message_is_refused_with_the_reason(tmp_path, message, fault):
    code, said = check(tmp_path, message)
    assert code == 1 and fault in said


def test_the_hooks_have_the_versions_of_lint_and_check_messages():
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    lint = re.search(r"^lint = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert lint is not None
    pinned = set(re.findall(r'"([\w-]+==[\w.]+)"', lint[1]))
    used = set(re.findall(r"additional_dependencies: \[(.*)\]", hooks))
    assert used == {pin for pin in pinned if not pin.startswith("mypy")}  # which `make types` runs
    assert "entry: python3 tools/commit_message.py\n        language: system\n        stages: [commit-msg]" in hooks
