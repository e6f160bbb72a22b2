"""The miniature world: everything the pipeline needs, small enough for a bare machine."""
