"""One module per claim about cost; `python -m benchmarks` lists them, `python -m benchmarks NAME` runs one."""
