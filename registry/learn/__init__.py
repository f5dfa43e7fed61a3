"""Training runs: the KP bank, new domains, and retrained versions, each with a frozen proof."""
