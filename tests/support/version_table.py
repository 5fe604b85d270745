"""The table of loraprune_ds/hf/VERSIONS.md, from pyproject.toml, versions.py and tests/oldest_names.txt.

python -m tests.support.version_table      writes it
"""

import tomllib

from packaging.requirements import Requirement

from loraprune_ds import versions
from tests.support.launching import ROOT
from tests.support.oldest_names import FILE, LACKS_FAMILY

PAGE = ROOT / "loraprune_ds" / "hf" / "VERSIONS.md"
BEGIN = "| what | needs |"
SHOWN = ("torch", "transformers", "peft", "accelerate", "datasets")
SETS = {"llamafactory": "LLaMA-Factory 0.9.5", "axolotl": "Axolotl 0.19.0"}


def rows() -> dict[str, str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needs = [Requirement(line) for line in project["dependencies"]]
    extras = project["optional-dependencies"]
    lacking = [
        line.split(LACKS_FAMILY) for line in FILE.read_text().splitlines() if LACKS_FAMILY in line
    ]
    table = {
        "the callback in one process, on DDP, FSDP2; its saves": ", ".join(
            f"{need.name}{need.specifier}" for need in needs if need.name in SHOWN
        ),
        "the callback on ZeRO-3": f"also {extras['deepspeed'][0]}",
        "`run`, `chats`, `evaluate`": ", ".join(
            f"{name}>={versions.LEAST[name]}" for name in ("transformers", "peft")
        ),
        "`run` on several ranks": f"also {extras['deepspeed'][0]}",
        "`plan`, exports as `hf` and `adapter`": "nothing more",
        "exports as `gguf-f16`, `gguf-q8_0`; the embedded model": f"also {extras['gguf'][0]}",
        "pictures, curves": f"also {', '.join(extras['pictures'])}",
    }
    for name, tool in SETS.items():
        families = ", ".join(family for which, family in lacking if which == name)
        table[f"families that the transformers of {tool} lacks"] = f"a newer one: {families}"
    return table


def with_table(page: str) -> str:
    begin = page.index(BEGIN)
    table = f"{BEGIN}\n|---|---|\n" + "".join(f"| {a} | {b} |\n" for a, b in rows().items())
    return page[:begin] + table + page[page.index("|\n\n", begin) + 2 :]


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text()))
