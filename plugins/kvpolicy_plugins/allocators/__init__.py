"""Budget allocators: entries per layer and KV head."""
