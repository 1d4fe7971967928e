"""Shared by tests: tiny models, fakes, graphs."""
