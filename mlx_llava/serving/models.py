"""The models of a server, by the names that clients know."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mlx_llava.serving.engine import Engine
from mlx_llava.serving.errors import ApiError
from mlx_llava.serving.model_thread import ModelThread


@dataclass(frozen=True)
class Models:
    """What there is to ask.

    Attributes:
        engines: by the models' own names.
        aliases: by other names, after which may be any ``:tag``, as Ollama has it.
    """

    engines: Mapping[str, Engine]
    aliases: Mapping[str, Engine]

    @property
    def names(self) -> dict[str, Engine]:
        """All that there are, the models' own first."""
        return {**self.engines, **self.aliases}

    @property
    def thread(self) -> ModelThread:
        """In which all of them run."""
        return next(iter(self.engines.values())).thread

    def find(self, name: str) -> Engine:
        """The one that a client means.

        Raises:
            ApiError: It is none.
        """
        untagged = name.partition(":")[0]
        engine = self.names.get(name.removesuffix(":latest")) or self.aliases.get(untagged)
        if engine is None:
            known = ", ".join(map(repr, self.engines))
            message = f"The model {name!r} does not exist; this server has {known}."
            raise ApiError(404, message, "model_not_found", param="model")
        return engine
