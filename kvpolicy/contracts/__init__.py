"""What a plugin author sees: the kinds of components, the view that they look at, and the budget."""
