"""replace.json, what tools.replace has measured, read back: it may be from anybody."""
from pathlib import Path
from typing import Annotated, Any, Optional

from pydantic import Field

from base.errors import BadInput
from base.files import exists, read_json
from tools.score import Count, Lenient, Measured

REMEDY = "move it away, and python -m tools.replace measures anew"
Positive = Annotated[float, Field(gt=0, le=1e30)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.+-]{1,64}$")]
Layer = Annotated[int, Field(ge=0, lt=10_000)]
Layers = Annotated[list[Layer], Field(max_length=10_000)]
Losses = Annotated[list[Measured], Field(min_length=1, max_length=10_000)]


class Settings(Lenient):
    init_from: str
    dataset: str
    block_size: Count
    windows: Count
    prompts: Count
    decode_tokens: Count
    bytes_per_token: Positive
    n_layer: Annotated[int, Field(ge=1, le=10_000)]


class Keys(Lenient):
    right: Measured
    loss: Measured


class Softmax(Lenient):
    losses: Losses
    keys: Optional[Keys]
    select: Measured


class Kept(Lenient):
    visible: Measured
    kept: Measured
    read: Measured


class Together(Lenient):
    layers: Layers
    losses: Losses
    keys: Optional[Keys]
    kept: Optional[Kept]


class Decoding(Lenient):
    state_bytes: Count
    softmax_state_bytes: Count
    token_ms: Measured
    softmax_token_ms: Measured
    times_as_fast: Measured


class Arm(Lenient):
    options: dict[str, Any]
    alone: Optional[Losses]
    together: dict[Annotated[str, Field(pattern=r"^[0-9]{1,5}$")], Together]
    decoding: Optional[Decoding]


class Tuned(Lenient):
    layers: Layers
    before: Measured  # bits per byte
    after: Measured
    tokens: Count
    rate: Positive


class Content(Lenient):
    settings: Settings
    softmax: Optional[Softmax]
    arms: dict[Name, Arm]
    tuned: dict[Name, Tuned]


def read_record(folder):
    """The content of a folder's replace.json (dict). BadInput if there is none, or it is
    damaged."""
    path = Path(folder) / "replace.json"
    if not exists(path):
        raise BadInput(f"no {path}: python -m tools.replace makes one, or name another --out_dir")
    return read_json(path, REMEDY, Content).model_dump()
