"""What engines share: their protocol, how gradients are watched, AdamW, and the state that a checkpoint holds."""
