"""Reference models, objectives, data, trainer and sampler.

In a checkout this folder is the package ``models``; installed with the kernels it is ``minisora_models``, for others
have a ``models`` of their own. Use one of the two names in a process: imported under both, everything in here exists
twice, and an object of a class under one name is no instance of the same class under the other. A warning says so.
Files do not mind: a checkpoint written under one name is read under the other.
"""

import sys
import warnings
from importlib.util import find_spec

_NAMES = {"models": "minisora_models", "minisora_models": "models"}
MINISORA = True

if getattr(sys.modules.get(_NAMES.get(__name__, "")), "MINISORA", False):
    warnings.warn(
        f"{__name__} is imported beside {_NAMES[__name__]}, another name of the same package: its classes now exist "
        "twice; import one of them only",
        stacklevel=2,
    )

# ``python -m`` puts "-m" there while it looks for the command, whose imports would end in a traceback.
_NEEDED = [name for name in ("av", "safetensors", "tqdm", "tyro", "yaml") if not find_spec(name)]
if sys.argv[:1] == ["-m"] and _NEEDED:
    sys.exit(f"error: {', '.join(_NEEDED)} is not installed, which the commands need: pip install '.[train]'")
