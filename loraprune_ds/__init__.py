"""LoRA-guided structured pruning of decoder models on DeepSpeed ZeRO-3."""

__version__ = "0.1.0"
