"""What lies in the folder of a run: names that whoever writes it and whoever reads it must agree on."""

STATUS_FILE = "status.json"
REPORT_FILE = "report.json"
MODEL_FOLDER = "model"
CHECKPOINTS_FOLDER = "checkpoints"
