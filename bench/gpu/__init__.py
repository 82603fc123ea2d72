"""What a GPU is asked, and what its code is held against without one."""
