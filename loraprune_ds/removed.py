"""Settings and options of earlier versions: what to do in place of each."""

DROP_BEFORE = "drop layers before the run, as launch/examples/drop_layers.py does"
REPEATED = (
    "remove it: a refit now repeats the last passes, with ten tokens for each input of a linear"
)
KEYS = {
    "model.drop_layers": DROP_BEFORE,
    "prune.depth_ratio": DROP_BEFORE,
    "prune.sizes": "a second run from the export of a first makes the next size",
    "prune.compensate_steps": REPEATED,
    "prune.compensate_decay": REPEATED,
}
OPTIONS = {
    "--mtp": "results have no layers that predict further tokens",
    "--explain": "loraprune_ds/plan/README.md has the formulas",
    "--text": "chats need a model with a chat template, which writes no plain texts",
    "--samples": "--set data.max_samples=N plans for as many",
    "--speed": "tests/benchmarks/serving.py measures the speed in servers",
    "--server-memory": "--set prune.target=12GiB finds the ratio for a server's memory",
    **dict.fromkeys(
        ("--intra-bandwidth", "--inter-bandwidth", "--host-bandwidth", "--flops", "--utilisation"),
        "a plan no longer estimates seconds, which no GPU has measured",
    ),
}
