"""Hostile input for every reader of the package, tried by processes that may die of it."""
