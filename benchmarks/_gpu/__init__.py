"""What is claimed of a GPU, measured on the one that is there: `python -m benchmarks._gpu`, or `make gpu`."""
