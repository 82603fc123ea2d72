"""Published weights: files of other projects, and the layouts of their tensors."""
