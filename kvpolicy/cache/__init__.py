"""What happens to a cache under a policy, for any runtime."""
