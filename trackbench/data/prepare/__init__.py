"""`trackbench prepare NAME`: training data and benchmarks made, converted or fetched."""
