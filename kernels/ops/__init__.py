"""One folder an op. ``mage_fast.ops`` re-exports the public functions."""
