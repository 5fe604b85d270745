"""The training: preparation, loop, distillation, checkpoints, output folder."""
