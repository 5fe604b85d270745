"""Records of a run, pictures, report.json and reporters such as TensorBoard."""
