"""Benchmarks and the model zoos that they and the tests run over."""
