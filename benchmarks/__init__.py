"""Programs that measure speed; each runs on its own and prints its results, which benchmarks/README.md records."""
