"""Models cut into the parts that are exported, with everything constant computed once."""
