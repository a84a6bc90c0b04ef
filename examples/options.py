"""Options of the command line as a dataclass: a field each, with its default and what it does."""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar, get_args, get_origin


def option(default: Any, help: str, *, positive: bool = True, **how: Any) -> Any:
    """A field of `Options`: its default, what --help says, whether a number must be above 0, and more for argparse."""
    return field(default=default, metadata={"help": help, "positive": positive, "how": how})


@dataclass(frozen=True)
class Options:
    """Options of the command line, as a dataclass whose fields are made by `option`."""

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if type(value) in (int, float) and each.metadata["positive"] and not 0 < value < math.inf:
                raise ValueError(f"{_flag(each.name)} must be above zero, got {value}")


T = TypeVar("T", bound=Options)


def parse(options: type[T], doc: str, only: Sequence[str] | None = None, **other_defaults: Any) -> T:
    """Read options from the command line: all of them, or only some; with other defaults, if any are given."""
    defaults_too = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=doc.splitlines()[0], formatter_class=defaults_too)
    for each in fields(options):
        if only is None or each.name in only:
            how = dict(each.metadata["how"], default=each.default, help=each.metadata["help"])
            if each.type is bool:
                how["action"] = "store_true"
            else:
                # of Path | None and tuple[int, ...], the first
                how["type"] = next(iter(get_args(each.type)), each.type)
            if get_origin(each.type) is tuple:
                how["nargs"] = "+"
            parser.add_argument(_flag(each.name), **how)
    parser.set_defaults(**other_defaults)
    try:
        return options(**vars(parser.parse_args()))
    except ValueError as error:
        parser.error(str(error))


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
