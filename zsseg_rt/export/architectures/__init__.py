"""Exporters: each cuts the models of one architecture, or of two alike, into a bundle's parts."""
