"""How options are declared: a field of a checked class, with default, help and limits.

    @checked
    class RunOptions:
        heading = "run"                      # of these options in --help
        seed: int = option(1337, "of the weights, the batches and dropout", ge=0)

pydantic checks the types and ranges of what is given.
"""
import typing

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass, rebuild_dataclass
from pydantic.fields import FieldInfo

# strict: "4" is no number and True is no 1; whole numbers are fine for floats all the same
RULES = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
checked = dataclass(kw_only=True, config=RULES)


def option(default, help, names=None, first=None, **limits):
    """A field of a checked class.

    names: a function without arguments; --help lists the names that it returns.
    first: a function of this option's value, called before any other option is looked at, since it
    may add some.
    limits: pydantic's ge, gt, le, lt, min_length."""
    is_count = isinstance(limits.get("ge"), int) and not isinstance(default, float)
    if is_count and "lt" not in limits:
        limits["lt"] = 2**31  # sizes and counts: what is larger overflows somewhere else
    extra = {"names": names, "first": first}
    return Field(default, description=help, json_schema_extra=extra, **limits)


def declared(cls):
    """The options that a plain class declares, its bases' among them: name -> (type, option).

    ValueError for what is no option, or one whose default is not among its values."""
    found = {}
    kinds = typing.get_type_hints(cls)
    for name in [*kinds, *vars(cls)]:
        value = getattr(cls, name, None)
        if name.startswith("__"):
            continue
        if name not in kinds or not isinstance(value, FieldInfo) or not value.description:
            raise ValueError(f"{name} is no option; write: {name}: int = option(4, \"its help\")")
        found[name] = (kinds[name], value)
    defaults = {name: value.default for name, (_, value) in found.items()}
    checked(type(cls.__name__, (cls,), {"__annotations__": kinds}))(**defaults)
    return found


def replace_options(cls, options):
    """Makes `options`, name -> (type, option), those of a checked class, and of those made from it.

    The classes stay the same objects, so that whoever has imported one sees the new options.
    ValueError if one of them has an option of that name already."""
    family = [cls]
    for member in family:  # which grows meanwhile: those made from cls, those made from these, ...
        family += [c for c in member.__subclasses__() if c not in family]
    old = cls.__dataclass_fields__.keys()
    for member in family[1:]:
        taken = sorted(options.keys() & member.__dataclass_fields__.keys() - old)
        if taken:
            raise ValueError(f"there is an option {taken[0]} already; choose another name")
    for name in cls.__annotations__:
        delattr(cls, name)
    cls.__annotations__ = {name: kind for name, (kind, _) in options.items()}
    for name, (_, value) in options.items():
        setattr(cls, name, value)
    for member in family:
        # back to what the decorator was given: it put the bare default in an option's place, ...
        for name in vars(member).get("__annotations__", {}):
            if member is not cls:
                setattr(member, name, member.__dataclass_fields__[name].default)
        for method in ("__repr__", "__eq__"):  # ... and would keep these, of the old fields
            delattr(member, method)
        dataclass(member, kw_only=True)
        rebuild_dataclass(member, force=True)
