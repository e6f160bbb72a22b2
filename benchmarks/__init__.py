"""Programs that measure speed; each runs on its own and prints its results, which benchmarks/README.md records."""

import demo  # noqa: F401  puts scripts/ on the path
