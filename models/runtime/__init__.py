"""What the commands need of the machine and of Python: devices, packages, files, plain values."""
