"""The kernels themselves. Everything here imports triton, so only a launcher imports it, at its first launch."""
