"""What the scripts in `benchmarks/` share; each puts this package's folder on `sys.path`."""
