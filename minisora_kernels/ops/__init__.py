"""One file per op: equation, reference, schema, shape function, autograd, backend table, public function."""
