"""How many bytes a kernel has in flight while it computes, counted in its machine code.

A loop that reads ahead copies to shared memory (LDGSTS), closes groups of copies (LDGDEPBAR), and waits until no more
than so many groups are on their way (DEPBAR.LE).
"""

from __future__ import annotations

import re

# A predicate before the name is of single threads, which copy what many read; those bytes are left out. One at the end
# is a mask.
COPY = "LDGSTS"
BITS = re.compile(r"LDGSTS\S*\.(64|128)\b")
WAIT = re.compile(r"DEPBAR\.LE SB0, (0x[0-9a-f]+)")
JUMP = re.compile(r"\bBRA\S* (?:!?U?P\d+, )?(0x[0-9a-f]+)")
TURNS = 16  # of a loop, until the groups in flight are those of every turn


def bytes_ahead(code: str, threads: int) -> int:
    """The fewest that a block of so many threads has in flight at a barrier of the loop that copies; 0 without one.

    ``code`` is what ``cuobjdump -sass`` prints of one kernel.
    """
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;/]+?)\s*;", code)
    instructions = [(int(place, 16), text) for place, text in lines]
    jumps = [(place, int(found[1], 16)) for place, text in instructions if (found := JUMP.search(text))]
    for begin, end in sorted(((to, at) for at, to in jumps if to < at), key=lambda loop: loop[1] - loop[0]):
        body = [text for place, text in instructions if begin <= place <= end]
        if any(text.startswith(COPY) for text in body):
            return _least(body, threads)
    return 0


def _least(body: list[str], threads: int) -> int:
    groups, found = [0], [0]  # the last group is open
    for _ in range(TURNS):
        found = []
        for text in body:
            if text.startswith(COPY):
                wide = BITS.match(text)
                groups[-1] += (int(wide[1]) if wide else 32) // 8 * threads
            elif text.startswith("LDGDEPBAR"):
                groups.append(0)
            elif wait := WAIT.match(text):
                groups = groups[-1 - int(wait[1], 16) :]
            elif text.startswith("BAR.SYNC"):
                found.append(sum(groups))
    return min(found, default=0)
