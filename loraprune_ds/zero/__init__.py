"""The live model on ZeRO-3. The only package that knows DeepSpeed."""
