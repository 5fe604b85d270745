"""An evaluation's JSON."""

EVALUATION = {
    "perplexity": 60.0,
    "method": None,
    "dtype": "float32",
    "cost": {"parameters": 750},
    "removed_fraction": 0.25,
    "tasks": {"results": {"piqa": {"alias": "piqa", "acc,none": 0.5}, "boolq": {"acc,none": 0.7}}},
    "dense": {
        "perplexity": 50.0,
        "tasks": {
            "results": {
                "piqa": {"acc,none": 0.8, "acc_stderr,none": "N/A"},
                "boolq": {"acc,none": 0.8},
            }
        },
    },
    "text": {"name": "wikitext2", "split": "test", "sha256": "0"},
    "protocol": {"window": 128, "max_windows": None},
}
