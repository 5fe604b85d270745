"""The callback that prunes inside transformers' Trainer, TRL or an accelerate loop."""
