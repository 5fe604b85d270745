"""The training: preparation, loop, distillation, checkpoints in time, output folder."""
