"""What a dataclass offers so that `load_config` can fill it from YAML."""

from collections.abc import Mapping
from typing import Any, ClassVar


class ConfigSchema:
    """Mixed into the dataclass at the root of a configuration. Everything here has a harmless default.

    REFUSED: keys that users of older programs know and that mean nothing here, mapped to what to write
        instead. A name is a key path, in which `*` stands for one key; "path=value" refuses one value.
    REPLACED_BY_NAME: key paths of mappings that choose something by their `name`. A layer that names
        another one replaces such a mapping as a whole; every other mapping is merged key by key.
    CLEARABLE: top-level mappings of name -> arguments from which a layer can take away what a weaker one put
        there: `name: false` one entry (`name: null` only means "no arguments"), null all of them.
    """

    REFUSED: ClassVar[Mapping[str, str]] = {}
    REPLACED_BY_NAME: ClassVar[frozenset[str]] = frozenset()
    CLEARABLE: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def unset_values(cls, layers: Mapping[str, Any], stem: str) -> Mapping[str, Any]:
        """Return key path -> value for keys that no layer sets, or sets to null.

        layers: the merged layers as plain values, interpolations unresolved. stem: the file's bare name.
        The values may hold `${...}`; a key in no layer and not named here keeps its dataclass default.
        """
        return {}

    @classmethod
    def check_cleared(cls, section: str, name: str) -> None:
        """Raise UserError("section.name: problem") for a name that `section.name: false` cannot mean."""

    def validate(self) -> None:
        """Raise UserError("key.path: what is wrong") for values that are impossible, alone or together."""
