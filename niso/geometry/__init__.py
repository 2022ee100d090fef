"""Mathematics on arrays."""
