"""What a policy kept of a text and why: a recorder for a cache, and the page that shows it."""
