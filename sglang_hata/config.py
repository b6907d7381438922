"""Every HATA setting: its flag, its default, what is allowed. Imports neither torch nor SGLang."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hata_kernels.reference import Budget, Costs

BITS_ALLOWED = (64, 128, 256)
SCORINGS = ("hamming", "one-sided")
SELECTIONS = ("sampled", "top")
AUTO = "auto"
MAX_TOKENS = 2**24


class HataError(ValueError):
    """A setting or a combination that HATA refuses. The message is one sentence for the person who set it."""


@dataclass(frozen=True)
class Flag:
    """One command-line flag, and the keyword of `sgl.Engine` that goes with it."""

    name: str  # the Engine's keyword; the flag is this with dashes
    metavar: str | None
    help: str

    @property
    def option(self) -> str:
        return "--" + self.name.replace("_", "-")


FLAGS = (
    Flag("hata", None, "Serve with HATA: decode attends to the few cached tokens that matter."),
    Flag(
        "hata_budget",
        "TOKENS|SHARE%",
        "Tokens that each KV head attends to in a decode step, sinks and recent tokens included: a number such "
        "as 1024, or a share of the context such as 1.6%%. Default 2048: the budget at which the HATA paper "
        "stays within 2.2 points of dense attention on RULER at 128K tokens.",
    ),
    Flag(
        "hata_min_budget",
        "N",
        "A budget that is a share of the context is never fewer than N tokens. Default 1024: fewer save little "
        "time, and answers that are gathered from all over a text suffer.",
    ),
    Flag(
        "hata_bits",
        "{64,128,256}",
        "Bits of a hash code: untrained, or with --hata-weights auto of those that ship; a folder of trained weights "
        "brings its own. Default 128: 16 bytes a "
        "token and KV head, 3.1%% of K and V at head_dim 128. 256 chooses better and costs twice as much; 64 only "
        "makes sense with trained weights.",
    ),
    Flag(
        "hata_scoring",
        "{hamming,one-sided}",
        "How a query is compared with codes. hamming binarises the queries of a group too, as the paper "
        "does; one-sided keeps them at 4 bits each, which tells keys apart better by the same codes. Default: what "
        "the trained weights were trained for, and one-sided for untrained codes.",
    ),
    Flag(
        "hata_key_sizes",
        None,
        "With untrained codes: cache how large each key is beside its code, 2 bytes a token and KV head, and score by "
        "both. Chooses better where keys have no biases, and a little worse where they have. Takes up to 29%% of a "
        "layer's time more.",
    ),
    Flag(
        "hata_selection",
        "{sampled,top}",
        "Which tokens the budget goes to. top: those of the best scores, as in the paper. sampled: most of them, and "
        "some of the others, likelier the better their scores, that stand for all that are left out. Default sampled: "
        "at the same budget its answers are nearer to those of dense attention.",
    ),
    Flag(
        "hata_weights",
        "DIR|auto|none",
        "Folder of trained hash weights (hata.json beside safetensors); auto for those that ship for this very model, "
        "untrained codes if there are none; or none for the untrained rotation. Default auto.",
    ),
    Flag(
        "hata_dense_layers",
        "N",
        "The first N layers attend to everything, as their attention is spread over all tokens. Default 1.",
    ),
    Flag("hata_sink", "N", "Always attend to the first N tokens, inside the budget. Default 4."),
    Flag(
        "hata_recent",
        "N",
        "Always attend to the last N tokens, inside the budget; the current token is always kept. Default 16.",
    ),
    Flag(
        "hata_min_context",
        "N|auto",
        "Requests of at most N cached tokens attend to all of them; their codes are stored all the same. With auto, "
        "the default, every step decides by its batch, from costs measured on this GPU at start: where choosing "
        "tokens would take longer than reading all, all are read.",
    ),
    Flag(
        "hata_verify",
        None,
        "Check the stored codes and every selection against the specification while serving, and report both in "
        "/server_info. Slow: for tests and for trying a new model.",
    ),
)


@dataclass(frozen=True)
class HataConfig:
    """Validated settings of one server. What users leave out is as here, but for the weights: `from_options` has auto.

    Args:
        budget: as the user wrote it, ``"2048"`` or ``"1.6%"``.
        min_budget: the fewest tokens that a share comes to.
        bits: bits of an untrained code; a weights folder brings its own.
        scoring: ``"hamming"`` or ``"one-sided"``; ``"auto"``, with weights, until `projections.resolve` knows theirs.
        key_sizes: cache sizes of keys, and score by them too.
        selection: ``"sampled"`` or ``"top"``.
        weights: a folder, ``"none"``, or ``"auto"`` until `projections.resolve` has looked.
        dense_layers: how many of the first layers attend to everything.
        sink, recent: tokens at the start and at the end that are always attended to.
        min_context: contexts up to this many tokens are attended whole; None: wherever choosing takes longer.
        verify: check codes and selections while serving.

    Raises:
        HataError: a value that is not allowed.
    """

    budget: str = "2048"
    min_budget: int = 1024
    bits: int = 128
    scoring: str = "one-sided"
    key_sizes: bool = False
    selection: str = "sampled"
    weights: str = "none"
    dense_layers: int = 0
    sink: int = 4
    recent: int = 16
    min_context: int | None = None
    verify: bool = False

    def __post_init__(self) -> None:
        tokens, _ = parse_budget(self.budget)
        if self.bits not in BITS_ALLOWED:
            raise HataError(f"--hata-bits {self.bits} is not a code length: choose 64, 128 or 256.")
        if self.scoring not in SCORINGS and not (self.scoring == AUTO and self.weights != "none"):
            raise HataError(f"--hata-scoring {self.scoring} is not a score: choose {' or '.join(SCORINGS)}.")
        if self.selection not in SELECTIONS:
            raise HataError(f"--hata-selection {self.selection} is not a selection: choose {' or '.join(SELECTIONS)}.")
        for name in ("min_budget", "dense_layers", "sink", "recent", "min_context"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= MAX_TOKENS:
                flag = f"--hata-{name.replace('_', '-')}"
                raise HataError(f"{flag} {value} is out of range: give a number from 0 to {MAX_TOKENS}.")
        if tokens and self.floor > tokens:
            raise HataError(
                f"--hata-budget {self.budget} has no room for {self.sink} sink and {max(self.recent, 1)} recent "
                f"tokens, which count inside it: give a budget of at least {self.floor}, or lower --hata-sink "
                "or --hata-recent."
            )
        if self.weights not in ("none", AUTO) and not Path(self.weights).is_dir():
            raise HataError(
                f"--hata-weights {self.weights} is not a folder: give a folder that holds hata.json, auto for those "
                "that ship, or none for untrained codes."
            )

    @property
    def floor(self) -> int:
        """Tokens that are kept whatever the scores: sinks, recent ones, and at least the current one."""
        return self.sink + max(self.recent, 1)

    def budget_rule(self, costs: Costs | None = None) -> Budget:
        """The rule that turns context lengths into numbers of tokens.

        Args:
            costs: of this GPU, for a ``min_context`` of None.
        """
        from hata_kernels.reference import Budget

        tokens, share_ppm = parse_budget(self.budget)
        floor = max(self.floor, self.min_budget if share_ppm else 0)
        costs = costs if self.min_context is None else None
        return Budget(tokens, share_ppm, floor=floor, min_context=self.min_context or 0, costs=costs)

    def to_dict(self) -> dict[str, Any]:
        """Plain values: what travels to SGLang's processes and what /server_info shows."""
        return asdict(self)

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> HataConfig | None:
        """Reads ``hata``, ``hata_budget``, ... as flags or as keywords of `sgl.Engine`; None when HATA is off.

        Raises:
            HataError: a value that is not allowed, or a HATA setting without ``hata`` itself.
        """
        asked = {flag.name: options.get(flag.name) for flag in FLAGS}
        given = {name: value for name, value in asked.items() if value is not None and value is not False}
        if not given.pop("hata", False):
            if given:
                option = next(flag.option for flag in FLAGS if flag.name in given)
                raise HataError(f"{option} has no effect without --hata: add --hata, or remove it.")
            return None
        if given.get("hata_weights", "none") not in ("none", AUTO) and "hata_bits" in given:
            raise HataError(
                f"--hata-bits {given['hata_bits']} has no effect with --hata-weights {given['hata_weights']}, which "
                "bring their own: remove one of the two."
            )
        if "hata_min_budget" in given and not parse_budget(str(given.get("hata_budget", cls.budget)))[1]:
            raise HataError(
                f"--hata-min-budget {given['hata_min_budget']} has no effect with a --hata-budget in tokens: give that "
                "as a share of the context, such as 1.6%, or remove one of the two."
            )
        types = {field.name: field.type for field in fields(cls)}
        values: dict[str, Any] = {}
        for name, value in given.items():
            key = name.removeprefix("hata_")
            if key == "min_context" and value == "auto":
                continue
            values[key] = _whole_number(name, value) if types[key].startswith("int") else value
        if "budget" in values:
            values["budget"] = str(values["budget"])
        if "weights" in values:
            values["weights"] = str(values["weights"])
        if values.setdefault("weights", AUTO) != "none":
            values.setdefault("scoring", AUTO)
        return cls(**values)


def parse_budget(text: str) -> tuple[int, int]:
    """``"1024"`` -> (1024, 0); ``"1.6%"`` -> (0, 16000), the share in parts per million.

    Raises:
        HataError: neither a number of tokens nor a share.
    """
    number = re.fullmatch(r"\d+", text.strip())
    if number and 1 <= int(text) <= MAX_TOKENS:
        return int(text), 0
    share = re.fullmatch(r"(\d{1,3}(?:\.\d{1,4})?)\s*%", text.strip())
    if share:
        ppm = round(float(share[1]) * 10_000)
        if 1 <= ppm <= 1_000_000:
            return 0, ppm
    raise HataError(
        f"--hata-budget {text} is not a budget: give a number of tokens from 1 to {MAX_TOKENS}, such as 1024, "
        "or a share of the context from 0.0001% to 100%, such as 1.6%."
    )


def _whole_number(name: str, value: Any) -> int:
    try:
        if isinstance(value, bool) or int(str(value)) != float(str(value)):
            raise ValueError
        return int(str(value))
    except ValueError:
        option = "--" + name.replace("_", "-")
        raise HataError(f"{option} {value} is not a whole number: give one, such as {option} 64.") from None
