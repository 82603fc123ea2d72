"""``make new-op OP=x``: writes the files of an op that multiplies by a number, ready to be filled.

The templates are in tools/templates. In what they become, ``new_op`` is the op's name and ``NewOp`` its class.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
FILES = {
    "op.py": "minisora_kernels/ops/{op}.py",
    "cpu.cpp": "csrc/cpu/{op}.cpp",
    "triton.py": "minisora_kernels/triton/{op}.py",
    "bench.py": "bench/ops/bench_{op}.py",
    "cases.py": "minisora_kernels/verify/cases/{op}.py",
    "test.py": "tests/ops/test_{op}.py",
}


def write(op: str, root: Path = ROOT) -> list[Path]:
    """Write the files of ``op`` and its two lines in ``__init__.py``; nothing is written if one of them is there.

    Raises:
        ValueError: a name that is no module's, or is in use.
    """
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", op):
        raise ValueError(f"OP is {op!r}; it may be words in lower case with _ between them")
    init = root / "minisora_kernels" / "__init__.py"
    lines = init.read_text().splitlines()
    targets = {name: root / path.format(op=op) for name, path in FILES.items()}
    used = [str(path.relative_to(root)) for path in targets.values() if path.exists()]
    if re.search(rf"\b{op}\b", init.read_text()):
        used.append(str(init.relative_to(root)))
    if used:
        raise ValueError(f"OP is {op!r}, which is in use: {', '.join(used)}")
    for name, path in targets.items():
        text = (Path(__file__).parent / "templates" / name).read_text()
        path.write_text(text.replace("new_op", op).replace("NewOp", op.title().replace("_", "")))
    imports = [i for i, line in enumerate(lines) if line.startswith("from .ops.")]
    at = next((i for i in imports if lines[i] > f"from .ops.{op} "), imports[-1] + 1)
    lines.insert(at, f"from .ops.{op} import {op} as {op}")
    names = [i for i, line in enumerate(lines) if re.fullmatch(r' +"\w+",', line)]
    lines.insert(next((i for i in names if lines[i] > f'    "{op}",'), names[-1] + 1), f'    "{op}",')
    init.write_text("\n".join(lines) + "\n")
    return [*targets.values(), init]


def main() -> int:
    try:
        if len(sys.argv) != 2:
            raise ValueError("usage: make new-op OP=name")
        paths = write(sys.argv[1])
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print("\n".join(str(path.relative_to(ROOT)) for path in paths))
    print(f"Now `make op OP={sys.argv[1]}`, which passes; then fill them. CONTRIBUTING.md says what is in each file.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
