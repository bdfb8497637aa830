"""How plugins come in: hooks, entry points, and the catalog of names that they fill.

The room cannot be called `catalog`: `kvpolicy.catalog` is the function that returns the catalog of the process.
"""
