"""The parts of the training loop that runs, sweeps and benchmarks share. They neither compile nor write files."""
