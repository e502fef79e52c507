"""A report as a page, a figure, and numbers."""
