"""What a module says of its parameters to whoever builds the optimizer."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ParamHint:
    """Training hint of one parameter.

    weight_decay: False keeps the parameter out of weight decay.
    lr: an absolute learning rate of its own; None takes the optimizer's.
    """

    weight_decay: bool = True
    lr: float | None = None
