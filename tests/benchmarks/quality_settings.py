"""Names the runs of quality.py, by group. Each changes the plain method at equal budget and removed fraction."""

from collections.abc import Sequence
from dataclasses import dataclass

REFIT = "prune.compensate=least_squares"
DISTILL = "train.distill_weight=0.5"
QUARTER, WARM = "train.distill_weight=0.25", "train.distill_temperature=2"
GRADIENT = "prune.criterion=gradient"
FISHER = "prune.criterion=fisher"
GLOBAL = "prune.ranking=global"
EVERY_STEP = ("prune.compensate_steps=4", "prune.compensate_decay=0.9")  # measured for the refit
INT8 = "model.frozen=int8"
ALL_THREE = (REFIT, DISTILL, GRADIENT)
ENDS = ("plain", "all-three")
STOCK = ("prune.protected_first=0", "prune.protected_last=0")  # every layer alike: stock classes load the result

# 81,920 and 409,600 tokens, in windows of 128. A cut follows every 5 % of the steps, as in the published runs. The
# short runs have the rate of group `rates` that validates best at 41.7 %. The others have half of it, which nobody
# chose.
BOTH = ("train.micro_batch_size=8", "lora.lora_dropout=0")
SHORT = ("train.steps=80", "train.global_batch_size=8", "prune.prune_every=4", *BOTH)
LONG = ("train.steps=200", "train.global_batch_size=16", "prune.prune_every=10", *BOTH)
DEEP, LIGHT, HALF = "prune.ratio=0.417", "prune.ratio=0.148", "prune.ratio=0.5"
RATE, UNTUNED_RATE = "train.learning_rate=4e-3", "train.learning_rate=2e-3"


@dataclass(frozen=True)
class Setting:
    """Describes one row of the table.

    Attributes:
        model: `mha` (key-value heads repeated), `gqa` (SmolLM2 as it is), `nf4` (`mha`, rounded to 4 bits) or
            `two-four` (`mha`, two of four weights zero).
        peer: another method, or a lever (peer_run.py). Empty: the project's.
    """

    group: str
    name: str
    overrides: tuple[str, ...]
    model: str = "mha"
    one_seed: bool = False  # for choosing, not for comparing
    peer: str = ""

    def seeds(self, wanted: Sequence[int]) -> Sequence[int]:
        return wanted[:1] if self.one_seed else wanted


def _short(group: str, name: str, *changes: str, model: str = "mha", one_seed: bool = False, peer: str = "") -> Setting:
    return Setting(group, name, (*SHORT, DEEP, RATE, *changes), model, one_seed, peer)


