"""The names under which PEFT knows the tuner."""

from __future__ import annotations

PREFIX = "tnpeft_"  # every parameter of an adapter has it in its name, no module that holds a layer has


class PeftTypeName(str):
    """A PEFT type outside PEFT's own enumeration: text with the ``value`` and ``name`` of an enum member."""

    @property
    def value(self) -> str:
        """The text itself."""
        return str.__str__(self)

    @property
    def name(self) -> str:
        """The text itself."""
        return str.__str__(self)

    def __str__(self) -> str:
        """Show as a member of PEFT's enumeration shows: its reports take what stands after the dot."""
        return f"PeftType.{self.value}"


TENSOR_NETWORK = PeftTypeName("TENSOR_NETWORK")
