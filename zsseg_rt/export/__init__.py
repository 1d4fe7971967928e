"""Turn torch models into bundles."""
