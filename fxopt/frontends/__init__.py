"""Frontends: from an `nn.Module` to a `Program`. `capture` chooses between `symbolic` and `export`."""
