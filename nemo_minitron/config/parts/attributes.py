"""The attributes of answers (SteerLM)."""

from __future__ import annotations

from dataclasses import dataclass, field

from nemo_minitron.config.parts.checks import choice, positive

__all__ = ["ATTRIBUTE_SCHEMAS", "AttributesConfig"]

ATTRIBUTE_SCHEMAS = ("helpsteer", "oasst", "own")


@dataclass
class AttributesConfig:
    """Which attributes the answers have.

    Attributes:
        schema: "helpsteer" (helpfulness, correctness, coherence, complexity, verbosity, each 0 to 4), "oasst"
            (OpenAssistant's, 0 to 9), or "own" for ``names``.
        names: names of the attributes, for schema "own".
        highest: highest value of the attributes of schema "own"; values are whole numbers from 0.
        derive: label answers without values by rules: verbosity from their length, complexity from their
            reading grade, helpfulness and correctness from which answer of a pair was chosen.
    """

    schema: str = "helpsteer"
    names: list[str] = field(default_factory=list)
    highest: int = 4
    derive: bool = False

    def faults(self) -> list[str]:
        """Unknown schema, own attributes without names or names without being own."""
        faults = [*choice(self, "schema", ATTRIBUTE_SCHEMAS), *positive(self, "highest")]
        if self.schema == "own" and not self.names:
            faults.append("names: schema=own needs the names of its attributes")
        if self.schema != "own" and self.names:
            faults.append(f"names: schema={self.schema} has its own; set schema=own or leave them out")
        twice = sorted({name for name in self.names if self.names.count(name) > 1})
        faults += [f"names: {name!r} is given twice" for name in twice]
        faults += [
            f"names: {name!r} must be letters, digits and underscores" for name in self.names if not name.isidentifier()
        ]
        return faults
