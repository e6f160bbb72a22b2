"""A world of drawn people, in which it can be measured whether a LoRA learns a person."""

import demo  # noqa: F401  puts scripts/ on sys.path
