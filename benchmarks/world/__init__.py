"""A world of drawn people, in which it can be measured whether a LoRA learns a person."""
