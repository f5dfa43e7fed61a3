"""Train one bank: warm start, Trainer, checkpoints."""
