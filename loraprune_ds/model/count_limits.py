"""Limits on the counts in config.json. A million layers take minutes to build, without a word."""

import re

from loraprune_ds.errors import require
from loraprune_ds.files import JsonObject

# At least ten times what the largest published models have, which are 126 layers (Llama 3.1 405B)
# and 512 experts (Qwen3-Next). Widths and heads need no limit: without weights any size is quick.
LIMITS = {r"num_\w*layers|depth": 1500, r"\w*experts": 5120}


def check_counts(config: JsonObject, where: str) -> None:
    """Checks the counts of layers and experts in config.json and its sections, such as a tower's.

    Raises:
        UserError: a count is above its limit. The line names `where` and the key.
    """
    sections = [config]
    for section in sections:  # which grows
        sections += [value for value in section.values() if isinstance(value, dict)]
        for key, value in section.items():
            for keys, limit in LIMITS.items():
                if isinstance(value, int) and re.fullmatch(keys, str(key)):
                    require(
                        value <= limit,
                        f"{where}: config.json has {key} {value}, but at most {limit} are supported",
                    )
