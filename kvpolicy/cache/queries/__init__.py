"""The last queries of every layer, and what is fed query by query."""
