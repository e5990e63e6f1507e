"""Benchmarks of fxopt: `python -m benchmarks NAME`; a file or package per benchmark, named as on the command line."""