def _settings() -> list[Setting]:
    alone = {
        "plain": (),
        "refit": (REFIT,),
        "distillation": (DISTILL,),
        "gradient": (GRADIENT,),
        "all-three": ALL_THREE,
    }
    levers = [_short("levers", name, *changes) for name, changes in alone.items()]
    rates = [
        _short("rates", f"{name}-lr{rate}", *alone[name], f"train.learning_rate={rate}", one_seed=True)
        for rate, names in {"1e-3": ENDS, "2e-3": alone, "8e-3": ENDS}.items()
        for name in names
    ]
    details = [
        _short("details", "all-three-every-4th-step", *ALL_THREE, "prune.score_every=4"),
        _short("details", "all-three-top-64", *ALL_THREE, "train.distill_top_k=64"),
        _short("details", "all-three-ridge-0.01", *ALL_THREE, "prune.compensate_ridge=0.01"),
        _short("details", "all-three-recovery", *ALL_THREE, "train.steps=60", "train.recovery_steps=20"),
        _short("details", "all-three-end-0.5", *ALL_THREE, "prune.cooldown_fraction=0.5"),
    ]
    where = [
        _short("where", "all-three-nothing-protected", *ALL_THREE, *STOCK),
        _short("where", "all-three-few-heads", *ALL_THREE, "prune.head_ratio=0.25"),
        _short("where", "all-three-many-heads", *ALL_THREE, "prune.head_ratio=0.75"),
        _short("where", "all-three-global", *ALL_THREE, "prune.ranking=global"),
        _short("where", "all-three-global-cap-60", *ALL_THREE, "prune.ranking=global", "prune.max_layer_ratio=0.6"),
    ]
    fisher = [
        _short("fisher", "fisher", FISHER),
        _short("fisher", "fisher-refit", FISHER, REFIT),
        _short("fisher", "fisher-refit-multiple-64", FISHER, REFIT, "prune.channel_multiple=64"),
        _short("fisher", "fisher-refit-multiple-128", FISHER, REFIT, "prune.channel_multiple=128"),
        _short("fisher", "fisher-refit-global", FISHER, REFIT, GLOBAL),
        _short("fisher", "fisher-refit-distillation", FISHER, REFIT, DISTILL),
        _short("fisher", "fisher-refit-distillation-global", FISHER, REFIT, DISTILL, GLOBAL),
        _short("fisher", "fisher-refit-distillation-global-4-steps", FISHER, REFIT, DISTILL, GLOBAL, *EVERY_STEP),
        _short("fisher", "fisher-refit-stock", FISHER, REFIT, *STOCK),
        _short("fisher", "fisher-refit-4-steps-half", FISHER, REFIT, *EVERY_STEP, HALF),
    ]
    smaller = {
        "rank-32": ("lora.r=32", "lora.lora_alpha=64"),
        "every-8": ("prune.prune_every=8",),
        "end-0.5": ("prune.cooldown_fraction=0.5",),
        "lr6e-3": ("train.learning_rate=6e-3",),
        "beta2-0.95": ("train.adam_beta2=0.95",),
        "few-heads": ("prune.head_ratio=0.3",),
        "many-heads": ("prune.head_ratio=0.56",),
        "most-heads": ("prune.head_ratio=0.67",),
        "distillation-0.25": (QUARTER,),
    }
    details += [
        _short("fisher-details", "fisher-refit-4-steps", FISHER, REFIT, *EVERY_STEP),
        _short("fisher-details", "fisher-refit-decay-0.9", FISHER, REFIT, EVERY_STEP[1]),
        _short("quick", "fisher-refit-20480", FISHER, REFIT, *EVERY_STEP, "train.steps=20", "prune.prune_every=1"),
        _short("quick", "fisher-refit-10240", FISHER, REFIT, *EVERY_STEP, "train.steps=10", "prune.prune_every=1"),
    ]
    details += [
        _short("fisher-details", f"fisher-refit-4-steps-{name}", FISHER, REFIT, *EVERY_STEP, *changes)
        for name, changes in smaller.items()
    ]
    details.append(_short("fisher-details", "fisher-refit-4-steps-norms", FISHER, REFIT, *EVERY_STEP, peer="norms"))
    general = (FISHER, REFIT, DISTILL, GLOBAL, *EVERY_STEP)
    quarter = (*general, QUARTER, WARM)
    details += [
        _short("fisher-details", "general-0.25", *general, QUARTER),
        _short("fisher-details", "general-temperature-2", *general, WARM),
        _short("fisher-details", "general-temperature-4", *general, "train.distill_temperature=4"),
        _short("fisher-details", "general-0.1-temperature-2", *general, "train.distill_weight=0.1", WARM),
        _short("fisher-details", "general-0.25-temperature-2-uniform", FISHER, REFIT, QUARTER, WARM, *EVERY_STEP),
        _short("fisher-details", "general-0", FISHER, REFIT, GLOBAL, *EVERY_STEP),
        _short("fisher-details", "general-0.25-temperature-2", *quarter),
        _short("fisher-details", "general-0.25-temperature-2-half", *quarter, HALF),
        _short("fisher-details", "general-0.25-temperature-2-by-step", *quarter, "prune.normalize=step"),
    ]
    stock = [_short("stock", "fisher-refit-stock-4-steps", FISHER, REFIT, *STOCK, *EVERY_STEP)]
    stock += [
        _short("stock", f"fisher-refit-stock-4-steps-{name}", FISHER, REFIT, *STOCK, *EVERY_STEP, *smaller[name])
        for name in ("rank-32", "every-8", "end-0.5", "few-heads", "many-heads", "most-heads")
    ]
    late = (FISHER, REFIT, *STOCK, *EVERY_STEP, *smaller["end-0.5"])
    stock += [
        _short("stock", f"fisher-refit-stock-4-steps-end-0.5-{name}", *late, *smaller[name])
        for name in ("many-heads", "few-heads")
    ]
    stock.append(_short("stock", "fisher-refit-stock-4-steps-end-0.5-distillation", *late, QUARTER, WARM))
    magnitude = (*SHORT, DEEP, RATE, "prune.criterion=magnitude")
    peers = [Setting("peers", "magnitude", magnitude)]
    peers += [Setting("peers", f"peer-{name}", magnitude, peer=name) for name in ("wanda", "flap")]
    peers.append(Setting("peers", "two-four", (*SHORT, RATE), model="two-four", peer="two-four"))
    int8 = [
        _short("int8", "plain-int8", INT8),
        _short("int8", "fisher-refit-int8", FISHER, REFIT, INT8),
        _short("int8", "fisher-nf4", FISHER, model="nf4"),
    ]
    long = [
        Setting("long", "plain-409600", (*LONG, DEEP, UNTUNED_RATE)),
        Setting("long", "all-three-409600", (*LONG, DEEP, UNTUNED_RATE, *ALL_THREE)),
        Setting("long", "fisher-refit-4-steps-409600", (*LONG, DEEP, UNTUNED_RATE, FISHER, REFIT, *EVERY_STEP)),
        Setting(
            "long",
            "fisher-refit-distillation-global-4-steps-409600",
            (*LONG, DEEP, UNTUNED_RATE, FISHER, REFIT, DISTILL, GLOBAL, *EVERY_STEP),
        ),
        Setting("long", "general-temperature-2-409600", (*LONG, DEEP, UNTUNED_RATE, *general, WARM)),
        Setting("long", "general-0.25-temperature-2-409600", (*LONG, DEEP, UNTUNED_RATE, *quarter)),
    ]
    light = [
        Setting("light", "plain-light", (*SHORT, LIGHT, UNTUNED_RATE)),
        Setting("light", "all-three-light", (*SHORT, LIGHT, UNTUNED_RATE, *ALL_THREE)),
        Setting("light", "general-0.25-temperature-2-light", (*SHORT, LIGHT, UNTUNED_RATE, *quarter)),
        Setting("light", "all-three-light-409600", (*LONG, LIGHT, UNTUNED_RATE, *ALL_THREE)),
    ]
    gqa = [
        _short("gqa", "gqa-plain", model="gqa"),
        _short("gqa", "gqa-all-three", *ALL_THREE, model="gqa"),
        _short("gqa", "gqa-fisher-refit-4-steps", FISHER, REFIT, *EVERY_STEP, model="gqa"),
        _short("gqa", "gqa-plain-stock", *STOCK, model="gqa"),
        _short("gqa", "gqa-all-three-stock", *ALL_THREE, *STOCK, model="gqa"),
    ]
    return [*levers, *fisher, *stock, *peers, *int8, *rates, *details, *where, *long, *light, *gqa]


SETTINGS = {setting.name: setting for setting in _settings()}
GROUPS = {  # in the order of the table
    "levers": "41.7 % removed, 81,920 tokens, learning rate 4e-3",
    "fisher": "the same, criterion fisher",
    "fisher-details": "details of fisher with the refit",
    "quick": "a few steps, with a cut after each",
    "stock": "the same, no layer protected",
    "peers": "other methods, without a refit",
    "int8": "the same with int8 weights",
    "rates": "the same at other learning rates",
    "details": "details of all three",
    "where": "where all three cut",
    "long": "41.7 % removed, 409,600 tokens, learning rate 2e-3",
    "light": "14.8 % removed, learning rate 2e-3",
    "gqa": "grouped-query attention as it is (stock: no layer protected)",
}


def select(groups: Sequence[str], only: Sequence[str] | None) -> list[Setting]:
    """Settings of some groups, or by name.

    Raises:
        SystemExit: an unknown name.
    """
    if only is None:
        return [setting for setting in SETTINGS.values() if setting.group in groups]
    if unknown := [name for name in only if name not in SETTINGS]:
        raise SystemExit(f"error: no setting {unknown[0]}; there are {', '.join(SETTINGS)}")
    return [SETTINGS[name] for name in only]
