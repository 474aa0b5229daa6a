from .context import Handler
HANDLERS: dict[str, Handler] = {}
