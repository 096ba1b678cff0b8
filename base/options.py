"""How options are declared: a field of a checked dataclass, with default, help and limits; pydantic checks types and ranges."""
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

# strict: "4" is no number and True is no 1; whole numbers are fine for floats all the same
checked = dataclass(kw_only=True, config=ConfigDict(strict=True, extra="forbid", allow_inf_nan=False))


def option(default, help, **limits):
    if "lt" not in limits and "ge" in limits and isinstance(limits["ge"], int) and not isinstance(default, float):
        limits["lt"] = 2**31  # sizes and counts: what is larger overflows somewhere else
    return Field(default, description=help, **limits)
