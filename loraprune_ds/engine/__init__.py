"""What the engines share: their protocol, AdamW, and the state that a checkpoint holds."""
