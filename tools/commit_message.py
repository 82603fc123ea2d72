"""Checks a commit message: ``python tools/commit_message.py FILE``, which is how git's commit-msg hook calls it."""

from __future__ import annotations

import re
import sys
from pathlib import Path

LONGEST = 72
EXEMPT = ("Merge ", "Revert ", "fixup! ", "squash! ", "amend! ")  # what git writes itself


def faults(message: str) -> list[str]:
    """What is wrong with a message; nothing if it is an empty list. Lines that git leaves out do not count."""
    message = message.split("# ------------------------ >8 ------------------------")[0]
    lines = [line.rstrip() for line in message.splitlines() if not line.startswith("#")]
    while lines and not lines[0]:
        lines.pop(0)
    if not lines:
        return ["the message is empty"]
    subject = lines[0]
    if subject.startswith(EXEMPT):
        return []
    found = []
    if len(subject) > LONGEST:
        found.append(f"the subject has {len(subject)} characters; it may have {LONGEST}")
    if not re.match(r"[a-z0-9_./-]+(, [a-z0-9_./-]+)*: [a-z0-9]", subject):
        found.append("the subject must be `area: verb ...` in lower case, as in `adaln: read the gate once`")
    if subject.endswith("."):
        found.append("the subject ends with a full stop")
    if len(lines) > 1 and lines[1]:
        found.append("the line after the subject must be empty")
    return found


def main() -> int:
    if len(sys.argv) != 2:
        print("usage: python tools/commit_message.py FILE", file=sys.stderr)
        return 2
    found = faults(Path(sys.argv[1]).read_text(encoding="utf-8"))
    for fault in found:
        print(f"commit message: {fault}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
