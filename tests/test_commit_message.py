"""The check of commit messages passes good ones and says what is wrong with others."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "tools" / "commit_message.py"
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
