"""Which model of a server is meant, and how long its sequences may be.

Owns the reading of ``/v1/models``; it does not know what the model is asked. Invariant: the first model that a server
lists is meant where the user names none.
"""

from typing import Any

from octavo.client.connection import Client
from octavo.client.wire import ConnectionFailed
from octavo.errors import OctavoError


async def pick_model(client: Client, name: str | None) -> tuple[str, int | None]:
    """The name of the model to ask for, and its longest sequence in tokens where the server says it.

    Args:
        name: as the user gave it; None takes the first that the server lists.

    Raises:
        OctavoError: the server cannot be reached, refuses, or lists no model.
    """
    try:
        found: Any = (await client.request("GET", "/v1/models")).json()
        cards = [card for card in found["data"] if isinstance(card["id"], str)]
    except (KeyError, TypeError):
        raise ConnectionFailed("the server's list of models has another form than OpenAI's") from None
    if name is None and not cards:
        raise OctavoError(f"{client.address.url} serves no model.")
    card = cards[0] if name is None else next((card for card in cards if card["id"] == name), None)
    longest = None if card is None else card.get("max_model_len")
    return name if name is not None else str(cards[0]["id"]), longest if type(longest) is int else None
