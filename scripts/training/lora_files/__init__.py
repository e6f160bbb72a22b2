"""LoRA files of any trainer: what they hold, other ranks, sums of several, and checkpoints with them baked in."""
