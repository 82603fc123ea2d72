"""The build backend: setuptools, plus torch as a build requirement only where the environment has none.

pip builds in an isolated environment. The kernels must be compiled against the torch they will run with, so setup.py
looks for it in the environment that is being installed into; asking pip for torch here would download a second one.
"""

from importlib.machinery import PathFinder
from sysconfig import get_path

from setuptools.build_meta import *  # noqa: F403
from setuptools.build_meta import get_requires_for_build_wheel as _requires


def _torch_if_missing() -> list[str]:
    installed = PathFinder.find_spec("torch", [get_path("purelib"), get_path("platlib")])
    return ["torch>=2.10"] if installed is None else []


def get_requires_for_build_wheel(config_settings=None):
    return _requires(config_settings) + _torch_if_missing()


get_requires_for_build_editable = get_requires_for_build_wheel
