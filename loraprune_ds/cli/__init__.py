"""The commands, for the scripts in launch/ and for `loraprune-ds`."""
