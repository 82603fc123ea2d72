"""One file an op: equation, reference, schema and fake, autograd, backend table, public function."""
