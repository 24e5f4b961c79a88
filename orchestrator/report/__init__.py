"""A study as one page without network, and its frontier as a figure."""
