"""The documentation as a site: pages of the checkout, and public names from their docstrings."""
