"""Post-operations: changes to what is kept."""
