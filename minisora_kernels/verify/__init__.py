"""``python -m minisora_kernels verify``: are the kernels right on this device, and faster? The answers go to a record.

- ``cases/``: the calls that are checked, and those that are timed;
- ``right.py``: values and gradients against float64, in a process of its own per op;
- ``faster.py``: ours, plain PyTorch and torch.compile in turns;
- ``record.py``: what was measured, as a file; the automatic choice (``automatic.py``) reads it;
- ``command.py``: the command line.
"""
