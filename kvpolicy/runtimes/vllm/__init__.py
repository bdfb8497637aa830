"""vLLM: serve a policy in an engine, as a plugin."""
